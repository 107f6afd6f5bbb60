"""Learns the part of the picture that stands still, and measures how far it has moved.

Lane dividers, rails and bolts belong to the machine: averaged over many frames the belt's own pattern vanishes, and
they remain. Knows no items beyond the masks it is given, no time and no thread.
"""

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

_RATE: Final = 0.05
"""Share of each frame in the running mean: twenty frames are five looks."""
_REACH: Final = 16
"""Largest shift that is found, pixels of the static picture (at most 320 wide): 32 px of a picture 640 wide."""
_ALONG: Final = 31
"""Length over which a row or column is flattened, so that only what ends within it remains."""
_FEWEST_FRAMES: Final = 12
KNOWN_BY: Final = 0.35
"""Correlation of two halves of the learning above which a direction has something that stands still."""
_FOUND_BY: Final = 0.15
"""Correlation below which the place of the picture is not known."""

Grey = NDArray[np.uint8]


class StaticPicture:
    """A running mean of what is no item: the machine, because the belt moves."""

    def __init__(self) -> None:
        self._mean: NDArray[np.float32] | None = None
        self._seen: NDArray[np.uint8] | None = None
        self._frames = 0

    def add(self, grey: Grey, mask: Grey) -> None:
        """Adds a frame, uint8 (h, w), where its mask is not 0; another size starts anew."""
        if self._mean is None or self._mean.shape != grey.shape:
            self._mean, self._frames = grey.astype(np.float32), 0
            self._seen = np.zeros_like(mask)
        assert self._seen is not None  # noqa: S101  set with the mean
        self._frames += 1
        fresh = cv2.bitwise_and(mask, cv2.bitwise_not(self._seen))
        cv2.copyTo(grey.astype(np.float32), fresh, self._mean)
        cv2.accumulateWeighted(grey, self._mean, max(_RATE, 1.0 / self._frames), mask=mask)
        cv2.bitwise_or(self._seen, mask, dst=self._seen)

    @property
    def picture(self) -> Grey | None:
        """The mean, uint8 (h, w) in steps of a grey level; None before enough frames."""
        if self._mean is None or self._frames < _FEWEST_FRAMES:
            return None
        return np.asarray(np.clip(self._mean + 0.5, 0, 255), np.uint8)

    def restart(self) -> None:
        """Forgets everything."""
        self._mean, self._seen, self._frames = None, None, 0


def shift_of(reference: Grey, picture: Grey) -> tuple[float, float, float, float]:
    """Returns how far a picture stands from its reference, and how sure that is.

    Normalised cross-correlation of both pictures, flattened along the other direction, so that a line counts across
    itself only; the peak is refined by a parabola.

    Args:
        reference: uint8 (h, w).
        picture: The same size.

    Returns:
        Shift to the right and downwards in pixels of these pictures (NaN where nothing stands still in that
        direction), and the correlation in x and y, -1..1.
    """
    found = []
    for along in (0, 1):
        size = (1, _ALONG) if along else (_ALONG, 1)
        flat, other = (
            np.asarray(image, np.float32) - np.asarray(cv2.blur(np.asarray(image, np.float32), size), np.float32)
            for image in (reference, picture)
        )
        padded = cv2.copyMakeBorder(other, _REACH, _REACH, _REACH, _REACH, cv2.BORDER_REPLICATE)
        response = np.asarray(cv2.matchTemplate(padded, flat, cv2.TM_CCOEFF_NORMED), np.float64)
        line = response.max(axis=along)
        at = int(line.argmax())
        best = float(line[at])
        place = at + _vertex(line, at) - _REACH
        found.append((place if best >= _FOUND_BY and 0 < at < 2 * _REACH else float("nan"), best))
    (x, sure_x), (y, sure_y) = found
    return x, y, sure_x, sure_y


def _vertex(line: NDArray[np.float64], at: int) -> float:
    """Returns where between -0.5 and 0.5 the parabola through the peak and its neighbours is highest."""
    if not 0 < at < len(line) - 1:
        return 0.0
    left, middle, right = (float(line[k]) for k in (at - 1, at, at + 1))
    bend = left - 2.0 * middle + right
    return 0.5 * (left - right) / bend if bend < 0.0 else 0.0
