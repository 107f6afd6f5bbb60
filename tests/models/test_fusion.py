"""Fusion: order does not matter, one defect counts, one bad crop does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.errors import InputError
from models.fusion import FusionSpec, fuse
from models.recipe import Recipe

RECIPE = Recipe(classes=("sound", "rot", "worm"), good_class="sound")
rows = arrays(np.float32, st.tuples(st.integers(1, 9), st.just(3)), elements=st.floats(0.0, 1.0, width=32)).map(
    lambda a: (a + 1e-3) / (a + 1e-3).sum(axis=1, keepdims=True)
)


@given(rows, st.randoms(), st.integers(1, 16))
def test_the_order_of_the_views_does_not_matter(views: np.ndarray, random: object, top_k: int) -> None:
    order = list(range(len(views)))
    random.shuffle(order)  # type: ignore[attr-defined]
    spec = FusionSpec(top_k=top_k, scale=1.3, offset=-0.4)
    assert fuse(views, spec, 0) == pytest.approx(fuse(views[order], spec, 0), abs=1e-9)
    first, again = RECIPE.decide(views), RECIPE.decide(views[order])
    assert first.defect == pytest.approx(again.defect, abs=1e-9)


@given(rows, st.integers(0, 8), st.integers(1, 4))
def test_a_view_that_shows_more_of_a_defect_never_makes_an_item_better(views: np.ndarray, row: int, top_k: int) -> None:
    spec, worse = FusionSpec(top_k=top_k), views.copy()
    worse[row % len(views)] = [worse[row % len(views), 0] / 2.0, 1.0 - worse[row % len(views), 0] / 2.0, 0.0]
    assert fuse(worse, spec, 0)[0] <= fuse(views, spec, 0)[0] + 1e-9


@given(rows)
def test_item_probabilities_are_probabilities(views: np.ndarray) -> None:
    fused = fuse(views, FusionSpec(), 0)
    assert np.isfinite(fused).all()
    assert fused.min() >= 0.0
    assert fused.sum() == pytest.approx(1.0)


def test_a_defect_seen_in_two_of_eight_views_condemns() -> None:
    views = np.array([[0.97, 0.02, 0.01]] * 6 + [[0.05, 0.9, 0.05]] * 2)
    verdict = RECIPE.decide(views)
    assert (verdict.klass, verdict.outlet, verdict.views) == ("rot", "reject", 8)


def test_one_bad_crop_does_not_condemn() -> None:
    views = np.array([[0.97, 0.02, 0.01]] * 7 + [[0.2, 0.7, 0.1]])
    assert RECIPE.decide(views).klass == "sound"


def test_a_certain_good_item_has_no_share_to_give() -> None:
    fused = fuse(np.array([[1.0, 0.0, 0.0]]), FusionSpec(), 0)
    assert fused[1:].sum() < 1e-5


def test_no_view_no_verdict() -> None:
    with pytest.raises(InputError) as caught:
        fuse(np.zeros((0, 3)), FusionSpec(), 0)
    assert caught.value.code == "fusion.no_views"
    with pytest.raises(InputError) as caught:
        fuse(np.array([[np.nan, 0.5, 0.5]]), FusionSpec(), 0)
    assert caught.value.code == "fusion.not_finite"
    with pytest.raises(InputError) as caught:
        RECIPE.decide(np.ones((2, 2)) / 2)
    assert caught.value.code == "recipe.wrong_classes"
