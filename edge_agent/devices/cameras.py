"""Real cameras: a video file, a folder of frames, a V4L2 device, a network stream.

`cv2.VideoCapture.read()` can block for ever, give the same buffer again after a reconnect, or return a torn frame as
if it were whole. A live device is therefore read by a thread of its own that only fills a mailbox of one; whoever
reads the mailbox has a deadline, and a reader that stalls is abandoned and replaced. A thread that hangs in a driver
cannot be ended, only left: there are never more than `max_readers`, then the process must be replaced (`camera.stuck`).
What a driver had buffered when it was opened, or while it hung, is old: such frames come without a wait between them
and are thrown away. Nothing here judges an image (`watch` does); it says whether there is a fresh one.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import cv2
import numpy as np

from edge_agent.interfaces import Frame, FrameSource, Image
from models.errors import CameraError

PICTURE_SUFFIXES: Final = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
_CORRUPT_IN_A_ROW: Final = 10
_LONGEST_PATIENCE_S: Final = 4.0
_GAP_PERIODS: Final = 6.0
"""After a gap of so many frame periods the driver's buffer may hold old frames."""
_BACKLOG_S: Final = 1.0
"""A source that still gives frames without a wait after so long has no pace of its own."""


@dataclass(slots=True)
class CameraCounters:
    """What happened since the camera was opened."""

    frames: int = 0
    dropped: int = 0
    corrupt: int = 0
    reopened: int = 0
    stale: int = 0
    """Old frames out of a driver's buffer that were thrown away."""


class Capture(Protocol):
    """The part of `cv2.VideoCapture` that is used."""

    def read(self) -> tuple[bool, Any]:
        """Next image."""

    def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
        """Whether the device is there."""

    def get(self, what: int) -> float:
        """A property."""

    def release(self) -> None:
        """Lets go."""


class ConstantSpeedEncoder:
    """Belt position from the time alone: right while the belt runs at its nominal speed.

    Args:
        speed_mm_s: Nominal belt speed.
        origin_s: Time at which the position is 0.
    """

    def __init__(self, speed_mm_s: float, origin_s: float = 0.0) -> None:
        self._speed = speed_mm_s
        self._origin_s = origin_s

    def position_mm(self, at_s: float) -> float:
        """See `Encoder`."""
        return (at_s - self._origin_s) * self._speed

    def speed_mm_s(self) -> float:
        """See `Encoder`."""
        return self._speed


def open_camera(
    source: str,
    *,
    belt_mm_s: float,
    frames_per_s: float = 30.0,
    paced: bool = True,
    loop: bool = False,
    stall_s: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> "FrameSource":
    """Opens what `source` names.

    Args:
        source: A video file, a folder of pictures, a device (`/dev/video0` or `0`), or an `rtsp://`, `http://` URL.
        belt_mm_s: Belt speed, as long as no encoder says better.
        frames_per_s: Of a folder, and of a video that does not say.
        paced: Recordings play at camera speed (late frames are dropped); False gives every frame at once.
        loop: Recordings start again at their end.
        stall_s: A live camera without a frame for so long is stalled.
        clock: Monotonic seconds.
        sleep: How to wait.

    Raises:
        CameraError: `camera.absent` when there is nothing to open.
    """
    path = Path(source)
    if is_live(source):
        return LiveCamera(source, belt_mm_s=belt_mm_s, frames_per_s=frames_per_s, stall_s=stall_s, clock=clock)
    if path.is_dir():
        pictures = sorted(
            (p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES), key=lambda p: _natural(p.name)
        )
        if not pictures:
            raise _absent(source, f"pictures ({', '.join(sorted(PICTURE_SUFFIXES))})", "none")
        reader: Callable[[CameraCounters], Iterator[Image]] = lambda counters: _pictures(pictures, counters)  # noqa: E731
        rate = frames_per_s
    elif path.is_file():
        rate = _video_rate(path, frames_per_s)
        reader = lambda counters: _video(path, counters)  # noqa: E731
    else:
        raise _absent(source, "a file, folder, device or URL", "nothing there")
    return VideoFile(reader, rate, belt_mm_s=belt_mm_s, paced=paced, loop=loop, clock=clock, sleep=sleep)


def is_live(source: str) -> bool:
    """Whether this names a device or a stream, not a recording."""
    return source.isdigit() or "://" in source or source.startswith("/dev/")


def _absent(source: str, expected: str, got: str) -> CameraError:
    return CameraError(
        "camera.absent", f"No camera at {source}; check the path, the cable or the address.", expected=expected, got=got
    )


def _natural(name: str) -> list[int | str]:
    """`frame9` before `frame10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _pictures(paths: list[Path], counters: CameraCounters) -> Iterator[Image]:
    """Decodable pictures in order; others are counted and skipped."""
    in_a_row = 0
    for path in paths:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            counters.corrupt += 1
            in_a_row += 1
            if in_a_row >= _CORRUPT_IN_A_ROW:
                raise CameraError(
                    "camera.corrupt", f"{in_a_row} pictures in a row cannot be decoded.", expected="images", got=path
                )
            continue
        in_a_row = 0
        yield np.asarray(image, np.uint8)


def _video_rate(path: Path, default: float) -> float:
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise CameraError(
                "camera.corrupt", f"{path} is no video OpenCV can decode.", expected="a video file", got="undecodable"
            )
        rate = capture.get(cv2.CAP_PROP_FPS)
    finally:
        capture.release()
    return rate if 0.0 < rate <= 1000.0 else default


def _video(path: Path, counters: CameraCounters) -> Iterator[Image]:
    capture = cv2.VideoCapture(str(path))
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    given = 0
    try:
        while True:
            ok, image = capture.read()
            if not ok or image is None:
                break
            given += 1
            yield np.asarray(image, np.uint8)
    finally:
        capture.release()
    # A truncated file promises more frames than it holds.
    counters.corrupt += max(0, expected - given)


class VideoFile:
    """Frames of a file or folder, at camera speed or as fast as they are asked for."""

    def __init__(
        self,
        reader: Callable[[CameraCounters], Iterator[Image]],
        frames_per_s: float,
        *,
        belt_mm_s: float,
        paced: bool,
        loop: bool,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.counters = CameraCounters()
        self._reader, self._period = reader, 1.0 / frames_per_s
        self._paced, self._loop, self._clock, self._sleep = paced, loop, clock, sleep
        self._start_s = clock() if paced else 0.0
        self.encoder = ConstantSpeedEncoder(belt_mm_s, self._start_s)
        self._images = reader(self.counters)
        self._number = -1
        self._shape: tuple[int, ...] | None = None

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`; late frames are skipped and counted when paced."""
        if self._paced:
            wait_s = self._start_s + (self._number + 1) * self._period - self._clock()
            if wait_s > timeout_s:
                self._sleep(timeout_s)
                return None
            if wait_s > 0.0:
                self._sleep(wait_s)
            behind = int((self._clock() - self._start_s) / self._period) - self._number - 1
            for _ in range(max(0, behind)):
                self._next()
                self.counters.dropped += 1
        image = self._next()
        if self._shape is None:
            self._shape = image.shape
        if image.shape != self._shape:
            raise CameraError("camera.wrong_size", "A frame changed its size.", expected=self._shape, got=image.shape)
        self.counters.frames += 1
        at_s = self._start_s + self._number * self._period
        return Frame(image, self._number, at_s, self.encoder.position_mm(at_s))

    def _next(self) -> Image:
        image = next(self._images, None)
        if image is None and self._loop and self._number >= 0:
            self._images = self._reader(self.counters)
            image = next(self._images, None)
        if image is None:
            raise CameraError("camera.ended", "The recording is over.", expected="a frame", got=f"{self._number + 1}")
        self._number += 1
        return image

    @property
    def frames_dropped(self) -> int:
        """Frames that were skipped because nobody fetched them in time."""
        return self.counters.dropped

    def close(self) -> None:
        """Closes the file."""
        self._images = iter(())


class LiveCamera:
    """A device or stream behind a reader thread and a mailbox of one: the freshest frame wins.

    Args:
        source: Device number or path, or URL.
        belt_mm_s: Nominal belt speed.
        frames_per_s: Nominal rate: what comes much faster comes out of a buffer.
        stall_s: Without a frame for so long the reader is given up and replaced; each replacement that gives no frame
            doubles the patience, up to four seconds.
        max_readers: Most threads at a time, those included that hang in the driver.
        clock: Monotonic seconds.
        opener: Makes the capture; `cv2.VideoCapture` unless a test says otherwise.
    """

    def __init__(
        self,
        source: str,
        *,
        belt_mm_s: float,
        frames_per_s: float = 30.0,
        stall_s: float = 1.0,
        max_readers: int = 8,
        clock: Callable[[], float] = time.monotonic,
        opener: Callable[[str], Capture] | None = None,
    ) -> None:
        self.counters = CameraCounters()
        self.encoder = ConstantSpeedEncoder(belt_mm_s, clock())
        self._source, self._stall_s, self._clock = source, stall_s, clock
        self._period_s, self._patience_s, self._max_readers = 1.0 / frames_per_s, stall_s, max_readers
        self._opener = opener or _open_device
        self._readers: list[threading.Thread] = []
        self._fresh = threading.Condition()
        self._frame: Frame | None = None
        self._problem: CameraError | None = None
        self._shape: tuple[int, ...] | None = None
        self._number = -1
        self._generation = 0
        self._last_s = clock()
        self._start_reader()

    def _start_reader(self) -> None:
        self._generation += 1
        self._last_s = self._clock()
        self._readers = [reader for reader in self._readers if reader.is_alive()]
        if len(self._readers) >= self._max_readers:
            raise CameraError(
                "camera.stuck",
                f"{self._source} hangs in its driver; only a new process can open it again.",
                expected=f"< {self._max_readers} readers that hang",
                got=len(self._readers),
            )
        reader = threading.Thread(
            target=self._run, args=(self._generation,), name=f"camera-{self._generation}", daemon=True
        )
        self._readers.append(reader)
        reader.start()

    def _run(self, generation: int) -> None:
        """Reads until it is replaced. An abandoned reader that wakes up later finds its generation gone and ends."""
        capture: Capture | None = None
        try:
            capture = self._opener(self._source)
            if not capture.isOpened():
                self._report(generation, _absent(self._source, "an open device", "not opened"))
                return
            backlog = _Backlog(self._period_s, self._clock())
            while self._generation == generation:
                began_s = self._clock()
                ok, image = capture.read()
                if not ok or image is None:
                    self._report(generation, _absent(self._source, "a frame", "none"))
                    return
                if backlog.holds(began_s, self._clock()):
                    self.counters.stale += 1
                else:
                    self._take(generation, np.asarray(image, np.uint8))
        except Exception as error:  # noqa: BLE001  a thread's boundary: what a driver raises becomes a camera fault
            self._report(generation, CameraError("camera.failed", "The camera's driver failed.", got=error))
        finally:
            if capture is not None:
                capture.release()

    def _take(self, generation: int, image: Image) -> None:
        now = self._clock()
        with self._fresh:
            if generation != self._generation:
                return
            self._number += 1
            self.counters.frames += 1
            self._last_s = now
            self._patience_s = self._stall_s
            if self._frame is not None:
                self.counters.dropped += 1
            self._frame = Frame(image, self._number, now, self.encoder.position_mm(now))
            self._fresh.notify()

    def _report(self, generation: int, problem: CameraError) -> None:
        with self._fresh:
            if generation == self._generation:
                self._problem = problem
                self._fresh.notify()

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`; never blocks longer than `timeout_s`.

        Raises:
            CameraError: `camera.absent`, `camera.stalled`, `camera.wrong_size`, `camera.failed`: the next call
                tries again with a new reader. `camera.stuck`: this process cannot open the device any more.
        """
        with self._fresh:
            if self._frame is None and self._problem is None:
                self._fresh.wait(timeout_s)
            frame, self._frame = self._frame, None
            problem, self._problem = self._problem, None
            patience_s = self._patience_s
            stalled = self._clock() - self._last_s > patience_s
        if problem is not None or (frame is None and stalled):
            self.counters.reopened += 1
            if problem is None:
                self._patience_s = min(2.0 * patience_s, max(_LONGEST_PATIENCE_S, self._stall_s))
            self._start_reader()
            raise problem or CameraError(
                "camera.stalled",
                f"{self._source} gave no frame in time; it is being reopened.",
                expected=f"a frame within {patience_s:g} s",
                got="none",
            )
        if frame is not None:
            if self._shape is None:
                self._shape = frame.image.shape
            if frame.image.shape != self._shape:
                self.counters.corrupt += 1
                raise CameraError(
                    "camera.wrong_size", "A frame changed its size.", expected=self._shape, got=frame.image.shape
                )
        return frame

    @property
    def frames_dropped(self) -> int:
        """Frames replaced by fresher ones before they were read."""
        return self.counters.dropped

    def close(self) -> None:
        """Tells the reader to end; one that blocks in the driver ends with the process."""
        self._generation += 1


class _Backlog:
    """Tells old frames of a driver's buffer from fresh ones: old ones are there at once, fresh ones are waited for.

    Looked for after opening and after a gap; over with the first frame that had to be waited for.
    """

    def __init__(self, period_s: float, now_s: float) -> None:
        self._period_s, self._since_s = period_s, now_s
        self._draining = True

    def holds(self, began_s: float, ended_s: float) -> bool:
        """Whether a frame that was asked for and given at these times is old."""
        took_s = ended_s - began_s
        if took_s > _GAP_PERIODS * self._period_s and not self._draining:
            self._draining, self._since_s = True, ended_s
            return False
        if self._draining and (took_s >= 0.5 * self._period_s or ended_s - self._since_s > _BACKLOG_S):
            self._draining = False
        return self._draining


def _open_device(source: str) -> Capture:
    return cv2.VideoCapture(int(source) if source.isdigit() else source)
