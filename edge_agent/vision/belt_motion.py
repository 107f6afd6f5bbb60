"""Measures how far the belt ran between two pictures, by sliding the silhouettes of the items over each other.

Only silhouettes count: an item rolls, so its skin moves otherwise than the belt, while its outline moves with it. The
belt is the colour that is seen most often at each pixel, so neither a dark belt nor gaps between items are required.
"""

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Image

Floats = NDArray[np.float32]

_WORK_PX: Final = 160
"""Approximate width, in pixels, of the shrunk picture in which belt and silhouettes are found."""
_ALIKE: Final = 8.0
"""Two samples of a pixel within so many grey levels show the same thing."""
_FAINT: Final = 10.0
_CLEAR: Final = 30.0
"""Between these two differences to the belt (grey levels of the largest channel) a pixel turns from belt to item."""
_CLOSING: Final = np.ones((5, 5), np.uint8)
_RIM: Final = np.ones((3, 3), np.uint8)
_LEARN: Final = 0.02
_FEW: Final = 10
"""Up to so many shifts are compared one by one; more are cheaper together."""
_ENVELOPE_FRAMES: Final = 16
"""The neighbourhood of each belt pixel is looked up so often; the belt changes slowly."""
MOVED_SHARE: Final = 0.004
"""Share of pixels that must change before two pictures differ by more than noise."""
BELT_LOOKS: Final = 32
"""Pictures from which the empty belt is learnt."""
OVERLAP: Final = 0.4
"""Smallest share of the picture that two silhouettes must have in common."""
MISFIT: Final = 0.3
"""Largest mismatch of a good match: 0 is equal, about 1 is unrelated."""
LEAST_SEEN: Final = 0.01
"""Share of the picture that must be item before a shift can be read."""


def shrink_of(width_px: int) -> int:
    """Returns the factor by which a picture of this width is shrunk before silhouettes are found in it."""
    return max(1, round(width_px / _WORK_PX))


def shrunk(image: Image, shrink: int) -> Floats:
    """Returns the picture as float32 (H // shrink, W // shrink, 3); each pixel is the mean of those it replaces."""
    size = (image.shape[1] // shrink, image.shape[0] // shrink)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.float32)


def largest_change(first: Floats, second: Floats) -> Floats:
    """Returns the distance of each pixel in its most different channel; (..., 3) becomes (...)."""
    change = np.abs(first - second)
    # Much faster than `max(axis=-1)` over three values.
    return np.asarray(np.maximum(np.maximum(change[..., 0], change[..., 1]), change[..., 2]), np.float32)


def moved(first: Floats, second: Floats) -> bool:
    """Returns whether two shrunk pictures differ by more than noise."""
    return float((largest_change(first, second) > _CLEAR).mean()) > MOVED_SHARE


def learn_belt(looks: Sequence[Floats]) -> Floats:
    """Returns the empty belt: at each pixel the colour that came most often, float32 (h, w, 3).

    Args:
        looks: Shrunk pictures of the moving belt. Items may cover a pixel most of the time, if they differ.
    """
    stack = np.stack([looks[at] for at in np.linspace(0, len(looks) - 1, min(len(looks), BELT_LOOKS)).astype(int)])
    best = np.full(stack.shape[1:3], -1)
    belt = stack[0].copy()
    for look in stack:
        alike = largest_change(stack, look) < _ALIKE
        count = alike.sum(axis=0)
        better = count > best
        mean = (stack * alike[..., None]).sum(axis=0) / np.maximum(count, 1)[..., None]
        belt[better] = mean[better]
        best = np.maximum(best, count)
    return np.asarray(belt, np.float32)


class BeltView:
    """Separates items from belt in shrunk pictures and follows slow changes of light.

    A pixel counts as belt when the belt shows its colour there or one pixel beside it, so that neither a camera that
    trembles nor an edge of the machine that moves by a fraction of a pixel looks like an item.

    Args:
        belt: From `learn_belt`.
    """

    def __init__(self, belt: Floats) -> None:
        self.belt = belt.copy()
        self._age = 0
        self._darkest: cv2.typing.MatLike = self.belt
        self._brightest: cv2.typing.MatLike = self.belt

    def difference(self, small: Floats) -> Floats:
        """Returns by how many grey levels (largest channel) each pixel differs from the belt, float32 (h, w)."""
        now, known = small[::2, ::2, 1], self.belt[::2, ::2, 1]
        near = np.abs(now - known) < _CLEAR
        # Below some pixels of belt the gain would be that of the items.
        gain = float(np.median(now[near] / np.maximum(known[near], 1.0))) if near.sum() > 32 else 1.0
        gain = min(max(gain, 0.5), 2.0)
        if self._age % _ENVELOPE_FRAMES == 0:
            around = np.ones((3, 3), np.uint8)
            self._darkest, self._brightest = cv2.erode(self.belt, around), cv2.dilate(self.belt, around)
        self._age += 1
        above = cv2.scaleAdd(self._brightest, -gain, small)
        below = cv2.addWeighted(self._darkest, gain, small, -1.0, 0.0)
        blue, green, red = cv2.split(cv2.max(above, below))
        return np.asarray(np.maximum(cv2.max(cv2.max(blue, green), red), np.float32(0.0)), np.float32)

    def silhouettes(self, small: Floats) -> Floats:
        """Returns float32 (h, w): 1 on an item, 0 on the belt, between the two on its rim."""
        soft = np.clip((self.difference(small) - _FAINT) * (1.0 / (_CLEAR - _FAINT)), 0.0, 1.0)
        soft = cv2.morphologyEx(soft, cv2.MORPH_CLOSE, _CLOSING)
        belt = (np.asarray(cv2.dilate(soft, _RIM)) < 0.5).view(np.uint8)
        cv2.accumulateWeighted(small, self.belt, _LEARN, mask=belt)
        return np.asarray(soft, np.float32)


def mismatch(first: Floats, second: Floats, shifts: range) -> NDArray[np.float64]:
    """Returns how badly `second` fits `first` moved right by each of `shifts` columns: 0 is equal, about 1 unrelated.

    All shifts are computed together by the correlation theorem, so that a wide range costs no more than a narrow one.
    The value is infinite where the two have too little in common.
    """
    height, width = first.shape
    if len(shifts) <= _FEW:
        common = np.array([_common(first, second, at) for at in shifts])
    else:
        length = cv2.getOptimalDFTSize(2 * width)
        one, other = (_spectra(part, length) for part in (first, second))
        product = cv2.mulSpectrums(other, one, cv2.DFT_ROWS, conjB=True)
        total = cv2.reduce(product, 0, cv2.REDUCE_SUM)
        whole = cv2.dft(total, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE | cv2.DFT_ROWS).ravel()
        common = whole[np.asarray(shifts) % length]
    columns = [
        cv2.reduce(cv2.multiply(part, part), 0, cv2.REDUCE_SUM, dtype=cv2.CV_64F).ravel() for part in (first, second)
    ]
    energies = [np.concatenate(([0.0], np.cumsum(column))) for column in columns]
    shift = np.asarray(shifts)
    right, left = np.maximum(shift, 0), np.maximum(-shift, 0)
    inside = width - np.abs(shift) >= OVERLAP * width
    right, left = np.where(inside, right, 0), np.where(inside, left, 0)
    energy = energies[0][width - right] - energies[0][left] + energies[1][width - left] - energies[1][right]
    enough = inside & (energy > LEAST_SEEN * height * (width - right - left))
    found = np.full(len(shift), np.inf)
    found[enough] = np.maximum(1.0 - 2.0 * common[enough] / energy[enough], 0.0)
    return found


def _spectra(part: Floats, length: int) -> cv2.typing.MatLike:
    """Returns the spectrum of each row, padded with zeros to `length`, in OpenCV's packed form."""
    padded = cv2.copyMakeBorder(part, 0, 0, 0, length - part.shape[1], cv2.BORDER_CONSTANT, value=0.0)
    return cv2.dft(padded, flags=cv2.DFT_ROWS)


def _common(first: Floats, second: Floats, shift: int) -> float:
    """Returns the sum of products of `first` moved right by `shift` columns and `second`."""
    width = first.shape[1]
    if abs(shift) >= width:
        return 0.0
    a, b = first[:, max(0, -shift) : width - max(0, shift)], second[:, max(0, shift) : width - max(0, -shift)]
    return float(cv2.multiply(a, b).sum())


def vertex(values: NDArray[np.float64], at: int) -> float:
    """Returns the offset (-0.5..0.5) of the minimum from sample `at`, by the parabola through it and its neighbours."""
    if not 0 < at < len(values) - 1 or not np.isfinite(values[at - 1 : at + 2]).all():
        return 0.0
    before, here, after = (float(v) for v in values[at - 1 : at + 2])
    bend = before - 2.0 * here + after
    return 0.0 if bend <= 0.0 else min(max(0.5 * (before - after) / bend, -0.5), 0.5)
