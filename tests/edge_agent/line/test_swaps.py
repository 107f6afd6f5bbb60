"""Bundles come and go at any frame: each item gets exactly one verdict, by the bundle that saw it first."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.devices.cameras import ConstantSpeedEncoder
from edge_agent.devices.hardware import NullEjector
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Frame, LineGeometry
from edge_agent.line.counters import LineCounter
from edge_agent.line.shadow import Shadow
from edge_agent.line.sorting import LineCore
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge, Judged
from models.windows import Window
from tests.simulators.tiny_bundle import tiny_bundle

FRAMES = 180


@dataclass(frozen=True)
class Film:
    """Six seconds of a line, drawn once, and every item that passed."""

    frames: tuple[Frame, ...]
    geometry: LineGeometry
    whole: tuple[tuple[int, int, float], ...]
    """(item, lane, belt coordinate) of the items that crossed the whole picture."""


@pytest.fixture(scope="module")
def film() -> Film:
    config = SimulationConfig(apples=8, varieties=("golden",), seed=11, touching_share=0.0, items_per_s=8.0)
    line = SimulatedLine(config, virtual=True)
    frames, items = [], {}
    for _ in range(FRAMES):
        frames.append(line.read(1.0))
        items |= {item.item_id: item for item in line.items()}
    first_mm, last_mm = frames[0].belt_mm, frames[-1].belt_mm
    width_mm = config.width_px * config.mm_per_px
    whole = tuple(
        (item.item_id, item.lane, item.item_mm)
        for item in items.values()
        if item.item_mm > first_mm + 60.0 and item.item_mm + width_mm + 60.0 < last_mm
    )
    return Film(tuple(frames), line.geometry, whole)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("bundles")
    for k, bias in enumerate((-2.5, -1.5, 0.5)):
        tiny_bundle(root / str(k), bias=bias, seed=k)
    return tuple(root / str(k) for k in range(3))


@pytest.fixture(scope="module")
def judges(bundles: tuple[Path, ...]) -> tuple[Judge, ...]:
    return tuple(Judge(bundle) for bundle in bundles)


@dataclass
class Run:
    verdicts: list[tuple[Judged, str]]
    windows: list[Window]
    shadows: list[Shadow]


def run(film: Film, judges: tuple[Judge, ...], swaps: dict[int, int], shadows: dict[int, int] | None = None) -> Run:
    """Sorts the film; before frame n the bundle `swaps[n]` and the challenger `shadows[n]` are taken over."""
    now_s = [0.0]

    def clock() -> float:
        return now_s[0]

    counter = LineCounter(len(film.geometry.lanes), clock=clock)
    queue = EjectionQueue(ConstantSpeedEncoder(1000.0), NullEjector(), clock=clock)
    found = Run([], [], [])
    core = LineCore(
        geometry=film.geometry,
        counter=counter,
        queue=queue,
        clock=clock,
        on_verdict=lambda judged, outlet: found.verdicts.append((judged, outlet)),
    )
    core.use(judges[0])
    for number, frame in enumerate(film.frames):
        now_s[0] = frame.captured_s
        if number in swaps:
            found.windows.append(counter.close_window())
            core.use(judges[swaps[number]])
        if shadows and number in shadows:
            found.windows.append(counter.close_window())
            core.shadow = Shadow(judges[shadows[number]], waiting=10_000)
            counter.use_shadow(core.shadow)
            found.shadows.append(core.shadow)
        core.process(frame)
    core.flush()
    found.windows.append(counter.close_window())
    return found


def identities(film: Film, found: Run) -> dict[int, int]:
    """Item of the truth -> verdicts it got."""
    return {
        item_id: sum(
            judged.track.lane == lane and abs(judged.track.item_mm - item_mm) < 25.0 for judged, _ in found.verdicts
        )
        for item_id, lane, item_mm in film.whole
    }


Swaps = st.dictionaries(st.integers(0, FRAMES - 1), st.integers(0, 2), max_size=8)


def check(film: Film, judges: tuple[Judge, ...], found: Run, swaps: dict[int, int]) -> None:
    assert set(identities(film, found).values()) == {1}
    ids = [judged.track.item_id for judged, _ in found.verdicts]
    assert len(ids) == len(set(ids))
    # The windows together have every verdict once, and each has one bundle.
    assert sum(window.items for window in found.windows) == len(found.verdicts)
    for judged, _ in found.verdicts:
        views = judged.track.probabilities
        judge = judged.track.judge
        assert isinstance(judge, Judge)
        # Judged by the bundle of its first view alone: again by that bundle, the same comes out.
        assert (judge.classifier.classify(judged.track.views).probabilities == views).all()
    assert {window.bundle for window in found.windows} <= {judges[k].digest for k in {0, *swaps.values()}}


def test_three_swaps_change_no_identity(film: Film, judges: tuple[Judge, ...]) -> None:
    assert len(film.whole) > 60
    swaps = {40: 1, 41: 2, 97: 0}
    found = run(film, judges, swaps)
    check(film, judges, found, swaps)
    assert {id(judged.track.judge) for judged, _ in found.verdicts} >= {id(judges[0]), id(judges[2])}


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(swaps=Swaps)
def test_swaps_at_any_frame_lose_and_double_no_item(
    film: Film, judges: tuple[Judge, ...], swaps: dict[int, int]
) -> None:
    check(film, judges, run(film, judges, swaps), swaps)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(swaps=Swaps, shadows=Swaps)
def test_challengers_that_come_and_go_change_no_verdict(
    film: Film, judges: tuple[Judge, ...], swaps: dict[int, int], shadows: dict[int, int]
) -> None:
    alone, both = run(film, judges, swaps), run(film, judges, swaps, shadows)
    said = [[(j.track.item_id, j.verdict, outlet) for j, outlet in found.verdicts] for found in (alone, both)]
    assert said[0] == said[1]
    # Every item offered to a challenger waits for it, none twice.
    offered = [
        judged.track.item_id
        for shadow in both.shadows
        for judged, *_ in (shadow._queue.get() for _ in range(shadow._queue.qsize()))
    ]
    assert len(offered) == len(set(offered))
