"""Fetches a bundle by content, chunk by chunk; the caller moves the chunks, so no socket is used here.

The caller asks for `wanted()` and hands in what arrives. Every chunk is checked against the digest in the verified
manifest before a byte is written; whatever is found on disk after a crash is hashed again, there is no journal. A
bundle appears in the slots by one rename, whole or not at all. What another slot already has is not fetched: equal
files are linked, equal chunks are copied, so a new head on an old extractor moves only the head.

Rules: a wrong chunk is never written, is asked for again after a pause that doubles, and is reported; space is
claimed before the first byte, so a full disk refuses at the start; nothing outside `fetch/` and `slots/` is touched.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from edge_agent.state_directory import StateDirectory
from models.bundle import MANIFEST, MAX_MANIFEST_BYTES, Chunk, FileEntry, Manifest, parse_manifest, sha256
from models.errors import BundleError, CapacityError
from models.files import sync_directory, sync_file, write_atomically

_FIRST_PAUSE_S: Final = 20.0
"""At most three tries of a wrong chunk in the first minute, fewer afterwards."""
_LONGEST_PAUSE_S: Final = 300.0
_Place = tuple[FileEntry, int]
"""The place of a chunk: a file and the offset in it."""


class Fetch:
    """One bundle on its way into a slot.

    Args:
        root: The agent's state directory.
        digest: Digest of the bundle.
        window: Most chunks wanted at a time.
        reserve_bytes: Disk space that must stay free.
        clock: Monotonic seconds.

    Raises:
        CapacityError: `delivery.disk_full`: nothing was changed; try again when there is room.
    """

    def __init__(self, root: Path, digest: str, *, window: int, reserve_bytes: int, clock: Callable[[], float]) -> None:
        self.digest = digest
        self._root, self._window, self._reserve, self._clock = root, window, reserve_bytes, clock
        directory = StateDirectory(root)
        self._parts, self._slots = directory.fetch, directory.slots
        self._parts.mkdir(parents=True, exist_ok=True)
        self._slots.mkdir(parents=True, exist_ok=True)
        self._manifest: Manifest | None = None
        self._missing: dict[str, list[_Place]] = {}
        self._sizes: dict[str, int] = {}
        self._left: Counter[str] = Counter()
        self._pauses: dict[str, tuple[float, float]] = {}
        self.counters: Counter[str] = Counter()
        self.fault: BundleError | None = None
        """The last chunk that was refused."""
        self.done = (self._slots / digest).is_dir()
        self.last_progress_s = clock()
        if not self.done:
            self._resume_manifest()

    # -- what is wanted ---------------------------------------------------------------------------------------

    def wanted(self) -> list[str]:
        """Returns the digests to request now, at most `window`."""
        if self.done:
            return []
        now, found = self._clock(), []
        for digest in [self.digest] if self._manifest is None else self._missing:
            if self._pauses.get(digest, (0.0, 0.0))[0] <= now:
                found.append(digest)
                if len(found) == self._window:
                    break
        return found

    def size_of(self, digest: str) -> int:
        """Returns the size in bytes of a wanted digest, as far as it is known."""
        return self._sizes.get(digest, MAX_MANIFEST_BYTES)

    def awaits(self, digest: str) -> bool:
        """Returns whether this blob is still missing, asked for or not."""
        return not self.done and (digest == self.digest if self._manifest is None else digest in self._missing)

    @property
    def progress(self) -> float:
        """The share of the chunks that is there, 0 to 1."""
        if self.done:
            return 1.0
        if self._manifest is None:
            return 0.0
        total = sum(len(entry.chunks) for entry in self._manifest.files)
        return 1.0 - sum(self._left.values()) / max(total, 1)

    # -- what arrives -----------------------------------------------------------------------------------------

    def receive(self, payload: bytes, claimed: str | None = None) -> bool:
        """Takes a blob; returns whether it was one that is missing.

        Args:
            payload: The bytes.
            claimed: Under which digest they were published; None when they came without a name.

        Raises:
            CapacityError: `delivery.disk_full`.
            BundleError: These are the right bytes of something that can never be used.
        """
        found = sha256(payload)
        expected = found if claimed is None else claimed
        if not self.awaits(expected):
            self.counters["unwanted"] += 1
            return False
        if found != expected:
            self._refuse(expected, found)
            return False
        if self._manifest is None:
            self._take_manifest(payload)
        else:
            self.counters["chunks"] += 1
            self.counters["bytes"] += len(payload)
            self._write(expected, payload)
            self._progressed()
        return True

    def _refuse(self, expected: str, got: str) -> None:
        """Counts a wrong chunk and doubles the pause before it is asked for again."""
        pause_s = min(self._pauses.get(expected, (0.0, _FIRST_PAUSE_S / 2))[1] * 2.0, _LONGEST_PAUSE_S)
        self._pauses[expected] = (self._clock() + pause_s, pause_s)
        self.counters["poisoned"] += 1
        what = "the manifest" if self._manifest is None else f"a chunk of {self._missing[expected][0][0].path}"
        self.fault = BundleError(
            "delivery.poisoned_chunk", f"The broker holds wrong bytes for {what}.", expected=expected, got=got
        )

    def _take_manifest(self, payload: bytes) -> None:
        manifest = parse_manifest(payload, digest=self.digest)
        self.counters["bytes"] += len(payload)
        # Not synchronised: what a power cut leaves of it is checked against its digest.
        (self._parts / f"{self.digest}.manifest").write_bytes(payload)
        self._use_manifest(manifest)

    def _resume_manifest(self) -> None:
        path = self._parts / f"{self.digest}.manifest"
        try:
            data = path.read_bytes() if path.stat().st_size <= MAX_MANIFEST_BYTES else b""
            manifest = parse_manifest(data, digest=self.digest)
        except (OSError, BundleError):
            path.unlink(missing_ok=True)
            return
        self._use_manifest(manifest)

    # -- what is there already --------------------------------------------------------------------------------

    def _use_manifest(self, manifest: Manifest) -> None:
        needed = [entry for entry in manifest.files if not self._take_whole(entry)]
        self._check_space(needed)
        for entry in needed:
            self._prepare(entry)
        self._manifest = manifest
        self._take_local_chunks()
        self._progressed()

    def _take_whole(self, entry: FileEntry) -> bool:
        """Returns whether the whole file is there: fetched before, or linked from another slot."""
        whole = self._parts / entry.sha256
        if _hash_of(whole) == entry.sha256 or self._link_from_slots(entry, whole):
            self.counters["reused_bytes"] += entry.size_bytes
            return True
        whole.unlink(missing_ok=True)
        return False

    def _link_from_slots(self, entry: FileEntry, whole: Path) -> bool:
        for slot in sorted(self._slots.iterdir()):
            candidate = slot / entry.path
            if not candidate.is_file() or candidate.stat().st_size != entry.size_bytes:
                continue
            if _hash_of(candidate) != entry.sha256:
                continue
            whole.unlink(missing_ok=True)
            try:
                os.link(candidate, whole)
            except OSError:  # a file system without links: its chunks are copied instead
                return False
            return True
        return False

    def _check_space(self, needed: list[FileEntry]) -> None:
        free = shutil.disk_usage(self._root).free
        claimed = sum(min(entry.size_bytes, _allocated(self._part(entry))) for entry in needed)
        wanted = sum(entry.size_bytes for entry in needed) - claimed + self._reserve
        if needed and free < wanted:
            raise _full(f"{wanted} bytes free", f"{free} bytes")

    def _prepare(self, entry: FileEntry) -> None:
        """Claims the space of a file and finds out which of its chunks are there already."""
        part = self._part(entry)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if entry.size_bytes:
                    os.posix_fallocate(descriptor, 0, entry.size_bytes)
                os.ftruncate(descriptor, entry.size_bytes)
                for chunk, offset in _places(entry):
                    if sha256(os.pread(descriptor, chunk.size_bytes, offset)) == chunk.sha256:
                        self.counters["reused_bytes"] += chunk.size_bytes
                    else:
                        self._missing.setdefault(chunk.sha256, []).append((entry, offset))
                        self._sizes[chunk.sha256] = chunk.size_bytes
                        self._left[entry.sha256] += 1
            finally:
                os.close(descriptor)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _full(f"{entry.size_bytes} bytes for {entry.path}", error.strerror) from error
        if not self._left[entry.sha256]:
            self._complete(entry)

    def _take_local_chunks(self) -> None:
        """Copies the chunks that other slots have, wherever in a file they lie there."""
        for slot in sorted(self._slots.iterdir()):
            try:
                manifest = parse_manifest((slot / MANIFEST).read_bytes())
            except (OSError, BundleError):
                continue
            for entry in manifest.files:
                self._take_from(slot / entry.path, entry)
        if not self._missing:
            self._finish()

    def _take_from(self, path: Path, entry: FileEntry) -> None:
        wanted = [(chunk, offset) for chunk, offset in _places(entry) if chunk.sha256 in self._missing]
        if not wanted or not path.is_file():
            return
        with path.open("rb") as stream:
            for chunk, offset in wanted:
                stream.seek(offset)
                data = stream.read(chunk.size_bytes)
                if sha256(data) == chunk.sha256 and chunk.sha256 in self._missing:
                    self.counters["reused_bytes"] += len(data)
                    self._write(chunk.sha256, data, finish=False)

    # -- writing ----------------------------------------------------------------------------------------------

    def _write(self, digest: str, payload: bytes, *, finish: bool = True) -> None:
        for entry, offset in self._missing[digest]:
            try:
                descriptor = os.open(self._part(entry), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(descriptor, payload, offset)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise _full(f"a chunk of {entry.path}", error.strerror) from error
        for entry, _ in self._missing.pop(digest):
            self._left[entry.sha256] -= 1
            if not self._left[entry.sha256]:
                self._complete(entry)
        self._pauses.pop(digest, None)
        if finish and not self._missing:
            self._finish()

    def _progressed(self) -> None:
        self.last_progress_s = self._clock()

    def _part(self, entry: FileEntry) -> Path:
        return self._parts / f"{entry.sha256}.part"

    def _complete(self, entry: FileEntry) -> None:
        """Makes a file durable; its whole hash is checked once more from disk."""
        part = self._part(entry)
        sync_file(part)
        if _hash_of(part) != entry.sha256:
            part.unlink()
            raise BundleError(
                "delivery.disk_corrupts",
                f"{entry.path} reads back otherwise than it was written; check the disk.",
                expected=entry.sha256,
                got="another digest",
            )
        part.rename(self._parts / entry.sha256)

    def _finish(self) -> None:
        """Makes the slot from the complete files, by one rename."""
        manifest = self._manifest
        if manifest is None:
            return
        building = self._slots / f".{self.digest}.partial"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for entry in manifest.files:
            os.link(self._parts / entry.sha256, building / entry.path)
        # The manifest comes last; its write makes the links durable with it.
        write_atomically(building / MANIFEST, manifest.encoded())
        building.rename(self._slots / self.digest)
        sync_directory(self._slots)
        self.done = True
        for entry in manifest.files:
            (self._parts / entry.sha256).unlink(missing_ok=True)
        (self._parts / f"{self.digest}.manifest").unlink(missing_ok=True)


def collect_garbage(root: Path, keep: set[str]) -> list[str]:
    """Removes slots that are not kept and half-fetched files; returns the digests that were removed.

    Args:
        root: The agent's state directory.
        keep: Digests of active, previous and target bundle.
    """
    removed: list[str] = []
    slots = StateDirectory(root).slots
    for slot in sorted(slots.iterdir()) if slots.is_dir() else []:
        if slot.name not in keep:
            shutil.rmtree(slot, ignore_errors=True)
            removed.append(slot.name)
    return removed


def discard_parts(root: Path) -> None:
    """Removes the files of a fetch that will not be continued."""
    shutil.rmtree(StateDirectory(root).fetch, ignore_errors=True)


def _places(entry: FileEntry) -> Iterator[tuple[Chunk, int]]:
    """Returns the chunks of a file with their offsets."""
    offset = 0
    for chunk in entry.chunks:
        yield chunk, offset
        offset += chunk.size_bytes


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _hash_of(path: Path) -> str:
    try:
        return sha256(path.read_bytes())
    except OSError:
        return ""


def _full(expected: str, got: object) -> CapacityError:
    return CapacityError(
        "delivery.disk_full", "There is no room for the bundle; free disk space.", expected=expected, got=got
    )
