"""Measures millimetres per pixel, from a checkerboard on the belt or from items whose mean size is known."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Frame, Image
from models.errors import InputError

_MAX_RESIDUAL_PX: Final = 1.0
_MAX_ANISOTROPY: Final = 0.02
_ENOUGH_BOARDS: Final = 8
_LEAST_ITEMS: Final = 12
"""Items that vary by 7 % in size give the scale to 5 % (95 %) at this number; the interval is stated with the scale."""
_BOOTSTRAPS: Final = 1000


@dataclass(frozen=True, slots=True)
class PixelScale:
    """Millimetres per pixel along the belt, with its uncertainty."""

    mm_per_px: float
    low: float
    high: float
    """95 % interval (items), or the extremes of the pictures (checkerboard)."""
    source: str
    """Source of the measurement: `checkerboard` or `items`."""
    seen: int
    """Number of pictures of the board, or of items."""
    residual_px: float = 0.0
    """Root mean square distance of the corners from a flat board seen straight from above."""
    anisotropy: float = 0.0
    """Share by which a pixel is longer along the belt than across it."""

    def across(self) -> "PixelScale":
        """Returns the scale along the other axis of the picture, for a camera that is turned by a quarter."""
        factor = 1.0 / (1.0 + self.anisotropy)
        return replace(
            self,
            mm_per_px=self.mm_per_px * factor,
            low=self.low * factor,
            high=self.high * factor,
            anisotropy=factor - 1.0,
        )


def parse_pattern(text: str) -> tuple[int, int]:
    """Parses the inner corners of a checkerboard, such as `9x6`.

    Raises:
        InputError: `calibration.bad_pattern`.
    """
    match = re.fullmatch(r"(\d{1,2})x(\d{1,2})", text.strip().lower())
    pattern = (int(match[1]), int(match[2])) if match else (0, 0)
    if min(pattern) < 3:
        raise InputError(
            "calibration.bad_pattern",
            "A checkerboard is named by its inner corners: columns x rows.",
            expected="such as 9x6, each at least 3",
            got=text,
        )
    return pattern


def scale_from_board(frames: Iterable[Frame], pattern: tuple[int, int], square_mm: float) -> PixelScale:
    """Finds the board in the frames and measures it.

    Args:
        frames: Frames that are searched until the board was found in eight of them.
        pattern: Number of inner corners (columns, rows).
        square_mm: Length of the edge of one square.

    Raises:
        InputError: `calibration.no_board`, `calibration.bad_board`, `calibration.bad_pattern`.
    """
    if not 0.1 <= square_mm <= 1000.0:
        raise InputError(
            "calibration.bad_pattern", "A square's edge is in millimetres.", expected="0.1 to 1000", got=square_mm
        )
    boards: list[PixelScale] = []
    looked = 0
    for frame in frames:
        looked += 1
        corners = _corners(frame.image, pattern)
        if corners is not None:
            boards.append(_measure(corners, pattern, square_mm))
            if len(boards) >= _ENOUGH_BOARDS:
                break
    if not boards:
        raise InputError(
            "calibration.no_board",
            "The checkerboard was not found; lay it flat on the belt, whole in the picture, evenly lit.",
            expected=f"{pattern[0]}x{pattern[1]} inner corners",
            got=f"none in {looked} frames",
        )
    values = [board.mm_per_px for board in boards]
    found = PixelScale(
        float(np.median(values)),
        min(values),
        max(values),
        "checkerboard",
        len(boards),
        float(np.median([board.residual_px for board in boards])),
        float(np.median([board.anisotropy for board in boards])),
    )
    if found.residual_px > _MAX_RESIDUAL_PX or abs(found.anisotropy) > _MAX_ANISOTROPY:
        raise InputError(
            "calibration.bad_board",
            "The checkerboard is not seen straight from above, is not flat, or the lens bends it;"
            " set the camera upright to the belt.",
            expected=f"residual <= {_MAX_RESIDUAL_PX:g} px, anisotropy <= {_MAX_ANISOTROPY:.0%}",
            got=f"residual {found.residual_px:.2f} px, anisotropy {found.anisotropy:+.1%}",
        )
    return found


def _corners(image: Image, pattern: tuple[int, int]) -> NDArray[np.float64] | None:
    """Returns the pixels of the inner corners, float64 (columns * rows, 2), row by row, or None."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    flags = cv2.CALIB_CB_NORMALIZE_IMAGE | cv2.CALIB_CB_ACCURACY
    found, corners = cv2.findChessboardCornersSB(grey, pattern, flags=flags)
    return np.asarray(corners, np.float64).reshape(-1, 2) if found else None


def _measure(corners: NDArray[np.float64], pattern: tuple[int, int], square_mm: float) -> PixelScale:
    """Measures one board by the affine map from pixels to its millimetres, and the residual of that map."""
    columns, rows = pattern
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=2).reshape(-1, 2) * square_mm
    known = np.column_stack((corners, np.ones(len(corners))))
    answer = np.linalg.lstsq(known, grid, rcond=None)[0]
    along, across = float(np.linalg.norm(answer[0])), float(np.linalg.norm(answer[1]))
    left_mm = known @ answer - grid
    residual_px = float(np.sqrt((left_mm**2).sum(axis=1).mean())) / np.sqrt(along * across)
    # Singular values, not rows: a pixel grid that is sheared against the board is no straight view either.
    large, small = np.linalg.svd(answer[:2], compute_uv=False)
    sign = 1.0 if along >= across else -1.0
    return PixelScale(along, along, along, "checkerboard", 1, float(residual_px), sign * float(large / small - 1.0))


def scale_from_items(lengths_px: list[float], item_mm: float, *, seed: int = 1) -> PixelScale:
    """Returns the scale at which the median length of the items is their known size.

    On the simulated line (four worlds of about 100 items, in full and in dim light) the median comes out 0 to 1 %
    too long, and the scale as much too small; the interval covers the choice of items, not this bias.

    Args:
        lengths_px: Length of each item, pixels.
        item_mm: Mean diameter of the items.
        seed: Seed of the bootstrap.

    Raises:
        InputError: `calibration.too_few_items`, `calibration.bad_item_size`.
    """
    if not 1.0 <= item_mm <= 1000.0:
        raise InputError(
            "calibration.bad_item_size",
            "The items' mean diameter is in millimetres.",
            expected="1 to 1000",
            got=item_mm,
        )
    if len(lengths_px) < _LEAST_ITEMS:
        raise InputError(
            "calibration.too_few_items",
            "Too few single items were seen to measure by; record longer, or use a checkerboard.",
            expected=f">= {_LEAST_ITEMS}",
            got=len(lengths_px),
        )
    lengths = np.asarray(lengths_px, np.float64)
    rng = np.random.default_rng(seed)
    draws = np.median(lengths[rng.integers(0, len(lengths), (_BOOTSTRAPS, len(lengths)))], axis=1)
    low, high = np.quantile(item_mm / draws, (0.025, 0.975))
    return PixelScale(item_mm / float(np.median(lengths)), float(low), float(high), "items", len(lengths))
