"""Lots against lots: what lasts is found, one odd lot is not, a mix of classes is told from other fruit."""

import numpy as np
import pytest

from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Signal
from control_plane.detection.lot_channel import Chunk, LotState, empty_chunk, new_state, record_of
from control_plane.detection.reference import Fit, fit

FEATURES = ("lightness", "area_share", "entropy", "embedding_0")
EDGES = np.quantile(np.random.default_rng(0).standard_normal(100_000), np.arange(1, 16) / 16)
FACTS = BundleFacts(
    features=FEATURES,
    counts=((1000,) * 16,) * 4,
    classes=("sound", "rot"),
    scalar_edges={"weight_g": tuple(np.exp(np.linspace(4.7, 5.5, 15)))},
)
FUNCTIONS = FACTS.functions()
LOT_S = 2400.0
ITEMS = 1200


class Line:
    """Lots of normal items: a style between lots, a share of rot, a weight that follows the size."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.now_s, self.number = 1000.0, 0

    def lot(
        self,
        shift: np.ndarray | float = 0.0,
        *,
        rot: float = 0.0,
        new: float = 0.0,
        scale: float = 1.0,
        odd: float = 0.0,
    ) -> list[Chunk]:
        """Twenty chunks of a lot.

        Args:
            shift: Added to every item.
            rot: Added to the share of rot.
            new: Share of items that lie elsewhere.
            scale: Factor on the weight.
            odd: Size of this lot's own strangeness.
        """
        self.number += 1
        rng = self.rng
        style = 0.19 * rng.standard_normal(4) + odd * np.array([1.0, 0.0, 0.5, -1.0]) + shift
        share = rng.beta(6.0, 94.0) + rot
        density = 0.005 * rng.standard_normal()
        found = []
        for _ in range(20):
            n = ITEMS // 20
            bad = rng.random(n) < share
            x = style + rng.standard_normal((n, 4)) + bad[:, None] * np.array([0.0, 0.0, 1.0, 1.5])
            x[rng.random(n) < new, 3] += 3.5
            chunk = empty_chunk(FACTS)
            chunk.counts = np.array(
                [np.bincount(np.searchsorted(EDGES, column), minlength=16) for column in x.T], np.float64
            )
            chunk.classes = np.array([n - bad.sum(), bad.sum()], np.float64)
            chunk.items, chunk.span_s = n, LOT_S / 20.0
            logs = 5.1 + 0.1 * x[:, 1] + density + np.log(scale)
            chunk.weights = np.array([n, logs.sum(), 0.0])
            found.append(chunk)
        return found


def summed(chunks: list[Chunk]) -> Chunk:
    whole = empty_chunk(FACTS)
    for chunk in chunks:
        whole.add(chunk)
    return whole


@pytest.fixture(scope="module")
def reference() -> Fit:
    line = Line(1)
    return fit([record_of("l", f"{k}", summed(line.lot()), FACTS, FUNCTIONS) for k in range(150)])


def run(reference: Fit, lots: list[list[Chunk]]) -> tuple[LotState, list[set[str]], dict[str, Signal]]:
    """Returns the state, the names of the signals after each lot, and the last signal of each name."""
    state, now_s = new_state(FACTS), 1000.0
    names: list[set[str]] = []
    last: dict[str, Signal] = {}
    for number, chunks in enumerate(lots):
        so_far = empty_chunk(FACTS)
        seen: set[str] = set()
        for chunk in chunks:
            so_far.add(chunk)
            now_s += chunk.span_s
            found = state.take(chunk, so_far, reference, FACTS, FUNCTIONS, line="l", name=f"lot-{number}", now_s=now_s)
            last.update({signal.name: signal for signal in found})
            seen |= {signal.name for signal in found}
        names.append(seen)
    return state, names, last


def test_benign_lots_say_nothing(reference: Fit) -> None:
    line = Line(2)
    _, names, _ = run(reference, [line.lot() for _ in range(60)])
    assert names == [set()] * 60


@pytest.mark.parametrize(
    ("change", "signal", "most_lots"),
    [
        ({"shift": 0.6}, "covariate", 8),
        ({"new": 0.12}, "covariate", 10),
        ({"rot": 0.2}, "label", 8),
        ({"scale": 1.05}, "scale", 4),
    ],
)
def test_what_lasts_is_found_in_some_lots(
    reference: Fit, change: dict[str, float], signal: str, most_lots: int
) -> None:
    line = Line(3)
    before = [line.lot() for _ in range(6)]
    _, names, last = run(reference, before + [line.lot(**change) for _ in range(most_lots)])
    assert names[:6] == [set()] * 6
    assert signal in names[-1]
    assert last[signal].items > 0
    assert 1 <= len(last[signal].lots) <= 8


def test_more_rot_is_no_other_fruit(reference: Fit) -> None:
    line = Line(4)
    _, names, last = run(reference, [line.lot(rot=0.15) for _ in range(10)])
    assert set().union(*names) == {"label"}
    assert last["label"].words == {"class": "rot", "direction": "more"}
    shares = last["label"].evidence["shares"]
    assert shares["rot"] == pytest.approx(0.21, abs=0.03)


def test_one_odd_lot_moves_the_mean_no_further_than_an_ordinary_one(reference: Fit) -> None:
    """The clip: without it a single lot that is five times as odd would raise the alarm of a lasting shift."""
    line = Line(5)
    state, names, _ = run(reference, [line.lot() for _ in range(4)] + [line.lot(odd=0.8)])
    assert "covariate" not in set().union(*names)
    bound = reference.covariate.clip**2
    assert float(state.slow @ state.slow) < bound


def test_a_lot_beyond_all_lots_is_reported_by_itself_and_its_shape_is_marked(reference: Fit) -> None:
    line = Line(6)
    _, names, last = run(reference, [line.lot(), line.lot(shift=np.array([0.0, 3.0, 0.0, 2.0]))])
    assert "odd-lot" in names[1]
    assert "shape" in last["odd-lot"].marks
    assert last["odd-lot"].words["feature"] in {"area_share", "embedding_0"}


def test_a_large_shift_of_the_skin_is_not_marked_as_shape(reference: Fit) -> None:
    line = Line(7)
    _, _, last = run(reference, [line.lot(shift=np.array([0.0, 0.0, 0.0, 3.0]))])
    assert "shape" not in last["odd-lot"].marks


def test_a_scale_is_judged_against_size_and_not_by_heavy_fruit(reference: Fit) -> None:
    line = Line(8)
    _, names, _ = run(reference, [line.lot(shift=np.array([0.0, 0.35, 0.0, 0.0])) for _ in range(4)])
    assert "scale" not in set().union(*names)
    _, _, last = run(reference, [line.lot(scale=1.05) for _ in range(6)])
    assert last["scale"].effect == pytest.approx(0.05, abs=0.025)
    assert last["scale"].words["direction"] == "heavy"


def test_a_line_without_a_scale_is_not_judged_by_it(reference: Fit) -> None:
    line = Line(9)
    lots = [line.lot(scale=1.2) for _ in range(4)]
    for chunk in (chunk for chunks in lots for chunk in chunks):
        chunk.weights = np.zeros(3)
    _, names, _ = run(reference, lots)
    assert "scale" not in set().union(*names)


def test_a_raised_factor_asks_for_more(reference: Fit) -> None:
    line = Line(10)
    lots = [line.lot(shift=0.6) for _ in range(8)]
    assert "covariate" in run(reference, lots)[1][-1]
    state, now_s = new_state(FACTS), 1000.0
    state.factor = 50.0
    for chunk in (chunk for chunks in lots for chunk in chunks):
        now_s += chunk.span_s
        found = state.take(chunk, chunk, reference, FACTS, FUNCTIONS, line="l", name="x", now_s=now_s)
        assert "covariate" not in {signal.name for signal in found}
