"""Fetches a bundle by content, chunk by chunk, from wherever chunks come; knows no socket.

The caller subscribes to `wanted()` and hands in what arrives. Every chunk is checked against the digest in the
verified manifest before a byte is written; whatever is found on disk after a crash is hashed again, there is no
journal. A bundle appears in the slots by one rename, whole or not at all. Files that another slot already has are
linked, not fetched: a new head on an old extractor moves only the head.

Rules: a wrong chunk is never written, is asked for again after a pause that doubles, and is reported; space is
claimed before the first byte, so a full disk refuses at the start; nothing outside `fetch/` and `slots/` is touched.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from models.bundle import (
    CHUNK_BYTES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    parse_manifest,
    sha256,
)
from models.errors import BundleError, CapacityError
from models.files import sync_directory, write_atomically
from models.messages import blob_topic

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0


class Fetch:
    """One bundle on its way into a slot.

    Args:
        root: The agent's state directory.
        digest: Of the bundle.
        window: Most chunks wanted at a time.
        reserve_bytes: Disk space that must stay free.
        clock: Monotonic seconds.

    Raises:
        CapacityError: `delivery.disk_full`: nothing was changed; try again when there is room.
    """

    def __init__(self, root: Path, digest: str, *, window: int, reserve_bytes: int, clock: Callable[[], float]) -> None:
        self.digest = digest
        self._root, self._window, self._reserve, self._clock = root, window, reserve_bytes, clock
        self._parts = root / "fetch"
        self._slots = root / "slots"
        self._parts.mkdir(parents=True, exist_ok=True)
        self._slots.mkdir(parents=True, exist_ok=True)
        self._manifest: Manifest | None = None
        self._missing: dict[tuple[str, int], FileEntry] = {}
        self._left: Counter[str] = Counter()
        self._pauses: dict[tuple[str, int], tuple[float, float]] = {}
        self.counters: Counter[str] = Counter()
        self.fault: BundleError | None = None
        """The last chunk that was refused."""
        self.done = (self._slots / digest).is_dir()
        self.last_progress_s = clock()
        if not self.done:
            self._resume_manifest()

    # -- what is wanted ---------------------------------------------------------------------------------------

    def wanted(self) -> list[str]:
        """Topics to be subscribed now: at most `window`."""
        if self.done:
            return []
        now = self._clock()
        keys = [(self.digest, 0)] if self._manifest is None else list(self._missing)
        ready = [key for key in keys if self._pauses.get(key, (0.0, 0.0))[0] <= now]
        return [blob_topic(*key) for key in ready[: self._window]]

    @property
    def progress(self) -> float:
        """0..1, by chunks."""
        if self.done:
            return 1.0
        if self._manifest is None:
            return 0.0
        total = sum(len(entry.chunks) for entry in self._manifest.files)
        return 1.0 - len(self._missing) / max(total, 1)

    # -- what arrives -----------------------------------------------------------------------------------------

    def receive(self, topic: str, payload: bytes) -> bool:
        """Takes a chunk; returns whether it was one that is missing.

        Raises:
            CapacityError: `delivery.disk_full`.
        """
        key = _key(topic)
        if self.done or key is None:
            self.counters["unwanted"] += 1
            return False
        if self._manifest is None:
            return key == (self.digest, 0) and self._take_manifest(payload)
        entry = self._missing.get(key)
        if entry is None:
            self.counters["unwanted"] += 1
            return False
        if sha256(payload) != entry.chunks[key[1]]:
            self._refuse(key, f"chunk {key[1]} of {entry.path}", entry.chunks[key[1]], sha256(payload))
            return False
        self._write(entry, key, payload)
        return True

    def _refuse(self, key: tuple[str, int], what: str, expected: str, got: str) -> None:
        """Counts a wrong chunk and doubles the pause before it is asked for again."""
        pause_s = min(self._pauses.get(key, (0.0, _FIRST_PAUSE_S / 2))[1] * 2.0, _LONGEST_PAUSE_S)
        self._pauses[key] = (self._clock() + pause_s, pause_s)
        self.counters["poisoned"] += 1
        self.fault = BundleError(
            "delivery.poisoned_chunk", f"The broker holds wrong bytes for {what}.", expected=expected, got=got
        )

    def _take_manifest(self, payload: bytes) -> bool:
        try:
            manifest = parse_manifest(payload, digest=self.digest)
        except BundleError as error:
            self._refuse((self.digest, 0), "the manifest", self.digest, str(error))
            if error.code != "bundle.wrong_digest":
                raise  # the right bytes, but no bundle we could ever use
            return False
        write_atomically(self._parts / f"{self.digest}.manifest", payload)
        self._use_manifest(manifest)
        return True

    def _resume_manifest(self) -> None:
        path = self._parts / f"{self.digest}.manifest"
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_MANIFEST_BYTES else b""
            self._use_manifest(parse_manifest(data, digest=self.digest))
        except (OSError, BundleError):
            path.unlink(missing_ok=True)

    def _use_manifest(self, manifest: Manifest) -> None:
        self._check_space(manifest)
        for entry in manifest.files:
            self._prepare(entry)
        self._manifest = manifest
        self._progressed()
        if not self._missing:
            self._finish()

    def _check_space(self, manifest: Manifest) -> None:
        free = shutil.disk_usage(self._root).free
        needed = manifest.size_bytes + self._reserve
        if free < needed:
            raise _full(f"{needed} bytes free", f"{free} bytes")

    def _prepare(self, entry: FileEntry) -> None:
        """Takes a file from another slot, or claims its space and finds out which chunks are there already."""
        whole = self._parts / entry.sha256
        if _hash_of(whole) == entry.sha256 or self._link_from_slots(entry, whole):
            self.counters["reused_bytes"] += entry.size_bytes
            return
        whole.unlink(missing_ok=True)
        part = self._parts / f"{entry.sha256}.part"
        try:
            with part.open("r+b" if part.exists() else "w+b") as stream:
                if entry.size_bytes:
                    os.posix_fallocate(stream.fileno(), 0, entry.size_bytes)
                stream.truncate(entry.size_bytes)
                for number, expected in enumerate(entry.chunks):
                    if sha256(stream.read(CHUNK_BYTES)) != expected:
                        self._missing[entry.sha256, number] = entry
                        self._left[entry.sha256] += 1
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _full(f"{entry.size_bytes} bytes for {entry.path}", error.strerror) from error
        if not self._left[entry.sha256]:
            self._complete(entry)

    def _link_from_slots(self, entry: FileEntry, whole: Path) -> bool:
        for slot in sorted(self._slots.iterdir()):
            candidate = slot / entry.path
            if candidate.is_file() and candidate.stat().st_size == entry.size_bytes:
                if _hash_of(candidate) != entry.sha256:
                    continue
                whole.unlink(missing_ok=True)
                os.link(candidate, whole)
                return True
        return False

    def _write(self, entry: FileEntry, key: tuple[str, int], payload: bytes) -> None:
        try:
            descriptor = os.open(self._parts / f"{entry.sha256}.part", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, payload, key[1] * CHUNK_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _full(f"chunk {key[1]} of {entry.path}", error.strerror) from error
        self.counters["chunks"] += 1
        self.counters["bytes"] += len(payload)
        del self._missing[key]
        self._pauses.pop(key, None)
        self._left[entry.sha256] -= 1
        self._progressed()
        if not self._left[entry.sha256]:
            self._complete(entry)
        if not self._missing:
            self._finish()

    def _progressed(self) -> None:
        self.last_progress_s = self._clock()

    def _complete(self, entry: FileEntry) -> None:
        """Makes a file durable; its whole hash is checked once more from disk."""
        part = self._parts / f"{entry.sha256}.part"
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if _hash_of(part) != entry.sha256:
            part.unlink()
            raise BundleError(
                "delivery.disk_corrupts",
                f"{entry.path} reads back otherwise than it was written; check the disk.",
                expected=entry.sha256,
                got="another digest",
            )
        part.rename(self._parts / entry.sha256)
        sync_directory(self._parts)

    def _finish(self) -> None:
        """All files are there: the slot appears by one rename."""
        manifest = self._manifest
        if manifest is None:
            return
        building = self._slots / f".{self.digest}.partial"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for entry in manifest.files:
            os.link(self._parts / entry.sha256, building / entry.path)
        write_atomically(building / MANIFEST, manifest.encoded())
        building.rename(self._slots / self.digest)
        sync_directory(self._slots)
        self.done = True
        for entry in manifest.files:
            (self._parts / entry.sha256).unlink(missing_ok=True)
        (self._parts / f"{self.digest}.manifest").unlink(missing_ok=True)


def collect_garbage(root: Path, keep: set[str]) -> list[str]:
    """Removes slots nobody needs and half-fetched files; returns the digests that were removed.

    Args:
        root: The agent's state directory.
        keep: Digests of active, previous and target bundle.
    """
    removed: list[str] = []
    slots = root / "slots"
    for slot in sorted(slots.iterdir()) if slots.is_dir() else []:
        if slot.name not in keep:
            shutil.rmtree(slot, ignore_errors=True)
            removed.append(slot.name)
    return removed


def discard_parts(root: Path) -> None:
    """Forgets a fetch that will not be continued."""
    shutil.rmtree(root / "fetch", ignore_errors=True)


def _key(topic: str) -> tuple[str, int] | None:
    head, _, number = topic.rpartition("/")
    digest = head.rpartition("/")[2]
    return (digest, int(number)) if number.isascii() and number.isdigit() and len(number) < 8 else None


def _hash_of(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""


def _full(expected: str, got: object) -> CapacityError:
    return CapacityError(
        "delivery.disk_full", "There is no room for the bundle; free disk space.", expected=expected, got=got
    )
