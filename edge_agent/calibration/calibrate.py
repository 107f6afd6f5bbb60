"""Measures the geometry of a line from its camera (scale, lanes, direction, speed) and writes it for the configuration.

The scale comes from a checkerboard on the belt or from items of known mean size; everything else from items that
pass. What cannot be measured well is refused with what was expected and what came, because a wrong geometry sorts
wrongly until a person notices. At the end the line's own locator and tracker run over the recording with the geometry
that was found, so that the number of items is the one that `run` will find.
"""

import datetime as dt
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np

from edge_agent.calibration.lanes import Lanes, find_lanes
from edge_agent.calibration.overlay import Sketch, draw
from edge_agent.calibration.scale import PixelScale, scale_from_board, scale_from_items
from edge_agent.calibration.survey import Opener, Progress, Survey, frames_of, survey, turned
from edge_agent.devices.cameras import is_live
from edge_agent.devices.hardware import open_hardware
from edge_agent.devices.image_encoder import LEARNING_FRAMES, ImageEncoder, belt_of
from edge_agent.devices.orientation import composed
from edge_agent.interfaces import Image, Lane, LineGeometry
from edge_agent.line_config import FailSafeConfig, LineConfig, Orientation
from edge_agent.vision.follower import ItemFollower
from models.errors import InputError
from models.files import write_atomically
from models.text import mask

_STANDS_PX: Final = 0.5
_UNSTEADY: Final = 0.1
_WIDE_INTERVAL: Final = 0.02
_BOARD_EVERY: Final = 5


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The measures of one camera."""

    date: str
    camera: str
    width_px: int
    height_px: int
    frames: int
    items: int
    """Number of items that the line follows in these frames; of a live camera, the number of items measured."""
    mm_per_px: float
    mm_per_px_low: float
    mm_per_px_high: float
    """95 % interval of the median (items), or the extremes of the pictures (checkerboard)."""
    scale_from: str
    scale_seen: int
    """Number of items, or of pictures of the board, that were measured."""
    residual_px: float
    anisotropy: float
    lane_rows: tuple[tuple[int, int], ...]
    lane_centres: tuple[float, ...]
    lane_items: tuple[int, ...]
    stray_items: int
    direction: str
    """Travel in the picture as configured before: `left-right`, `right-left`, `top-bottom` or `bottom-top`."""
    orientation: Orientation
    """The orientation under which items travel from left to right; all other measures are taken in it."""
    px_per_frame: float
    belt_mm_s: float
    speed_spread: float
    """Half the width of the middle 80 % of the speeds while the belt ran, as a share."""
    outlets_mm: dict[str, float]
    notes: tuple[str, ...] = ()
    """Notes for the person who uses the geometry."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Facts known beforehand: the size of the board or of the items, and perhaps the number of lanes."""

    pattern: tuple[int, int] | None = None
    """Number of inner corners of the checkerboard (columns, rows)."""
    square_mm: float = 0.0
    item_mm: float = 0.0
    """Mean diameter of the items."""
    lanes: int | None = None


def camera_opener(config: LineConfig) -> Opener:
    """Returns an opener of the camera of a configuration: unpaced recordings, and simulations in virtual time.

    A picture size that is configured already is not required, as it is one of the measures.
    """
    unpaced = msgspec.structs.replace(
        config,
        paced=False,
        loop=False,
        encoder="nominal",
        ejector="",
        belt="",
        weights=(),
        fail_safe=FailSafeConfig(),
        width_px=0,
        height_px=0,
        lane_rows=(),
    )
    return lambda: open_hardware(unpaced, virtual=True).source


def calibrate(
    config: LineConfig,
    target: Target,
    *,
    date: str,
    frames: int = 450,
    opener: Opener | None = None,
    board_opener: Opener | None = None,
    progress: Progress = lambda _done, _all: None,
) -> tuple[Calibration, Image]:
    """Watches the line and measures it.

    Args:
        config: Configuration of the line; its outlets are kept.
        target: Facts known beforehand.
        date: Date of the calibration, ISO 8601.
        frames: Largest number of frames that are watched.
        opener: Opens the camera, if it is another than the configuration's.
        board_opener: Opens the recording of the checkerboard, if it is another than that of the items.
        progress: Called with (frames so far, frames wanted).

    Returns:
        The measures, and a picture that shows them.

    Raises:
        InputError: `calibration.*`.
        CameraError: The camera is not there or fails.
    """
    _check(target, date, frames)
    opener = opener or camera_opener(config)
    scale = None
    if target.pattern is not None:
        # A board lies still, so that neighbouring frames show nothing new.
        looks = islice(frames_of(board_opener or opener, frames), 0, None, _BOARD_EVERY if board_opener is None else 1)
        scale = scale_from_board(looks, target.pattern, target.square_mm)
    seen = survey(opener, frames=frames, progress=progress)
    if scale is not None and seen.turn in {"rotate-90", "rotate-270"}:
        scale = scale.across()
    if abs(seen.px_per_frame) < _STANDS_PX:
        raise InputError(
            "calibration.belt_stands",
            "The items do not travel; run the belt while you calibrate.",
            expected=f">= {_STANDS_PX:g} px per frame",
            got=f"{seen.px_per_frame:+.2f} px per frame",
        )
    lanes = find_lanes([i.y for i in seen.items], [i.width for i in seen.items], seen.height_px, target.lanes)
    if scale is None:
        scale = scale_from_items([i.length for i in seen.items if len(i.lengths) > 1], target.item_mm)
    found = _result(config, date, seen, lanes, scale)
    if not is_live(config.camera):
        found = msgspec.structs.replace(found, items=_followed(found, turned(opener, seen.turn), frames))
    return found, draw(seen.picture, _sketch(found, seen, lanes))


def _check(target: Target, date: str, frames: int) -> None:
    if (target.pattern is None) == (target.item_mm <= 0.0):
        raise InputError(
            "calibration.no_scale",
            "The scale comes either from a checkerboard or from items of known mean size.",
            expected="--checkerboard with --square-mm, or --item-mm",
            got="both" if target.pattern is not None else "neither",
        )
    try:
        dt.date.fromisoformat(date)
    except ValueError as error:
        raise InputError("calibration.bad_date", "This is no date.", expected="such as 2027-01-31", got=date) from error
    if frames < 1 or (target.lanes is not None and target.lanes < 1):
        raise InputError(
            "calibration.bad_count", "Frames and lanes are counted from 1.", expected=">= 1", got=(frames, target.lanes)
        )


def _result(config: LineConfig, date: str, seen: Survey, lanes: Lanes, scale: PixelScale) -> Calibration:
    return Calibration(
        date=date,
        camera=mask(config.camera),
        width_px=seen.width_px,
        height_px=seen.height_px,
        frames=seen.frames,
        items=len(seen.items),
        mm_per_px=round(scale.mm_per_px, 5),
        mm_per_px_low=round(scale.low, 5),
        mm_per_px_high=round(scale.high, 5),
        scale_from=scale.source,
        scale_seen=scale.seen,
        residual_px=round(scale.residual_px, 4),
        anisotropy=round(scale.anisotropy, 5),
        lane_rows=tuple((lane.top_px, lane.bottom_px) for lane in lanes.rows),
        lane_centres=tuple(round(centre, 1) for centre in lanes.centres),
        lane_items=lanes.items,
        stray_items=lanes.stray,
        direction=seen.direction,
        orientation=composed(config.orientation, seen.turn),
        px_per_frame=round(abs(seen.px_per_frame), 3),
        belt_mm_s=round(abs(seen.px_per_s) * scale.mm_per_px, 1),
        speed_spread=round(seen.spread, 4),
        outlets_mm=dict(config.outlets_mm),
        notes=tuple(_notes(seen, lanes, scale)),
    )


def _followed(found: Calibration, opener: Opener, limit: int) -> int:
    """Returns how many items the line follows in the recording with this geometry and the belt from the picture."""
    lanes = tuple(Lane(top, bottom) for top, bottom in found.lane_rows)
    follower = ItemFollower(LineGeometry(found.width_px, found.height_px, found.mm_per_px, lanes), 1)
    belt = belt_of(frame.image for frame in frames_of(opener, LEARNING_FRAMES))
    encoder = ImageEncoder(found.mm_per_px, nominal_mm_s=found.belt_mm_s, belt=belt)
    for frame in frames_of(opener, limit):
        follower.take(replace(frame, belt_mm=encoder.feed(frame)))
    return follower.items


def _notes(seen: Survey, lanes: Lanes, scale: PixelScale) -> list[str]:
    notes = []
    if seen.spread > _UNSTEADY:
        notes.append(f"The belt's speed changed by {seen.spread:.0%}; belt_mm_s is the middle. Use an encoder.")
    interval = (scale.high - scale.low) / scale.mm_per_px
    if scale.source == "items" and interval > _WIDE_INTERVAL:
        notes.append(f"The scale is known to {interval / 2:.1%} only; watch more items, or use a checkerboard.")
    heights = [lane.bottom_px - lane.top_px for lane in lanes.rows]
    above, below = lanes.rows[0].top_px, seen.height_px - lanes.rows[-1].bottom_px
    if max(above, below) > 0.8 * max(heights):
        notes.append(f"There is room for another lane ({above} rows above, {below} below) where no item was seen.")
    if lanes.stray:
        notes.append(f"{lanes.stray} items lay outside the lanes.")
    return notes


def _sketch(found: Calibration, seen: Survey, lanes: Lanes) -> Sketch:
    percent = (found.mm_per_px_high - found.mm_per_px_low) / found.mm_per_px * 50.0
    how = f"residual {found.residual_px:.2f} px" if found.scale_from == "checkerboard" else f"+-{percent:.1f} %"
    return Sketch(
        mm_per_px=found.mm_per_px,
        lanes=lanes.rows,
        blobs=seen.blobs,
        title=f"{found.mm_per_px:.4f} mm/px ({found.scale_from}, {how})   turn {found.orientation},"
        f" {found.px_per_frame:.1f} px/frame, {found.belt_mm_s:.0f} mm/s",
        subtitle=f"{found.items} items in {found.frames} frames, {len(found.lane_rows)} lanes,"
        f" {found.width_px} x {found.height_px} px, {found.date}",
        outlets_mm=found.outlets_mm,
    )


def geometry_toml(found: Calibration) -> str:
    """Returns the `[line]` section for the agent's configuration; measures without a key there stand as comments."""
    about = [
        f"Geometry of {found.camera}, calibrated {found.date} from {found.frames} frames with {found.items} items.",
        (
            f"Items travel {found.direction} in the camera's picture, {found.px_per_frame:g} px per frame,"
            f" spread {found.speed_spread:.1%}; the keys below hold for the picture after its orientation."
        ),
        (
            f"Scale from {found.scale_seen} {'items' if found.scale_from == 'items' else 'pictures of a checkerboard'}:"
            f" {found.mm_per_px_low:g} to {found.mm_per_px_high:g} mm per px,"
            f" residual {found.residual_px:g} px, anisotropy {found.anisotropy:+.2%}."
        ),
        f"Items per lane: {', '.join(map(str, found.lane_items))}; outside: {found.stray_items}.",
        *(f"NOTE: {note}" for note in found.notes),
    ]
    rows = ", ".join(f"[{top}, {bottom}]" for top, bottom in found.lane_rows)
    lines = [
        *("# " + "".join(c if c.isprintable() else "?" for c in line) for line in about),
        "",
        "[line]",
        f"mm_per_px = {found.mm_per_px!r}",
        f"belt_mm_s = {found.belt_mm_s!r}",
        f"lanes = {len(found.lane_rows)}",
        f"lane_rows = [{rows}]",
        f"width_px = {found.width_px}",
        f"height_px = {found.height_px}",
        f'orientation = "{found.orientation}"',
        "",
        "# Kept from the configuration: the distance of each outlet from column 0 is measured by hand.",
        "[line.outlets_mm]",
        *(f"{_key(name)} = {value!r}" for name, value in found.outlets_mm.items()),
    ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """Returns a quoted TOML key; the escapes of JSON are valid in TOML."""
    return msgspec.json.encode(name).decode()


def write_calibration(found: Calibration, picture: Image, geometry: Path, overlay: Path | None) -> None:
    """Writes the geometry, and the overlay as PNG, each atomically.

    Raises:
        InputError: `calibration.not_written`.
    """
    ok, data = cv2.imencode(".png", picture)
    files: list[tuple[Path, bytes]] = [(overlay, np.asarray(data).tobytes())] if overlay is not None and ok else []
    # The geometry comes last, so that its picture exists whenever it is new.
    files.append((geometry, geometry_toml(found).encode()))
    for path, content in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise InputError(
                "calibration.not_written",
                f"{path} cannot be written.",
                expected="a writable place",
                got=error.strerror,
            ) from error
