"""The line and its standby are kept alive: who is started when, who takes over, and that never two of them judge."""

import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.config import Standby
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.line.standby import prefer_as_oom_victim, run_at_low_priority
from edge_agent.line_protocol import Go
from edge_agent.supervisor.line_keeper import LineKeeper, standby_for
from models.errors import UnavailableError
from models.messages import Phase, Swap

OLD, NEW = "11" * 32, "22" * 32


class Process:
    """A line process that does what a test says."""

    def __init__(self, pid: int, digest: str, now_s: float, *, standby: bool) -> None:
        self.pid, self.digest, self.standby = pid, digest, standby
        self.started_s = self.heard_s = now_s
        self.ready = self.waiting = self.killed = self.deaf = self.hangs = False
        self.commands: list[Go] = []
        self.loads: list[str] = []

    def load(self, digest: str, directory: Path, *, swap: Swap = Swap.BELT_GAP, swap_within_s: float | None = None):
        self.loads.append(digest)
        self.digest = digest

    def load_shadow(self, digest: str, directory: Path | None, samples: str) -> None:
        raise NotImplementedError

    def set_lot(self, lot: str, variety: str) -> None:
        raise NotImplementedError

    def go(self, present: Go) -> None:
        if self.deaf:
            raise UnavailableError("pipe.closed", "The other process does not read.")
        self.commands.append(present)
        self.waiting = False

    def kill(self) -> None:
        self.killed = True

    def stop(self, timeout_s: float) -> None:
        self.killed = True


class Bench:
    """A supervisor that starts such processes, and its clock."""

    def __init__(self) -> None:
        self.now_s, self.present = 100.0, Go(lifetime_items=7, lot="A", variety="gala")
        self.counters: Counter[str] = Counter()
        self.processes: list[Process] = []
        self.events: list[tuple[str, dict[str, str]]] = []
        self.keeper = LineKeeper(self, self, lambda: self.now_s)

    def start_process(self, digest: str, *, standby: bool) -> Process:
        self.processes.append(Process(len(self.processes), digest, self.now_s, standby=standby))
        return self.processes[-1]

    def event(self, code: str, message: str, **facts: str) -> None:
        self.events.append((code, facts))

    def tick(self, digest: str = OLD, standby: str = "", after_s: float = 0.0) -> None:
        self.now_s += after_s
        for process in self.processes:
            if (process.ready or process.waiting) and not process.hangs:
                process.heard_s = self.now_s
        self.keeper.tick(digest, standby)

    def line_up(self) -> Process:
        self.keeper.line.ready = True
        self.keeper.came_up()
        return self.keeper.line

    def covered_line(self) -> tuple[Process, Process]:
        """A line at work and a standby that waits."""
        self.tick(standby=OLD)
        line = self.line_up()
        self.tick(standby=OLD)
        spare = self.processes[-1]
        spare.waiting = True
        return line, spare


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("mode", "phase", "wanted"),
    [
        (Standby.TRIAL, Phase.TRIAL, OLD),
        (Standby.TRIAL, Phase.COMMITTED, ""),
        (Standby.TRIAL, Phase.ROLLED_BACK, ""),
        (Standby.TRIAL, Phase.SELF_TEST, ""),
        (Standby.ALWAYS, Phase.TRIAL, OLD),
        (Standby.ALWAYS, Phase.COMMITTED, NEW),
        (Standby.ALWAYS, Phase.FETCHING, NEW),
        (Standby.NEVER, Phase.TRIAL, ""),
    ],
)
def test_a_standby_stands_for_one_bundle(mode: Standby, phase: Phase, wanted: str) -> None:
    assert standby_for(mode, SlotState(phase=phase, active=NEW, previous=OLD)) == wanted


def test_the_first_bundle_of_an_agent_has_nothing_to_stand_by_with(bench: Bench) -> None:
    assert standby_for(Standby.TRIAL, SlotState(phase=Phase.TRIAL, active=NEW)) == ""
    assert bench.keeper.covered("")


def test_a_line_that_ran_long_is_replaced_at_once_and_one_that_keeps_dying_ever_later(bench: Bench) -> None:
    bench.tick()
    bench.tick(after_s=61.0)
    assert bench.keeper.gone(bench.keeper.line, "")
    bench.tick()
    assert len(bench.processes) == 2
    pauses = []
    for _ in range(8):
        count = len(bench.processes)
        bench.keeper.gone(bench.keeper.line, "")
        died_s = bench.now_s
        while len(bench.processes) == count:
            bench.tick(after_s=0.1)
        pauses.append(bench.now_s - died_s)
    assert pauses == pytest.approx([0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0], abs=0.11)


def test_a_standby_is_started_only_beside_a_line_that_works(bench: Bench) -> None:
    for _ in range(20):
        bench.tick(standby=OLD, after_s=1.0)
    assert [process.standby for process in bench.processes] == [False]
    bench.line_up()
    bench.tick(standby=OLD)
    assert [process.standby for process in bench.processes] == [False, True]
    assert not bench.keeper.covered(OLD)
    bench.processes[1].waiting = True
    assert bench.keeper.covered(OLD)
    assert not bench.keeper.covered(NEW)


def test_the_standby_takes_over_once_the_line_was_reaped_and_not_before(bench: Bench) -> None:
    line, spare = bench.covered_line()
    line.hangs = True
    for _ in range(60):
        bench.tick(standby=OLD, after_s=0.1)  # the line hangs, is killed, and is not reaped yet
    assert line.killed
    assert spare.commands == []
    assert bench.keeper.gone(line, OLD)
    assert spare.commands == [bench.present]
    assert bench.keeper.line is spare
    assert bench.counters["standby_takeovers"] == 1


def test_it_takes_over_without_the_pause_of_a_line_that_keeps_dying(bench: Bench) -> None:
    bench.tick()
    for _ in range(5):
        bench.keeper.gone(bench.keeper.line, OLD)
        while bench.keeper.line is None:
            bench.tick(after_s=0.5)
    line, spare = bench.covered_line()
    bench.keeper.gone(line, OLD)
    assert bench.keeper.line is spare


def test_the_time_without_a_line_is_reported(bench: Bench) -> None:
    line, spare = bench.covered_line()
    bench.keeper.gone(line, OLD)
    bench.now_s += 0.25
    bench.line_up()
    bench.line_up()
    assert bench.events == [("line.taken_over", {"bundle": OLD, "after_ms": "250"})]
    assert bench.keeper.line is spare


def test_after_it_took_over_the_next_standby_comes_when_the_line_works(bench: Bench) -> None:
    line, _ = bench.covered_line()
    bench.keeper.gone(line, OLD)
    bench.tick(standby=OLD)
    assert len(bench.processes) == 2
    bench.line_up()
    bench.tick(standby=OLD)
    assert [process.standby for process in bench.processes] == [False, True, True]


def test_a_standby_with_another_bundle_than_wanted_is_ended_and_never_takes_over(bench: Bench) -> None:
    line, spare = bench.covered_line()
    bench.keeper.gone(line, NEW)
    assert spare.commands == []
    bench.tick(NEW, standby=NEW, after_s=1.0)
    assert spare.killed
    assert not bench.keeper.line.standby


def test_a_standby_that_is_no_longer_needed_is_ended(bench: Bench) -> None:
    line, spare = bench.covered_line()
    bench.tick(NEW)
    assert spare.killed
    assert bench.keeper.line is line
    assert not bench.keeper.gone(spare, "")
    assert bench.counters["standby_died"] == 0, "it ended on command"


def test_a_standby_that_keeps_dying_is_counted_and_started_later_and_later(bench: Bench) -> None:
    bench.tick(standby=OLD)
    line = bench.line_up()
    for _ in range(1200):
        bench.tick(standby=OLD, after_s=0.5)
        if bench.processes[-1].standby and not bench.processes[-1].killed:
            bench.processes[-1].killed = True
            assert not bench.keeper.gone(bench.processes[-1], OLD)
    assert bench.keeper.line is line
    assert 10 < bench.counters["standby_died"] == bench.counters["standby_starts"] < 20


def test_a_standby_that_hangs_while_it_waits_or_never_gets_warm_is_ended(bench: Bench) -> None:
    bench.tick(standby=OLD)
    bench.line_up()
    bench.tick(standby=OLD)
    slow = bench.processes[-1]
    bench.tick(standby=OLD, after_s=59.0)
    assert not slow.killed
    bench.tick(standby=OLD, after_s=2.0)
    assert slow.killed
    assert bench.counters["standby_stalled"] == 1


def test_a_standby_that_cannot_be_started_does_not_stop_the_watch_of_the_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.tick()
    line = bench.processes[0]
    line.ready = True
    bench.keeper.came_up()
    start = bench.start_process

    def refuse(digest: str, *, standby: bool) -> Process:
        if standby:
            raise OSError(12, "Cannot allocate memory")
        return start(digest, standby=standby)

    monkeypatch.setattr(bench, "start_process", refuse)
    bench.tick(standby=OLD)
    assert bench.counters["standby_failed"] == 1
    bench.tick(standby=OLD)
    assert bench.counters["standby_failed"] == 1, "it pauses"
    line.hangs = True
    for _ in range(8):
        bench.tick(standby=OLD, after_s=1.0)
    assert line.killed


def test_a_standby_that_does_not_respond_is_ended_and_a_line_started(bench: Bench) -> None:
    line, spare = bench.covered_line()
    spare.deaf = True
    bench.keeper.gone(line, OLD)
    assert spare.killed
    bench.keeper.gone(spare, OLD)
    bench.tick(standby=OLD, after_s=1.0)
    assert not bench.keeper.line.standby


def test_a_line_that_starts_with_the_wanted_bundle_is_not_asked_to_load_it(bench: Bench) -> None:
    bench.tick()
    line = bench.keeper.line
    bench.keeper.load(OLD, Path())
    bench.keeper.load(NEW, Path())
    bench.line_up()
    bench.keeper.load(NEW, Path())
    assert line.loads == [NEW, NEW], "one that works loads again: its model may have failed"
    bench.keeper.load("", Path())
    assert line.killed


def test_a_process_that_warms_up_has_a_low_priority_and_one_that_sorts_has_not() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    assert run_at_low_priority(priority) == max(before, 10)
    assert priority() == before


def test_a_standby_goes_first_when_memory_runs_out_and_a_line_does_not() -> None:
    score = Path("/proc/self/oom_score_adj")
    before = int(score.read_text())
    with prefer_as_oom_victim():
        assert int(score.read_text()) == min(before + 100, 1000)
    assert int(score.read_text()) == before
