"""Times of exposures, from the timestamps a source gives: those of a file are mended, those of a live camera checked.

A file may repeat a timestamp, jump back where two recordings were joined, or state none at all; a stream may count its
frames at a rate that is not the camera's. What is plausible is kept as it is, so that a lost frame keeps its time; the
rest is replaced and counted.
"""

import math
from collections import deque
from typing import Final

LONGEST_HOLE_S: Final = 60.0
"""A longer step forward in a file is no lost frame but another clock."""
_SAME_S: Final = 1.0e-4
"""Two timestamps closer than this are equal; the finest time base in use is 1/90,000 s."""
_ROOM: Final = 1.2
"""A frame lies between its neighbours when they are this many periods apart."""
_OFTEN: Final = 0.3
"""A file with so large a share of doubled stamps states them in pairs; else a doubled one is an extra frame."""
_STEPS: Final = 31
"""Frames over which steps and doubled stamps are counted."""
_PROVED_S: Final = 3.0
"""A live camera's clock is believed after it kept pace with the local clock for so long."""
_JITTER_S: Final = 0.25
"""Largest difference of the two clocks over that time, and largest delay of a frame: networks buffer less."""
_DRIFT: Final = 2.0e-4
"""Quartz clocks differ by less than 200 millionths; so fast the assumed delay may grow."""


class FileClock:
    """Mends the timestamps of a file, frame by frame. Time begins at 0 with the first frame and never runs back.

    Args:
        period_s: Period of the frames, until it is measured.
    """

    def __init__(self, period_s: float) -> None:
        self._steps: deque[float] = deque([period_s], maxlen=_STEPS)
        self._doubled: deque[bool] = deque(maxlen=_STEPS)
        self._origin_s: float | None = None
        self._last_s = 0.0
        self.mended = 0
        """Number of timestamps that were replaced."""

    @property
    def period_s(self) -> float:
        """Median step of the last frames, seconds."""
        return sorted(self._steps)[len(self._steps) // 2]

    def place(self, stamp_s: float, next_stamp_s: float | None) -> float:
        """Returns the time of a frame, seconds since the first one.

        Args:
            stamp_s: Timestamp of the frame as the file states it.
            next_stamp_s: Timestamp of the frame that follows; None for the last one.
        """
        if self._origin_s is None:
            self._origin_s = stamp_s if math.isfinite(stamp_s) else 0.0
            return 0.0
        step_s = stamp_s - self._origin_s - self._last_s
        ahead_s = math.nan if next_stamp_s is None else next_stamp_s - self._origin_s - self._last_s
        plausible = _SAME_S < ahead_s <= LONGEST_HOLE_S
        spike = plausible and step_s > ahead_s + _SAME_S
        if _SAME_S < step_s <= LONGEST_HOLE_S and not spike:
            self._steps.append(step_s)
            self._doubled.append(False)
            self._last_s += step_s
            return self._last_s
        self.mended += 1
        self._doubled.append(True)
        if plausible:
            # The neighbours are right and this one is not: it lies between them, or shows the moment of the last one.
            often = sum(self._doubled) >= _OFTEN * len(self._doubled)
            self._last_s += ahead_s / 2.0 if spike or often or ahead_s > _ROOM * self.period_s else 0.0
            return self._last_s
        self._last_s += self.period_s
        if math.isfinite(step_s) and abs(step_s) > _SAME_S:
            # Another clock began here, such as that of a second recording joined to the first.
            self._origin_s = stamp_s - self._last_s
        return self._last_s


class CameraClock:
    """The exposure time of a live camera's frames in local monotonic time.

    A frame arrives some time after its exposure, and that delay varies. Where the camera states times that keep pace
    with the local clock, the frame with the smallest delay fixes the relation of the two clocks, and the others follow
    from their timestamps. Until that is proved, or where there are no timestamps, the time of arrival counts.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last_stamp_s = -math.inf
        self._last_s = -math.inf
        self._offset_s: float | None = None
        self.believed = False
        """Whether the camera's own timestamps are in use."""

    def exposure_s(self, stamp_s: float, arrived_s: float) -> float:
        """Returns the exposure time, monotonic seconds; never after `arrived_s` and never before the last one.

        Args:
            stamp_s: Timestamp the camera states, seconds; 0 where it states none.
            arrived_s: Local monotonic time at which the frame arrived.
        """
        at_s = self._by_camera(stamp_s, arrived_s)
        self._last_s = min(max(at_s, self._last_s), arrived_s)
        return self._last_s

    def _by_camera(self, stamp_s: float, arrived_s: float) -> float:
        if not math.isfinite(stamp_s) or stamp_s <= 0.0 or stamp_s <= self._last_stamp_s:
            self._restart()
            return arrived_s
        passed_s = 0.0 if self._first is None else stamp_s - self._last_stamp_s
        self._last_stamp_s = stamp_s
        if self._first is None or self._offset_s is None:
            self._first, self._offset_s = (stamp_s, arrived_s), arrived_s - stamp_s
            return arrived_s
        self._offset_s = min(self._offset_s + _DRIFT * passed_s, arrived_s - stamp_s)
        if stamp_s - self._first[0] >= _PROVED_S:
            apart_s = (arrived_s - self._first[1]) - (stamp_s - self._first[0])
            self.believed = abs(apart_s) <= _JITTER_S
            self._first = (stamp_s, arrived_s)
            if not self.believed:
                self._offset_s = arrived_s - stamp_s
        at_s = stamp_s + self._offset_s
        if arrived_s - at_s > _JITTER_S:
            self._restart()
            return arrived_s
        return at_s if self.believed else arrived_s

    def _restart(self) -> None:
        self._first, self._offset_s, self.believed = None, None, False
        self._last_stamp_s = -math.inf
