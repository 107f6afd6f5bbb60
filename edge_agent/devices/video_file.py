"""Recordings as cameras: a video file or a folder of pictures, at camera speed or as fast as they are asked for.

The time of a frame is the file's own timestamp, not its number divided by a rate: phones record at a variable rate, and
a lost frame leaves a hole. A picture that cannot be decoded keeps its number and its time, so that what comes behind it
stays where it belongs on the belt.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import cv2
import numpy as np

from edge_agent.devices.camera_counters import CameraCounters
from edge_agent.devices.captures import Capture, open_capture
from edge_agent.devices.pictures import PictureReader
from edge_agent.devices.timestamps import FileClock
from edge_agent.interfaces import Encoder, Frame, Image
from models.errors import CameraError

_BAD_IN_A_ROW: Final = 10
"""So many damaged pictures in a row are no picture folder of a line."""
_COUNTED: Final = (b"ftyp", b"RIFF")
"""Containers whose header states the number of frames (MP4 and AVI); for others OpenCV guesses it from the rate."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """One picture of a recording."""

    image: Image | None
    """None where the picture is damaged."""
    at_s: float
    """Time since the first exposure, seconds."""


class Exposures(Protocol):
    """The pictures of a recording; each call starts from the first one."""

    period_s: float
    """Nominal period of the exposures, seconds."""

    def read(self, counters: CameraCounters, /) -> Iterator[Exposure]:
        """Yields the exposures in order and counts what is damaged or mended."""


class PictureFolder:
    """The pictures of a folder, one per period.

    Args:
        paths: The pictures in order.
        frames_per_s: Their rate.
        depth_bits: Bits that carry the picture; 0 = read from the pictures.

    Raises:
        CameraError: `camera.unsupported_depth`.
    """

    def __init__(self, paths: list[Path], frames_per_s: float, *, depth_bits: int = 0) -> None:
        self.period_s = 1.0 / frames_per_s
        self._pictures = PictureReader(paths, depth_bits=depth_bits)

    def read(self, _counters: CameraCounters) -> Iterator[Exposure]:
        """See `Exposures`.

        Raises:
            CameraError: `camera.corrupt` after ten damaged pictures in a row.
        """
        in_a_row = 0
        for number, image in enumerate(self._pictures):
            in_a_row = in_a_row + 1 if image is None else 0
            if in_a_row >= _BAD_IN_A_ROW:
                raise CameraError(
                    "camera.corrupt",
                    f"{in_a_row} pictures in a row cannot be decoded.",
                    expected="images",
                    got=self._pictures.paths[number],
                )
            yield Exposure(image, number * self.period_s)


class Video:
    """The frames of a video file at their own timestamps.

    Args:
        path: The file.
        frames_per_s: Rate where the file states none.

    Raises:
        CameraError: `camera.corrupt` when the file is no video that can be decoded.
    """

    def __init__(self, path: Path, frames_per_s: float) -> None:
        self._path = path
        capture = self._open()
        rate = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
        self.period_s = 1.0 / (rate if 0.0 < rate <= 1000.0 else frames_per_s)

    def _open(self) -> Capture:
        capture = open_capture(str(self._path))
        if not capture.isOpened():
            capture.release()
            raise CameraError(
                "camera.corrupt",
                f"{self._path} is no video OpenCV can decode.",
                expected="a video file",
                got="undecodable",
            )
        return capture

    def read(self, counters: CameraCounters) -> Iterator[Exposure]:
        """See `Exposures`. Frames that the file promises but that cannot be decoded count as damaged at its end."""
        clock = FileClock(self.period_s)
        capture = self._open()
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if self._states_frames() else 0
        given = 0
        held: tuple[Image | None, float] | None = None
        try:
            while (found := _next_frame(capture)) is not None:
                if held is not None:
                    yield Exposure(held[0], clock.place(held[1], found[1]))
                held = found
                given += 1
            if held is not None:
                yield Exposure(held[0], clock.place(held[1], None))
        finally:
            capture.release()
            counters.times_mended += clock.mended
        counters.corrupt += max(0, promised - given)

    def _states_frames(self) -> bool:
        with self._path.open("rb") as stream:
            head = stream.read(12)
        return head.startswith(_COUNTED[1]) or head[4:8] == _COUNTED[0]


def _next_frame(capture: Capture) -> tuple[Image | None, float] | None:
    """Returns the next frame, uint8 (H, W, 3) BGR or None if damaged, and its timestamp in seconds; None at the end."""
    ok, image = capture.read()
    if not ok:
        return None
    return None if image is None else np.asarray(image, np.uint8), capture.get(cv2.CAP_PROP_POS_MSEC) / 1000.0


class VideoFile:
    """A recording as a camera.

    Args:
        exposures: The pictures and their times.
        encoder: Belt position for frames without an encoder of their own; asked with the time since the start.
        size_px: Width and height that every picture must have; None = those of the first picture.
        paced: Whether frames come at camera speed (late ones are dropped); else each one comes when it is asked for.
        loop: Whether the recording starts again at its end.
        clock: Monotonic clock in seconds.
        sleep: Function that waits.
    """

    def __init__(
        self,
        exposures: Exposures,
        *,
        encoder: Encoder,
        size_px: tuple[int, int] | None = None,
        paced: bool = False,
        loop: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.counters = CameraCounters()
        self.encoder = encoder
        self._exposures, self._size = exposures, size_px
        self._paced, self._loop, self._clock, self._sleep = paced, loop, clock, sleep
        self._start_s = clock() if paced else 0.0
        self._pass_s = 0.0
        """Time at which the present pass through the recording began."""
        self._reader = exposures.read(self.counters)
        self._ahead: deque[Exposure] = deque()
        self._over = False
        self._read_any = False
        self._newest_s = 0.0
        self._number = -1

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`; when paced, late frames are skipped and counted.

        Raises:
            CameraError: `camera.ended`; `camera.wrong_size`, and the next call returns the next frame;
                `camera.corrupt`.
        """
        if not self._fill(1):
            raise CameraError("camera.ended", "The recording is over.", expected="a frame", got=f"{self._number + 1}")
        if self._paced and not self._wait(timeout_s):
            return None
        exposure = self._ahead.popleft()
        self._number += 1
        if exposure.image is None:
            self.counters.corrupt += 1
            return self.read(timeout_s) if not self._paced else None
        height, width = exposure.image.shape[:2]
        self._size = self._size or (width, height)
        if (width, height) != self._size:
            self.counters.wrong_size += 1
            raise CameraError(
                "camera.wrong_size",
                "A picture has another size than the line.",
                expected=f"{self._size[0]} x {self._size[1]} px",
                got=f"{width} x {height} px",
            )
        self.counters.frames += 1
        at_s = self._start_s + exposure.at_s
        return Frame(exposure.image, self._number, at_s, self.encoder.position_mm(at_s))

    def _wait(self, timeout_s: float) -> bool:
        """Waits until the next exposure is due, and skips it while the one behind it is due as well."""
        wait_s = self._start_s + self._ahead[0].at_s - self._clock()
        if wait_s > 0.0:
            self._sleep(min(wait_s, timeout_s))
        if wait_s > timeout_s:
            return False
        while self._fill(2) and self._start_s + self._ahead[1].at_s <= self._clock():
            skipped = self._ahead.popleft()
            self._number += 1
            if skipped.image is None:
                self.counters.corrupt += 1
            else:
                self.counters.dropped += 1
        return True

    def _fill(self, count: int) -> bool:
        """Decodes ahead until `count` exposures wait; False when the recording ends before."""
        while len(self._ahead) < count and not self._over:
            exposure = next(self._reader, None)
            if exposure is None and self._loop and self._read_any:
                last_s = self._ahead[-1].at_s if self._ahead else self._newest_s
                self._pass_s = last_s + self._exposures.period_s
                self._reader = self._exposures.read(self.counters)
                exposure = next(self._reader, None)
            if exposure is None:
                self._over = True
                break
            self._read_any = True
            self._newest_s = self._pass_s + exposure.at_s
            self._ahead.append(Exposure(exposure.image, self._newest_s))
        return len(self._ahead) >= count

    @property
    def frames_dropped(self) -> int:
        """Frames that were skipped because they were not fetched in time."""
        return self.counters.dropped

    @property
    def frames_bad(self) -> int:
        """Frames that could not be used: damaged, or of another size."""
        return self.counters.corrupt + self.counters.wrong_size

    def close(self) -> None:
        """Closes the file."""
        self._ahead.clear()
        self._over = True
        close = getattr(self._reader, "close", None)
        if close is not None:
            close()
