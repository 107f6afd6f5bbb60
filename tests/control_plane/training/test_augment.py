"""Augmented views are views of a whole item on no background."""

import numpy as np

from control_plane.training.augment import varied
from tests.simulators.photographs import small_views


def test_varied_views_are_other_views_of_a_whole_item_on_no_background() -> None:
    views, _, _ = small_views(8)
    made = varied(views, np.random.default_rng(0))
    assert made.shape == views.shape
    assert made.dtype == np.uint8
    assert (made == varied(views, np.random.default_rng(0))).all()
    assert (made != views).any(axis=(1, 2, 3)).all()
    area = (made.max(axis=3) > 0).sum(axis=(1, 2)) / (views.max(axis=3) > 0).sum(axis=(1, 2))
    assert (area > 0.5).all()
    assert (area < 1.1).all()
    assert (made.min(axis=3) > 0).sum() == (made.max(axis=3) > 0).sum()
    nothing = varied(np.zeros((3, 64, 64, 3), np.uint8), np.random.default_rng(1))
    assert not nothing.any()
    assert varied(views[:0], np.random.default_rng(0)).shape == (0, 64, 64, 3)
