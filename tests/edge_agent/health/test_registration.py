"""How far a picture has moved is measured where something stands still, and is not known where nothing does."""

import math

import numpy as np
import pytest

from edge_agent.health.registration import KNOWN_BY, StaticPicture, shift_of

SHAPE = (170, 320)


def machine(rng: np.random.Generator, *, bolts: bool, right: int = 0, down: int = 0) -> np.ndarray:
    """A belt of independent texture with three dividers, perhaps with bolts, moved by so many pixels."""
    image = rng.normal(40.0, 1.5, SHAPE)
    places = np.random.default_rng(7).integers(20, 290, (3, 5))
    for row, columns in zip((30, 85, 140), places, strict=True):
        image[row + down : row + down + 2] = 70.0
        for column in columns if bolts else ():
            image[row + down : row + down + 2, column + right : column + right + 7] = 110.0
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, -2), (-7, 5), (11, 9)])
def test_a_shift_is_measured_in_both_directions(right: int, down: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, y, sure_x, sure_y = shift_of(machine(rng, bolts=True), machine(rng, bolts=True, right=right, down=down))
        assert x == pytest.approx(right, abs=0.25)
        assert y == pytest.approx(down, abs=0.25)
        assert min(sure_x, sure_y) > KNOWN_BY


def test_dividers_alone_have_a_place_across_the_belt_and_none_along_it() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, y, sure_x, sure_y = shift_of(machine(rng, bolts=False), machine(rng, bolts=False, down=4))
        assert y == pytest.approx(4, abs=0.25)
        assert sure_y > KNOWN_BY
        assert sure_x < KNOWN_BY
        assert math.isnan(x)


def test_a_bare_belt_has_no_place_at_all() -> None:
    rng = np.random.default_rng(1)
    one, two = (rng.normal(40.0, 2.0, SHAPE).astype(np.uint8) for _ in range(2))
    x, y, _, _ = shift_of(one, two)
    assert math.isnan(x)
    assert math.isnan(y)


def test_what_moves_vanishes_from_the_static_picture_and_what_stands_still_remains() -> None:
    rng, static = np.random.default_rng(2), StaticPicture()
    mask = np.full(SHAPE, 255, np.uint8)
    assert static.picture is None
    for _ in range(40):
        image = machine(rng, bolts=True)
        image[:, int(rng.integers(0, 300)) :][:, :10] = 200
        hidden = np.where(image == 200, 0, mask).astype(np.uint8)
        static.add(image, hidden)
    picture = static.picture
    assert picture is not None
    assert int(picture.max()) < 120
    assert picture[85].mean() > 65.0
    assert picture[60].std() < 1.5
    static.add(np.zeros((10, 20), np.uint8), np.full((10, 20), 255, np.uint8))
    assert static.picture is None, "another size starts anew"
