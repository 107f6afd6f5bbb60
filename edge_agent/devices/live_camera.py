"""Live cameras: a V4L2 device or a network stream behind a reader thread.

`cv2.VideoCapture.read()` can block for ever, give the same buffer again after a reconnect, or return a torn frame as
if it were whole. A live device is therefore read by a thread of its own that only fills a mailbox of one; the reader of
the mailbox has a deadline, and a thread that stalls is abandoned and replaced. A thread that hangs in a driver cannot
be ended, only left behind: there are never more than `max_readers`, then the process must be replaced (`camera.stuck`).
Frames that a driver had buffered when it was opened, or while it hung, are old: they come without a wait between them
and are thrown away. Nothing here judges an image (`health.camera` does); it decides whether there is a fresh one.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import cv2
import numpy as np

from edge_agent.devices.camera_counters import CameraCounters
from edge_agent.devices.captures import Capture, open_capture
from edge_agent.devices.timestamps import CameraClock
from edge_agent.interfaces import Encoder, Frame, Image
from models.errors import CameraError

log = logging.getLogger("sortline.camera")
_LONGEST_PATIENCE_S: Final = 4.0
_GAP_PERIODS: Final = 6.0
"""After a gap of so many frame periods the driver's buffer may hold old frames."""
_BACKLOG_S: Final = 1.0
"""A source that still gives frames without a wait after so long has no pace of its own."""
_LEAVE_S: Final = 1.0
"""Longest wait for reader threads when a camera is closed."""
READER: Final = "camera-reader-"
"""Names of the reader threads begin so. A process in which one is left must end without tearing the interpreter down:
a thread that returns from OpenCV into an interpreter that is gone aborts the process."""


class LiveCamera:
    """A device or stream behind a reader thread and a mailbox of one: the freshest frame wins.

    Args:
        source: Device number or path, or URL.
        encoder: Belt position at a monotonic time, for frames without an encoder of their own.
        size_px: Width and height that every frame must have; None = those of the first frame.
        frames_per_s: Nominal rate; frames that come much faster come out of a buffer.
        stall_s: Without a frame for so long the reader is abandoned and replaced; each replacement that gives no frame
            doubles this time, up to four seconds.
        max_readers: Largest number of threads, including those that hang in the driver.
        clock: Monotonic clock in seconds.
        opener: Makes the capture; `open_capture` unless a test replaces it.
    """

    def __init__(
        self,
        source: str,
        *,
        encoder: Encoder,
        size_px: tuple[int, int] | None = None,
        frames_per_s: float = 30.0,
        stall_s: float = 1.0,
        max_readers: int = 8,
        clock: Callable[[], float] = time.monotonic,
        opener: Callable[[str], Capture] | None = None,
    ) -> None:
        self.counters = CameraCounters()
        self.encoder = encoder
        self._source, self._size, self._stall_s, self._clock = source, size_px, stall_s, clock
        self._period_s, self._patience_s, self._max_readers = 1.0 / frames_per_s, stall_s, max_readers
        self._opener = opener or open_capture
        self._readers: list[threading.Thread] = []
        self._fresh = threading.Condition()
        self._frame: Frame | None = None
        self._problem: CameraError | None = None
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
            target=self._run, args=(self._generation,), name=f"{READER}{self._generation}", daemon=True
        )
        self._readers.append(reader)
        reader.start()

    def _run(self, generation: int) -> None:
        """Reads until it is replaced. An abandoned reader that wakes up later finds its generation gone and ends."""
        capture: Capture | None = None
        try:
            capture = self._opener(self._source)
            if not capture.isOpened():
                self._report(generation, absent(self._source, "an open device", "not opened"))
                return
            backlog, times = Backlog(self._period_s, self._clock()), CameraClock()
            while self._generation == generation:
                began_s = self._clock()
                ok, image = capture.read()
                if not ok:
                    self._report(generation, absent(self._source, "a frame", "none"))
                    return
                arrived_s = self._clock()
                if backlog.holds(began_s, arrived_s):
                    self.counters.stale += 1
                    continue
                if image is None:
                    self._damaged(generation, arrived_s)
                    continue
                exposed_s = times.exposure_s(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000.0, arrived_s)
                self._take(generation, _bgr(image), exposed_s, arrived_s)
        except CameraError as error:
            self._report(generation, error)
        except Exception as error:  # noqa: BLE001  a thread's boundary: what a driver raises becomes a camera fault
            self._report(generation, CameraError("camera.failed", "The camera's driver failed.", got=error))
        finally:
            if capture is not None:
                capture.release()

    def _damaged(self, generation: int, arrived_s: float) -> None:
        with self._fresh:
            if generation == self._generation:
                self._number += 1
                self._last_s = arrived_s
                self.counters.corrupt += 1

    def _take(self, generation: int, image: Image, exposed_s: float, arrived_s: float) -> None:
        with self._fresh:
            if generation != self._generation:
                return
            self._number += 1
            self._last_s = arrived_s
            self._patience_s = self._stall_s
            height, width = image.shape[:2]
            self._size = self._size or (width, height)
            if (width, height) != self._size:
                self.counters.wrong_size += 1
                self._problem = CameraError(
                    "camera.wrong_size",
                    "The camera gives frames of another size than the line; set the camera back.",
                    expected=f"{self._size[0]} x {self._size[1]} px",
                    got=f"{width} x {height} px",
                )
                self._fresh.notify()
                return
            self.counters.frames += 1
            if self._frame is not None:
                self.counters.dropped += 1
            self._frame = Frame(image, self._number, exposed_s, self.encoder.position_mm(exposed_s))
            self._fresh.notify()

    def _report(self, generation: int, problem: CameraError) -> None:
        with self._fresh:
            if generation == self._generation:
                self._problem = problem
                self._fresh.notify()

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`; never blocks longer than `timeout_s`.

        Raises:
            CameraError: `camera.absent`, `camera.stalled`, `camera.failed`: the next call tries again with a new
                reader. `camera.wrong_size`: the reader goes on. `camera.stuck`: this process cannot open the device
                any more.
        """
        with self._fresh:
            if self._frame is None and self._problem is None:
                self._fresh.wait(timeout_s)
            frame, self._frame = self._frame, None
            problem, self._problem = self._problem, None
            patience_s = self._patience_s
            stalled = self._clock() - self._last_s > patience_s
        if problem is not None and problem.code == "camera.wrong_size":
            raise problem
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
        return frame

    @property
    def frames_dropped(self) -> int:
        """Frames replaced by fresher ones before they were read."""
        return self.counters.dropped

    @property
    def frames_bad(self) -> int:
        """Frames that could not be used: damaged, or of another size."""
        return self.counters.corrupt + self.counters.wrong_size

    def close(self) -> None:
        """Ends the reader and waits a moment for it; a thread that hangs in the driver is left behind."""
        self._generation += 1
        until_s = time.monotonic() + _LEAVE_S
        for reader in self._readers:
            reader.join(max(0.0, until_s - time.monotonic()))


def left_behind() -> bool:
    """Returns whether a reader thread still runs, although its camera was closed or abandoned."""
    return any(thread.name.startswith(READER) for thread in threading.enumerate())


class Backlog:
    """Separates old frames of a driver's buffer from fresh ones: old ones come at once, fresh ones are waited for.

    It is in force after opening and after a gap, and ends with the first frame that had to be waited for.
    """

    def __init__(self, period_s: float, now_s: float) -> None:
        self._period_s, self._since_s = period_s, now_s
        self._draining = True

    def holds(self, began_s: float, ended_s: float) -> bool:
        """Returns whether a frame that was requested and given at these times is old."""
        took_s = ended_s - began_s
        if took_s > _GAP_PERIODS * self._period_s and not self._draining:
            self._draining, self._since_s = True, ended_s
            return False
        if self._draining and (took_s >= 0.5 * self._period_s or ended_s - self._since_s > _BACKLOG_S):
            self._draining = False
        return self._draining


def absent(source: str, expected: str, got: str) -> CameraError:
    """Returns the error for a camera that is not there."""
    return CameraError(
        "camera.absent", f"No camera at {source}; check the path, the cable or the address.", expected=expected, got=got
    )


def _bgr(image: Any) -> Image:
    """Returns a device's picture as uint8 (H, W, 3) BGR.

    Raises:
        CameraError: `camera.unsupported_depth`: the device gives raw numbers of more than eight bits.
    """
    picture = np.asarray(image)
    if picture.dtype != np.uint8:
        raise CameraError(
            "camera.unsupported_depth",
            "The camera gives more than 8 bits per channel; set its pixel format to 8 bits.",
            expected="uint8",
            got=str(picture.dtype),
        )
    if picture.ndim == 2 or picture.shape[2] == 1:
        return np.asarray(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR), np.uint8)
    return picture
