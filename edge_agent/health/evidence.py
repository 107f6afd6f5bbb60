"""Says in words and in a picture what has become of the camera: an instruction for a person, and before beside now.

The picture is a JPEG of at most 32 KiB: on the left how the belt looked when the levels were learnt, on the right now,
with the dirty cells framed.
"""

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.health.camera_levels import picture_of
from edge_agent.health.camera_sensor import CameraChange
from models.messages import MAX_PICTURE_BYTES
from models.windows import DIRT_COLUMNS, DIRT_ROWS

RECOVERED: Final = "optics.recovered"
CODES: Final = {
    "dirt": "optics.dirty",
    "sharpness": "optics.blurred",
    "exposure": "optics.light",
    "red_to_green": "optics.colour",
    "blue_to_green": "optics.colour",
    "flicker": "optics.flicker",
    "shift_x_px": "optics.moved",
    "shift_y_px": "optics.moved",
}
"""Quantity -> code of the condition that it begins."""
_MIDDLE: Final = (0.4, 0.6)
"""Shares of height and width between which a place is in the middle."""
_WIDTH: Final = 480
_QUALITIES: Final = (70, 50, 30, 15)


def condition_of(change: CameraChange) -> tuple[str, str]:
    """Returns code and message of the condition that a change begins or ends."""
    if not change.outside:
        return RECOVERED, f"The camera's {_NAMES[change.quantity]} is as it was learnt again."
    return CODES[change.quantity], _INSTRUCTIONS[change.quantity](change)


def place_of(dirty: NDArray[np.bool_]) -> str:
    """Returns where in the picture most dirty cells are, such as `upper right`; `all over it` where they are many."""
    rows, columns = np.nonzero(dirty)
    if not len(rows) or dirty.mean() > 1.0 / 3.0:
        return "all over it"
    row, column = rows.mean() / (DIRT_ROWS - 1), columns.mean() / (DIRT_COLUMNS - 1)
    upright = "upper" if row < _MIDDLE[0] else "lower" if row > _MIDDLE[1] else ""
    across = "left" if column < _MIDDLE[0] else "right" if column > _MIDDLE[1] else ""
    return " ".join(part for part in (upright, across) if part) or "middle"


def _dirt(change: CameraChange) -> str:
    where = place_of(change.dirty)
    return f"Wipe the lens; the dirt is {where if where.startswith('all') else f'at the {where} of the picture'}."


def _blur(change: CameraChange) -> str:
    how = "softer" if change.value < change.level else "sharper"
    return f"The picture is {how} than it was learnt; wipe the lens, then check its focus and the belt's height."


def _light(change: CameraChange) -> str:
    return f"The belt is at {change.value / change.level:.0%} of its learnt brightness; check lamp, exposure and gain."


def _colour(change: CameraChange) -> str:
    share = change.value / change.level - 1.0 if change.level else 0.0
    what = change.quantity.partition("_")[0]
    return f"The light has {share:+.0%} {what} against green; check the lamp and the camera's white balance."


def _moved(change: CameraChange) -> str:
    away = change.value - change.level
    across = "right" if change.quantity == "shift_x_px" else "down"
    return f"The picture stands {away:+.0f} px to the {across}; fasten the camera, then calibrate."


_NAMES: Final = {
    "dirt": "lens",
    "sharpness": "sharpness",
    "exposure": "light",
    "red_to_green": "share of red",
    "blue_to_green": "share of blue",
    "flicker": "steadiness of light",
    "shift_x_px": "place along the belt",
    "shift_y_px": "place across the belt",
}
_INSTRUCTIONS: Final = {
    "dirt": _dirt,
    "sharpness": _blur,
    "exposure": _light,
    "red_to_green": _colour,
    "blue_to_green": _colour,
    "flicker": lambda _change: "The light flickers; check the lamp's driver, and foreign light on mains.",
    "shift_x_px": _moved,
    "shift_y_px": _moved,
}


def evidence_picture(change: CameraChange) -> bytes:
    """Returns a JPEG of the belt before (left) and now (right), at most 32 KiB; empty where it cannot be so small."""
    scale = min(_WIDTH / change.image.shape[1], 1.0)
    now = np.asarray(cv2.resize(change.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
    height, width = now.shape[:2]
    for row, column in zip(*np.nonzero(change.dirty), strict=True):
        left, right = (round(edge * width / DIRT_COLUMNS) for edge in (column, column + 1))
        top, bottom = (round(edge * height / DIRT_ROWS) for edge in (row, row + 1))
        cv2.rectangle(now, (left, top), (right - 1, bottom - 1), (0, 200, 255), 1)
    before = cv2.imdecode(np.frombuffer(change.before_jpeg, np.uint8), cv2.IMREAD_COLOR) if change.before_jpeg else None
    both = now if before is None else np.hstack([cv2.resize(before, (width, height)), np.zeros_like(now[:, :4]), now])
    for quality in _QUALITIES:
        data = picture_of(np.asarray(both, np.uint8), width=2 * _WIDTH + 4, quality=quality)
        if len(data) <= MAX_PICTURE_BYTES:
            return data
    return b""
