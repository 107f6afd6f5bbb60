"""Commands that copy a control plane and bring the copy back."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.cli.output import Actor, AsJson, Config, DataDir, acting, note, say, warn
from control_plane.config import load_in
from models.text import counted

Target = Annotated[Path, typer.Argument(help="New or empty folder that the backup is written to.")]
Source = Annotated[Path, typer.Argument(help="Folder of a backup.")]


def backup(target: Target, config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Copy database, bundles, keys, metadata, the certificate authority and the configuration file; the server may run.

    The backup holds private keys: keep it as safe as the machine itself.

    Example: `sortline backup /mnt/backups/2027-03-01 --config /etc/sortline/control-plane.toml`
    """
    from control_plane.backup.save import save  # noqa: PLC0415

    found = save(load_in(config, data_dir), target, config, datetime.now(UTC))
    if as_json:
        say(asdict(found) | {"folder": str(found.folder)}, as_json=True)
    else:
        note(f"{counted(found.files, 'file')}, {found.size_bytes / 1e6:.1f} MB of {found.made_at} in {found.folder}")
        note(f"sha256 of its manifest: {found.digest}")
    if found.elsewhere:
        note(f"not in the backup, make them again on the new machine: {', '.join(found.elsewhere)}")
    for digest in found.damaged:
        warn("damaged", f"the disk has changed the stored blob {digest}; it is not in the backup")
    if found.damaged:
        raise typer.Exit(1)


def restore(
    source: Source, actor: Actor = "", config: Config = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Verify a backup and bring it into the empty place that the configuration names; then `sortline serve` goes on.

    What agents run stays as it is. Rollouts that were under way are paused. Versions and generations continue above all
    that was given out, so that agents follow.

    Example: `sortline restore /mnt/backups/2027-03-01 --config /etc/sortline/control-plane.toml`
    """
    from control_plane.backup.restore import restore as bring_back  # noqa: PLC0415

    found = bring_back(load_in(config, data_dir), source, actor=acting(actor), now=datetime.now(UTC))
    if as_json:
        say(asdict(found), as_json=True)
    else:
        _say_what_is_left(found)


def _say_what_is_left(found: Any) -> None:
    """Prints what the restore did, and what only people can do."""
    done = found.succession
    note(f"{counted(found.files, 'file')} are as they were at {found.made_at}; start the control plane")
    for word, ids in (("paused", done.paused), ("ended, agents stay where they are", done.ended)):
        for rollout_id in ids:
            note(f"rollout {rollout_id}: {word}; look at it before you go on")
    note("what happened later is not known here; repeat it:")
    note(f"  signed since (here: root {done.root_version}, targets {done.targets_version}): `sortline keys push`")
    note("  revoked since: `sortline agents revoke`, at once, because those boxes are admitted again")
    note("  enrolled since: `sortline agents enrol`; pushed since: `sortline models push`")
