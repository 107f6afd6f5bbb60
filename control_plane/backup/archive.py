"""The format of a backup: files, and `backup.json` with the size and sha256 of each.

Their content is not read here. The manifest is written last, so a backup that was interrupted has none and is
refused. Files are readable by their owner alone, because private keys are among them. Law: what `read_archive` accepts
is byte for byte what `ArchiveWriter` wrote.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Final, Literal

import msgspec

from models.bundle import sha256
from models.errors import ConflictError, InputError
from models.files import sync_directory, write_atomically

MANIFEST: Final = "backup.json"
_MAX_MANIFEST_BYTES: Final = 256 * 1024 * 1024
_PIECE: Final = 1024 * 1024
_SHOWN: Final = 5
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a backup."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
    """Relative, with `/`; never leads out of the folder."""
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Digest


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`backup.json`, version 1."""

    schema_version: Literal[1] = 1
    made_at: str
    """ISO 8601 with zone, by the clock of the machine that made it; the database is as it was then."""
    database: Literal["sqlite", "postgresql"]
    revision: str
    """Version of the tables."""
    tables: tuple[str, ...] = ()
    """Tables of a PostgreSQL database in the order in which they can be loaded; empty for SQLite."""
    files: tuple[FileEntry, ...]


class ArchiveWriter:
    """Writes a backup.

    Args:
        folder: New or empty.

    Raises:
        ConflictError: `backup.not_empty`.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConflictError(
                "backup.not_empty", f"{folder} is not empty.", expected="a new or empty folder", got=str(folder)
            )
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self._files: list[FileEntry] = []

    def place(self, name: str) -> Path:
        """Returns where a file of this name goes; its folder exists then."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def copy(self, source: Path, name: str) -> FileEntry:
        """Copies a file into the backup."""
        with source.open("rb") as stream:
            return self.write(stream, name)

    def write(self, stream: BinaryIO, name: str) -> FileEntry:
        """Copies a stream into the backup."""
        entry = write_stream(stream, self.place(name), name)
        self._files.append(entry)
        return entry

    def add(self, name: str) -> FileEntry:
        """Lists a file that something else has written at its `place`."""
        path = self.place(name)
        path.chmod(0o600)
        entry = _entry_of(path, name)
        self._files.append(entry)
        return entry

    def leave_out(self, entry: FileEntry) -> None:
        """Takes a file out of the backup again."""
        self._files.remove(entry)
        (self.folder / entry.path).unlink()

    def finish(
        self, *, made_at: str, database: Literal["sqlite", "postgresql"], revision: str, tables: tuple[str, ...]
    ) -> tuple[BackupManifest, str]:
        """Writes the manifest, with which the backup is complete; returns it and its digest."""
        manifest = BackupManifest(
            made_at=made_at,
            database=database,
            revision=revision,
            tables=tables,
            files=tuple(sorted(self._files, key=lambda entry: entry.path)),
        )
        for folder in {(self.folder / entry.path).parent for entry in manifest.files}:
            sync_directory(folder)
        data = msgspec.json.format(msgspec.json.encode(manifest))
        write_atomically(self.folder / MANIFEST, data, mode=0o600)
        return manifest, sha256(data)


def write_stream(stream: BinaryIO, path: Path, name: str) -> FileEntry:
    """Writes a stream to a new file, durably, readable by its owner alone; returns what was written."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as target:
        for piece in _pieces(stream):
            digest.update(piece)
            size += len(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return FileEntry(path=name, size_bytes=size, sha256=digest.hexdigest())


def _entry_of(path: Path, name: str) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        for piece in _pieces(stream):
            digest.update(piece)
            size += len(piece)
        os.fsync(stream.fileno())
    return FileEntry(path=name, size_bytes=size, sha256=digest.hexdigest())


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def read_archive(folder: Path) -> tuple[BackupManifest, str]:
    """Reads and verifies a whole backup: every file by its digest, none missing, none beside.

    Returns:
        The manifest and its digest.

    Raises:
        InputError: `backup.absent`: there is no complete backup; `backup.unreadable`: the manifest is not one of this
            version; `backup.damaged`: files differ from the manifest.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise InputError("backup.unreadable", f"{path} is too large.", expected=f"<= {_MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            "backup.absent",
            f"{folder} holds no complete backup.",
            expected=f"{MANIFEST}, which is written last",
            got=error.strerror,
        ) from error
    try:
        manifest = msgspec.json.decode(data, type=BackupManifest)
    except msgspec.DecodeError as error:
        raise InputError(
            "backup.unreadable", f"{path} cannot be read.", expected="schema_version 1", got=str(error)[:200]
        ) from error
    _check_names(manifest)
    _check_files(folder, manifest)
    return manifest, sha256(data)


def _check_names(manifest: BackupManifest) -> None:
    names = [entry.path for entry in manifest.files]
    bad = [n for n in names if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts or "\\" in n]
    if bad or len(set(names)) != len(names):
        raise InputError("backup.unreadable", "The manifest names files twice or outside the backup.", got=bad[:_SHOWN])


def _check_files(folder: Path, manifest: BackupManifest) -> None:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    wanted = {entry.path: entry for entry in manifest.files}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found)]
    problems += [f"not listed {name}" for name in sorted(found - wanted.keys())]
    problems += [
        f"changed {name}"
        for name in sorted(wanted.keys() & found)
        if (folder / name).is_symlink() or _entry_of(folder / name, name) != wanted[name]
    ]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            "backup.damaged",
            "Files of the backup differ from its manifest; nothing was restored.",
            expected="every file as it was written",
            got=", ".join(problems[:_SHOWN]) + more,
        )
