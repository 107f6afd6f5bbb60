"""Handing shots to a device ahead of time: a bounded queue, a thread of its own, and nothing sent too late.

The line only puts a shot into the queue. The thread writes it and tries again while the device does not answer, until
the item has passed: from then on the shot would hit the next item, so it is dropped and counted.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.interfaces import Encoder, Shot
from models.errors import UnavailableError
from models.histogram import Histogram

log = logging.getLogger("sortline.drivers")
_REMEMBERED: Final = 1024
_RETRY_S: Final = 0.02
_IDLE_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Announced:
    """A shot on its way to the device."""

    shot: Shot
    sequence: int
    """Counts the announced shots from 1."""
    position_mm: float
    """Belt position when it was announced."""
    at_s: float
    """When it was announced, monotonic seconds."""


class ShotQueue:
    """The queue between the line and a device.

    Args:
        send: Writes one shot; raises UnavailableError when it should be tried again. Called by one thread.
        belt: Position of the belt, by which an item has passed or not.
        limit: Most shots that wait.
        late_mm: A shot is still sent when its item has passed by no more than this.
        clock: Monotonic seconds, the belt's clock.
    """

    def __init__(
        self,
        send: Callable[[Announced], None],
        belt: Encoder,
        *,
        limit: int = 256,
        late_mm: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send, self._belt, self._clock = send, belt, clock
        self._limit, self._late_mm = limit, late_mm
        self._waiting: deque[Announced] = deque()
        self._known: OrderedDict[tuple[int, str, int], None] = OrderedDict()
        self._wake = threading.Condition()
        self._sequence = 0
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._write_ms, self._handover_ms = Histogram(), Histogram()
        self.counters: Counter[str] = Counter()
        """announced, sent, repeated, refused (queue full), late, retried, failed"""

    def offer(self, shot: Shot, position_mm: float) -> bool:
        """Queues a shot once; False when it is too late or the queue is full. Never waits for the device."""
        key = (shot.lane, shot.outlet, shot.item_id)
        if self._passed(shot, position_mm):
            self.counters["late"] += 1
            return False
        at_s = self._clock()
        with self._wake:
            if key in self._known:
                self.counters["repeated"] += 1
                return True
            if len(self._waiting) >= self._limit:
                self.counters["refused"] += 1
                return False
            self._known[key] = None
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            self._sequence += 1
            self._waiting.append(Announced(shot, self._sequence, position_mm, at_s))
            self.counters["announced"] += 1
            self._wake.notify()
        return True

    def _passed(self, shot: Shot, position_mm: float) -> bool:
        return not position_mm <= shot.target_mm + self._late_mm

    def step(self) -> float:
        """Sends what waits; returns seconds until the next attempt."""
        while True:
            with self._wake:
                if not self._waiting:
                    return _IDLE_S
                entry = self._waiting[0]
            began_s = self._clock()
            if self._passed(entry.shot, self._belt.position_mm(began_s)):
                self._done(entry, "late")
                continue
            try:
                self._send(entry)
            except UnavailableError as error:
                if not self.counters["retried"]:
                    log.warning("%s", error)
                with self._wake:
                    self.counters["retried"] += 1
                return _RETRY_S
            except Exception:
                log.exception("a shot could not be handed over: item=%s", entry.shot.item_id)
                self._done(entry, "failed")
                continue
            ended_s = self._clock()
            with self._wake:
                self._write_ms.add((ended_s - began_s) * 1000.0)
                self._handover_ms.add((ended_s - entry.at_s) * 1000.0)
            self._done(entry, "sent")

    def _done(self, entry: Announced, how: str) -> None:
        with self._wake:
            if self._waiting and self._waiting[0] is entry:
                self._waiting.popleft()
            self.counters[how] += 1

    @property
    def write_ms(self) -> Histogram:
        """Milliseconds that each successful write took; a copy."""
        with self._wake:
            return Histogram(zero=self._write_ms.zero, buckets=dict(self._write_ms.buckets))

    @property
    def handover_ms(self) -> Histogram:
        """Milliseconds from announcement to the end of the write; a copy."""
        with self._wake:
            return Histogram(zero=self._handover_ms.zero, buckets=dict(self._handover_ms.buckets))

    @property
    def waiting(self) -> int:
        """Shots in the queue."""
        return len(self._waiting)

    def start(self, name: str) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            pause_s = self.step()
            with self._wake:
                if not self._stopping and (not self._waiting or pause_s <= _RETRY_S):
                    self._wake.wait(pause_s)

    def close(self) -> None:
        """Ends the thread; what still waits is not sent. May be called twice."""
        with self._wake:
            self._stopping = True
            self._waiting.clear()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(3.0)
