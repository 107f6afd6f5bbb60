"""Draws a sheet of the line at work: frames with the verdict on each item, and items with their views.

A person can check on it whether each item is found, followed, cut out cleanly and decided rightly. Everything shown
comes from the line's own path (`LineCore`); only the boxes are found once more, by a separate locator.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from edge_agent.calibration.overlay import Colour
from edge_agent.devices.frames import frames
from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.interfaces import Frame, Image, LineGeometry
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.vision.judge import Judge, Judged
from edge_agent.vision.segmentation import Detection, Locator
from models.errors import InputError
from models.files import write_atomically

_CELL_PX: Final = 640
_FRAMES: Final = 4
_APART: Final = 3
"""One frame in so many is shown, so that the eye can follow an item."""
_ROWS: Final = 6
_VIEW_PX: Final = 64
_HEAD_PX: Final = 64
_LABEL_PX: Final = 22
_PAPER: Final[Colour] = (32, 30, 28)
_INK: Final[Colour] = (235, 235, 235)
_FAINT: Final[Colour] = (150, 150, 150)
_LANE: Final[Colour] = (120, 110, 100)
_OPEN: Final[Colour] = (200, 200, 200)
_STAYS: Final[Colour] = (220, 160, 60)
_EJECTED: Final[Colour] = (60, 150, 250)
"""Blue items stay, orange ones are ejected; colour-blind people can distinguish the two, and the text repeats it."""
_FONT: Final = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True, slots=True)
class _Verdict:
    judged: Judged
    outlet: str
    truth: str


@dataclass(frozen=True, slots=True)
class _Shown:
    """One frame with the items found in it."""

    frame: Frame
    places: list[tuple[Detection, int, int, bool]]
    """For each item its place, id (0 = not followed yet), number of views, and whether it has its verdict."""


def write_sheet(config: LineConfig, bundle: Path, output: Path, *, seconds: float = 6.0) -> dict[str, int]:
    """Runs the line for some seconds of the camera's time and writes the sheet of the last frames.

    Args:
        config: Configuration of the line; recordings and the simulation run as fast as they can.
        bundle: Directory of the bundle that judges.
        output: PNG file that is written.
        seconds: Duration in the camera's time.

    Returns:
        Counts: frames, items, shown.

    Raises:
        BundleError: The bundle is not usable.
        CameraError: The camera is not there.
        InputError: `sheet.no_items`: nothing was judged in that time.
    """
    cv2.setNumThreads(1)
    judge = Judge(bundle)
    world = open_hardware(config, virtual=not config.paced)
    try:
        film = _ContactSheet(config, world, judge)
        film.run(seconds)
    finally:
        world.close()
    if not film.verdicts or film.geometry is None:
        raise InputError("sheet.no_items", "Nothing was judged in that time.", expected="an item", got=film.frames)
    picture = _compose(film, world.description, judge)
    done, data = cv2.imencode(".png", picture)
    assert done  # noqa: S101  a uint8 image always encodes
    write_atomically(output, data.tobytes())
    return {"frames": film.frames, "items": film.items, "shown": len(film.chosen())}


class _ContactSheet:
    """Runs the line and keeps what is to be shown."""

    def __init__(self, config: LineConfig, world: LineHardware, judge: Judge) -> None:
        self._config, self._world, self._judge = config, world, judge
        self.geometry: LineGeometry | None = None
        self.shown: deque[_Shown] = deque(maxlen=_FRAMES)
        self.verdicts: dict[int, _Verdict] = {}
        self.frames = self.items = 0
        self._now_s = 0.0

    def run(self, seconds: float) -> None:
        core: LineCore | None = None
        for frame in frames(self._world.source, seconds=seconds, patience_s=self._world.patience_s):
            before_s, self._now_s = self._now_s, frame.captured_s
            if core is None:
                core = self._open(frame)
            core.queue.run_to(before_s, self._now_s)
            core.process(frame)
            places = self._locator.find(frame.image)
            if self.frames % _APART == 0:
                self.shown.append(_Shown(frame, [self._place(core, frame, place) for place in places]))
            self.frames += 1

    def _open(self, frame: Frame) -> LineCore:
        geometry = self.geometry = geometry_of(self._config, self._world, frame)
        self._locator = Locator(geometry)
        counter = LineCounter(self._config.lanes, variety=self._config.variety, clock=lambda: self._now_s)
        queue = self._world.ejection_queue(self._config, lambda: self._now_s)
        core = LineCore(
            geometry=geometry,
            counter=counter,
            queue=queue,
            clock=lambda: self._now_s,
            weights=self._world.weights,
            on_verdict=self._take,
        )
        core.use(self._judge)
        return core

    def _take(self, judged: Judged, outlet: str) -> None:
        track, simulation = judged.track, self._world.simulation
        found = simulation.view_truth(track.last_belt_mm, track.lane, track.item_mm) if simulation else None
        self.verdicts[track.item_id] = _Verdict(judged, outlet, found.kind if found else "")
        self.items += 1

    def _place(self, core: LineCore, frame: Frame, place: Detection) -> tuple[Detection, int, int, bool]:
        item_mm = frame.belt_mm - place.x_px * core.geometry.mm_per_px
        near = [t for t in core.tracker.tracks if t.lane == place.lane and abs(t.item_mm - item_mm) < t.length_mm / 3.0]
        track = min(near, key=lambda t: abs(t.item_mm - item_mm), default=None)
        if track is None:
            return place, 0, 0, False
        return place, track.item_id, len(track.views), track.item_id in self.verdicts

    def chosen(self) -> list[_Verdict]:
        """Returns the newest items that are ejected and the newest that stay, as far as there is room."""
        goes = [v for v in self.verdicts.values() if v.judged.verdict.outlet in self._outlets()]
        stays = [v for v in self.verdicts.values() if v.judged.verdict.outlet not in self._outlets()]
        room = 2 * _ROWS
        few = min(max(room - len(stays), _ROWS), len(goes))
        return goes[len(goes) - few :] + stays[-(room - few) :]

    def _outlets(self) -> frozenset[str]:
        return frozenset(self.geometry.outlets_mm) if self.geometry else frozenset()

    def goes(self, outlet: str) -> bool:
        """Returns whether an item for this outlet leaves the belt."""
        return outlet in self._outlets()


def _compose(film: _ContactSheet, camera: str, judge: Judge) -> Image:
    head = np.full((_HEAD_PX, 2 * _CELL_PX, 3), _PAPER, np.uint8)
    title = f"The line at work: {camera}"
    _text(head, title, (12, 26), _INK, 0.62)
    facts = f"bundle {judge.digest[:12]}   frames {film.frames}   items {film.items}   one frame in {_APART} is shown"
    _text(head, facts, (12, 51), _FAINT, 0.48)
    for at, (colour, text) in enumerate(((_OPEN, "seen, views so far"), (_STAYS, "stays"), (_EJECTED, "goes"))):
        x = 2 * _CELL_PX - 400 + at * 165
        cv2.circle(head, (x, 21), 7, colour, 2, cv2.LINE_AA)
        _text(head, text, (x + 14, 26), _INK, 0.48)
    cells = [_frame_cell(film, shown) for shown in film.shown]
    return np.vstack((head, *_in_two_columns(cells), *_in_two_columns([_item_cell(film, v) for v in film.chosen()])))


def _in_two_columns(cells: list[Image]) -> list[Image]:
    if len(cells) % 2:
        cells = [*cells, np.full_like(cells[0], _PAPER)]
    return [np.hstack(cells[k : k + 2]) for k in range(0, len(cells), 2)]


def _frame_cell(film: _ContactSheet, shown: _Shown) -> Image:
    geometry = film.geometry
    assert geometry is not None  # noqa: S101  a frame was shown
    scale = (_CELL_PX - 4) / geometry.width_px
    size = (_CELL_PX - 4, round(geometry.height_px * scale))
    picture = np.asarray(cv2.resize(shown.frame.image, size, interpolation=cv2.INTER_AREA), np.uint8)
    for lane in geometry.lanes[1:]:
        cv2.line(picture, (0, round(lane.top_px * scale)), (size[0], round(lane.top_px * scale)), _LANE, 1)
    for place, item_id, views, decided in shown.places:
        verdict = film.verdicts[item_id] if decided else None
        _draw_place(film, picture, place, item_id, views, verdict, scale)
    cell = np.full((size[1] + _LABEL_PX + 6, _CELL_PX, 3), _PAPER, np.uint8)
    cell[_LABEL_PX : _LABEL_PX + size[1], 2 : 2 + size[0]] = picture
    frame = shown.frame
    _text(cell, f"frame {frame.number}   belt at {frame.belt_mm:,.0f} mm", (6, 16), _FAINT, 0.44)
    return cell


def _draw_place(
    film: _ContactSheet,
    picture: Image,
    place: Detection,
    item_id: int,
    views: int,
    verdict: _Verdict | None,
    scale: float,
) -> None:
    goes = verdict is not None and film.goes(verdict.outlet)
    colour = _OPEN if verdict is None else _EJECTED if goes else _STAYS
    left, right = round(place.left_px * scale), round(place.right_px * scale)
    top, bottom = round(place.top_px * scale), round(place.bottom_px * scale)
    if not place.whole:
        cv2.rectangle(picture, (left, top), (right, bottom), _LANE, 1)
        return
    centre, half = ((left + right) // 2, (top + bottom) // 2), ((right - left) // 2 + 2, (bottom - top) // 2 + 2)
    cv2.ellipse(picture, centre, half, 0.0, 0.0, 360.0, colour, 3 if goes else 2, cv2.LINE_AA)
    first = f"#{item_id}" if item_id else "?"
    second = verdict.judged.verdict.klass if verdict else f"{views} view{'s' if views != 1 else ''}"
    for row, text in enumerate((first, second)):
        (wide, tall), _ = cv2.getTextSize(text, _FONT, 0.42, 1)
        at = (centre[0] - wide // 2, centre[1] - 2 + row * (tall + 7))
        plate = picture[max(at[1] - tall - 3, 0) : at[1] + 5, max(at[0] - 3, 0) : at[0] + wide + 3]
        cv2.addWeighted(plate, 0.35, np.full_like(plate, _PAPER), 0.65, 0.0, dst=plate)
        _text(picture, text, at, colour, 0.42)


def _item_cell(film: _ContactSheet, found: _Verdict) -> Image:
    """Draws one item: its views in the order in which they were taken, and the verdict on them."""
    cell = np.full((_VIEW_PX + 10, _CELL_PX, 3), _PAPER, np.uint8)
    verdict, track = found.judged.verdict, found.judged.track
    room = (_CELL_PX - 216) // (_VIEW_PX + 4)
    for number, view in enumerate(track.views[:room]):
        small = cv2.resize(view, (_VIEW_PX, _VIEW_PX), interpolation=cv2.INTER_AREA) if len(view) != _VIEW_PX else view
        x = 6 + number * (_VIEW_PX + 4)
        cell[5 : 5 + _VIEW_PX, x : x + _VIEW_PX] = small
    colour = _EJECTED if film.goes(found.outlet) else _STAYS
    x = _CELL_PX - 208
    cv2.rectangle(cell, (x - 8, 6), (x - 5, 4 + _VIEW_PX), colour, cv2.FILLED)
    _text(cell, f"#{track.item_id}  {verdict.klass}  {max(verdict.probabilities):.2f}", (x, 22), _INK, 0.5)
    _text(cell, f"defect {verdict.defect:.2f}   goes to {found.outlet}", (x, 43), colour, 0.44)
    truth = f"in truth {found.truth}" if found.truth else f"{len(track.views)} views"
    _text(cell, f"lane {track.lane}   {truth}", (x, 62), _FAINT, 0.44)
    return cell


def _text(image: Image, text: str, at: tuple[int, int], colour: Colour, size: float) -> None:
    cv2.putText(image, text, at, _FONT, size, colour, 1, cv2.LINE_AA)
