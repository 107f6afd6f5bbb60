"""Keeps a line process running and, where one is wanted, a standby that waits to take over from it.

A standby (`standby`) has everything in memory and touches neither camera nor ejector; one message makes it the line.
Rules: the message is sent only after the line before was reaped, so no two processes ever judge; a standby holds a
bundle that was committed; it is started only beside a line that works, so it never delays one; one that dies or does
not get ready is counted and started again later, and counts against no bundle. A line that ran long is replaced at
once, one that keeps dying after a growing pause.

Trials are decided elsewhere: the caller names the bundle that the line judges with and the one a standby must hold.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from edge_agent.config import Standby
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.host import Host
from edge_agent.line_protocol import Go
from models.errors import SortlineError
from models.messages import Phase, Swap

log = logging.getLogger("sortline.keeping")
_BEAT_TIMEOUT_S: Final = 5.0
_START_TIMEOUT_S: Final = 60.0
_PROVEN_S: Final = 60.0
"""Seconds after which a process that ends is replaced without a pause."""
_FIRST_PAUSE_S: Final = 0.2
_LINE_PAUSE_S: Final = 10.0
_STANDBY_PAUSE_S: Final = 60.0


def standby_for(mode: Standby, state: SlotState) -> str:
    """Returns the bundle that a standby must hold now; empty = no standby is wanted. Pure."""
    if mode is Standby.NEVER or state.safe_state:
        return ""  # in a safe state the bundle before must not judge again
    if state.phase is Phase.TRIAL:
        return state.previous
    return state.active if mode is Standby.ALWAYS else ""


class Process(Protocol):
    """A line process or a standby (`line_process.LineProcess`). Times are monotonic seconds."""

    digest: str
    """The bundle it has, or was last asked to load."""
    started_s: float
    heard_s: float
    ready: bool
    """It works as the line."""

    @property
    def waiting(self) -> bool:
        """Whether it is a standby that could take over now."""

    @property
    def pid(self) -> int:
        """Process id."""

    def load(
        self, digest: str, directory: Path, *, swap: Swap = Swap.BELT_GAP, swap_within_s: float | None = None
    ) -> None:
        """Asks it to switch to this bundle."""

    def load_shadow(self, digest: str, directory: Path | None, samples: str) -> None:
        """Asks it to take this challenger, or none."""

    def set_lot(self, lot: str, variety: str) -> None:
        """Announces the next lot."""

    def go(self, present: Go) -> None:
        """Makes a standby the line: its life as such begins now."""

    def kill(self) -> None:
        """Ends it; the owner is notified when it is gone."""

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, then makes it."""


class Starter(Protocol):
    """Starts line processes."""

    @property
    def present(self) -> Go:
        """Returns the state from which a standby continues."""

    def start_process(self, digest: str, *, standby: bool) -> Process:
        """Starts a line process, or a standby, with this bundle (empty = none)."""


@dataclass(slots=True)
class _Place:
    """One process, and the time at which the next one may be started."""

    name: str
    longest_pause_s: float
    process: Process | None = None
    failures: int = 0
    next_s: float = 0.0

    def vacate(self, now_s: float) -> None:
        """Records that the process is gone."""
        proven = self.process is not None and now_s - self.process.started_s > _PROVEN_S
        self.failures = 0 if proven else self.failures + 1
        pause_s = min(_FIRST_PAUSE_S * 2.0**self.failures, self.longest_pause_s)
        self.next_s = now_s + (pause_s if self.failures else 0.0)
        self.process = None


class LineKeeper:
    """The line process of one agent, and its standby.

    Args:
        host: The supervisor; its counters get `line_starts`, `line_stalled` and the same of `standby`;
            `standby_died`, `standby_failed`, `standby_takeovers`.
        starter: Starts the processes.
        clock: Monotonic seconds.
    """

    def __init__(self, host: Host, starter: Starter, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._starter, self._counters, self._clock = host, starter, host.counters, clock
        self._line = _Place("line", _LINE_PAUSE_S)
        self._standby = _Place("standby", _STANDBY_PAUSE_S)
        self._up = False
        """Whether the line has reported that it works, and its earlier messages were read."""
        self._gap_since_s: float | None = None
        """When the line was gone that a standby is taking over from."""

    @property
    def line(self) -> Process | None:
        """The line process, if there is one."""
        return self._line.process

    @property
    def ready(self) -> bool:
        """Whether a line process works."""
        return self.line is not None and self.line.ready

    @property
    def pids(self) -> list[int]:
        """Process ids of all line processes that are kept."""
        return [place.process.pid for place in (self._line, self._standby) if place.process is not None]

    def covered(self, standby: str) -> bool:
        """Returns whether a standby with this bundle could take over now, or (empty) none is wanted."""
        spare = self._standby.process
        return not standby or (spare is not None and spare.waiting and spare.digest == standby)

    # -- what happens -----------------------------------------------------------------------------------------

    def tick(self, digest: str, standby: str) -> None:
        """Runs one turn.

        Args:
            digest: What the line must judge with when it is started; empty = nothing.
            standby: What a standby must hold; empty = none is wanted.
        """
        now_s = self._clock()
        for place in (self._line, self._standby):
            self._end_silent(place, now_s)
        if self.line is None and not self._take_over(standby) and now_s >= self._line.next_s:
            self._start(self._line, digest)
        spare = self._standby.process
        if spare is not None and spare.digest != standby:
            self._standby.process = None
            spare.kill()
        elif spare is None and standby and self._up and now_s >= self._standby.next_s:
            try:
                self._start(self._standby, standby)
            except OSError as error:
                self._standby.vacate(now_s)
                self._counters["standby_failed"] += 1
                log.warning("no standby can be started: %s", error)

    def _start(self, place: _Place, digest: str) -> None:
        place.process = self._starter.start_process(digest, standby=place is self._standby)
        self._counters[f"{place.name}_starts"] += 1

    def _end_silent(self, place: _Place, now_s: float) -> None:
        process = place.process
        if process is None:
            return
        if now_s - process.heard_s > (_BEAT_TIMEOUT_S if process.ready or process.waiting else _START_TIMEOUT_S):
            self._counters[f"{place.name}_stalled"] += 1
            process.kill()

    def gone(self, process: object, standby: str) -> bool:
        """Handles the end of a process; a standby with the right bundle takes over at once, before anything is written.

        Args:
            process: Which.
            standby: What a standby must hold, as for `tick`.

        Returns:
            Whether it was the line.
        """
        now_s = self._clock()
        if process is self._standby.process:
            self._standby.vacate(now_s)
            self._counters["standby_died"] += 1
            log.warning("the standby died; the next one starts in %.1f s", self._standby.next_s - now_s)
        if process is not self._line.process:
            return False
        self._line.vacate(now_s)
        self._up, self._gap_since_s = False, None
        self._take_over(standby)
        return True

    def _take_over(self, standby: str) -> bool:
        spare, now_s = self._standby.process, self._clock()
        if spare is None or not standby or not self.covered(standby):
            return False
        try:
            spare.go(self._starter.present)
        except SortlineError as error:
            log.warning("the standby does not take over: %s", error)
            spare.kill()
            return False
        self._standby.process, self._line.process = None, spare
        self._gap_since_s = now_s
        self._counters["standby_takeovers"] += 1
        return True

    def came_up(self) -> None:
        """Records that the line reported that it works."""
        self._up = True
        if self._gap_since_s is not None and self.line is not None:
            gap_ms = (self._clock() - self._gap_since_s) * 1000.0
            self._gap_since_s = None
            self._host.event("line.taken_over", "", bundle=self.line.digest, after_ms=f"{gap_ms:.0f}")

    # -- what is asked ----------------------------------------------------------------------------------------

    def load(
        self, digest: str, directory: Path, *, swap: Swap = Swap.BELT_GAP, swap_within_s: float | None = None
    ) -> None:
        """Makes the line judge with this bundle: by a swap while it runs, else it is started with it."""
        line = self.line
        if line is None or (line.digest == digest and not line.ready):
            return
        if not digest:
            line.kill()
            return
        try:
            line.load(digest, directory, swap=swap, swap_within_s=swap_within_s)
        except SortlineError as error:
            log.warning("load not sent: %s", error)
            line.kill()

    def stop(self, timeout_s: float) -> None:
        """Ends both processes; the last messages of the line are still delivered."""
        if self._standby.process is not None:
            self._standby.process.kill()
        if self.line is not None:
            self.line.stop(timeout_s)
