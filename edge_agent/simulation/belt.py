"""Moves the simulated belt: its position by time, through ramps and stops."""

from collections import deque
from dataclasses import dataclass
from typing import Final

_RAMP_S: Final = 0.3


@dataclass(slots=True)
class _Segment:
    """The motion from `at_s` on: constant acceleration for `ramp_s`, then constant speed."""

    at_s: float
    at_mm: float
    speed: float
    target: float
    ramp_s: float

    def position(self, now: float) -> float:
        elapsed = now - self.at_s
        ramp = min(max(elapsed, 0.0), self.ramp_s)
        gain = (self.target - self.speed) * ramp * ramp / (2.0 * self.ramp_s) if self.ramp_s else 0.0
        return self.at_mm + self.speed * min(elapsed, ramp) + gain + self.target * max(elapsed - self.ramp_s, 0.0)

    def speed_at(self, now: float) -> float:
        if not self.ramp_s or now - self.at_s >= self.ramp_s:
            return self.target
        return self.speed + (self.target - self.speed) * max(now - self.at_s, 0.0) / self.ramp_s


class BeltMotion:
    """The position of a belt that changes its speed by ramps.

    Args:
        start_s: Time at which it starts, at position 0.
        speed_mm_s: Speed at that time.
    """

    def __init__(self, start_s: float, speed_mm_s: float) -> None:
        self._segments = deque([_Segment(start_s, 0.0, speed_mm_s, speed_mm_s, 0.0)], maxlen=64)
        self._wanted_mm_s = speed_mm_s
        self._held = False

    def position_mm(self, at_s: float) -> float:
        """Returns the position at a past, present or future time, millimetres."""
        segments = self._segments
        for segment in reversed(tuple(segments)):
            if at_s >= segment.at_s:
                return segment.position(at_s)
        return segments[0].position(at_s)

    def speed_mm_s(self, at_s: float) -> float:
        """Returns the speed at a time not before the last change, millimetres per second."""
        return self._segments[-1].speed_at(at_s)

    def drive(self, speed_mm_s: float, now_s: float) -> None:
        """Ramps to a speed, at once or as soon as the belt is no longer held."""
        self._wanted_mm_s = speed_mm_s
        self._ramp(now_s)

    def hold(self, now_s: float, *, held: bool) -> None:
        """Holds the belt, or lets it run again."""
        self._held = held
        self._ramp(now_s)

    def _ramp(self, now_s: float) -> None:
        last = self._segments[-1]
        target = 0.0 if self._held else self._wanted_mm_s
        if target != last.target:
            self._segments.append(_Segment(now_s, last.position(now_s), last.speed_at(now_s), target, _RAMP_S))
