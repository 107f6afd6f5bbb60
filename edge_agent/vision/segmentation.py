"""Finds the items of one frame by a learnt belt background, a threshold and connected parts.

It has no notion of time or identity.

Works on a quarter-size image, so that a 640x340 frame costs well under a millisecond; the mask of one item is refined
at full size only when a view of it is taken. The background follows the light: a gain per frame and channel first (a
lamp that dims or changes its colour must not turn the belt into one large item), then a slow running mean of the pixels
that are no item.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Image, LineGeometry, Mask

SHRINK: Final = 4
_DELTA: Final = 26.0
"""Grey levels (largest channel) by which an item stands out from the belt."""
_LEARN: Final = 0.02
FLOODED: Final = 0.85
"""A frame of which a larger share is not belt shows no belt: it is black, torn, or its light changed too much."""
_EACH: Final = 8
"""The lamp's gain is measured on every eighth pixel of every eighth row of the small image."""
_FEWEST: Final = 32
"""Smallest number of belt samples from which the gain of the lamp is measured."""
_TINTED: Final = 1.1
_STEADY: Final = 0.05
_FOLLOW: Final = 0.05
_CONVEX: Final = 1.25
"""A part whose convex hull is more than this factor larger than the part is no single fruit."""
_MIN_SHARE: Final = 0.04
"""Smallest item, as a share of a square as wide as the lane."""


@dataclass(slots=True)
class Detection:
    """One item in one frame; pixels of the full-size frame."""

    lane: int
    x_px: float
    """Column of the centre of its bounding box (along the belt)."""
    left_px: int
    right_px: int
    top_px: int
    bottom_px: int
    whole: bool
    """Whether the item is wholly in the picture; False when the edge of the frame cuts it."""
    touching: bool
    """Whether it was cut off a neighbour that it touches."""


class Locator:
    """Finds items on the belt of one camera."""

    def __init__(self, geometry: LineGeometry) -> None:
        self._geometry = geometry
        self._size = (geometry.width_px // SHRINK, geometry.height_px // SHRINK)
        # Kept from frame to frame: memory of this size would come from the system each time.
        self._half = np.empty((geometry.height_px // 2, geometry.width_px // 2, 3), np.uint8)
        self._small = np.empty((geometry.height_px // SHRINK, geometry.width_px // SHRINK, 3), np.uint8)
        self._difference = np.empty_like(self._small)
        self._planes = [np.empty(self._small.shape[:2], np.uint8) for _ in range(3)]
        self._background: NDArray[np.float32] | None = None
        self._known: NDArray[np.float32] | None = None
        """Samples of the background that `_gains` looks at, taken while the background is in the processor's cache."""
        self._kernel = np.ones((3, 3), np.uint8)
        self.coverage = 0.0
        """Share (0..1) of the last frame that is not belt; near 1 the frame shows no belt at all."""

    @property
    def background(self) -> NDArray[np.float32] | None:
        """The belt as learnt so far: float32 (h, w, 3) at a quarter of the size; None before the first frame."""
        return self._background

    def restore(self, background: NDArray[np.float32] | None) -> None:
        """Continues with a belt that was learnt before; the array is copied."""
        self._background = None if background is None else background.copy()
        self._known = None if background is None else _sampled(background)

    def find(self, image: Image) -> list[Detection]:
        """Returns all items of a frame, by lane and within a lane from right (front) to left.

        Args:
            image: Picture, uint8 (H, W, 3) BGR, of the size of the line's geometry.
        """
        small = self._shrunk(image)
        if self._background is None:
            self._background = _first_background(small)
            self._known = _sampled(self._background)
        foreground = self._foreground(small)
        found: list[Detection] = []
        for lane, rows in enumerate(self._geometry.lanes):
            top, bottom = rows.top_px // SHRINK, rows.bottom_px // SHRINK
            found.extend(self._in_lane(foreground[top:bottom], lane, top))
        return found

    def _shrunk(self, image: Image) -> NDArray[np.uint8] | cv2.typing.MatLike:
        """Shrinks to a quarter by area; halving twice is three times as fast as once by four (OpenCV 4 and 5)."""
        if image.shape[0] % SHRINK or image.shape[1] % SHRINK:
            return cv2.resize(image, self._size, dst=self._small, interpolation=cv2.INTER_AREA)
        half = self._half
        cv2.resize(image, (half.shape[1], half.shape[0]), dst=half, interpolation=cv2.INTER_AREA)
        return cv2.resize(half, self._size, dst=self._small, interpolation=cv2.INTER_AREA)

    def _foreground(self, small: NDArray[np.uint8] | cv2.typing.MatLike) -> NDArray[np.uint8]:
        """Returns 255 where there is an item, and learns the belt elsewhere."""
        background, known = self._background, self._known
        assert background is not None  # noqa: S101  set by the only caller
        assert known is not None  # noqa: S101  set with the background
        gains = _gains(small, known)
        expected = _lit(background, gains)
        # As `largest_channel`, into memory that is kept: new memory of this size costs as much as the work.
        blue, green, red = cv2.split(cv2.absdiff(small, expected, dst=self._difference), self._planes)
        largest = cv2.max(cv2.max(blue, green, dst=blue), red, dst=blue)
        foreground = cv2.threshold(largest, _DELTA, 255, cv2.THRESH_BINARY)[1]
        foreground = cv2.morphologyEx(foreground, cv2.MORPH_CLOSE, self._kernel)
        belt = cv2.bitwise_not(cv2.dilate(foreground, self._kernel))
        self.coverage = cv2.countNonZero(foreground) / foreground.size
        if abs(gains - 1.0).max() < _STEADY:
            cv2.accumulateWeighted(small, background, _LEARN, mask=belt)
        else:
            self._follow_lamp(small, belt, background, gains)
        self._known = _sampled(background)
        return np.asarray(foreground, np.uint8)

    @staticmethod
    def _follow_lamp(
        small: NDArray[np.uint8] | cv2.typing.MatLike,
        belt: cv2.typing.MatLike,
        background: NDArray[np.float32],
        gains: NDArray[np.float32],
    ) -> None:
        """Learns under another light: the whole belt takes a step towards it, also where items hide it.

        Were only the belt that is seen to follow, the background would be brighter beside the items' path than in it,
        and no single gain would fit both.
        """
        step = gains**_FOLLOW
        background *= step
        cv2.accumulateWeighted(np.asarray(small, np.float32) / (gains / step), background, _LEARN, mask=belt)

    def _in_lane(self, part: NDArray[np.uint8], lane: int, top: int) -> list[Detection]:
        # Outlines cost a tenth of labelled pixels; only a blob that may be several items is drawn again.
        contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        height, width = part.shape
        least = _MIN_SHARE * height * height
        found: list[Detection] = []
        for contour in contours:
            left, y, wide, tall = cv2.boundingRect(contour)
            if wide * tall < least or cv2.contourArea(contour) < least:
                continue
            edges = [left, left + wide]
            if wide >= 1.3 * tall and wide >= 0.75 * height:
                shape = np.zeros((tall, wide), np.uint8)
                cv2.drawContours(shape, [contour], 0, 1, cv2.FILLED, offset=(-left, -y))
                edges[1:1] = [left + cut for cut in _cuts(shape, height)]
            touching = len(edges) > 2
            top_px, bottom_px = (top + y) * SHRINK, (top + y + tall) * SHRINK
            for start, end in pairwise(edges):
                x_px, whole = (start + end) * SHRINK / 2.0, start > 0 and end < width
                place = Detection(lane, x_px, start * SHRINK, end * SHRINK, top_px, bottom_px, whole, touching)
                found.append(place)
        found.sort(key=lambda item: -item.x_px)
        return found

    def mask(self, image: Image, item: Detection) -> tuple[Image, Mask]:
        """Returns the full-size crop around an item and its mask (one connected part, holes filled).

        Args:
            image: The frame the item was found in.
            item: Place of the item in that frame.

        Returns:
            uint8 (h, w, 3) view into the frame, and uint8 (h, w) mask 0/255.
        """
        margin = SHRINK
        side_margin = 0 if item.touching else margin
        rows = self._geometry.lanes[item.lane]
        y0, y1 = max(item.top_px - margin, rows.top_px), min(item.bottom_px + margin, rows.bottom_px)
        x0, x1 = max(item.left_px - side_margin, 0), min(item.right_px + side_margin, image.shape[1])
        crop = image[y0:y1, x0:x1]
        background = self._background
        assert background is not None  # noqa: S101  an item was found, so there is one
        belt = cv2.mean(background[y0 // SHRINK : -(-y1 // SHRINK), x0 // SHRINK : -(-x1 // SHRINK)])
        # Outside this box of colours some channel differs from the belt by more than `_DELTA`.
        low, high = [int(level) - _DELTA for level in belt[:3]], [int(level) + _DELTA for level in belt[:3]]
        like_belt = cv2.inRange(crop, np.array(low), np.array(high))
        return crop, _largest_filled(cv2.bitwise_not(like_belt, dst=like_belt))


def _sampled(background: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns every eighth pixel of every eighth row, contiguous."""
    return np.ascontiguousarray(background[::_EACH, ::_EACH])


def _gains(small: NDArray[np.uint8] | cv2.typing.MatLike, known: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns how much brighter the lamp is than it was, per channel (blue, green, red); 1 where little belt is seen.

    Args:
        small: The frame at a quarter of its size.
        known: The background as of `_sampled`.
    """
    # Belt pixels are the majority or at least stay near their old value: the median ratio is the lamp's gain.
    sample = small[::_EACH, ::_EACH].astype(np.float32)
    near = np.abs(sample[:, :, 1] - known[:, :, 1]) < _DELTA
    ratios = (sample / np.maximum(known, 1.0))[near]
    if len(ratios) <= _FEWEST:
        return np.ones(3, np.float32)
    # The same as `numpy.median`, which spends as long again on checks.
    middle = len(ratios) // 2
    ratios.partition((middle - 1, middle), axis=0)
    low = ratios[middle] if len(ratios) % 2 else ratios[middle - 1]
    gains: NDArray[np.float32] = (low + ratios[middle]) * np.float32(0.5)
    return np.minimum(np.maximum(gains, np.float32(0.5)), np.float32(2.0))


def _lit(background: NDArray[np.float32], gains: NDArray[np.float32]) -> cv2.typing.MatLike:
    """Returns the belt under the present lamp; a change of colour, not only of brightness, costs one more pass."""
    if float(gains.max()) < _TINTED * float(gains.min()):
        return cv2.convertScaleAbs(background, alpha=float(gains[1]))
    return cv2.convertScaleAbs(background * gains)


def _first_background(small: NDArray[np.uint8] | cv2.typing.MatLike) -> NDArray[np.float32]:
    """Returns the belt to start with: in each row the level below which a fifth of its pixels lie."""
    rows = np.quantile(np.asarray(small, np.float32), 0.2, axis=1, keepdims=True)
    return np.ascontiguousarray(np.broadcast_to(rows, small.shape), np.float32)


def _cuts(shape: NDArray[np.uint8], lane_height: int) -> list[int]:
    """Returns the columns at which a blob of touching items is cut: narrow waists between wide bellies.

    Args:
        shape: uint8 (h, w) of one connected part, 1 inside; clearly wider than high.
        lane_height: Height of the lane at the same scale; an item is about 0.55-0.8 of it long.
    """
    height, width = shape.shape
    thickness = cv2.reduce(shape, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32F)
    smooth = np.asarray(cv2.blur(thickness, (5, 1), borderType=cv2.BORDER_REPLICATE), np.float32)[0]
    pieces = max(2, round(width / max(height, 0.55 * lane_height)))
    cuts: list[int] = []
    for at in range(1, pieces):
        centre, reach = width * at / pieces, width / pieces * 0.35
        low, high = int(max(centre - reach, 1)), int(min(centre + reach, width - 1))
        waist = low + int(smooth[low:high].argmin())
        if smooth[waist] < 0.72 * smooth.max():
            cuts.append(waist)
    return cuts


def _largest_filled(inside: NDArray[np.uint8] | cv2.typing.MatLike) -> Mask:
    """Returns the largest connected part with its holes and bites filled.

    A dark hole in an apple belongs to the apple, and so does rot as dark as the belt at its rim: fruit is convex, so
    the hull restores what the threshold bit off. A part far from convex is no single fruit and stays as it is.
    """
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros(inside.shape, np.uint8)
    if contours:
        largest = max(contours, key=cv2.contourArea)
        hull = cv2.convexHull(largest)
        if cv2.contourArea(hull) <= _CONVEX * cv2.contourArea(largest):
            cv2.fillConvexPoly(mask, hull, 255)
        else:
            cv2.drawContours(mask, [largest], 0, 255, cv2.FILLED)
    return mask
