"""Measures the camera by the empty belt in a few consecutive frames: light, colour, sharpness and flicker by cell.

Knows no learnt levels, no time and no thread. The picture is divided into 12 rows and 16 columns of cells. Pixels
within the places of items are left out; a place that stands still while the belt moves is no item (dirt on the lens is
found as one) and is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Frame
from models.windows import DIRT_COLUMNS, DIRT_ROWS

Box = tuple[int, int, int, int]
"""Left, top, right, bottom of an item's place, pixels."""
Floats = NDArray[np.float64]

STATIC_WIDTH: Final = 320
"""Columns of the picture of what stands still; smaller frames keep their own."""
_MARGIN_PX: Final = 10
"""Around an item: its shadow and its blurred edge."""
_LEAST_FREE: Final = 0.25
"""A cell of which a smaller share is belt says nothing."""
_STILL_SHARE: Final = 0.3
"""A place that moved less than this share of the belt's advance stands still."""
_STILL_PX: Final = 9.0
"""Nor may it move by more: where frames were dropped, another item may stand near the place of one that has left."""
_LEAST_ADVANCE_PX: Final = 4.0


@dataclass(frozen=True, slots=True)
class Exposure:
    """One frame and the places of the items in it."""

    frame: Frame
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class BeltLook:
    """What a few consecutive frames show of the belt. Cells without enough belt are NaN."""

    colour: Floats
    """Mean colour of the belt by cell, float64 (12, 16, 3) BGR."""
    sharpness: Floats
    """Natural logarithm of the variance of the Laplacian by cell, (12, 16)."""
    flicker: float
    """Modulation of the light from frame to frame by row of cells, share of the mean; NaN with one frame."""
    belt_mm: float
    """Belt position of the first frame."""


def look_at(exposures: Sequence[Exposure], mm_per_px: float, *, edge_px: int = 0) -> BeltLook:
    """Measures some consecutive frames of one size.

    Args:
        exposures: One frame or more, oldest first.
        mm_per_px: Scale of the picture, by which places that stand still are told from items.
        edge_px: Width of the strips at both ends of the belt that are left out: an item of which only so much is in the
            picture is not found yet.
    """
    height, width = exposures[0].frame.image.shape[:2]
    ends = [(-_MARGIN_PX, 0, edge_px - _MARGIN_PX, height), (width - edge_px + _MARGIN_PX, 0, width, height)]
    boxes = [[*of, *(ends if edge_px else ())] for of in _items_only(exposures, mm_per_px)]
    seen = [_colour_of(e.frame.image, of) for e, of in zip(exposures, boxes, strict=True)]
    shares = np.stack([share for _, share in seen])
    colours = np.stack([colour for colour, _ in seen])
    known = shares >= _LEAST_FREE
    weights = np.where(known, shares, 0.0)
    total = weights.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        colour = (np.where(known[..., None], colours, 0.0) * weights[..., None]).sum(axis=0) / total[..., None]
    return BeltLook(
        colour=colour,
        sharpness=_sharpness(exposures, boxes),
        flicker=_flicker(np.where(known, colours.mean(axis=3), np.nan)),
        belt_mm=exposures[0].frame.belt_mm,
    )


def static_part(exposures: Sequence[Exposure], mm_per_px: float) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Returns grey pictures, uint8 (h, w) at most 320 columns wide, and masks of what is belt or machine in them."""
    found = []
    for exposure, of in zip(exposures, _items_only(exposures, mm_per_px), strict=True):
        image = exposure.frame.image
        scale = min(STATIC_WIDTH / image.shape[1], 1.0)
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        grey = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        found.append((np.asarray(grey, np.uint8), _free((size[1], size[0]), of, scale)))
    return found


def _items_only(exposures: Sequence[Exposure], mm_per_px: float) -> list[list[Box]]:
    """Leaves out the places that stand still while the belt moves: no item does."""
    kept = []
    for exposure in exposures:
        others = [
            (other.boxes, advance_px)
            for other in exposures
            if (advance_px := abs(exposure.frame.belt_mm - other.frame.belt_mm) / mm_per_px) >= _LEAST_ADVANCE_PX
        ]
        kept.append([box for box in exposure.boxes if not (others and _stands(box, others))])
    return kept


def _stands(box: Box, others: Sequence[tuple[Sequence[Box], float]]) -> bool:
    """Returns whether every other frame, between which the belt ran so many pixels, shows something at this place."""
    return all(
        any(_close(box, before, min(_STILL_SHARE * advance_px, _STILL_PX)) for before in boxes)
        for boxes, advance_px in others
    )


def _close(a: Box, b: Box, limit_px: float) -> bool:
    """Returns whether each side lies within the limit of the side of the same name."""
    return abs(a[0] - b[0]) < limit_px and all(abs(x - y) < limit_px for x, y in zip(a, b, strict=True))


def _free(size: tuple[int, int], boxes: Sequence[Box], scale: float) -> NDArray[np.uint8]:
    """Returns uint8 (h, w): 255 outside the places of items, 0 within and close to them."""
    mask = np.full(size, 255, np.uint8)
    for left, top, right, bottom in boxes:
        x0, y0 = int(max(left - _MARGIN_PX, 0) * scale), int(max(top - _MARGIN_PX, 0) * scale)
        mask[y0 : int((bottom + _MARGIN_PX) * scale) + 1, x0 : int((right + _MARGIN_PX) * scale) + 1] = 0
    return mask


def _cells(values: NDArray[np.float32]) -> Floats:
    return np.asarray(cv2.resize(values, (DIRT_COLUMNS, DIRT_ROWS), interpolation=cv2.INTER_AREA), np.float64)


def _colour_of(image: NDArray[np.uint8], boxes: Sequence[Box]) -> tuple[Floats, Floats]:
    """Returns the mean colour of the belt (12, 16, 3) and the share of belt (12, 16) by cell."""
    scale = 0.25
    size = (max(image.shape[1] // 4, DIRT_COLUMNS), max(image.shape[0] // 4, DIRT_ROWS))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32)
    mask = (_free((size[1], size[0]), boxes, scale) > 0).astype(np.float32)
    share = _cells(mask)
    return _cells(small * mask[:, :, None]) / np.maximum(share, 1e-6)[:, :, None], share


def _sharpness(exposures: Sequence[Exposure], boxes: Sequence[Sequence[Box]]) -> Floats:
    """Returns the logarithm of the variance of the Laplacian by cell, over the first and the last frame."""
    power, share = np.zeros((DIRT_ROWS, DIRT_COLUMNS)), np.zeros((DIRT_ROWS, DIRT_COLUMNS))
    for at in sorted({0, len(exposures) - 1}):
        image = exposures[at].frame.image
        edges = cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.CV_32F)
        mask = (_free(image.shape[:2], boxes[at], 1.0) > 0).astype(np.float32)
        power += _cells(np.asarray(cv2.multiply(cv2.multiply(edges, edges), mask), np.float32))
        share += _cells(mask)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share >= _LEAST_FREE, np.log(np.maximum(power / share, 1e-3)), np.nan)


def _flicker(levels: Floats) -> float:
    """Returns the modulation of the light over the frames; `levels` is (frames, 12, 16), NaN = unknown."""
    always: NDArray[np.bool_] = np.asarray(np.isfinite(levels).all(axis=0))
    rows = [row for row in range(DIRT_ROWS) if always[row].sum() >= 2]
    if len(levels) < 2 or not rows:
        return float("nan")
    relative = levels / np.where(always, levels, np.nan).mean(axis=0)
    light = np.stack([np.median(relative[:, row, always[row]], axis=1) for row in rows])
    return float(np.sqrt(light.var(axis=1).mean()))
