"""Makes a backup of a control plane, also while it runs.

Order: the database first, as it is at one moment, then the files it names. Bundles are only ever added, and a ceremony
writes new keys before the metadata that names them, so everything the copied database refers to is in the backup.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import make_url

from control_plane.backup.archive import ArchiveWriter
from control_plane.backup.database_copy import copy_postgresql, copy_sqlite
from control_plane.config import ControlPlaneConfig

STORE: Final = "store"
TRUST: Final = "trust"
IDENTITY: Final = "identity"
CONFIG: Final = "config.toml"
LOCK: Final = "lock"
"""The authority's lock file; it holds nothing."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a backup holds."""

    folder: Path
    digest: str
    """Sha256 of the manifest; kept elsewhere, it proves that a backup was not exchanged."""
    made_at: str
    files: int
    size_bytes: int
    damaged: tuple[str, ...]
    """Stored blobs that the disk has changed; they are not in the backup."""
    elsewhere: tuple[str, ...]
    """Files that the configuration names and that are not in the backup: tokens and passwords."""


def folders(config: ControlPlaneConfig) -> dict[str, Path]:
    """Returns the folders of a control plane by their name in a backup."""
    return {STORE: config.root / "store", TRUST: config.trust_folder, IDENTITY: config.identity_folder}


def save(config: ControlPlaneConfig, target: Path, config_file: Path | None, now: datetime) -> Saved:
    """Makes a backup.

    Args:
        config: The control plane.
        target: New or empty folder.
        config_file: Its configuration file; None = there is none.
        now: Aware UTC.

    Raises:
        ConflictError: `backup.not_empty`, `backup.no_database`.
        InputError: `backup.damaged_database`.
    """
    writer = ArchiveWriter(target)
    url, tables = config.database_url, tuple[str, ...]()
    sqlite = make_url(url).get_backend_name() == "sqlite"
    if sqlite:
        revision = copy_sqlite(url, writer)
    else:
        revision, tables = copy_postgresql(url, writer)
    damaged = []
    for name, folder in folders(config).items():
        for path in _files(folder):
            entry = writer.copy(path, f"{name}/{path.relative_to(folder).as_posix()}")
            if name == STORE and entry.sha256 != path.name:
                writer.leave_out(entry)
                damaged.append(path.name)
    if config_file is not None:
        writer.copy(config_file, CONFIG)
    manifest, digest = writer.finish(
        made_at=now.isoformat(timespec="seconds"),
        database="sqlite" if sqlite else "postgresql",
        revision=revision,
        tables=tables,
    )
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    elsewhere = tuple(_named_files(msgspec.to_builtins(config)))
    return Saved(target, digest, manifest.made_at, len(manifest.files), size_bytes, tuple(damaged), elsewhere)


def _named_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the files that settings name: every `..._file` that is set, in every section."""
    for key, value in settings.items():
        for section in value if isinstance(value, list | tuple) else (value,):
            if isinstance(section, Mapping):
                yield from _named_files(section)
        if key.endswith("_file") and isinstance(value, str) and value:
            yield value


def _files(folder: Path) -> list[Path]:
    """Every whole file of a folder; what begins with a dot is still being written."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [Path(parent) / name for name in names if not name.startswith(".") and name != LOCK]
    return sorted(found)
