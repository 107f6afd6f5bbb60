"""What the line reports to its supervisor: beats every second, windows, faults; sent by a thread of its own.

Any thread may queue a report and never waits for it. The reporter thread may be as slow as the supervisor: what does
not fit into the queue is dropped and counted.
"""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Final

from edge_agent.health.abstain_budget import AbstainWatch
from edge_agent.health.camera import CameraHealth
from edge_agent.interfaces import Encoder
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_protocol import Beat, Faulted, FromLine, Pipe, WindowClosed
from models.errors import SortlineError
from models.messages import Fault, wall_ms
from models.recipe import UNSURE
from models.windows import Window

log = logging.getLogger("sortline.line")
_MAX_REPORTS: Final = 256
_BEAT_S: Final = 1.0
_TURN_S: Final = 0.05
"""Pause between two turns of the reporter: a fault reaches the supervisor at most so much later."""
_MOVING_MM_S: Final = 1.0
"""Below this speed the belt counts as standing."""


class Outbox:
    """Reports that wait for the pipe."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._reports: queue.Queue[FromLine] = queue.Queue(_MAX_REPORTS)
        self.dropped = 0
        """Reports that were lost because the queue was full or the pipe broken."""
        self.orphaned = False
        """The supervisor is gone: nothing is sent any more."""

    def say(self, message: FromLine) -> None:
        """Queues a report; never waits. A full queue drops it, and `dropped` counts it."""
        try:
            self._reports.put_nowait(message)
        except queue.Full:
            self.dropped += 1

    def say_fault(self, code: str, message: str, subject: str = "") -> None:
        """Queues a fault that happens now; `subject` is which of several things of a kind it is about."""
        self.say(Faulted(fault=Fault(code=code, message=message[:600], at_ms=wall_ms()), subject=subject))

    def take(self) -> FromLine | None:
        """Returns the oldest report, or None."""
        try:
            return self._reports.get_nowait()
        except queue.Empty:
            return None

    def drain(self) -> None:
        """Sends what waits; gives up at the first report the supervisor does not take."""
        while not self.orphaned:
            message = self.take()
            if message is None:
                return
            try:
                self._pipe.send(message)
            except SortlineError as error:
                log.warning("report lost: %s", error)
                self.dropped += 1
                return


class Reporter:
    """Makes beats and windows from the state of the line; `run` is the body of its thread.

    Args:
        outbox: Takes the reports.
        counter: Gives windows and live figures.
        health: Gives the camera's fault.
        encoder: Gives the belt's speed.
        core: Returns the core, None before the first frame.
        window_s: Length of a window, seconds.
        boot_id: Of the supervisor; live figures carry it.
    """

    def __init__(
        self,
        outbox: Outbox,
        counter: LineCounter,
        health: CameraHealth,
        encoder: Encoder,
        core: Callable[[], LineCore | None],
        *,
        window_s: float,
        boot_id: str,
    ) -> None:
        self._outbox, self._counter, self._health, self._encoder, self._core = outbox, counter, health, encoder, core
        self._window_s, self._boot_id = window_s, boot_id
        self._abstain = AbstainWatch()
        self._abstain_of = ("", "", "")
        """Bundle, variety and lot whose abstentions are being watched."""

    def run(self, stop: threading.Event) -> None:
        """Reports until the line stops; the last window is closed and sent before the thread ends.

        Cyclic garbage is collected here once per window, because the collector is off while the line sorts.
        """
        next_beat = next_window = time.monotonic()
        next_window += self._window_s
        while True:
            last = stop.is_set()
            now = time.monotonic()
            if now >= next_window or last:
                next_window = now + self._window_s
                window = self._counter.close_window()
                self._outbox.say(WindowClosed(window=window))
                self.watch_budget(window)
                gc.collect()
            if now >= next_beat:
                next_beat = now + _BEAT_S
                self._outbox.say(self.beat())
            self._outbox.drain()
            if last:
                return
            stop.wait(_TURN_S)

    def watch_budget(self, window: Window) -> None:
        """Reports when the line begins to abstain more often than its recipe allows, and when that ends."""
        core = self._core()
        if core is None or core.judge is None:
            return
        of = (window.bundle, window.variety, window.lot)
        if of != self._abstain_of:
            self._abstain_of = of
            self._abstain.forget()
        budget = core.judge.recipe.policy(window.variety, window.lot).budget
        if not self._abstain.update(window.items, window.grades.get(UNSURE, 0), budget):
            return
        seen = f"{self._abstain.share:.1%} of the items are unsure, the budget is {budget:.1%}"
        fault = Fault(code="recipe.within_budget", message=f"The line abstains within its budget again: {seen}.")
        if self._abstain.over:
            fault = Fault(code="recipe.over_budget", message=f"The line abstains too often: {seen}.")
        self._outbox.say_fault(fault.code, fault.message)

    def beat(self) -> Beat:
        """Returns the state of the line at this moment."""
        core = self._core()
        speed = self._encoder.speed_mm_s()
        lot, variety = self._counter.lot_and_variety
        judge = core.judge if core else None
        return Beat(
            digest=judge.digest if judge else "",
            items_on_bundle=core.items_on_bundle if core else 0,
            belt_running=speed > _MOVING_MM_S and not self._health.blind,
            camera_fault=self._health.fault,
            live=self._counter.live(self._boot_id, speed, camera_fault=self._health.fault),
            lot=lot,
            variety=variety,
            terms=judge.recipe.terms_source(variety, lot) if judge else "",
        )
