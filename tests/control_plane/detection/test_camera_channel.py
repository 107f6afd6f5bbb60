"""The camera against its own level: each fault has its signal and place, day and night have none."""

import math

import numpy as np
import pytest

from control_plane.detection.camera_channel import DAY_S, CameraState, place
from control_plane.detection.finding import Signal
from models.histogram import pack_counts
from models.statistics import Moments
from models.windows import CameraCounts

GOOD = {
    "sharpness": 5.0,
    "exposure": 90.0,
    "red_to_green": 0.9,
    "blue_to_green": 0.7,
    "flicker": 0.01,
    "shift_x_px": 0.0,
    "shift_y_px": 0.0,
}
NOISE = {"sharpness": 0.05, "exposure": 0.9, "red_to_green": 0.005, "blue_to_green": 0.005, "flicker": 0.003}


class Bench:
    """A camera that looks once a second and reports every ten."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.state, self.now_s = CameraState(), 1_000_000.0

    def run(
        self,
        seconds: float,
        *,
        span_s: float = 10.0,
        dirt: np.ndarray | None = None,
        repeated: int = 0,
        **changed: float,
    ) -> list[Signal]:
        found: list[Signal] = []
        looks = round(span_s)
        for _ in range(round(seconds / span_s)):
            self.now_s += span_s
            values = {
                name: sum(
                    (
                        Moments.of(changed.get(name, level) + NOISE.get(name, 0.3) * self.rng.standard_normal())
                        for _ in range(10)
                    ),
                    Moments(),
                )
                for name, level in GOOD.items()
            }
            cells = np.zeros((12, 16), int) if dirt is None else dirt * looks
            counts = CameraCounts(looks=looks, dirt_looks=looks, dirt=pack_counts(cells), repeated=repeated, **values)
            found = self.state.take(counts, frames=300, span_s=span_s, now_s=self.now_s, items=30)
        return found


def names(signals: list[Signal]) -> set[str]:
    return {signal.name for signal in signals}


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    assert bench.run(600.0) == []
    return bench


@pytest.mark.parametrize(
    ("change", "signal"),
    [
        ({"exposure": 70.0, "sharpness": 5.0 + 2.0 * math.log(70 / 90)}, "exposure"),
        ({"exposure": 110.0, "sharpness": 5.0 + 2.0 * math.log(110 / 90)}, "exposure"),
        ({"red_to_green": 1.02}, "colour"),
        ({"blue_to_green": 0.62}, "colour"),
        ({"sharpness": 4.0}, "focus"),
        ({"flicker": 0.15}, "flicker"),
        ({"shift_x_px": 12.0}, "shift"),
        ({"shift_x_px": -7.0, "shift_y_px": -7.0}, "shift"),
    ],
)
def test_each_fault_has_its_own_signal_within_two_minutes(bench: Bench, change: dict[str, float], signal: str) -> None:
    found = bench.run(120.0, **change)
    assert names(found) == {signal}
    assert found[0].delay_s <= 120.0
    assert found[0].items > 0


def test_less_light_is_not_taken_for_blur(bench: Bench) -> None:
    """Half the light has a quarter of the variance; without the correction this would be a loss of focus."""
    found = bench.run(120.0, exposure=45.0, sharpness=5.0 + 2.0 * math.log(0.5))
    assert names(found) == {"exposure"}
    assert found[0].effect == pytest.approx(math.log(0.5), abs=0.1)
    assert found[0].words["direction"] == "darker"


def test_a_sharper_picture_and_less_flicker_are_no_fault(bench: Bench) -> None:
    assert bench.run(300.0, sharpness=6.0, flicker=0.0) == []


def test_dirt_is_found_with_its_place_and_goes_when_it_is_wiped(bench: Bench) -> None:
    dirt = np.zeros((12, 16), int)
    dirt[1:4, 12:15] = 1
    found = bench.run(60.0, dirt=dirt)
    assert names(found) == {"dirt"}
    assert found[0].words["where"] == "upper right"
    assert found[0].evidence["cells"] == 9
    assert np.array(found[0].evidence["dirt"])[2, 13] > 0.5
    assert bench.run(120.0) == []


def test_what_was_dirty_from_the_beginning_is_subtracted() -> None:
    dirt = np.zeros((12, 16), int)
    dirt[5, 5:8] = 1
    bench = Bench()
    assert bench.run(900.0, dirt=dirt) == []
    more = dirt.copy()
    more[9:11, 1:3] = 1
    assert bench.run(60.0, dirt=more)[0].words["where"] == "lower left"


def test_a_single_dirty_cell_is_noise(bench: Bench) -> None:
    dirt = np.zeros((12, 16), int)
    dirt[3, 3] = 1
    assert bench.run(300.0, dirt=dirt) == []


def test_repeated_frames_are_found(bench: Bench) -> None:
    assert names(bench.run(60.0, repeated=150)) == {"repeated"}


def test_a_change_that_is_significant_and_harmless_says_nothing(bench: Bench) -> None:
    """Four percent of the light are fifty standard errors of a minute, and harm nobody."""
    assert bench.run(1800.0, exposure=90.0 * 1.04, sharpness=5.0 + 2.0 * math.log(1.04)) == []


def test_day_and_night_are_learnt_in_a_day_and_a_lamp_that_fails_is_still_found() -> None:
    bench = Bench()
    bench.run(300.0)
    for day in range(4):
        for hour in range(24):
            light = math.exp(0.1 * math.sin(2.0 * math.pi * hour / 24.0))
            found = bench.run(3600.0, span_s=600.0, exposure=90.0 * light, sharpness=5.0 + 2.0 * math.log(light))
            assert found == [], f"day {day}, hour {hour}"
    assert bench.state.thresholds()[1] > 0.1
    assert names(bench.run(120.0, exposure=68.0, sharpness=5.0 + 2.0 * math.log(68 / 90))) == {"exposure"}


def test_light_that_creeps_away_is_not_learnt_as_usual() -> None:
    """Two percent a day: after the two days of learning the level stands, and the drift reaches the threshold."""
    bench = Bench()
    found: set[str] = set()
    for hour in range(14 * 24):
        light = math.exp(-0.02 * hour / 24.0)
        found |= names(bench.run(3600.0, span_s=1800.0, exposure=90.0 * light, sharpness=5.0 + 2.0 * math.log(light)))
    assert found == {"exposure"}


def test_nothing_is_learnt_while_something_is_present(bench: Bench) -> None:
    before = bench.state.level.copy()
    bench.run(3600.0, exposure=60.0, sharpness=5.0 + 2.0 * math.log(60 / 90))
    assert abs(bench.state.level - before).max() < 0.02, "only the minute before it was named"
    assert bench.now_s - bench.state.day_began_s < DAY_S


def test_a_quantity_that_is_not_measured_is_left_alone(bench: Bench) -> None:
    counts = CameraCounts(looks=10)
    assert bench.state.take(counts, frames=300, span_s=10.0, now_s=bench.now_s + 10.0, items=0) == []
    assert np.isfinite(bench.state.fast).all()


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ((0, 3), (0, 4), "upper left"),
        ((5, 7), (7, 9), "middle"),
        ((9, 12), (6, 10), "lower"),
        ((4, 8), (12, 16), "right"),
    ],
)
def test_places_in_words(rows: tuple[int, int], columns: tuple[int, int], words: str) -> None:
    dirty = np.zeros((12, 16), bool)
    dirty[slice(*rows), slice(*columns)] = True
    assert place(dirty) == words
    assert place(np.zeros((12, 16), bool)) == ""


def test_looks_that_measured_nothing_make_no_level() -> None:
    """A camera that has not seen its belt yet looks, and reports no level; that is no dark picture."""
    bench = Bench()
    for _ in range(3):
        bench.now_s += 10.0
        bench.state.take(CameraCounts(looks=9), frames=300, span_s=10.0, now_s=bench.now_s, items=0)
    assert bench.run(600.0) == []
    assert bench.state.level[1] == pytest.approx(math.log(90.0), abs=0.01)
    assert bench.state.ready
