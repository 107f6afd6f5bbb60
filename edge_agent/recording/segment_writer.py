"""Writes the segments of a recording: one file at a time, bounded in bytes, the oldest making room."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from edge_agent.recording.segments import (
    KEPT,
    SUFFIX,
    segment_files,
)
from models.errors import InputError
from models.files import sync_directory


@dataclass(slots=True)
class RecordingCounters:
    """Counts of frames, decisions and files since the recorder was made."""

    frames: int = 0
    frames_lost: int = 0
    """Not recorded: the queue was full, the disk paused, or the quota had no room."""
    decisions: int = 0
    decisions_lost: int = 0
    disk_errors: int = 0
    segments: int = 0
    segments_evicted: int = 0
    kept_evicted: int = 0
    bytes: int = 0
    """Written since the start."""
    cpu_s: float = 0.0
    """Processor time of the writing thread."""


def open_new(path: Path) -> BinaryIO:
    """Opens a new segment file without a buffer; an existing file is an error."""
    return cast("BinaryIO", path.open("xb", buffering=0))


class SegmentWriter:
    """Writes segment files within the quota. Only the writing thread calls it, apart from its construction.

    Args:
        folder: Folder of the recording; made when it is missing.
        quota_bytes: Largest size of all segments together.
        opener: Makes a new, unbuffered segment file.
        counters: Counters that are updated.

    Raises:
        InputError: `recording.unwritable`.
    """

    def __init__(
        self, folder: Path, quota_bytes: int, opener: Callable[[Path], BinaryIO], counters: RecordingCounters
    ) -> None:
        self._folder, self._quota, self._opener, self._counters = folder, quota_bytes, opener, counters
        self._closed: dict[int, tuple[Path, int, bool]] = {}
        self._stream: BinaryIO | None = None
        self._path = folder
        self._sequence = 0
        self._kept = False
        self._began_s = self._last_s = 0.0
        self.open_bytes = 0
        self.used = 0
        self.broken = True
        """Whether something was lost since the last record that was written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for sequence, path, kept in segment_files(folder):
                size = path.stat().st_size
                self._closed[sequence] = (path, size, kept)
                self.used += size
                self._sequence = max(self._sequence, sequence + 1)
            self._make_room(0)
        except OSError as error:
            raise InputError(
                "recording.unwritable", f"{folder} cannot hold a recording.", expected="a folder", got=error
            ) from error

    def begin(self, data: bytes, captured_s: float) -> bool:
        """Closes the present segment and starts one with these bytes; returns whether there was room."""
        self.close()
        if not self._make_room(len(data)):
            self.broken = True
            return False
        self._path = self._folder / f"{self._sequence:08d}{SUFFIX}"
        self._sequence += 1
        self._stream = self._opener(self._path)
        self._kept, self._began_s, self._last_s = False, captured_s, captured_s
        self._counters.segments += 1
        self._put(data)
        sync_directory(self._folder)
        self.broken = False
        return True

    def append(self, data: bytes, captured_s: float | None) -> bool:
        """Adds a record and returns whether there was room for it."""
        if self._stream is None or not self._make_room(len(data)):
            self.broken = True
            return False
        self._put(data)
        self._last_s = self._last_s if captured_s is None else captured_s
        return True

    def _put(self, data: bytes) -> None:
        stream = self._stream
        assert stream is not None  # noqa: S101  both callers have one
        left = memoryview(data)
        while left:
            written = stream.write(left)
            # An unbuffered file writes what fits, and fails when nothing does.
            self.open_bytes += written
            self.used += written
            self._counters.bytes += written
            left = left[written:]

    def _make_room(self, size: int) -> bool:
        """Evicts segments until `size` bytes fit: the oldest first, kept ones last, never the open one."""
        while self.used + size > self._quota and self._closed:
            sequence = min(self._closed, key=lambda number: (self._closed[number][2], number))
            path, freed, kept = self._closed[sequence]
            path.unlink(missing_ok=True)
            del self._closed[sequence]
            self.used -= freed
            self._counters.segments_evicted += 1
            self._counters.kept_evicted += kept
        return self.used + size <= self._quota

    def keep(self, lead_up_s: float) -> None:
        """Marks the open segment, and the one before when this one is young."""
        if self._stream is None:
            return
        if self._last_s - self._began_s < lead_up_s and self._closed:
            before = max(self._closed)
            path, size, kept = self._closed[before]
            if not kept:
                self._closed[before] = (_marked(path), size, True)
        if not self._kept:
            self._path, self._kept = _marked(self._path), True
        sync_directory(self._folder)

    def sync(self) -> None:
        """Makes everything that was written durable."""
        if self._stream is not None:
            os.fdatasync(self._stream.fileno())

    def close(self) -> None:
        """Ends the open segment."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        self._closed[self._sequence - 1] = (self._path, self.open_bytes, self._kept)
        self.open_bytes = 0
        try:
            os.fdatasync(stream.fileno())
        finally:
            stream.close()

    def abandon(self) -> None:
        """Ends the open segment after an error: its bytes stay on the disk, and a new segment must begin."""
        self.broken = True
        with contextlib.suppress(OSError):
            self.close()


def _marked(path: Path) -> Path:
    """Renames a segment to its kept name."""
    return path.rename(path.with_name(path.name.removesuffix(SUFFIX) + KEPT + SUFFIX))
