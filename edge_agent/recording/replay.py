"""Plays a recording as camera and encoder, in virtual time."""

import struct
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from edge_agent.interfaces import Frame, Lane, LineGeometry
from edge_agent.recording.segments import (
    Checkpoint,
    Decision,
    End,
    Entry,
    FrameHead,
    Kept,
    malformed,
    read_segment,
    segment_files,
    unreadable,
)
from models.errors import CameraError, InputError

_PNG_SIZE: Final = struct.Struct(">II")


@dataclass(slots=True)
class Stretch:
    """A run of frames without a loss between them."""

    start: Entry
    checkpoint: Checkpoint
    frames: list[tuple[FrameHead, Entry]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    checkpoints: dict[int, Entry] = field(default_factory=dict)
    """Further checkpoints, by the index of the frame before which they were taken."""
    ended: bool = False
    """Whether the run ended here in order."""

    @property
    def geometry(self) -> LineGeometry:
        """Geometry of the recorded line."""
        point = self.checkpoint
        lanes = tuple(Lane(top, bottom) for top, bottom in point.lanes)
        return LineGeometry(point.width_px, point.height_px, point.mm_per_px, lanes, point.outlets_mm)


class Replay:
    """A recording as camera and encoder, in virtual time: each `read` returns the next frame.

    Args:
        folder: Folder that a recorder wrote.

    Raises:
        InputError: `recording.absent`, `recording.corrupt`, `recording.wrong_version`, `recording.oversize`,
            `recording.malformed`, `recording.unreadable`.
    """

    def __init__(self, folder: Path) -> None:
        self.stretches: list[Stretch] = []
        self.torn: list[str] = []
        """Descriptions of segments whose tail a power cut tore off; the rest of each is replayed."""
        self.kept: list[str] = []
        """Reasons for which segments were marked to be kept."""
        self._open: Stretch | None = None
        self._last_index = -1
        for path in _paths(folder):
            segment = read_segment(path)
            for entry in segment.entries:
                self._take(entry)
            if segment.torn:
                self.torn.append(segment.torn)
                self._open = None
        self._queue = [(stretch, at) for stretch in self.stretches for at in range(len(stretch.frames))]
        self._next = 0
        self._stretch: Stretch | None = None
        self._times: list[float] = []
        self._now_s = 0.0

    def _take(self, entry: Entry) -> None:
        head, current = entry.head, self._open
        match head:
            case Checkpoint():
                follows = head.continuous and current is not None and current.checkpoint.run == head.run
                if current is not None and follows and head.index == self._last_index + 1:
                    current.checkpoints[head.index] = entry
                else:
                    self._open = Stretch(entry, head)
                    self.stretches.append(self._open)
                    self._last_index = head.index - 1
            case FrameHead():
                if current is None or head.index != self._last_index + 1:
                    raise malformed(entry.path, f"frame {self._last_index + 1}", f"frame {head.index}")
                current.frames.append((head, entry))
                self._last_index = head.index
            case Decision():
                if current is not None:
                    current.decisions.append(head)
            case Kept():
                self.kept.append(head.reason)
            case End():
                if current is not None:
                    current.ended = True
                self._open = None

    # -- camera -------------------------------------------------------------------------------------------------

    def read(self, timeout_s: float) -> Frame | None:  # noqa: ARG002  a recording never waits
        """Returns the next frame; see `FrameSource.read`.

        Raises:
            CameraError: `camera.ended`, `camera.corrupt`, `camera.wrong_size`.
            InputError: The file changed since it was indexed.
        """
        if self._next >= len(self._queue):
            raise CameraError("camera.ended", "The recording is over.", expected="a frame", got=self._next)
        stretch, at = self._queue[self._next]
        head, entry = stretch.frames[at]
        frame = _frame(stretch.checkpoint, head, entry)
        if stretch is not self._stretch:
            self._stretch = stretch
            self._times = [head.captured_s for head, _ in stretch.frames]
        self._next += 1
        self._now_s = head.captured_s
        return frame

    @property
    def frames(self) -> int:
        """Number of frames of the whole recording."""
        return len(self._queue)

    @property
    def decisions(self) -> int:
        """Number of decisions of the whole recording."""
        return sum(len(stretch.decisions) for stretch in self.stretches)

    @property
    def bundles(self) -> dict[str, int]:
        """Number of decisions of each bundle that judged, by digest."""
        counts: Counter[str] = Counter()
        for stretch in self.stretches:
            counts.update({head.digest: 0 for head, _ in stretch.frames if head.digest})
            counts.update(decision.digest for decision in stretch.decisions)
        return dict(counts)

    @property
    def about(self) -> dict[str, str]:
        """Facts about the recording machine, taken from the newest stretch."""
        return self.stretches[-1].checkpoint.about if self.stretches else {}

    def bundle_directory(self) -> Path:
        """Returns the directory that held the bundle on the machine that recorded.

        Raises:
            InputError: `recording.no_bundle` when it is not there (any more).
        """
        directory = self.about.get("bundle", "")
        if not directory or not Path(directory).is_dir():
            raise InputError(
                "recording.no_bundle",
                "The bundle of the recording is not here; name a directory with --bundle.",
                expected=f"bundle {' or '.join(sorted(self.bundles)) or '(none judged)'}",
                got=directory or "no directory",
            )
        return Path(directory)

    def close(self) -> None:
        """Ends the recording; no further frame comes."""
        self._next = len(self._queue)

    # -- encoder ------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Returns the recording's clock: the exposure time of the frame that was read last."""
        return self._now_s

    def position_mm(self, at_s: float) -> float:
        """Returns exactly the recorded position at a frame's time; between and beyond frames the speed is constant."""
        if self._stretch is None:
            return 0.0
        frames, at = self._stretch.frames, bisect_right(self._times, at_s) - 1
        if at >= 0 and self._times[at] == at_s:
            return frames[at][0].belt_mm
        head = frames[max(at, 0)][0]
        return head.belt_mm + (at_s - head.captured_s) * self._speed(max(at, 0))

    def speed_mm_s(self) -> float:
        """Returns the mean speed from the present frame to the next, millimetres per second."""
        return self._speed(bisect_right(self._times, self._now_s) - 1) if self._stretch else 0.0

    def _speed(self, at: int) -> float:
        stretch = self._stretch
        if stretch is None or len(stretch.frames) < 2:
            return 0.0
        at = min(max(at, 0), len(stretch.frames) - 2)
        first, second = stretch.frames[at][0], stretch.frames[at + 1][0]
        elapsed_s = second.captured_s - first.captured_s
        return (second.belt_mm - first.belt_mm) / elapsed_s if elapsed_s > 0.0 else 0.0


def _paths(folder: Path) -> list[Path]:
    try:
        paths = [path for _, path, _ in segment_files(folder)]
    except FileNotFoundError:
        paths = []
    except OSError as error:
        raise unreadable(folder, error) from error
    if not paths:
        raise InputError(
            "recording.absent", f"{folder} holds no recording.", expected="files such as 00000000.slr", got="none"
        )
    return paths


def _frame(point: Checkpoint, head: FrameHead, entry: Entry) -> Frame:
    data = entry.payload()
    # The size stands in the first bytes of a PNG: a small file must not unfold into a huge image.
    size = _PNG_SIZE.unpack_from(data, 16) if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24 else None
    if size is not None and size != (point.width_px, point.height_px):
        raise CameraError(
            "camera.wrong_size",
            f"Frame {head.number} of {entry.path.name} has another size than its line.",
            expected=(point.width_px, point.height_px),
            got=size,
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if size is not None else None
    except cv2.error:
        image = None
    if image is None or image.shape != (point.height_px, point.width_px, 3):
        raise CameraError(
            "camera.corrupt", f"Frame {head.number} of {entry.path.name} is no image.", expected="a PNG", got="none"
        )
    return Frame(np.asarray(image, np.uint8), head.number, head.captured_s, head.belt_mm)
