"""Brings a backup into an empty place, from which the control plane goes on.

Rules: the whole backup is verified before anything is written; nothing that is there is overwritten; until everything
is in place a marker keeps the control plane from starting, and the same command begins again after a power cut.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from control_plane.backup.after_restore import Succession, succeed
from control_plane.backup.archive import BackupManifest, read_archive, write_stream
from control_plane.backup.database_copy import SQLITE_FILE, check_empty_postgresql, load_postgresql, sqlite_path
from control_plane.backup.save import folders
from control_plane.config import ControlPlaneConfig
from control_plane.database.engine import open_database, writing
from control_plane.database.migrate import known_revisions, migrate
from control_plane.trust.ceremony import TrustFolder
from control_plane.trust.online_signer import OnlineSigner
from models.errors import ConfigError, ConflictError, InputError
from models.files import sync_directory, write_atomically

MARKER: Final = "restore-unfinished"
_OF_THE_DISK: Final = "lost+found"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore brought back."""

    made_at: str
    """When the backup was made: what happened later is lost."""
    files: int
    succession: Succession


def restore(config: ControlPlaneConfig, source: Path, *, actor: str, now: datetime) -> Restored:
    """Restores a backup into the folders and the database that the configuration names.

    Args:
        config: Of the new control plane.
        source: The backup.
        actor: Who restores, for the audit trail.
        now: Aware UTC.

    Raises:
        InputError: See `archive.read_archive`; `backup.newer`.
        ConflictError: `backup.not_empty`, `backup.other_database`.
    """
    manifest, digest = read_archive(source)
    _check_fits(config, manifest)
    places = folders(config)
    marker = config.root / MARKER
    if marker.exists() and marker.read_text(encoding="utf-8") == digest:
        _clear(config, places.values())
    _check_empty(config, places.values())
    if manifest.database == "postgresql":
        check_empty_postgresql(config.database_url, manifest.revision)
    config.root.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, digest.encode())
    for entry in manifest.files:
        name, _, rest = entry.path.partition("/")
        if rest and name in places:
            _copy(source / entry.path, places[name] / rest, entry.path)
    if manifest.database == "sqlite":
        _copy(source / SQLITE_FILE, sqlite_path(config.database_url), SQLITE_FILE)
    else:
        load_postgresql(config.database_url, source, manifest.tables, manifest.revision)
    migrate(config.database_url)
    succession = _succeed(config, digest, manifest.made_at, actor, now)
    marker.unlink()
    sync_directory(config.root)
    return Restored(manifest.made_at, len(manifest.files), succession)


def check_finished(root: Path) -> None:
    """Refuses to work on what a restore left unfinished.

    Raises:
        ConfigError: `backup.unfinished`.
    """
    if (root / MARKER).exists():
        raise ConfigError(
            "backup.unfinished",
            f"A restore into {root} has not finished; give the same `sortline restore` command again.",
            expected="a finished restore",
            got=str(root / MARKER),
        )


def _check_fits(config: ControlPlaneConfig, manifest: BackupManifest) -> None:
    found = make_url(config.database_url).get_backend_name()
    if found != manifest.database:
        raise ConflictError(
            "backup.other_database",
            "The backup is of another kind of database than the configuration names.",
            expected=manifest.database,
            got=found,
        )
    if manifest.revision not in known_revisions():
        raise InputError(
            "backup.newer",
            "The backup was made by a newer version of this program; restore it with that one.",
            expected="a known version of the tables",
            got=manifest.revision,
        )


def _check_empty(config: ControlPlaneConfig, places: Iterable[Path]) -> None:
    for folder in (config.root, *places):
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if there := [name for name in there if name not in {MARKER, _OF_THE_DISK}]:
            raise _not_empty(folder, there)
    if make_url(config.database_url).get_backend_name() == "sqlite" and sqlite_path(config.database_url).exists():
        raise _not_empty(sqlite_path(config.database_url), [])


def _not_empty(place: Path, there: list[str]) -> ConflictError:
    return ConflictError(
        "backup.not_empty",
        f"{place} is not empty; restore into a new place.",
        expected="a new or empty folder",
        got=", ".join(there[:5]) or "a file",
    )


def _clear(config: ControlPlaneConfig, places: Iterable[Path]) -> None:
    """Removes what an interrupted restore of the same backup has written; the place was empty before it."""
    for folder in places:
        shutil.rmtree(folder, ignore_errors=True)
    if make_url(config.database_url).get_backend_name() == "sqlite":
        path = sqlite_path(config.database_url)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)


def _copy(source: Path, target: Path, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with source.open("rb") as stream:
        write_stream(stream, target, name)


def _succeed(config: ControlPlaneConfig, digest: str, made_at: str, actor: str, now: datetime) -> Succession:
    engine = open_database(config.database_url)
    try:
        with writing(engine) as session:
            signer = OnlineSigner(TrustFolder(config.trust_folder))
            found = succeed(session, signer, backup=digest, made_at=made_at, actor=actor, now=now)
            session.commit()
    finally:
        engine.dispose()
    return found
