"""The abstain budget on the line: exceeded beyond doubt, kept again, never by chance, never by an old lot."""

import socket
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.health.abstain_budget import MEMORY_ITEMS, AbstainWatch
from edge_agent.health.camera import CameraHealth
from edge_agent.line.reporting import Outbox, Reporter
from edge_agent.line_protocol import Faulted, Pipe
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from models.bundle import RECIPE, write_bundle
from models.recipe import UNSURE, Recipe, Terms
from models.windows import Window
from tests.edge_agent.line.test_process import core_of, drive
from tests.simulators.tiny_bundle import tiny_files


def test_one_bad_window_is_no_trend_and_many_are() -> None:
    watch = AbstainWatch()
    assert not watch.update(40, 3, 0.05)
    changes = [watch.update(40, 6, 0.05) for _ in range(10)]
    assert changes.count(True) == 1
    assert watch.over
    assert watch.share > 0.1


def test_a_few_items_raise_no_alarm() -> None:
    watch = AbstainWatch()
    assert not watch.update(4, 1, 0.01)
    assert not watch.update(40, 40, 0.01)
    assert watch.update(60, 30, 0.01)


def test_it_stays_over_until_the_share_is_within_the_budget() -> None:
    watch = AbstainWatch()
    assert watch.update(400, 60, 0.05)
    assert not watch.update(400, 24, 0.05), "six percent is still more than five"
    assert watch.over
    assert watch.update(400, 16, 0.05)
    assert not watch.over


def test_a_line_without_items_or_budget_says_nothing() -> None:
    watch = AbstainWatch()
    assert not watch.update(0, 0, 0.05)
    assert not watch.update(500, 0, 0.0)
    assert not watch.over


def test_another_lot_starts_again() -> None:
    watch = AbstainWatch()
    for _ in range(9):
        watch.update(40, 2, 0.05)
    watch.forget()
    assert not watch.update(20, 2, 0.05), "two of twenty say little by themselves"


def test_a_line_that_keeps_its_budget_is_hardly_ever_accused() -> None:
    rng = np.random.default_rng(1)
    accused = 0
    for _ in range(100):
        watch = AbstainWatch()
        accused += any(watch.update(180, int(rng.binomial(180, 0.05)), 0.06) for _ in range(60))
    assert accused <= 15, "ten minutes at nine items a second on two lanes"


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0.0, 1.0)), max_size=60))
def test_the_memory_is_bounded(windows: list[tuple[int, float]]) -> None:
    watch = AbstainWatch()
    for items, share in windows:
        watch.update(items, int(items * share), 0.05)
        assert 0.0 <= watch.share <= 1.0
        assert sum(count for count, _ in watch._windows) < MEMORY_ITEMS + 500


def unsure_bundle(root: Path, terms: Terms) -> Path:
    recipe = Recipe(classes=("sound", "defect"), good_class="sound", terms=terms, unsure_outlet="recheck")
    write_bundle(root, "tiny", tiny_files() | {RECIPE: msgspec.json.encode(recipe)})
    return root


def test_items_the_line_is_unsure_of_take_their_outlet_and_are_counted_as_such(tmp_path: Path) -> None:
    terms = Terms(abstain_budget=0.05, abstain_above=1e-4)
    line = SimulatedLine(SimulationConfig(apples=8, varieties=("golden",)), virtual=True)
    core = core_of(line, Judge(unsure_bundle(tmp_path / "b", terms)))
    drive(line, core, 60)
    window = core.counter.close_window()
    window.check()
    assert window.items > 5
    assert sum(window.grades.values()) == window.items
    assert window.grades[UNSURE] > 0
    assert window.outlets["recheck"] == window.grades[UNSURE]


@pytest.mark.slow
def test_the_lot_in_work_chooses_the_terms(tmp_path: Path) -> None:
    nothing = Terms(wasted=1e6, escaped=0.0)
    recipe = Recipe(classes=("sound", "defect"), good_class="sound", lots={"juice-only": nothing})
    write_bundle(tmp_path / "b", "tiny", tiny_files() | {RECIPE: msgspec.json.encode(recipe)})
    for lot, rejects in (("", True), ("juice-only", False)):
        line = SimulatedLine(SimulationConfig(apples=8, varieties=("golden",)), virtual=True)
        core = core_of(line, Judge(tmp_path / "b"))
        core.counter.lot = lot
        drive(line, core, 60)
        outlets = core.counter.close_window().outlets
        assert ("reject" in outlets) == rejects, outlets


def test_the_line_reports_that_its_budget_is_exceeded_once_and_that_it_is_kept_again(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(ours)
    try:
        judge = Judge(unsure_bundle(tmp_path / "b", Terms(abstain_budget=0.05)))
        simulated = SimulatedLine(SimulationConfig(apples=8), virtual=True)
        core = core_of(simulated, judge)
        outbox, health = Outbox(pipe), CameraHealth(frames_per_s=30.0, stall_s=1.0)
        reporter = Reporter(outbox, core.counter, health, simulated, lambda: core, window_s=600.0, boot_id="0" * 16)

        def say(unsure: int) -> list[str]:
            window = Window(
                started_ms=0, duration_ms=1, bundle=judge.digest, items=400, grades={UNSURE: unsure, "x": 400 - unsure}
            )
            reporter.watch_budget(window)
            return [report.fault.code for report in iter(outbox.take, None) if isinstance(report, Faulted)]

        assert [say(10), say(80), say(80), say(2)] == [[], ["recipe.over_budget"], [], ["recipe.within_budget"]]
    finally:
        pipe.close()
        theirs.close()
