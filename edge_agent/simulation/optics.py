"""Shows the simulated scene through lamp, lens and sensor, with their faults.

The order is that of the light: lens (a knock, dirt, blur), sensor noise, the lamp's brightness and colour with the
exposure, then what transport does to the picture. Noise follows the lens because a lens out of focus does not blur the
sensor's noise.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.simulation.faults import NO_FAULTS, Faults
from edge_agent.simulation.rendering import draw_dirt, draw_noise, draw_smudge

_FLICKER_HZ = 100.0
_READOUT_S = 0.008
"""Time between the first and the last row of the rolling shutter."""


class Optics:
    """Lamp, lens and sensor of one simulated camera.

    Args:
        rng: Source of noise and smudges.
        size: Height and width of the image.
        noise: Standard deviation of the sensor's noise, grey levels.
        effects: Source of damage in transport.
    """

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int], noise: float, effects: np.random.Generator
    ) -> None:
        self._size, self._effects = size, effects
        self._noise = draw_noise(rng, size, noise) if noise else []
        self._all_over = draw_dirt(rng, size)
        self._smudge: tuple[tuple[float, float, float], NDArray[np.float32]] | None = None

    def use_noise(self, rng: np.random.Generator, sigma: float) -> None:
        """Replaces the sensor's noise: another pass of the same items looks different."""
        self._noise = draw_noise(rng, self._size, sigma) if sigma else []

    def expose(
        self, scene: NDArray[np.uint8], number: int, faults: Faults, *, at_s: float, since_s: float
    ) -> NDArray[np.uint8]:
        """Returns the picture of a scene.

        Args:
            scene: uint8 (H, W, 3) BGR without noise; it may be changed.
            number: Number of the exposure.
            faults: What is wrong.
            at_s: Time of the exposure, seconds.
            since_s: Time for which these faults have held, seconds.
        """
        image = scene if faults == NO_FAULTS else self._through_lens(scene, faults, since_s)
        if self._noise:
            image = np.asarray(cv2.add(image, self._noise[number % len(self._noise)]), np.uint8)
        if faults == NO_FAULTS:
            return image
        image = self._lit(image, faults, at_s)
        if faults.corrupt_share and self._effects.random() < faults.corrupt_share:
            image = image.copy()
            torn = int(self._effects.integers(0, image.shape[0] // 2))
            image[torn:] = self._effects.integers(0, 256, image[torn:].shape, dtype=np.uint8)
        return image

    def _through_lens(self, image: NDArray[np.uint8], faults: Faults, since_s: float) -> NDArray[np.uint8]:
        height, width = self._size
        if faults.shift_x_px or faults.shift_y_px:
            moved = np.array([[1.0, 0.0, faults.shift_x_px], [0.0, 1.0, faults.shift_y_px]])
            image = np.asarray(cv2.warpAffine(image, moved, (width, height), borderMode=cv2.BORDER_REPLICATE), np.uint8)
        if faults.dirt:
            grown = min(since_s / faults.dirt_creep_s, 1.0) if faults.dirt_creep_s else 1.0
            clean = (1.0 - faults.dirt * grown * self._dirt(faults))[:, :, None]
            image = np.asarray(image * clean + faults.dirt_level * (1.0 - clean), np.uint8)
        if faults.blur_px:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), faults.blur_px), np.uint8)
        return image

    def _dirt(self, faults: Faults) -> NDArray[np.float32]:
        if faults.dirt_x < 0.0:
            return self._all_over
        place = (faults.dirt_y, faults.dirt_x, faults.dirt_size)
        if self._smudge is None or self._smudge[0] != place:
            self._smudge = place, draw_smudge(self._size, place[:2], place[2])
        return self._smudge[1]

    def _lit(self, image: NDArray[np.uint8], faults: Faults, at_s: float) -> NDArray[np.uint8]:
        gains = np.array([faults.blue, faults.green, faults.red]) * faults.brightness
        if (gains != 1.0).any():
            levels = np.arange(256)[:, None] * gains
            image = np.asarray(cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8).reshape(256, 1, 3)), np.uint8)
        if faults.flicker:
            rows_s = at_s + np.linspace(0.0, _READOUT_S, len(image), dtype=np.float64)
            wave = 1.0 + faults.flicker * np.sin(2.0 * math.pi * _FLICKER_HZ * rows_s)
            image = np.clip(image * wave[:, None, None] + 0.5, 0, 255).astype(np.uint8)
        return image
