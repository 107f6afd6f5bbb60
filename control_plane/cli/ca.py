"""Commands of the site's certificate authority."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import AsJson, Config, DataDir, note, say, table_of, warn
from control_plane.config import load_in

RootKey = Annotated[
    Path | None,
    typer.Option(
        "--root-key",
        help="File of the root's private key; keep it off this machine. Without it, a file in the identity folder.",
        show_default=False,
    ),
]
authority = typer.Typer(no_args_is_help=True, help="The site's certificate authority.")


@authority.command("init")
def ca_init(
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="DNS name or address under which agents reach broker and control plane; once for each. `localhost` "
            "and 127.0.0.1 are always included.",
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="Name of the site as it stands in the certificates.")] = "Sortline",
    root_key: RootKey = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make the authority: a root for ten years, an issuing authority for two, certificates of the site's servers.

    Example: `sortline ca init --name broker.plant.example --name 10.0.0.5 --root-key /media/safe/root.key`
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    names = ["localhost", "127.0.0.1", *(name or [])]
    made = Authority.create(
        load_in(config, data_dir).identity_folder, site=site, names=names, now=now, root_key=root_key
    )
    refresh_site(made, now)
    _show(made.status(now), as_json=as_json)


@authority.command("rotate")
def ca_rotate(
    issuing_only: Annotated[
        bool,
        typer.Option("--issuing-only", help="Keep the root and replace the issuing authority: agents need nothing."),
    ] = False,
    root_key: RootKey = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Replace the root and the issuing authority. Both roots are trusted until `sortline ca retire`.

    A running server follows within a minute; agents renew at their next look. mosquitto must be restarted once, because
    it reads its trust only when it starts.
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    held = Authority(load_in(config, data_dir).identity_folder)
    new = held.rotate(now, root_key=root_key, keep_root=issuing_only)
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("replica")
def ca_replica(
    name: Annotated[str, typer.Argument(help="Name of the replica.")],
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make certificates for another replica of the control plane; it runs with `broker.replica = "NAME"`."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    new = Authority(load_in(config, data_dir).identity_folder).add_replica(name)
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("retire")
def ca_retire(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End the trust in replaced authorities: an agent that has not renewed since must be enrolled again."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    new = Authority(load_in(config, data_dir).identity_folder).retire()
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("status")
def ca_status(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Print the ages of the authorities, where their keys lie, and what to do next."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415

    found = Authority(load_in(config, data_dir).identity_folder)
    _show(found.status(datetime.now(UTC)), as_json=as_json)


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    def table(found: dict[str, Any]) -> Table:
        rows = [
            [g["number"], g["state"], g["root_until"][:10], g["issuing_until"][:10], g["root_sha256"][:16]]
            for g in found["generations"]
        ]
        return table_of(["generation", "state", "root until", "issuing until", "root sha256"], rows)

    say(status, as_json=as_json, table=table)
    if as_json:
        return
    note(f"servers: {', '.join(status['names'])}; folder {status['folder']}")
    if any(g["root_key_here"] for g in status["generations"] if g["state"] != "retired"):
        warn("the root's key lies on this machine", "move root-*.key to a safe and bring it when you rotate")
    if status["rotate_due"]:
        warn("rotate now", "the issuing authority ends within three months")
