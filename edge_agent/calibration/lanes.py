"""Finds the lanes: the rows of the items' centres fall into heaps, one per lane."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Lane
from models.errors import InputError

MAX_LANES: Final = 8
_LEAST_PER_LANE: Final = 5
_LEAST_SHARE: Final = 0.05
"""A heap smaller than this share of the largest consists of stray items and is no lane."""
_CLEAR_GAP: Final = 0.3
"""Smallest gap between the centres of two lanes, in item widths; centres within one lane wander less."""
_LANE_ITEMS: Final = 1.45
"""Height of a lane that stands alone, in item widths."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lanes from top to bottom."""

    rows: tuple[Lane, ...]
    centres: tuple[float, ...]
    items: tuple[int, ...]
    """Number of items seen in each lane."""
    stray: int
    """Number of items that belong to no lane."""


def find_lanes(centres: list[float], widths: list[float], height_px: int, expected: int | None = None) -> Lanes:
    """Splits the items' centres across the belt into lanes.

    Args:
        centres: Row of each item's centre.
        widths: Extent of each item across the belt, pixels.
        height_px: Height of the picture.
        expected: Number of lanes, where it is known.

    Raises:
        InputError: `calibration.too_few_items`, `calibration.wrong_lanes`, `calibration.lanes_not_separable`.
    """
    needed = _LEAST_PER_LANE * (expected or 1)
    if len(centres) < needed:
        raise InputError(
            "calibration.too_few_items",
            "Too few items were seen to find the lanes; record longer, with items in every lane.",
            expected=f">= {needed} items",
            got=len(centres),
        )
    width = float(np.median(widths))
    rows = np.sort(np.asarray(centres, np.float64))
    cuts = np.flatnonzero(np.diff(rows) > _CLEAR_GAP * width) + 1
    heaps = np.split(rows, cuts)
    least = max(3.0, _LEAST_SHARE * max(len(heap) for heap in heaps))
    kept = [heap for heap in heaps if len(heap) >= least]
    middles = [float(np.median(heap)) for heap in kept]
    _check(kept, middles, width, expected)
    bounds = _bounds(middles, width, height_px)
    return Lanes(
        tuple(Lane(top, bottom) for top, bottom in bounds),
        tuple(middles),
        tuple(len(heap) for heap in kept),
        len(rows) - sum(len(heap) for heap in kept),
    )


def _check(heaps: list[NDArray[np.float64]], middles: list[float], width: float, expected: int | None) -> None:
    found = ", ".join(f"{len(heap)} items around row {middle:.0f}" for heap, middle in zip(heaps, middles, strict=True))
    wide = [float(np.quantile(heap, 0.95) - np.quantile(heap, 0.05)) for heap in heaps]
    # Items side by side are a width apart: centres that fill more than that without a gap are several lanes.
    if not heaps or max(wide) > 1.0 * width or min(np.diff(middles), default=width) < 0.8 * width:
        raise InputError(
            "calibration.lanes_not_separable",
            "The items' rows do not fall into lanes; guide the items, or name the rows yourself (line.lane_rows).",
            expected=f"heaps narrower than an item ({width:.0f} px), with gaps between",
            got=found or "no heap",
        )
    if (expected is not None and len(heaps) != expected) or len(heaps) > MAX_LANES:
        raise InputError(
            "calibration.wrong_lanes",
            "Another number of lanes carries items than the line has; let items run in every lane,"
            " and let the picture show nothing else.",
            expected=f"{expected or f'at most {MAX_LANES}'} lanes",
            got=f"{len(heaps)}: {found}",
        )


def _bounds(middles: list[float], width: float, height_px: int) -> list[tuple[int, int]]:
    """Returns the rows of each lane: bounds lie half-way between neighbours, and as far outside as inside."""
    if len(middles) == 1:
        outer = _LANE_ITEMS * width / 2.0
        edges = [middles[0] - outer, middles[0] + outer]
    else:
        between = [(above + below) / 2.0 for above, below in pairwise(middles)]
        edges = [2.0 * middles[0] - between[0], *between, 2.0 * middles[-1] - between[-1]]
    whole = [min(max(round(edge), 0), height_px) for edge in edges]
    return list(pairwise(whole))
