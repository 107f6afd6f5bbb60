"""Belt position from a counter that wraps around: pure, fed with readings, asked at any moment.

Readings come late, seldom or not at all; the line asks at every frame. The answer comes from the last readings without
waiting: between two of them it is interpolated, after the last it is extrapolated for a bounded time. When readings
stop, the belt counts as standing, because an unknown belt must not fire valves.
"""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from edge_agent.interfaces import Encoder
from models.errors import ConfigError

_HISTORY: Final = 32
_SPEED_OVER_S: Final = 0.1
_SLACK_PULSES: Final = 2


class PulseBelt(Encoder, Protocol):
    """An encoder that also gives the count of pulses at each position."""

    def pulses_at(self, position_mm: float) -> int | None:
        """Returns the count at a belt position; None while no count is known or when the position is too far away."""

    def position_of(self, pulses: int) -> float | None:
        """Returns the belt position of a count, the one nearest to the present; None while no count is known."""


@dataclass(frozen=True, slots=True)
class _Track:
    """What is known of the belt; replaced as a whole, so readers need no lock."""

    pulses: int
    times_s: tuple[float, ...]
    places_mm: tuple[float, ...]
    speed_mm_s: float


class PulseEncoder:
    """Position and speed from readings of a counter that wraps around. One thread feeds it, any may ask.

    A reading that the belt cannot have reached is kept back: if the next one confirms it, the counter was set or
    restarted, and the position goes on from where it was thought to be (`lost_track`: items on the belt are then
    misplaced by what was missed); otherwise it was a glitch.

    Args:
        mm_per_pulse: Belt travel per pulse; negative when the encoder is mounted the other way round.
        bits: Width of the counter.
        stale_ms: Without a reading for so long, the speed is 0.
        extrapolate_ms: Longest time for which the last speed is used.
        max_mm_s: A belt is never faster.
        clock: Monotonic seconds; only `speed_mm_s`, `stale` and `stale_count` ask it.
    """

    def __init__(
        self,
        *,
        mm_per_pulse: float,
        bits: Literal[16, 32] = 32,
        stale_ms: float = 250.0,
        extrapolate_ms: float = 100.0,
        max_mm_s: float = 5000.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not math.isfinite(mm_per_pulse) or mm_per_pulse == 0.0:
            raise ConfigError(
                "driver.bad_option",
                "A pulse must move the belt.",
                expected="mm_per_pulse other than 0",
                got=mm_per_pulse,
            )
        self._mm, self._modulus = mm_per_pulse, 1 << bits
        self._stale_s = stale_ms / 1000.0
        self._extrapolate_s = min(extrapolate_ms, stale_ms) / 1000.0
        self._max_mm_s, self._clock = max_mm_s, clock
        self._track: _Track | None = None
        self._suspect: tuple[int, float] | None = None
        self.counters: Counter[str] = Counter()
        """readings, bad_value, not_later, implausible, lost_track, gaps"""

    def feed(self, pulses: object, at_s: float) -> bool:
        """Takes a reading made at the monotonic time `at_s`; returns False when it is refused. Never raises."""
        counted = isinstance(pulses, int) and not isinstance(pulses, bool) and 0 <= pulses < self._modulus
        if not isinstance(pulses, int) or not counted or not math.isfinite(at_s):
            self.counters["bad_value"] += 1
            return False
        track = self._track
        if track is None:
            self._begin(pulses, at_s, 0.0)
            return True
        elapsed_s = at_s - track.times_s[-1]
        if elapsed_s <= 0.0:
            self.counters["not_later"] += 1
            return False
        if elapsed_s > self._stale_s:
            self.counters["gaps"] += 1
        if self._max_mm_s * elapsed_s >= abs(self._mm) * self._modulus / 2:
            # The counter may have wrapped unseen, so its value gives no distance.
            return self._restart(pulses, at_s)
        if not self._possible(pulses - track.pulses, elapsed_s):
            return self._doubt(pulses, at_s)
        self._suspect = None
        self._extend(track, pulses, at_s)
        return True

    def _extend(self, track: _Track, pulses: int, at_s: float) -> None:
        times = (*track.times_s[1 - _HISTORY :], at_s)
        places = (
            *track.places_mm[1 - _HISTORY :],
            track.places_mm[-1] + self._mm * self._signed(pulses - track.pulses),
        )
        # Speed over at least 100 ms or two readings: single pulses would make it jump.
        first = min(max(bisect_right(times, at_s - _SPEED_OVER_S) - 1, 0), len(times) - 2)
        speed = (places[-1] - places[first]) / (at_s - times[first])
        self._track = _Track(pulses, times, places, speed)
        self.counters["readings"] += 1

    def _begin(self, pulses: int, at_s: float, place_mm: float) -> None:
        self._suspect = None
        self._track = _Track(pulses, (at_s,), (place_mm,), 0.0)
        self.counters["readings"] += 1

    def _restart(self, pulses: int, at_s: float) -> bool:
        self.counters["lost_track"] += 1
        self._begin(pulses, at_s, self.position_mm(at_s))
        return True

    def _doubt(self, pulses: int, at_s: float) -> bool:
        suspect, self._suspect = self._suspect, (pulses, at_s)
        if suspect is not None and self._possible(pulses - suspect[0], at_s - suspect[1]):
            return self._restart(pulses, at_s)
        self.counters["implausible"] += 1
        return False

    def _signed(self, difference: int) -> int:
        half = self._modulus // 2
        return (difference + half) % self._modulus - half

    def _possible(self, difference: int, elapsed_s: float) -> bool:
        reach_mm = self._max_mm_s * elapsed_s + _SLACK_PULSES * abs(self._mm)
        return elapsed_s > 0.0 and abs(self._signed(difference) * self._mm) <= reach_mm

    def position_mm(self, at_s: float) -> float:
        """See `Encoder`; 0 before the first reading."""
        track = self._track
        if track is None:
            return 0.0
        times, places = track.times_s, track.places_mm
        if at_s >= times[-1]:
            return places[-1] + track.speed_mm_s * min(at_s - times[-1], self._extrapolate_s)
        k = bisect_right(times, at_s)
        if k == 0:
            return places[0]
        share = (at_s - times[k - 1]) / (times[k] - times[k - 1])
        return places[k - 1] + share * (places[k] - places[k - 1])

    def speed_mm_s(self) -> float:
        """See `Encoder`; 0 when stale."""
        track = self._track
        return 0.0 if track is None or self._old(track) else track.speed_mm_s

    def _old(self, track: _Track) -> bool:
        return self._clock() - track.times_s[-1] > self._stale_s

    @property
    def stale(self) -> bool:
        """Whether there was no believable reading for `stale_ms`."""
        track = self._track
        return track is None or self._old(track)

    @property
    def stale_count(self) -> int:
        """How often readings stopped for longer than `stale_ms`, the present time included."""
        track = self._track
        return self.counters["gaps"] + int(track is not None and self._old(track))

    def pulses_at(self, position_mm: float) -> int | None:
        """See `PulseBelt`."""
        track = self._track
        if track is None or not math.isfinite(position_mm):
            return None
        difference = round((position_mm - track.places_mm[-1]) / self._mm)
        return (track.pulses + difference) % self._modulus if abs(difference) < self._modulus // 2 else None

    def position_of(self, pulses: int) -> float | None:
        """See `PulseBelt`."""
        track = self._track
        if track is None or not 0 <= pulses < self._modulus:
            return None
        return track.places_mm[-1] + self._mm * self._signed(pulses - track.pulses)
