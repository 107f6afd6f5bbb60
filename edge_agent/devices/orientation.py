"""Turns or mirrors pictures so that items travel from left to right; once, at the camera's door.

Everything behind the door has one direction of travel. A camera whose pictures are right already is not wrapped, so
that it costs nothing.
"""

from dataclasses import dataclass, replace
from typing import Final, cast

import cv2
import numpy as np

from edge_agent.interfaces import Frame, FrameSource, Image
from edge_agent.line_config import Orientation

_TURNS: Final[dict[int, int | None]] = {
    0: None,
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}
TURN_FOR: Final[dict[str, Orientation]] = {
    "left-right": "none",
    "right-left": "rotate-180",
    "bottom-top": "rotate-90",
    "top-bottom": "rotate-270",
}
"""The turn that makes items of each direction travel from left to right. Turns keep views as a camera can see them,
while a mirror image shows fruit and letters the wrong way round."""


def _parts(orientation: Orientation) -> tuple[bool, int]:
    """Returns whether the picture is mirrored left to right first, and the degrees it is then turned clockwise."""
    mirrored = orientation.startswith("mirror")
    _, _, degrees = orientation.partition("rotate-")
    return mirrored, int(degrees or 0)


def composed(first: Orientation, then: Orientation) -> Orientation:
    """Returns the orientation that has the effect of two, one after the other."""
    (mirrored, degrees), (again, more) = _parts(first), _parts(then)
    # A mirror turns the sense of the turns before it around.
    mirrored, degrees = (not mirrored, -degrees) if again else (mirrored, degrees)
    turn = f"rotate-{(degrees + more) % 360}" if (degrees + more) % 360 else ""
    return cast("Orientation", "-".join(filter(None, ("mirror" if mirrored else "", turn))) or "none")


def oriented(image: Image, orientation: Orientation) -> Image:
    """Returns the picture, mirrored and turned; the same array for `none`."""
    mirrored, degrees = _parts(orientation)
    turn = _TURNS[degrees]
    image = np.asarray(cv2.flip(image, 1), np.uint8) if mirrored else image
    return image if turn is None else np.asarray(cv2.rotate(image, turn), np.uint8)


def size_before(width_px: int, height_px: int, orientation: Orientation) -> tuple[int, int]:
    """Returns width and height of the camera's own picture for an oriented picture of this size."""
    return (height_px, width_px) if _parts(orientation)[1] in {90, 270} else (width_px, height_px)


@dataclass(slots=True)
class OrientedCamera:
    """A camera whose pictures are turned so that items travel from left to right."""

    source: FrameSource
    orientation: Orientation

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`."""
        frame = self.source.read(timeout_s)
        return None if frame is None else replace(frame, image=oriented(frame.image, self.orientation))

    def close(self) -> None:
        """Closes the camera."""
        self.source.close()
