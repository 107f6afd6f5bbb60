"""Changes between two frames: a lot begins at a gap or after its longest wait, and no window mixes two lots."""

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_agent.health.camera import CameraHealth
from edge_agent.line.counters import LineCounter
from edge_agent.line.loader import LoadedJudge
from edge_agent.line.reporting import Outbox, Reporter
from edge_agent.line.switching import Switching
from edge_agent.line_protocol import FromLine, Pipe, SetLot, WindowClosed
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from models.messages import Swap
from tests.edge_agent.line.test_process import core_of
from tests.simulators.tiny_bundle import tiny_bundle

FOR_EVER = float("inf")
"""A monotonic time since which no wait has been long enough."""
SMALL = SimulationConfig(apples=8, varieties=("golden",))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    yield pipe
    pipe.close()
    theirs.close()


def test_a_lot_begins_at_a_gap_no_window_mixes_two_and_a_bundle_that_waits_for_it_takes_over(
    tmp_path: Path, pipe: Pipe
) -> None:
    tiny_bundle(tmp_path / "a", bias=-2.5)
    tiny_bundle(tmp_path / "b", bias=0.5)
    first, second = Judge(tmp_path / "a"), Judge(tmp_path / "b")
    film = SimulatedLine(SimulationConfig(apples=8, varieties=("golden",), items_per_s=1.8, lanes=1), virtual=True)
    outbox = Outbox(pipe)
    core = core_of(film, first)
    counter = core.counter
    counter.begin_lot("A", "gala")
    # No deadline: only a gap begins the lot.
    switching = Switching(counter, outbox.say, swap_within_s=60.0, threads=1, champion=first)
    judged: Counter[str] = Counter()
    core.on_verdict = lambda _found, _outlet: judged.update([counter.lot])
    said, begun_at, swapped_at = False, 0, 0
    for number in range(400):
        frame = film.read(1.0)
        assert frame is not None
        if number == 60:
            switching.loader.judge.append(LoadedJudge(second, 1.0, FOR_EVER, Swap.LOT_CHANGE))
        if number >= 150 and core.tracker.open and not said:
            said = True
            assert core.judge is first
            switching.request_lot(SetLot(lot="B", variety="fuji"), FOR_EVER)
        open_before = core.tracker.open
        switching.apply(core)
        if not begun_at and counter.lot == "B":
            begun_at = number
            assert open_before == 0
        if not swapped_at and core.judge is second:
            swapped_at = number
        core.process(frame)
    reports: list[FromLine] = []
    while (report := outbox.take()) is not None:
        reports.append(report)
    windows = [r.window for r in reports if isinstance(r, WindowClosed)] + [counter.close_window()]
    assert 150 <= begun_at <= swapped_at < 400
    assert {(w.lot, w.variety) for w in windows} == {("A", "gala"), ("B", "fuji")}
    for lot in "AB":
        assert sum(w.items for w in windows if w.lot == lot) == judged[lot] > 2
    assert {w.bundle for w in windows if w.lot == "A"} == {first.digest}
    health = CameraHealth(frames_per_s=30.0, stall_s=1.0)
    found = Reporter(outbox, counter, health, film, lambda: core, window_s=10.0, boot_id="0" * 16).beat()
    assert (found.lot, found.variety, found.terms) == ("B", "fuji", "recipe")


@pytest.mark.parametrize(("since_s", "lot"), [(FOR_EVER, ""), (-FOR_EVER, "B")])
def test_a_lot_does_not_wait_for_a_gap_for_ever(since_s: float, lot: str) -> None:
    counter = LineCounter(2)
    switching = Switching(counter, lambda _report: None, swap_within_s=2.0, threads=1)
    full = SimpleNamespace(tracker=SimpleNamespace(open=3))
    switching.request_lot(SetLot(lot="B", variety="fuji"), since_s)
    switching.apply(full)  # type: ignore[arg-type]
    assert counter.lot == lot


def test_a_full_outbox_drops_reports_and_counts_them(pipe: Pipe) -> None:
    outbox = Outbox(pipe)
    for _ in range(300):
        outbox.say_fault("line.fail_safe", "A report without a reader.")
    assert outbox.dropped == 300 - 256
