"""True shares from confused verdicts: right on planted shares, never negative, wide when little is known."""

import numpy as np
import pytest

from control_plane.detection.class_shares import true_shares

CONFUSION = np.array([[950.0, 40.0, 10.0], [20.0, 75.0, 5.0], [10.0, 0.0, 90.0]])
RATES = CONFUSION / CONFUSION.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("truth", [(0.9, 0.06, 0.04), (0.6, 0.35, 0.05), (1.0, 0.0, 0.0)])
def test_planted_shares_are_found_and_lie_in_the_interval(truth: tuple[float, ...]) -> None:
    counts = np.random.default_rng(1).multinomial(20_000, np.asarray(truth) @ RATES).astype(float)
    shares, ends = true_shares(counts, CONFUSION)
    assert shares == pytest.approx(truth, abs=0.02)
    assert shares.sum() == pytest.approx(1.0)
    assert (shares >= 0.0).all()
    assert (ends[:, 0] <= np.asarray(truth) + 0.005).all()
    assert (ends[:, 1] >= np.asarray(truth) - 0.005).all()


def test_counted_shares_are_not_the_true_ones() -> None:
    counts = 10_000.0 * np.array([0.6, 0.35, 0.05]) @ RATES
    assert abs(counts[1] / counts.sum() - 0.35) > 0.05
    assert true_shares(counts, CONFUSION)[0][1] == pytest.approx(0.35, abs=0.01)


def test_few_items_of_known_truth_make_the_interval_wide() -> None:
    counts = 10_000.0 * np.array([0.8, 0.15, 0.05]) @ RATES
    widths = [np.diff(true_shares(counts, CONFUSION * scale)[1][1])[0] for scale in (0.05, 1.0)]
    assert widths[0] > 2.0 * widths[1]


def test_the_same_counts_give_the_same_interval() -> None:
    counts = np.array([900.0, 60.0, 40.0])
    first, second = (true_shares(counts, CONFUSION)[1] for _ in range(2))
    assert (first == second).all()
