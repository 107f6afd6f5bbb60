"""Splits by item: all views of an item are on one side."""

import numpy as np

from control_plane.data.splits import item_folds


def test_all_views_of_an_item_are_on_one_side_and_each_view_is_tested_once() -> None:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 23, 400).astype(str)
    truth = (rng.random(400) < 0.4).astype(int)
    tested = np.zeros(400, int)
    for train_rows, test_rows in item_folds(items, truth, folds=5, seed=3):
        assert not set(items[train_rows]) & set(items[test_rows])
        tested[test_rows] += 1
    assert (tested == 1).all()
