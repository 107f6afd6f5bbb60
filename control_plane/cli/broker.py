"""Commands of the broker: run the embedded one, keep its passwords, write mosquitto's configuration."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.cli.output import Config, DataDir, note
from control_plane.config import load_in

broker = typer.Typer(no_args_is_help=True, help="The embedded MQTT broker, its identities, and mosquitto's profile.")
Credentials = Annotated[
    Path, typer.Option(help="File that holds identities and the digests of their passwords; made when it is missing.")
]


@broker.command("run")
def broker_run(
    credentials: Annotated[
        Path | None,
        typer.Option(
            help="Accept the passwords of this file (`sortline broker add`), on this machine only. Without it, the "
            "site's certificates (`sortline ca init`)."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to listen on. Without it, 8883 with certificates and 1883 with passwords.")
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Run the embedded broker (MQTT 3.1.1) until it is stopped.

    For a fleet of many boxes use mosquitto (`sortline broker mosquitto-profile`), EMQX or HiveMQ.
    """
    from control_plane.broker.__main__ import main as run  # noqa: PLC0415

    if credentials is not None:
        access, usual = ["--credentials", str(credentials)], 1883
    else:
        found = load_in(config, data_dir)
        access, usual = ["--site", str(found.identity_folder / "site")], 8883
    raise typer.Exit(run(["--host", host, "--port", str(usual if port is None else port), *access]))


@broker.command("add")
def broker_add(
    identity: Annotated[str, typer.Argument(help="Agent id, or `control-plane`.")],
    credentials: Credentials,
    password_file: Annotated[Path, typer.Option(help="File for the new password; hand it to that agent alone.")],
) -> None:
    """Add an identity or renew its password, which is random and written once.

    Example: `sortline broker add line-1 --credentials broker.json --password-file line-1.password`
    """
    from control_plane.broker.access import Role, add_identity  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415
    from models.topics import check_agent_id  # noqa: PLC0415

    role = Role.CONTROL_PLANE if identity == "control-plane" else Role.AGENT
    password = add_identity(credentials, check_agent_id(identity), role)
    write_atomically(password_file, password.encode(), mode=0o600)
    note(f"{identity} may connect as {role}; its password is in {password_file}")


@broker.command("remove")
def broker_remove(identity: Annotated[str, typer.Argument(help="Agent id.")], credentials: Credentials) -> None:
    """Remove an identity; a running broker drops its connections within a second."""
    from control_plane.broker.access import remove_identity  # noqa: PLC0415

    remove_identity(credentials, identity)
    note(f"{identity} may no longer connect")


@broker.command("mosquitto-profile")
def mosquitto_profile(
    to: Annotated[Path, typer.Option("--to", help="Folder for mosquitto.conf, access list and certificates.")],
    port: Annotated[
        int | None,
        typer.Option(help="Port for mutual TLS. Without it, `broker.port` of the settings where that is set, or 8883."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Without it, all addresses of the machine.", show_default=False)
    ] = "",
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Write configuration, access list and certificates for mosquitto. Running it again renews them.

    Start mosquitto with `mosquitto -c DIR/mosquitto.conf`. With `identity.mosquitto_profile = "DIR"` the server
    rewrites access list and revocations after every change and makes mosquitto read them.
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.mosquitto import write_profile  # noqa: PLC0415

    found = load_in(config, data_dir)
    chosen = found.broker.tls_port if port is None else port
    write_profile(Authority(found.identity_folder), to, host=host, port=chosen)
    note(f"listens on port {chosen}; start it with: mosquitto -c {to / 'mosquitto.conf'}")
