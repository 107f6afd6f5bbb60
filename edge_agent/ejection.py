"""From verdict to valve: a queue ordered by belt position, fired by a thread of its own.

Targets are belt millimetres, not times: when the belt stops, slows or restarts, nothing needs correcting. A verdict
that comes after its item has passed is never fired late (it would hit the next item): it is refused and counted.
"""

import heapq
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from edge_agent.seams import Ejector, Encoder, Shot

log = logging.getLogger("sortline.ejection")
_NEAR_S: Final = 0.002
_LONGEST_NAP_S: Final = 0.05
_MAX_WAITING: Final = 4096


class EjectionQueue:
    """Shots that wait for their belt position.

    Args:
        encoder: Where the belt is.
        ejector: What fires.
        lead_ms: Time from command to effect of the valves.
        clock: Monotonic seconds, the encoder's clock.
    """

    def __init__(
        self, encoder: Encoder, ejector: Ejector, *, lead_ms: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._encoder, self._ejector, self._clock = encoder, ejector, clock
        self._lead_s = lead_ms / 1000.0
        self._heap: list[tuple[float, int, Shot]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.fired = 0
        self.late = 0
        """Shots refused because their position had passed when they came."""
        self.refused = 0
        """Shots refused because the queue was full."""
        self.failed = 0
        """Shots the ejector's driver broke on."""

    def schedule(self, shot: Shot) -> bool:
        """Queues a shot; False when it comes too late (the item goes to the late outlet). Never blocks for long."""
        now = self._clock()
        if self._encoder.position_mm(now + self._lead_s) >= shot.target_mm:
            self.late += 1
            return False
        with self._wake:
            if len(self._heap) >= _MAX_WAITING:
                self.refused += 1
                return False
            heapq.heappush(self._heap, (shot.target_mm, shot.item_id, shot))
            self._wake.notify()
        return True

    def run_to(self, from_s: float, to_s: float) -> None:
        """Fires what falls due between two moments, in steps of 1 ms: for lines that run in virtual time."""
        steps = max(1, round((to_s - from_s) / 0.001)) if self._heap else 1
        for step in range(1, steps + 1):
            self.fire_due(from_s + (to_s - from_s) * step / steps)

    def fire_due(self, at_s: float | None = None) -> float:
        """Fires everything whose position has come; returns seconds until the next may be due (bounded)."""
        while True:
            now = self._clock() if at_s is None else at_s
            position_mm = self._encoder.position_mm(now + self._lead_s)
            with self._wake:
                if not self._heap:
                    return _LONGEST_NAP_S
                missing_mm = self._heap[0][0] - position_mm
                if missing_mm > 0.0:
                    speed = self._encoder.speed_mm_s()
                    wait_s = missing_mm / speed if speed > 1.0 else _LONGEST_NAP_S
                    return min(max(wait_s, 0.0), _LONGEST_NAP_S)
                shot = heapq.heappop(self._heap)[2]
            self._fire(shot, now)

    def _fire(self, shot: Shot, now: float) -> None:
        try:
            self._ejector.fire(shot, now)
            self.fired += 1
        except Exception:
            self.failed += 1
            log.exception("ejector failed lane=%s outlet=%s item=%s", shot.lane, shot.outlet, shot.item_id)

    def start(self) -> None:
        """Starts the thread that fires."""
        self._thread = threading.Thread(target=self._run, name="ejection", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            wait_s = self.fire_due()
            with self._wake:
                if self._stopping:
                    return
                # Sleep until just before the target, then in steps of 2 ms: no busy loop, at most 2 mm at 1 m/s.
                nap_s = wait_s - _NEAR_S if wait_s > 2 * _NEAR_S else min(wait_s, _NEAR_S)
                self._wake.wait(max(nap_s, 0.0002))

    def stop(self) -> None:
        """Ends the thread within 100 ms; what still waits is not fired."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    @property
    def waiting(self) -> int:
        """Shots in the queue."""
        return len(self._heap)
