"""Figures and their intervals over items."""

import numpy as np
import pytest

from control_plane.evaluation.metrics import auc, auc_within_folds, item_truth, measure


def test_an_item_is_bad_when_a_sure_view_shows_it() -> None:
    none = np.zeros(3, bool)
    assert item_truth(np.array([0, 0, 2]), none) == 2
    assert item_truth(np.array([0, 0, 2]), np.array([False, False, True])) == 0
    assert item_truth(np.array([1, 1]), np.ones(2, bool)) == 1


def test_intervals_widen_when_views_are_copies() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 2
    score = np.clip(0.5 + 0.25 * (truth - 0.5) + rng.normal(0, 0.25, 40), 0.01, 0.99)
    repeat = np.repeat(np.arange(40), 20)
    probabilities = np.column_stack((1 - score, score))
    single = measure(truth, probabilities, np.arange(40), ("sound", "bad"))["auc"]
    copies = measure(truth[repeat], probabilities[repeat], repeat, ("sound", "bad"))["auc"]
    assert copies["value"] == pytest.approx(single["value"], abs=1e-6)
    assert copies["high"] - copies["low"] == pytest.approx(single["high"] - single["low"], abs=0.05)
    few = measure(truth[:4], probabilities[:4], np.arange(4), ("sound", "bad"))
    for figure in (few["auc"], few["confusion_shares"][0][0]):
        assert figure["low"] is None
        assert "only 4 items" in figure["reason"]


def test_the_mean_within_folds_is_blind_to_offsets_between_folds_and_pooling_is_not() -> None:
    bad = np.tile([False, True], 40)
    score = np.repeat([0.1, 0.5, 0.3, 0.7], 20) + 0.1 * bad
    folds = [np.arange(k * 20, (k + 1) * 20) for k in range(4)]
    within = auc_within_folds(bad, score, folds)
    assert (within["value"], within["low"], within["high"], within["folds"]) == (1.0, 1.0, 1.0, 4)
    assert auc(bad, score) < 0.75
    one_sided = auc_within_folds(bad, score, [*folds[:2], np.flatnonzero(bad)])
    assert one_sided["value"] is None
    assert "only 2 folds" in one_sided["reason"]


def test_each_cell_of_the_confusion_has_an_interval_over_items() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(60) % 2, 10)
    score = np.where(rng.random(600) < 0.8, truth * 0.9 + 0.05, 0.5)
    found = measure(truth, np.column_stack((1 - score, score)), np.repeat(np.arange(60), 10), ("sound", "rot", "worm"))
    counts, shares = np.array(found["confusion"]), found["confusion_shares"]
    for row in range(2):
        for column in range(2):
            cell = shares[row][column]
            assert cell["value"] == pytest.approx(counts[row, column] / counts[row].sum(), abs=1e-4)
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert shares[0][1]["low"] < shares[0][1]["high"]
    assert shares[2][0] == {"value": None, "low": None, "high": None, "reason": "no item of this class"}
