"""Learns what a camera's belt looks like when all is well, keeps it over restarts, and measures looks against it.

The levels are learnt once, from the first looks with a moving belt, and never follow: a lens that gets dirty slowly, or
while the agent is off, is still seen. They belong to one camera and geometry (`key`); another one, a damaged file or a
file that was taken away is learnt anew. No thread and no clock.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.health.belt_look import BeltLook, Floats
from edge_agent.health.registration import KNOWN_BY, Grey, shift_of
from models.errors import InputError
from models.files import write_atomically
from models.windows import DIRT_COLUMNS, DIRT_ROWS, QUANTITIES

LOOKS: Final = 30
"""Looks from which the levels are learnt: half a minute of a running belt."""
_CELLS: Final = DIRT_ROWS * DIRT_COLUMNS
_FEWEST_IN_A_CELL: Final = 5
_MAX_FILE_BYTES: Final = 4 * 1024 * 1024
_WIDER: Final = 5.0
"""Width of the learnt band, in standard deviations of single looks; what is compared is a median of five."""
_ALWAYS: Final = frozenset({"exposure", "sharpness", "red_to_green", "blue_to_green"})
"""Quantities that every learnt camera has."""
FLOORS: Final = {
    "sharpness": 0.12,
    "exposure": 0.04,
    "red_to_green": 0.02,
    "blue_to_green": 0.02,
    "flicker": 0.006,
    "shift_x_px": 1.5,
    "shift_y_px": 1.5,
}
"""Narrowest half band: a change that matters to nobody is not reported. Of `exposure` as a share of its level."""


class CameraLevels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one camera's belt looks like when all is well."""

    schema_version: Literal[1] = 1
    key: Annotated[str, msgspec.Meta(max_length=400)]
    learnt_at_ms: int
    level: dict[str, float]
    """Quantity -> median over the looks; a direction in which nothing stands still is left out."""
    spread: dict[str, float]
    """Quantity -> standard deviation of single looks (from the median absolute deviation)."""
    colour: Annotated[bytes, msgspec.Meta(min_length=_CELLS * 12, max_length=_CELLS * 12)]
    """float32 (12, 16, 3), mean colour of the belt by cell; NaN = never seen often enough."""
    sharpness: Annotated[bytes, msgspec.Meta(min_length=_CELLS * 4, max_length=_CELLS * 4)]
    """float32 (12, 16)."""
    seen: Annotated[bytes, msgspec.Meta(min_length=_CELLS * 4, max_length=_CELLS * 4)]
    """float32 (12, 16), share of the looks in which the cell showed enough belt."""
    tone_spread: float
    """Standard deviation of a cell's colour relative to the others, share."""
    texture_spread: float
    """Standard deviation of a cell's sharpness relative to the others, natural logarithm."""
    static_size: tuple[int, int]
    """Rows and columns of the picture of what stands still."""
    static: Annotated[bytes, msgspec.Meta(max_length=1024 * 1024)]
    """uint8, that picture."""
    scale: Annotated[float, msgspec.Meta(gt=0.0)]
    """Its pixels per pixel of the camera."""
    before_jpeg: Annotated[bytes, msgspec.Meta(max_length=256 * 1024)] = b""
    """How the picture looked, for people."""

    def half_band(self, name: str) -> float:
        """Returns how far a quantity may lie from its level."""
        floor = FLOORS[name] * (abs(self.level[name]) if name == "exposure" else 1.0)
        return max(_WIDER * self.spread[name], floor)


@dataclass(frozen=True, slots=True)
class Measured:
    """One look against the levels."""

    values: dict[str, float]
    """Quantity -> value, of those that are known; see `models.windows.CameraCounts`."""
    tone: Floats
    """Per cell, how much brighter or darker than the rest of the belt it has become, share (12, 16); NaN = not seen."""
    texture: Floats
    """Per cell, how much sharper than the rest it has become, natural logarithm (12, 16)."""


class Reference:
    """Levels as arrays, ready to measure with."""

    def __init__(self, levels: CameraLevels) -> None:
        self.levels = levels
        self._colour = np.frombuffer(levels.colour, "<f4").astype(np.float64).reshape(DIRT_ROWS, DIRT_COLUMNS, 3)
        self._sharpness = np.frombuffer(levels.sharpness, "<f4").astype(np.float64).reshape(DIRT_ROWS, DIRT_COLUMNS)
        self.seen = np.frombuffer(levels.seen, "<f4").astype(np.float64).reshape(DIRT_ROWS, DIRT_COLUMNS)
        """Share of the looks in which a cell showed enough belt, (12, 16)."""
        self._static = np.frombuffer(levels.static, np.uint8).reshape(levels.static_size)

    def measure(self, look: BeltLook, static: Grey | None) -> Measured | None:
        """Measures a look; None where too little belt is seen.

        Args:
            look: The look.
            static: What stands still now, uint8 of the learnt size; None = not known yet.
        """
        found = _relative(look, self._colour, self._sharpness)
        if found is None:
            return None
        light, tints, sharper, tone, texture = found
        level = self.levels.level
        values = {
            "exposure": level["exposure"] * light,
            "red_to_green": level["red_to_green"] * tints[0],
            "blue_to_green": level["blue_to_green"] * tints[1],
            "sharpness": level["sharpness"] + sharper,
            "flicker": look.flicker,
        }
        if static is not None and static.shape == self._static.shape:
            x, y, _, _ = shift_of(self._static, static)
            values |= {"shift_x_px": x / self.levels.scale, "shift_y_px": y / self.levels.scale}
        known = {name: value for name, value in values.items() if name in level and math.isfinite(value)}
        return Measured(known, tone, texture)


def learn(
    looks: Sequence[BeltLook],
    statics: Sequence[Grey],
    *,
    key: str,
    scale: float,
    at_ms: int,
    before_jpeg: bytes = b"",
) -> CameraLevels | None:
    """Learns the levels; None where the belt was hidden too much.

    Args:
        looks: Looks while the belt moved.
        statics: What stood still after the first half of them and after the last.
        key: Names camera and geometry.
        scale: Pixels of `statics` per pixel of the camera.
        at_ms: Now, milliseconds since 1970.
        before_jpeg: The picture as it is now, for people.
    """
    seen = np.stack([np.isfinite(look.sharpness) & np.isfinite(look.colour).all(axis=2) for look in looks])
    often = seen.sum(axis=0) >= _FEWEST_IN_A_CELL
    if often.sum() < _CELLS / 8:
        return None
    colour = _median_over([look.colour for look in looks], often[..., None])
    sharpness = _median_over([look.sharpness for look in looks], often)
    found = [part for look in looks if (part := _relative(look, colour, sharpness)) is not None]
    lights, tints = np.array([part[0] for part in found]), np.array([part[1] for part in found])
    grey, green = colour.mean(axis=2), colour[..., 1]
    columns: dict[str, NDArray[np.float64]] = {
        "exposure": float(np.nanmedian(grey)) * lights,
        "red_to_green": float(np.nanmedian(colour[..., 2] / green)) * tints[:, 0],
        "blue_to_green": float(np.nanmedian(colour[..., 0] / green)) * tints[:, 1],
        "sharpness": float(np.nanmedian(sharpness)) + np.array([part[2] for part in found]),
        "flicker": np.array([look.flicker for look in looks if math.isfinite(look.flicker)]),
    }
    level = {name: float(np.median(values)) for name, values in columns.items() if len(values)}
    spread = {name: _spread(values) for name, values in columns.items() if len(values)}
    first, last = statics[0], statics[-1]
    x, y, sure_x, sure_y = shift_of(last, first)
    for name, moved, sure in (("shift_x_px", x, sure_x), ("shift_y_px", y, sure_y)):
        if sure >= KNOWN_BY and math.isfinite(moved):
            # The bias of the parabola is part of the level; two halves give no spread, so the floor is the band.
            own = shift_of(last, last)[0 if name == "shift_x_px" else 1]
            level[name], spread[name] = own / scale, 0.0
    return CameraLevels(
        key=key,
        learnt_at_ms=at_ms,
        level=level,
        spread=spread,
        colour=colour.astype("<f4").tobytes(),
        sharpness=sharpness.astype("<f4").tobytes(),
        seen=seen.mean(axis=0).astype("<f4").tobytes(),
        tone_spread=_pooled([part[3] for part in found]),
        texture_spread=_pooled([part[4] for part in found]),
        static_size=(last.shape[0], last.shape[1]),
        static=last.tobytes(),
        scale=scale,
        before_jpeg=before_jpeg,
    )


def _relative(
    look: BeltLook, colour: Floats, sharpness: Floats
) -> tuple[float, tuple[float, float], float, Floats, Floats] | None:
    """Returns light, (red, blue) tint, sharpness, and tone and texture by cell, relative to a reference.

    Medians over the cells: dirt in a part of the picture changes none of the first three.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = look.colour / colour
        sharper = look.sharpness - sharpness
    known = np.isfinite(ratio).all(axis=2) & np.isfinite(sharper)
    if known.sum() < _CELLS / 16:
        return None
    channels = np.median(ratio[known], axis=0)
    light = float(np.median(ratio[known].mean(axis=1)))
    tints = np.median(ratio[known] / ratio[known][:, 1:2], axis=0)
    if min(channels) <= 0.0 or light <= 0.0:
        return None
    # The Laplacian grows with the light; what is left is the lens.
    sharp = sharper - 2.0 * math.log(light)
    middle = float(np.median(sharp[known]))
    tones = np.where(known[..., None], ratio / channels - 1.0, np.nan)
    largest = np.take_along_axis(tones, np.abs(np.nan_to_num(tones)).argmax(axis=2)[..., None], axis=2)[..., 0]
    return light, (float(tints[2]), float(tints[0])), middle, largest, np.where(known, sharp - middle, np.nan)


def _median_over(looks: Sequence[Floats], often: NDArray[np.bool_]) -> Floats:
    stacked = np.stack(looks)
    stacked = np.where(np.isfinite(stacked) | ~often, stacked, np.nan)
    filled = np.where(often, stacked, 0.0)
    return np.where(often, np.nanmedian(filled, axis=0), np.nan)


def _spread(values: NDArray[np.float64]) -> float:
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _pooled(cells: Sequence[Floats]) -> float:
    """Returns the standard deviation of a cell over the looks, pooled over the cells."""
    stacked = np.stack(cells)
    return _spread(stacked[np.isfinite(stacked)])


def picture_of(image: NDArray[np.uint8], *, width: int = 480, quality: int = 70) -> bytes:
    """Returns a JPEG of a picture at most `width` columns wide."""
    scale = min(width / image.shape[1], 1.0)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes() if done else b""


def write_levels(path: Path, levels: CameraLevels) -> None:
    """Keeps levels: MessagePack behind its CRC-32 (big endian). Law: `read_levels(path, levels.key) == levels`.

    Raises:
        OSError: The disk refused.
    """
    data = msgspec.msgpack.encode(levels)
    write_atomically(path, zlib.crc32(data).to_bytes(4, "big") + data)


def read_levels(path: Path, key: str) -> CameraLevels | None:
    """Returns the levels of this camera; None where there are none, or those of another camera or geometry.

    Raises:
        InputError: `camera.levels_damaged`: the file is learnt anew.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
        levels = msgspec.msgpack.decode(data[4:], type=CameraLevels)
        sound = int.from_bytes(data[:4], "big") == zlib.crc32(data[4:])
        fits = math.prod(levels.static_size) == len(levels.static) and min(levels.static_size) > 0
        names = set(levels.level)
        complete = names == set(levels.spread) and _ALWAYS <= names <= set(QUANTITIES)
        finite = all(map(math.isfinite, (*levels.level.values(), *levels.spread.values())))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not (sound and fits and complete and finite):
        raise _damaged(path, "another checksum, or parts that do not fit")
    return levels if levels.key == key else None


def _damaged(path: Path, got: object) -> InputError:
    return InputError(
        "camera.levels_damaged",
        f"{path} cannot be used; the camera's levels are learnt again.",
        expected="levels with their checksum",
        got=got,
    )
