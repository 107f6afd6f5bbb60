"""The line counts each lane by itself, with the weights of its load cells, and the lanes sum to the line."""

import msgspec
import numpy as np
import pytest

from edge_agent.line.counters import LineCounter
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from models.bundle import PROFILE, write_bundle
from models.profile import build_profile, encode_profile, feature_names
from models.windows import Window
from tests.edge_agent.line.test_process import core_of, drive
from tests.simulators.tiny_bundle import tiny_files

CONFIG = SimulationConfig(apples=8, varieties=("golden",), lanes=2, seed=5)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """A bundle that does not judge by weight and whose training data knew it."""
    rng, names = np.random.default_rng(1), feature_names(5)
    profile = build_profile(
        rng.normal(size=(200, len(names))).astype(np.float32),
        names,
        {"sound": 200},
        scalars={"weight_g": rng.uniform(120.0, 270.0, 200)},
    )
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    write_bundle(directory, "tiny", tiny_files() | {PROFILE: encode_profile(profile)})
    return Judge(directory)


def sorted_window(judge: Judge, *, weighs: bool, frames: int = 150) -> Window:
    line = SimulatedLine(CONFIG, virtual=True)
    core = core_of(line, judge)
    core.weights = tuple(line.load_cell(lane) for lane in range(CONFIG.lanes)) if weighs else ()
    drive(line, core, frames)
    return core.counter.close_window()


def test_lanes_sum_to_the_line_and_every_item_is_weighed(judge: Judge) -> None:
    window = sorted_window(judge, weighs=True)
    window.check()
    assert window.items > 60
    assert [lane.items for lane in window.by_lane] == list(window.lanes)
    assert min(window.lanes) > 20
    assert sum(window.scalars["weight_g"]) == window.items
    assert [sum(lane.scalars["weight_g"]) for lane in window.by_lane] == list(window.lanes)
    assert window.by_lane[0].feature_counts().sum(axis=1).tolist() == [window.lanes[0]] * len(window.nulls)


def test_a_line_without_load_cells_counts_no_weights(judge: Judge) -> None:
    window = sorted_window(judge, weighs=False)
    window.check()
    assert window.scalars == {}
    assert "weight_g" not in window.scalars_missing, "the bundle does not declare it"


def test_a_window_without_items_has_lanes_without_counts(judge: Judge) -> None:
    counter = LineCounter(3)
    for used in (None, judge):
        counter.use(used)
        window = counter.close_window()
        window.check()
        assert [msgspec.to_builtins(lane) for lane in window.by_lane] == [{}] * 3


def test_items_of_the_bundle_before_are_counted_in_their_lane_without_features(judge: Judge) -> None:
    line = SimulatedLine(CONFIG, virtual=True)
    core = core_of(line, judge)
    drive(line, core, 40)
    core.counter.close_window()
    other = Judge.__new__(Judge)
    for name, value in vars(judge).items():
        setattr(other, name, value)
    core.use(other)
    drive(line, core, 30)
    window = core.counter.close_window()
    window.check()
    assert 0 < max(window.nulls) < window.items
    assert sum(max(lane.nulls, default=0) for lane in window.by_lane) == max(window.nulls)
