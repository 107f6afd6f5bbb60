"""Augmentation: each view turned, bent, recoloured, shaded and polished, its label unchanged.

Twenty apples are twenty skins, and a classifier learns the skin before it learns the defect. Every change here
concerns the whole view (another hue, a blush, a lamp at the side, a gloss, another shape), so that the look of the skin
carries less information about the label. Views that measure the model are never changed.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Views = NDArray[np.uint8]
_Picture = NDArray[np.floating]
_Rng = np.random.Generator


def varied(views: Views, rng: np.random.Generator) -> Views:
    """Returns each view as it might look on another item under another lamp.

    Args:
        views: uint8 (N, S, S, 3) BGR, background zero.
        rng: Source of all randomness; the same state gives the same bytes.

    Returns:
        uint8 (N, S, S, 3): background zero, item pixels at least 1.
    """
    return np.stack([_varied(view, rng) for view in views]) if len(views) else views


def _varied(view: Views, rng: _Rng) -> Views:
    picture, inside = _bent(view, rng)
    if rng.random() < 0.8:
        picture = _recoloured(picture, rng)
    if rng.random() < 0.5:
        picture = _blushed(picture, rng)
    if rng.random() < 0.5:
        picture = _shaded(picture, rng)
    if rng.random() < 0.4:
        picture = _polished(picture, inside, rng)
    if rng.random() < 0.3:
        picture = np.asarray(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), rng.uniform(0.4, 0.9)), np.float32)
    picture = picture + rng.normal() + rng.normal(size=picture.shape) * rng.uniform(0.0, 3.0)
    return np.where(inside[..., None], np.clip(picture, 1, 255), 0).astype(np.uint8)


def _rotation(angle: float) -> _Picture:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _bent(view: Views, rng: _Rng) -> tuple[_Picture, NDArray[np.bool_]]:
    """Turns, stretches, shears and perhaps mirrors a view; returns the picture and where the item is in it."""
    side = len(view)
    first, last = rng.uniform(0.0, 2.0 * np.pi, 2)
    across, along = rng.uniform(0.78, 1.02, 2)
    matrix = _rotation(first) @ np.array([[across, 0.075 * rng.normal()], [0.0, along]]) @ _rotation(last)
    if rng.random() < 0.5:
        matrix = matrix @ np.diag([-1.0, 1.0])
    centre = np.full(2, (side - 1) / 2.0)
    affine = np.column_stack((matrix, centre - matrix @ centre)).astype(np.float32)
    item = (view.max(axis=2) > 0).astype(np.float32)
    picture = cv2.warpAffine(view.astype(np.float32), affine, (side, side))
    share = np.asarray(cv2.warpAffine(item, affine, (side, side)))
    # Division by the share removes the black of the background from the rim.
    return np.asarray(picture / np.maximum(share, 0.25)[..., None]), np.asarray(share > 0.6)


def _recoloured(picture: _Picture, rng: _Rng) -> _Picture:
    """Applies another tone curve, saturation, hue (a turn about the grey axis), white balance and exposure."""
    x = (np.clip(picture, 1.0, 255.0) / 255.0) ** rng.uniform(0.75, 1.35)
    grey = x.mean(axis=2, keepdims=True)
    x = grey + (x - grey) * rng.uniform(0.6, 1.5)
    angle = 0.35 * rng.normal()
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3.0)
    turn = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross  # Rodrigues
    gain = np.exp(0.12 * rng.normal(size=3) + 0.2 * rng.normal())
    return np.asarray(255.0 * np.clip(x @ turn.T * gain, 0.004, 1.0))


def _blushed(picture: _Picture, rng: _Rng) -> _Picture:
    """Gives part of the skin another colour, with a soft border."""
    side = len(picture)
    field = cv2.resize(rng.normal(size=(3, 3)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    cover = (1.0 / (1.0 + np.exp(-3.0 * (np.asarray(field) + 0.5 * rng.normal()))))[..., None]
    tinted = np.clip(picture * np.exp(0.22 * rng.normal(size=3)), 1.0, 255.0)
    return np.asarray(picture * (1.0 - cover) + tinted * cover)


def _shaded(picture: _Picture, rng: _Rng) -> _Picture:
    """Adds the shading of a lamp at one side."""
    rows, columns = np.mgrid[: len(picture), : len(picture)] / len(picture) - 0.5
    angle = rng.uniform(0.0, 2.0 * np.pi)
    return np.asarray(
        picture * np.exp(rng.uniform(0.0, 0.6) * (np.cos(angle) * columns + np.sin(angle) * rows))[..., None]
    )


def _polished(picture: _Picture, inside: NDArray[np.bool_], rng: _Rng) -> _Picture:
    """Adds one to three highlights."""
    places = np.argwhere(inside)
    rows, columns = np.mgrid[: len(picture), : len(picture)]
    unit = len(picture) / 64.0
    for _ in range(int(rng.integers(1, 4)) if len(places) else 0):
        y, x = places[rng.integers(len(places))]
        radius, angle, squeeze = rng.uniform(1.5, 7.0) * unit, rng.uniform(0.0, np.pi), rng.uniform(1.0, 3.0)
        u = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
        v = ((rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)) * squeeze
        cover = (np.exp(-(u * u + v * v) / (2.0 * radius * radius)) * rng.uniform(0.15, 0.9))[..., None]
        picture = picture * (1.0 - cover) + 255.0 * cover
    return picture
