"""More views than were photographed: turns, flips, lamp changes, and blemishes drawn on sound skin.

Twenty apples are twenty skins. Drawing plausible blemishes (rot, hole, bruise, spots) on the sound views of each item
shows the learner the same skin with and without a defect, so that it learns the defect instead of the item. Used only
where there are two classes; validation views are never touched.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Views = NDArray[np.uint8]


def turned(views: Views, rng: np.random.Generator) -> Views:
    """Each view turned by a multiple of 90 degrees, perhaps mirrored, under a slightly other lamp."""
    out = np.empty_like(views)
    for row, view in enumerate(views):
        picture = np.rot90(view, int(rng.integers(4)))
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        gain = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
        inside = picture.max(axis=2, keepdims=True) > 0
        out[row] = np.where(inside, np.clip(picture * gain, 1, 255), 0).astype(np.uint8)
    return out


def blemished(views: Views, rng: np.random.Generator) -> Views:
    """Each view with one drawn blemish."""
    return np.stack([_blemish(view, rng) for view in views]) if len(views) else views


def _blemish(view: Views, rng: np.random.Generator) -> Views:
    inside = view.max(axis=2) > 0
    core = cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8))
    places = np.argwhere(np.asarray(core) > 0)
    if not len(places):
        return view
    y, x = (int(v) for v in places[rng.integers(len(places))])
    skin = view[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].reshape(-1, 3).mean(axis=0).astype(np.float64)
    side = view.shape[0]
    draw = (_rot, _hole, _bruise, _spots)[int(rng.integers(4))]
    picture = draw(view.astype(np.float64), (y, x), skin, side / 64.0, rng)
    return np.where(inside[..., None], np.clip(picture, 1, 255), 0).astype(np.uint8)


def _blob(
    side: int, at: tuple[float, float], radius: float, soft: float, wobble: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Coverage (side, side) of an irregular ellipse with a soft rim, 0..1."""
    rows, columns = np.mgrid[:side, :side]
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.5, 1.0)
    dy, dx = rows - at[0], columns - at[1]
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / squeeze
    noise = cv2.resize(rng.normal(size=(8, 8)), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip((radius - np.hypot(u, v) - noise * wobble * radius) / soft, 0.0, 1.0), np.float64)


def _painted(
    picture: NDArray[np.float64],
    coverage: NDArray[np.float64],
    colour: NDArray[np.float64],
    strength: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    alpha = (coverage * strength)[..., None]
    texture = 1.0 + 0.08 * rng.normal(size=(*coverage.shape, 1))
    return np.asarray(picture * (1.0 - alpha) + alpha * colour * texture, np.float64)


def _rot(
    picture: NDArray[np.float64], at: tuple[int, int], skin: NDArray[np.float64], unit: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    coverage = _blob(len(picture), at, rng.uniform(6, 20) * unit, rng.uniform(1, 4) * unit, 0.25, rng)
    brown = np.array([35.0, 60.0, 100.0]) * rng.uniform(0.4, 1.2) * (skin.mean() + 40.0) / 130.0
    return _painted(picture, coverage, brown, rng.uniform(0.6, 0.95), rng)


def _hole(
    picture: NDArray[np.float64], at: tuple[int, int], skin: NDArray[np.float64], unit: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    radius = rng.uniform(1.2, 3.0) * unit
    halo = _blob(len(picture), at, radius * rng.uniform(1.8, 4.0), 3.0 * unit, 0.2, rng)
    brown = np.array([40.0, 70.0, 110.0]) * (skin.mean() + 30.0) / 140.0
    ringed = _painted(picture, halo, brown, rng.uniform(0.2, 0.6), rng)
    return _painted(
        ringed, _blob(len(picture), at, radius, 1.2 * unit, 0.2, rng), np.array([15.0, 20.0, 28.0]), 0.95, rng
    )


def _bruise(
    picture: NDArray[np.float64], at: tuple[int, int], skin: NDArray[np.float64], unit: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    coverage = _blob(len(picture), at, rng.uniform(6, 16) * unit, rng.uniform(3, 8) * unit, 0.25, rng)
    return _painted(picture, coverage, skin * np.array([0.6, 0.62, 0.7]), rng.uniform(0.5, 0.95), rng)


def _spots(
    picture: NDArray[np.float64], at: tuple[int, int], skin: NDArray[np.float64], unit: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    coverage = np.zeros(picture.shape[:2])
    for _ in range(int(rng.integers(4, 16))):
        place = (at[0] + rng.normal() * 9.0 * unit, at[1] + rng.normal() * 9.0 * unit)
        coverage = np.maximum(coverage, _blob(len(picture), place, rng.uniform(1, 3.2) * unit, 1.2 * unit, 0.3, rng))
    dark = np.array([45.0, 60.0, 75.0]) * (skin.mean() + 30.0) / 140.0
    return _painted(picture, coverage, dark, rng.uniform(0.5, 0.9), rng)
