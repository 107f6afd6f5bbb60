"""Commands of the site's certificate authority."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.keys import PassphraseFile, passphrase_from
from control_plane.cli.output import AsJson, Config, DataDir, note, say, table_of, warn
from control_plane.config import ControlPlaneConfig, load_in
from models.errors import ConflictError
from models.text import counted

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
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Write the root's key in clear, also with --root-key.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make the authority: a root for ten years, an issuing authority for two, certificates of the site's servers.

    With --root-key the root's key gets a passphrase of 12 characters or more; in the identity folder it lies in clear.

    Example: `sortline ca init --name broker.plant.example --name 10.0.0.5 --root-key /media/safe/root.key`
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    names = ["localhost", "127.0.0.1", *(name or [])]
    wanted = (root_key is not None or passphrase_file is not None) and not no_passphrase
    ask = passphrase_from(passphrase_file, confirm=True)
    made = Authority.create(
        load_in(config, data_dir).identity_folder,
        site=site,
        names=names,
        now=now,
        root_key=root_key,
        passphrase=ask(root_key or Path("the root's key")) if wanted else "",
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
    passphrase_file: PassphraseFile = None,
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
    new = held.rotate(now, root_key=root_key, keep_root=issuing_only, passphrase=passphrase_from(passphrase_file))
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)
    if not issuing_only:
        note(f"the key of the new root is in {held.root_key_path(root_key, following=True)}; put it into the safe")


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
def ca_retire(
    yes: Annotated[bool, typer.Option("--yes", help="Retire also where agents are cut off.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """End the trust in replaced authorities: an agent that has not renewed since must be enrolled again.

    The command names these agents, and without --yes it is refused while there are any.
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now, found = datetime.now(UTC), load_in(config, data_dir)
    held = Authority(found.identity_folder)
    lost = _cut_off(found, held)
    for agent_id, facts in lost.items():
        warn(agent_id, facts)
    if lost and not yes:
        raise ConflictError(
            "ca.would_cut_off",
            f"{counted(len(lost), 'agent')} would be cut off and must be enrolled again; wait until they have renewed, "
            "or retire with --yes.",
            expected="every enrolled agent with a certificate of the current authority",
            got=", ".join(sorted(lost)[:5]) + (f", and {len(lost) - 5} more" if len(lost) > 5 else ""),
        )
    new = held.retire()
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


def _cut_off(config: ControlPlaneConfig, held: Any) -> dict[str, str]:
    """Returns the agents that a retirement cuts off, with what is known of each; a site without database has none."""
    from control_plane.database.engine import open_database  # noqa: PLC0415
    from control_plane.database.migrate import migration_state  # noqa: PLC0415
    from control_plane.identity.retirement import left_behind  # noqa: PLC0415

    engine = open_database(config.database_url)
    try:
        if migration_state(engine)[0] is None:
            return {}
        return {
            one.agent_id: f"has not renewed; its certificate ends {one.until:%Y-%m-%d}, "
            f"last seen {f'{one.seen_at:%Y-%m-%d %H:%M} UTC' if one.seen_at else 'never'}"
            if one.until
            else "has no certificate"
            for one in left_behind(engine, held)
        }
    finally:
        engine.dispose()


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
    here = [g for g in status["generations"] if g["root_key_here"] and g["state"] != "retired"]
    if here:
        how = "in clear" if any(not g["root_key_encrypted"] for g in here) else "encrypted"
        lead = f"the root's key lies on this machine, {how}"
        warn(lead, "move root-*.key to a safe and bring it when you rotate")
    if status["rotate_due"]:
        warn("rotate now", "the issuing authority ends within three months")
