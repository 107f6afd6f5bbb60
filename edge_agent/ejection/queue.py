"""From verdict to valve: a queue ordered by belt position, fired by a thread of its own.

Targets are belt millimetres, not times: when the belt stops, slows or restarts, nothing needs correcting. A verdict
that comes after its item has passed is never fired late (it would hit the next item): it is refused and counted; and
a shot whose moment passed while the process was held up is dropped behind its fire window, for the same reason.
Two items closer than the ejector's pitch are taken by one long opening, or the second one goes to the late outlet.
"""

import heapq
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.interfaces import AheadEjector, Ejector, Encoder, Shot, Sighting
from models.histogram import Histogram

log = logging.getLogger("sortline.ejection")
_NEAR_S: Final = 0.002
_LONGEST_NAP_S: Final = 0.05
_MAX_WAITING: Final = 1024
"""Most shots that wait for one ejector."""


def _become_urgent() -> bool:
    """Gives the calling thread a real-time priority; needs root or a limit (`LimitRTPRIO=10` in the unit).

    The thread sleeps except for microseconds, so nothing starves. Without it, a line that shares one core with its own
    inference fires up to a scheduler's slice late: p99 3 ms instead of 1 ms, measured.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(10))
    except (AttributeError, OSError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """Rules by which ejectors are driven."""

    lead_ms: float = 0.0
    """From command to effect of the valves, until an ejector's own lead is learnt."""
    window_mm: float = 20.0
    """A shot that could only be fired this far behind its place is dropped: it would hit the gap or the next item."""
    pitch_mm: float = 0.0
    """Closest distance of two shots of one ejector; 0 = no limit."""
    close: Literal["hold", "skip"] = "hold"
    """Two items closer than the pitch: hold the valve open over both, or let the second one pass."""


class EjectionQueue:
    """Shots that wait for their belt position.

    Args:
        encoder: Position of the belt.
        ejector: Device that fires.
        lead_ms: As in `EjectionRules`, where no other rule is needed.
        clock: Monotonic seconds, the encoder's clock.
        rules: Rules by which ejectors are driven.
        ledger: Takes the shots and returns the learnt leads.
    """

    def __init__(
        self,
        encoder: Encoder,
        ejector: Ejector,
        *,
        lead_ms: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        rules: EjectionRules | None = None,
        ledger: ConfirmationLedger | None = None,
    ) -> None:
        self._encoder, self._ejector, self._clock = encoder, ejector, clock
        self.rules = rules or EjectionRules(lead_ms=lead_ms)
        self.ledger = ledger
        self._leads: dict[tuple[int, str], float] = {}
        self._heaps: dict[tuple[int, str], list[tuple[float, int, Shot]]] = {}
        self._last_mm: dict[tuple[int, str], float] = {}
        self._fired: deque[tuple[Shot, float, float, float]] = deque(maxlen=_MAX_WAITING)
        ahead_mm = getattr(ejector, "ahead_mm", 0.0)
        self._ahead: AheadEjector | None = cast("AheadEjector", ejector) if ahead_mm > 0.0 else None
        self._announced: dict[int, None] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.real_time = False
        """Whether the thread that fires has a real-time priority."""
        self.jitter_ms = Histogram()
        """How late after its place each shot was commanded, milliseconds; emptied once per window."""
        self.fired = 0
        self.late = 0
        """Shots refused because their position had passed when they came."""
        self.overdue = 0
        """Shots dropped because they could only be fired behind their window."""
        self.close = 0
        """Shots refused because the ejector could not recover in time (rule `skip`)."""
        self.refused = 0
        """Shots refused because the queue was full."""
        self.failed = 0
        """Shots the ejector's driver broke on."""

    def counts(self) -> dict[str, int]:
        """Returns the outcome of the shots since the start."""
        return {
            "fired": self.fired,
            "late": self.late,
            "overdue": self.overdue,
            "close": self.close,
            "refused": self.refused,
            "failed": self.failed,
        }

    def leads_ms(self) -> dict[str, float]:
        """Returns `lane/outlet` -> learnt lead in milliseconds, for the ejectors that have one."""
        return {f"{lane}/{outlet}": round(lead_s * 1000.0, 2) for (lane, outlet), lead_s in self._leads.items()}

    def lead_s(self, lane: int, outlet: str) -> float:
        """Returns the seconds from command to effect of this ejector: learnt, or as configured."""
        return self._leads.get((lane, outlet), self.rules.lead_ms / 1000.0)

    def schedule(self, shot: Shot) -> bool:
        """Queues a shot; False when it cannot be fired (the item goes to the late outlet). Never blocks for long."""
        lead_s = self.lead_s(shot.lane, shot.outlet)
        if self._encoder.position_mm(self._clock() + lead_s) >= shot.target_mm:
            self.late += 1
            return False
        key = (shot.lane, shot.outlet)
        near = abs(shot.target_mm - self._last_mm.get(key, -1e12)) < self.rules.pitch_mm
        if near and self.rules.close == "skip":
            self.close += 1
            return False
        with self._wake:
            heap = self._heaps.setdefault(key, [])
            if len(heap) >= _MAX_WAITING:
                self.refused += 1
                return False
            self._last_mm[key] = shot.target_mm
            heapq.heappush(heap, (shot.target_mm, shot.item_id, replace(shot, joined=True) if near else shot))
            self._wake.notify()
        return True

    def learn(self, sightings: list[Sighting], belt_mm: float, *, until_s: float) -> list[tuple[tuple[int, str], str]]:
        """Pairs what was fired with what was seen and takes the leads learnt from it; called once per frame.

        Returns:
            Ejectors whose trouble is new, as `ConfirmationLedger.settle`.
        """
        ledger = self.ledger
        if ledger is None:
            return []
        while self._fired and self._fired[0][1] <= until_s:
            ledger.fired(*self._fired.popleft())
        for sighting in sightings:
            ledger.seen(sighting)
        news = ledger.settle(belt_mm)
        self._leads = {key: health.lead_s for key, health in ledger.ejectors.items() if health.lead_s is not None}
        return news

    def run_to(self, from_s: float, to_s: float) -> None:
        """Fires what falls due between two moments, in steps of 1 ms: for lines that run in virtual time."""
        steps = max(1, round((to_s - from_s) / 0.001)) if self.waiting else 1
        for step in range(1, steps + 1):
            self.fire_due(from_s + (to_s - from_s) * step / steps)

    def fire_due(self, at_s: float | None = None) -> float:
        """Fires everything whose position has come; returns seconds until the next may be due (bounded)."""
        wait_s = _LONGEST_NAP_S
        if self._ahead is not None:
            self._announce(self._ahead, self._clock() if at_s is None else at_s)
        for key in tuple(self._heaps):
            while (missing_s := self._fire_first(key, at_s)) <= 0.0:
                pass
            wait_s = min(wait_s, missing_s)
        return wait_s

    def _announce(self, ejector: AheadEjector, now: float) -> None:
        """Hands shots to a device that does the last millimetres itself, once they are near enough."""
        position_mm = self._encoder.position_mm(now)
        with self._wake:
            near = [
                shot
                for heap in self._heaps.values()
                for target_mm, _, shot in heap
                if target_mm - position_mm <= ejector.ahead_mm and shot.item_id not in self._announced
            ]
        for shot in sorted(near, key=lambda shot: shot.target_mm):
            # A refused shot is tried again by `fire`, which counts it as failed when it is refused once more.
            self._announced[shot.item_id] = None
            ejector.announce(shot, position_mm)
        while len(self._announced) > _MAX_WAITING:
            self._announced.pop(next(iter(self._announced)))

    def _fire_first(self, key: tuple[int, str], at_s: float | None) -> float:
        """Fires or drops the first shot of one ejector if its place has come; returns seconds until then."""
        now = self._clock() if at_s is None else at_s
        lead_s, speed = self.lead_s(*key), self._encoder.speed_mm_s()
        with self._wake:
            heap = self._heaps[key]
            if not heap:
                return _LONGEST_NAP_S
            shot = heap[0][2]
            missing_mm = shot.target_mm - self._encoder.position_mm(now + lead_s)
            if missing_mm > 0.0:
                return min(missing_mm / speed, _LONGEST_NAP_S) if speed > 1.0 else _LONGEST_NAP_S
            heapq.heappop(heap)
        if -missing_mm > self.rules.window_mm:
            self.overdue += 1
            log.warning("shot dropped %.0f mm behind its place lane=%s", -missing_mm, shot.lane)
        else:
            self._fire(shot, now, speed)
            self.jitter_ms.add(-missing_mm / speed * 1000.0 if speed > 1.0 else 0.0)
        return 0.0

    def _fire(self, shot: Shot, now: float, speed_mm_s: float) -> None:
        try:
            self._ejector.fire(shot, now)
            self.fired += 1
        except Exception:
            self.failed += 1
            log.exception("ejector failed lane=%s outlet=%s item=%s", shot.lane, shot.outlet, shot.item_id)
            return
        if self.ledger is not None and not shot.blind:
            self._fired.append((shot, now, self._encoder.position_mm(now), speed_mm_s))

    def start(self) -> None:
        """Starts the thread that fires."""
        self._thread = threading.Thread(target=self._run, name="ejection", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.real_time = _become_urgent()
        while True:
            wait_s = self.fire_due()
            with self._wake:
                if self._stopping:
                    return
                # Sleep until just before the target, then in steps of 2 ms: no busy loop, at most 2 mm at 1 m/s.
                nap_s = wait_s - _NEAR_S if wait_s > 2 * _NEAR_S else min(wait_s, _NEAR_S)
                self._wake.wait(max(nap_s, 0.0002))

    def stop(self) -> None:
        """Ends the thread within 100 ms; shots that still wait are not fired."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    @property
    def waiting(self) -> int:
        """Number of shots in the queue."""
        return sum(len(heap) for heap in tuple(self._heaps.values()))
