"""Makes views from pixels: the one implementation that training, evaluation and the line share.

A *view* is uint8 (S, S, 3) BGR: the item's bounding square plus a margin, resized by area averaging, with every
pixel that is not the item set to exactly (0, 0, 0) and every item pixel kept above it. Belt, backdrop and
neighbours therefore cannot reach the model. The parameters travel in the bundle as `preprocess.json`.

On the line the mask comes from the belt background (`edge_agent`), in a photograph from its alpha channel or from
its plain backdrop (`segment_photo`); from there on both take the same path, `make_view`.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from models.errors import InputError
from models.view_spec import VIEW_FEATURES, PreprocessSpec

View: TypeAlias = NDArray[np.uint8]
"""uint8 (S, S, 3) BGR, background exactly zero."""

MAX_PHOTO_BYTES: Final = 32 * 1024 * 1024
MAX_PHOTO_PIXELS: Final = 50_000_000
_LEAST_HIDDEN: Final = 0.005
"""An alpha channel that hides a smaller share of the pixels is no mask; a disc in its square hides a fifth."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_TIFF: Final = (b"II*\0", b"MM\0*")
_LEVELS: Final = np.arange(256, dtype=np.float64)
_SQUARES: Final = _LEVELS**2
_CORE: Final = np.ones((5, 5), np.uint8)
_DARK: Final = 40
"""Grey levels below this count as dark."""


def make_view(image: NDArray[np.uint8], mask: NDArray[np.uint8], spec: PreprocessSpec) -> View:
    """Cuts one item out of an image.

    Args:
        image: uint8 (H, W, 3) BGR: a frame, a crop around the item, or a photograph.
        mask: uint8 (H, W), non-zero on this one item.
        spec: Geometry of the view.

    Returns:
        uint8 (S, S, 3) BGR, contiguous.

    Raises:
        InputError: `view.wrong_shape`, `view.empty_mask`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or mask.shape != image.shape[:2]:
        raise InputError(
            "view.wrong_shape",
            "An image and its mask do not belong together.",
            expected="uint8 (H, W, 3) and uint8 (H, W)",
            got=f"{image.dtype} {image.shape} and {mask.dtype} {mask.shape}",
        )
    left, top, width, height = cv2.boundingRect(mask)
    if width == 0 or height == 0:
        raise InputError("view.empty_mask", "The mask shows no item.", expected="> 0 pixels", got=0)
    side = max(width, height)
    side += 2 * max(1, round(spec.margin * side))
    x0 = left - (side - width) // 2
    y0 = top - (side - height) // 2
    square = np.zeros((side, side, 4), np.uint8)
    inside_y = slice(max(y0, top), min(y0 + side, top + height))
    inside_x = slice(max(x0, left), min(x0 + side, left + width))
    # Colour and full coverage of the item's pixels in one pass; the others stay zero in all four channels.
    coloured = cv2.cvtColor(image[inside_y, inside_x], cv2.COLOR_BGR2BGRA)
    target = square[inside_y.start - y0 : inside_y.stop - y0, inside_x.start - x0 : inside_x.stop - x0]
    cv2.copyTo(coloured, mask[inside_y, inside_x], target)
    return _resize_masked(square, spec.view_px)


def _resize_masked(square: NDArray[np.uint8], side: int) -> View:
    """Resizes colour and coverage together, so that the item's rim keeps its colour instead of fading to black.

    One call on four channels gives the same bytes as separate calls on colour and coverage, in less time.
    """
    shrinking = square.shape[0] > side
    how = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    small = cv2.resize(square, (side, side), interpolation=how)
    colour = cv2.cvtColor(small, cv2.COLOR_BGRA2BGR)
    coverage = cv2.extractChannel(small, 3)
    view = np.asarray(cv2.divide(colour, cv2.cvtColor(coverage, cv2.COLOR_GRAY2BGR), scale=255.0), np.uint8)
    # An item pixel is never exactly black: zero means background.
    np.maximum(view, 1, out=view)
    inside = cv2.threshold(coverage, 127, 255, cv2.THRESH_BINARY)[1]
    return np.asarray(cv2.bitwise_and(view, view, mask=inside), np.uint8)


def segment_photo(image: NDArray[np.uint8], backdrop_delta: int = 28) -> NDArray[np.uint8]:
    """Finds the item in a photograph on a plain backdrop.

    The backdrop's colour is the median of the border; what is close to it *and* connected with the border is
    backdrop. The largest remaining part, holes filled, is the item.

    Args:
        image: uint8 (H, W, 3) BGR.
        backdrop_delta: Largest channel difference that still counts as backdrop.

    Returns:
        uint8 (H, W): 255 on the item, 0 elsewhere. Where nothing stands out (an item that fills the photograph)
        the whole image is the item.
    """
    border = np.concatenate((image[0], image[-1], image[:, 0], image[:, -1]))
    colour = np.median(border, axis=0)
    close = (np.abs(image.astype(np.int16) - colour).max(axis=2) <= backdrop_delta).astype(np.uint8)
    framed = cv2.copyMakeBorder(close, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    flooded = np.zeros((framed.shape[0] + 2, framed.shape[1] + 2), np.uint8)
    cv2.floodFill(framed, flooded, (0, 0), 2)
    item = (framed[1:-1, 1:-1] != 2).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(item, connectivity=4)
    if count < 2:
        return np.full(image.shape[:2], 255, np.uint8)
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[largest, cv2.CC_STAT_AREA] < 0.01 * item.size:
        return np.full(image.shape[:2], 255, np.uint8)
    return np.where(labels == largest, np.uint8(255), np.uint8(0))


def mask_of_photo(image: NDArray[np.uint8], alpha: NDArray[np.uint8] | None, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Returns uint8 (H, W), non-zero on the item: the alpha channel where it hides something, else `segment_photo`.

    An alpha channel that hides nothing is written by many programs without any mask behind it.
    """
    if alpha is None or 1.0 - cv2.countNonZero(alpha) / alpha.size < _LEAST_HIDDEN:
        return segment_photo(image, spec.backdrop_delta)
    return alpha


def decode_photo(
    data: bytes, *, name: str, depth_bits: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Decodes an image file held in memory.

    An image of 16 bits per channel is scaled to 8 by the bits that it uses: cameras of 10, 12 and 14 bits write their
    values into the low bits of 16.

    Args:
        data: The file's bytes (JPEG, PNG, BMP, TIFF, WebP).
        name: Name of the file in an error.
        depth_bits: Bits per channel that a 16-bit image uses, 8..16; None = the fewest that hold its brightest value.

    Returns:
        uint8 (H, W, 3) BGR, and its alpha channel (H, W) or None.

    Raises:
        InputError: `photo.too_large`, `photo.unreadable`, `photo.wrong_type`.
    """
    if len(data) > MAX_PHOTO_BYTES:
        raise InputError(
            "photo.too_large", f"{name} is too large.", expected=f"<= {MAX_PHOTO_BYTES} bytes", got=len(data)
        )
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error:
        decoded = None
    if decoded is None:
        raise InputError(
            "photo.unreadable",
            f"{name} cannot be decoded as an image.",
            expected="a whole JPEG, PNG, BMP, TIFF or WebP file",
            got=f"{len(data)} bytes starting with {data[:8].hex() or 'nothing'}",
        )
    if decoded.dtype not in (np.uint8, np.uint16) or decoded.size > MAX_PHOTO_PIXELS * 4:
        raise InputError(
            "photo.wrong_type",
            f"{name} has a pixel type or a size that is not read.",
            expected=f"8 or 16 bits per channel, <= {MAX_PHOTO_PIXELS} pixels",
            got=f"{decoded.dtype} {decoded.shape}",
        )
    if decoded.dtype == np.uint16:
        decoded = _in_eight_bits(decoded, depth_bits or _used_bits(decoded))
    if decoded.ndim == 2:
        return cv2.cvtColor(decoded, cv2.COLOR_GRAY2BGR).astype(np.uint8, copy=False), None
    if decoded.shape[2] == 4:
        return np.ascontiguousarray(decoded[:, :, :3], np.uint8), np.ascontiguousarray(decoded[:, :, 3], np.uint8)
    return np.ascontiguousarray(decoded, np.uint8), None


def sample_bits(path: Path) -> int | None:
    """Returns the bits per channel that an image file of 16 bits uses; None for all other files.

    Only files that may have 16 bits are decoded: PNG with that depth in its header, and TIFF.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(26)
        if (head[:8] == _PNG and head[24:25] == b"\x10") or head[:4] in _TIFF:
            decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
            return _used_bits(decoded) if decoded is not None and decoded.dtype == np.uint16 else None
    except (OSError, cv2.error):
        return None
    return None


def _used_bits(decoded: NDArray[Any]) -> int:
    """Returns the fewest of 8, 10, 12, 14 and 16 bits that hold the brightest value of the colour channels."""
    colour = decoded if decoded.ndim == 2 else decoded[:, :, :3]
    brightest = int(colour.max(initial=0))
    return next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)


def _in_eight_bits(decoded: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Scales colour from so many bits, and an alpha channel, which always uses 16, to 8."""
    scaled = cv2.convertScaleAbs(decoded, alpha=255.0 / (2**bits - 1))
    if decoded.ndim == 3 and decoded.shape[2] == 4:
        scaled[:, :, 3] = decoded[:, :, 3] >> 8
    return np.asarray(scaled, np.uint8)


def view_of_photo(path: Path, spec: PreprocessSpec) -> View:
    """Returns the view of a labelled photograph.

    Raises:
        InputError: `photo.missing` and those of `decode_photo` and `make_view`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            "photo.missing", f"{path} cannot be read.", expected="a readable file", got=error.strerror
        ) from error
    image, alpha = decode_photo(data, name=str(path))
    return make_view(image, mask_of_photo(image, alpha, spec), spec)


def largest_channel(image: NDArray[np.uint8] | cv2.typing.MatLike) -> NDArray[np.uint8]:
    """Returns uint8 (H, W), the largest of the three channels; ten times as fast as `image.max(axis=2)`."""
    blue, green, red = cv2.split(image)
    return np.asarray(cv2.max(cv2.max(blue, green), red), np.uint8)


@lru_cache(maxsize=8)
def _places(side: int) -> NDArray[np.int64]:
    return np.arange(side)


def _extents(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Returns for each row the distance from its first to its last place that is not zero."""
    filled = counts > 0
    return np.asarray(filled.shape[1] - filled[:, ::-1].argmax(axis=1) - filled.argmax(axis=1))


def view_features(view: View) -> NDArray[np.float32]:
    """Measures image quality and geometry of the item in one view; see `features_of_views`.

    Args:
        view: uint8 (S, S, 3) BGR, background zero.

    Returns:
        float32 (9,), in the order of `VIEW_FEATURES`.
    """
    return np.asarray(features_of_views(view[None])[0])


def features_of_views(views: NDArray[np.uint8] | Sequence[View]) -> NDArray[np.float32]:
    """Measures image quality and geometry of the item in each view, for monitoring.

    Six views in one call take 72 microseconds each, six calls 196 each (measured); the numbers are the same.

    Args:
        views: uint8 (N, S, S, 3) BGR, background zero, N >= 1, or a sequence of views of one size.

    Returns:
        float32 (N, 9), in the order of `VIEW_FEATURES`: mean lightness (0-255), its standard deviation, log variance
        of the Laplacian, 95th percentile of lightness, share of item pixels darker than 40, share of the view
        that is item, height / width of the item, centre of mass x and y (0-1). NaN in the whole row of a view that is
        empty.
    """
    batch = np.ascontiguousarray(views, np.uint8)
    count, side = batch.shape[:2]
    # The views lie below each other, so what looks at single pixels takes all of them at once.
    tall = batch.reshape(count * side, side, 3)
    inside = cv2.threshold(largest_channel(tall), 0, 1, cv2.THRESH_BINARY)[1]
    grey = cv2.cvtColor(tall, cv2.COLOR_BGR2GRAY)
    per_row = cv2.reduce(inside, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).reshape(count, side)
    per_column = np.empty((count, side), np.int32)
    levels = np.empty((count, 256), np.float64)
    deviation = np.empty(count, np.float64)
    # Neighbours matter to these two only where an item reaches the upper or lower rim; then each view stands alone.
    height = side if per_row[:, (0, -1)].any() else count * side
    starts = range(0, count * side, height)
    cores = [cv2.erode(inside[at : at + height], _CORE) for at in starts]
    edges = [cv2.Laplacian(grey[at : at + height], cv2.CV_16S) for at in starts]
    core, edge = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in (cores, edges))
    for row in range(count):
        rows = slice(row * side, (row + 1) * side)
        per_column[row] = cv2.reduce(inside[rows], 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
        levels[row] = cv2.calcHist([grey[rows]], [0], inside[rows], [256], [0, 256]).ravel()
        deviation[row] = cv2.meanStdDev(edge[rows], mask=core[rows])[1][0, 0]
    pixels = per_row.sum(axis=1)
    some = np.maximum(pixels, 1)
    mean = levels @ _LEVELS / some
    percentile = (0.95 * (some - 1)).astype(np.int64)[:, None]
    places = _places(side)
    found = np.empty((count, len(VIEW_FEATURES)), np.float32)
    found[:, 0] = mean
    found[:, 1] = np.sqrt(np.maximum(levels @ _SQUARES / some - mean * mean, 0.0))
    found[:, 2] = np.log1p(deviation**2)
    found[:, 3] = (levels.cumsum(axis=1) <= percentile).sum(axis=1)
    found[:, 4] = levels[:, :_DARK].sum(axis=1) / some
    found[:, 5] = pixels / (side * side)
    found[:, 6] = _extents(per_row) / _extents(per_column)
    found[:, 7] = per_column @ places / some / side
    found[:, 8] = per_row @ places / some / side
    found[pixels == 0] = np.nan
    return found
