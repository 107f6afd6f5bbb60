"""Commands that run something until it is told to stop: control plane, worker, demo, broker."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.cli.output import Config, err
from control_plane.config import load_control_plane_config

broker = typer.Typer(no_args_is_help=True, help="The embedded MQTT broker and its identities.")


def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 chooses a free one.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Database, store, jobs.")] = None,
) -> None:
    """Run the control plane: API, pages, rollouts, worker processes."""
    from control_plane.server import serve as run  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    overrides: dict[str, Any] = {"server": server} if server else {}
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    raise typer.Exit(run(load_control_plane_config(config, overrides)))


def worker(config: Config = None) -> None:
    """Run one worker process for training jobs, here or on another machine with the same database and data."""
    from control_plane.server import work  # noqa: PLC0415

    work(load_control_plane_config(config))


def demo(
    seconds: Annotated[float, typer.Option(help="End by itself after so long with sorting; 0 = until Ctrl-C.")] = 0.0,
    report: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    port: Annotated[int, typer.Option(help="Of the pages; 0 chooses a free one.")] = 8080,
    agents: Annotated[int, typer.Option(help="Edge agents.")] = 3,
    lanes: Annotated[int, typer.Option(help="Lanes of each line.")] = 2,
    items_per_s: Annotated[float, typer.Option(help="Items per second and lane.")] = 9.0,
    items: Annotated[int, typer.Option(help="Items collected for training.")] = 600,
    data_dir: Annotated[Path | None, typer.Option(help="Keep everything here instead of a temporary folder.")] = None,
) -> None:
    """The whole loop on this machine: train, push, sort, watch."""
    from control_plane.demo.run import DemoOptions, run_demo  # noqa: PLC0415

    options = DemoOptions(
        seconds=seconds,
        report=report,
        port=port,
        agents=agents,
        lanes=lanes,
        items_per_s=items_per_s,
        items=items,
        data_dir=data_dir,
    )
    raise typer.Exit(run_demo(options))


@broker.command("run")
def broker_run(
    credentials: Annotated[
        Path | None, typer.Option(help="Passwords instead of certificates (`sortline broker add`); this machine only.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: 8883, with passwords 1883.")] = None,
    config: Config = None,
    data_dir: Annotated[str | None, typer.Option(help="Of the control plane, as for `sortline serve`.")] = None,
) -> None:
    """Run the embedded broker (MQTT 3.1.1) under the site's certificates (`sortline ca init`).

    For a fleet of many boxes use mosquitto (`sortline broker mosquitto-profile`), EMQX or HiveMQ.
    """
    from control_plane.broker.__main__ import main as run  # noqa: PLC0415

    if credentials is not None:
        access, usual = ["--credentials", str(credentials)], 1883
    else:
        found = load_control_plane_config(config, {"data_dir": data_dir} if data_dir else {})
        access, usual = ["--site", str(found.identity_folder / "site")], 8883
    raise typer.Exit(run(["--host", host, "--port", str(usual if port is None else port), *access]))


@broker.command("add")
def broker_add(
    identity: Annotated[str, typer.Argument(help="Agent id, or `control-plane`.")],
    credentials: Annotated[Path, typer.Option(help="File with identities; made when it is not there.")],
    password_file: Annotated[Path, typer.Option(help="Gets the new password; give it to that agent alone.")],
) -> None:
    """Add or renew an identity; its password is random and written once."""
    from control_plane.broker.access import Role, add_identity  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415
    from models.topics import check_agent_id  # noqa: PLC0415

    role = Role.CONTROL_PLANE if identity == "control-plane" else Role.AGENT
    password = add_identity(credentials, check_agent_id(identity), role)
    write_atomically(password_file, password.encode(), mode=0o600)
    err.print(f"{identity} may connect as {role}; its password is in {password_file}")


@broker.command("remove")
def broker_remove(identity: str, credentials: Annotated[Path, typer.Option()]) -> None:
    """Remove an identity; a running broker drops its connections within a second."""
    from control_plane.broker.access import remove_identity  # noqa: PLC0415

    remove_identity(credentials, identity)
