"""Measurements of a photograph that contain no item: its outer ring and its file.

Where a classifier on these is about as good as the model, the classes differ in how they were photographed.
`evaluation.shortcuts` compares the two.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

RING_SHARE: Final = 0.05
"""Width of the ring, as a share of the shorter side; at least one pixel. Ten pixels of a photograph of 200."""
_BINS: Final = 8
RING_FEATURES: Final = 3 * _BINS + 6


def ring_features(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns float32 (30,): per channel the histogram (8 bins), mean and standard deviation of the outer ring.

    Args:
        image: uint8 (H, W, 3) BGR, the whole photograph.
    """
    width = max(1, round(RING_SHARE * min(image.shape[:2])))
    ring = np.concatenate(
        (
            image[:width].reshape(-1, 3),
            image[-width:].reshape(-1, 3),
            image[width:-width, :width].reshape(-1, 3),
            image[width:-width, -width:].reshape(-1, 3),
        )
    )
    shares = [np.bincount(ring[:, k] >> 5, minlength=_BINS) / len(ring) for k in range(3)]
    return np.concatenate((*shares, ring.mean(axis=0) / 255.0, ring.std(axis=0) / 255.0)).astype(np.float32)


def file_features(image: NDArray[np.uint8], size_bytes: int) -> NDArray[np.float32]:
    """Returns float32 (3,): logarithms of the size of the file in bytes, and of width and height in pixels."""
    height, width = image.shape[:2]
    return np.array([math.log(max(size_bytes, 1)), math.log(width), math.log(height)], np.float32)
