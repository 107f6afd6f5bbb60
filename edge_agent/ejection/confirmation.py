"""Confirms shots by what a photo-eye or a second camera behind each ejector sees.

The ledger pairs sightings with shots by belt position: *confirmed*, *missed* (no sighting in time), *double* (a second
sighting for one shot) and *unexpected* (a sighting without a shot). From the pairs it learns the lead of each ejector,
the time from command to effect, which `EjectionQueue` fires ahead by (from the configured lead on, which must be near
enough for the valve to hit at all); and it sees a valve that weakens before it
fails: more misses than the trade accepts, or an effect that comes ever later.

A miss is decided in belt millimetres, so a stopped belt decides nothing. Everything is bounded.
"""

import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from edge_agent.interfaces import Shot, Sighting

EjectorKey = tuple[int, str]
"""(lane, outlet)."""

ACCEPTED_MISS_SHARE: Final = 0.01
"""More than 99 % of items in the right outlet is the trade's figure for a good machine; a valve may not spend more."""
_RECENT: Final = 100
_LEADS: Final = 31
_MIN_LEADS: Final = 7
_Z: Final = 2.58
"""Two-sided 99 %."""
_SLOWER_S: Final = 0.008
"""At 1 m/s a valve this much later hits 8 mm off, a third of a nozzle."""
_MAX_OPEN: Final = 256
_MAX_LEAD_S: Final = 0.2


@dataclass(slots=True)
class _Fired:
    shot: Shot
    at_s: float
    speed_mm_s: float
    fired_mm: float
    sightings: int = 0


@dataclass(slots=True)
class EjectorHealth:
    """Counts, recent hits and learnt delays of one ejector."""

    counts: Counter[str] = field(default_factory=Counter)
    """`fired`, `confirmed`, `missed`, `double`, `unexpected`, since the start."""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Whether each of the last shots hit."""
    delays_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LEADS))
    reference_s: float | None = None
    """Delay when the ejector was first known: what a slowing valve is compared with."""
    warned: str = ""

    @property
    def lead_s(self) -> float | None:
        """Median delay from command to effect; None until it is known."""
        return statistics.median(self.delays_s) if len(self.delays_s) >= _MIN_LEADS else None

    @property
    def miss_share(self) -> tuple[float, float]:
        """Share of the recent shots that missed, and its lower 99 % limit (Wilson 1927)."""
        shots, missed = len(self.recent), sum(not hit for hit in self.recent)
        if not shots:
            return 0.0, 0.0
        p, z2 = missed / shots, _Z * _Z
        centre = p + z2 / (2 * shots)
        spread = _Z * math.sqrt(p * (1 - p) / shots + z2 / (4 * shots * shots))
        return p, max(0.0, (centre - spread) / (1 + z2 / shots))

    def trouble(self) -> str:
        """`weak` when it misses more than accepted beyond chance, `slow` when its effect comes later than it did."""
        if self.miss_share[1] > ACCEPTED_MISS_SHARE:
            return "weak"
        lead = self.lead_s
        if lead is not None and self.reference_s is not None and lead - self.reference_s > _SLOWER_S:
            return "slow"
        return ""


class ConfirmationLedger:
    """Pairs shots with sightings. One thread calls it.

    Args:
        eye_mm: Distance from each outlet to its photo-eye along the belt's direction.
        tolerance_mm: Half the stretch in which a sighting belongs to a shot.
    """

    def __init__(self, *, eye_mm: float = 0.0, tolerance_mm: float = 45.0) -> None:
        self._eye_mm, self._tolerance_mm = eye_mm, tolerance_mm
        self._open: dict[EjectorKey, deque[_Fired]] = {}
        self.ejectors: dict[EjectorKey, EjectorHealth] = {}

    def fired(self, shot: Shot, at_s: float, fired_mm: float, speed_mm_s: float) -> None:
        """Notes a shot that was commanded at monotonic `at_s`, with the belt at `fired_mm` and `speed_mm_s` fast."""
        key = (shot.lane, shot.outlet)
        waiting = self._open.setdefault(key, deque(maxlen=_MAX_OPEN))
        waiting.append(_Fired(shot, at_s, speed_mm_s, fired_mm))
        self._health(key).counts["fired"] += 1

    def seen(self, sighting: Sighting) -> None:
        """Pairs a sighting with the nearest shot of its ejector."""
        key = (sighting.lane, sighting.outlet)
        place_mm = sighting.belt_mm - self._eye_mm
        health = self._health(key)
        near = [f for f in self._open.get(key, ()) if abs(f.shot.target_mm - place_mm) <= self._tolerance_mm]
        if not near:
            health.counts["unexpected"] += 1
            return
        shot = min(near, key=lambda f: (f.sightings > 0, abs(f.shot.target_mm - place_mm)))
        shot.sightings += 1
        if shot.sightings > 1:
            health.counts["double"] += 1
            return
        health.counts["confirmed"] += 1
        health.recent.append(True)
        # A delay in belt millimetres is a time only while the belt runs evenly.
        delay_s = (place_mm - shot.fired_mm) / shot.speed_mm_s if shot.speed_mm_s > 100.0 else -1.0
        if 0.0 <= delay_s <= _MAX_LEAD_S:
            health.delays_s.append(delay_s)
            if health.reference_s is None and len(health.delays_s) == _LEADS:
                health.reference_s = health.lead_s

    def settle(self, belt_mm: float) -> list[tuple[EjectorKey, str]]:
        """Decides the shots whose place lies behind the eye.

        Returns:
            Ejectors whose state changed, with `weak`, `slow` or `` (recovered).
        """
        news: list[tuple[EjectorKey, str]] = []
        for key, waiting in self._open.items():
            health = self.ejectors[key]
            while waiting and belt_mm > waiting[0].shot.target_mm + self._eye_mm + 2.0 * self._tolerance_mm:
                if not waiting.popleft().sightings:
                    health.counts["missed"] += 1
                    health.recent.append(False)
            trouble = health.trouble()
            if trouble != health.warned:
                health.warned = trouble
                news.append((key, trouble))
        return news

    def lead_s(self, lane: int, outlet: str) -> float | None:
        """Returns the learnt lead of an ejector, seconds; None until it is known."""
        health = self.ejectors.get((lane, outlet))
        return health.lead_s if health else None

    def counts(self) -> dict[str, int]:
        """Returns `lane/outlet/what` -> count since the start."""
        return {
            f"{lane}/{outlet}/{name}": count
            for (lane, outlet), health in self.ejectors.items()
            for name, count in health.counts.items()
        }

    def _health(self, key: EjectorKey) -> EjectorHealth:
        return self.ejectors.setdefault(key, EjectorHealth())
