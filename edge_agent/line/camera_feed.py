"""The camera thread of a line: it reads frames into a mailbox of one, where the newest frame replaces the one before.

A frame that was replaced before anybody sorted it is a dropped frame; the core counts those by their numbers. A frame
that `CameraHealth` refuses never reaches the mailbox; it is counted as bad, and the core is given the number of such
frames so that it does not take them for dropped ones.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

from edge_agent.health.camera import CameraHealth
from edge_agent.interfaces import Frame, FrameSource
from edge_agent.line.counters import LineCounter
from models.errors import CameraError

_READ_S: Final = 0.25
"""Longest wait for one frame; the thread looks at the stop event in between."""
_REOPEN_S: Final = 1.0
"""Pause between two attempts to open a camera that is absent."""


class CameraFeed:
    """Reads one camera; `run` is the body of its thread, `take` belongs to the sorting thread.

    Args:
        source: The camera.
        health: Accepts or refuses each frame and names the camera's faults.
        counter: Counts refused frames as `frames_bad`.
        stop: Set when the line ends.
        frames_bad: Returns how many frames the camera itself could not use so far.
    """

    def __init__(
        self,
        source: FrameSource,
        health: CameraHealth,
        counter: LineCounter,
        stop: threading.Event,
        *,
        frames_bad: Callable[[], int] = lambda: 0,
    ) -> None:
        self._frames_bad, self._bad_seen = frames_bad, 0
        self._source, self._health, self._counter, self._stop = source, health, counter, stop
        self._mailbox = threading.Condition()
        self._newest: tuple[Frame, int] | None = None
        """The newest frame, and the number of frames refused before it."""
        self._refused = 0
        self.ended = False
        """No further frame will come."""
        self.stuck = False
        """The camera hangs in its driver; only a new process can open it again."""

    def run(self) -> None:
        """Reads until the line stops or the camera ends."""
        while not self._stop.is_set():
            try:
                frame = self._source.read(_READ_S)
            except CameraError as error:
                self._count_bad()
                if error.code == "camera.ended":
                    self.end()
                    return
                self._health.failed(error, time.monotonic())
                if error.code == "camera.stuck":
                    self.stuck = True
                    self.end()
                    return
                if error.code != "camera.stalled":
                    self._stop.wait(_REOPEN_S)
                continue
            self._count_bad()
            if frame is None:
                self._health.silent(time.monotonic())
            elif self._health.take(frame, time.monotonic()):
                with self._mailbox:
                    self._newest = frame, self._refused
                    self._mailbox.notify()
            else:
                self._refused += 1
                self._counter.count("frames_bad")

    def _count_bad(self) -> None:
        """Counts the frames that the camera itself could not use since the last call."""
        bad = self._frames_bad()
        if bad > self._bad_seen:
            self._refused += bad - self._bad_seen
            self._counter.count("frames_bad", bad - self._bad_seen)
            self._bad_seen = bad

    def take(self, timeout_s: float) -> tuple[Frame, int] | None:
        """Returns the newest frame and how many frames were refused since the start, or None after `timeout_s`."""
        with self._mailbox:
            if self._newest is None and not self.ended:
                self._mailbox.wait(timeout_s)
            newest, self._newest = self._newest, None
        return newest

    def end(self) -> None:
        """Marks the feed as ended and wakes the sorting thread."""
        with self._mailbox:
            self.ended = True
            self._mailbox.notify()
