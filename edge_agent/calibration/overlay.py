"""Draws what was calibrated: lanes, centre lines, sizes, direction, a ruler and the way to each outlet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from edge_agent.calibration.survey import Blob
from edge_agent.interfaces import Image, Lane

Colour = tuple[int, int, int]

_HEAD_PX: Final = 64
_RULER_PX: Final = 54
_OUTLET_PX: Final = 34
_MOST_OUTLETS: Final = 8
_LEAST_WIDTH: Final = 1100
_PAPER: Final[Colour] = (32, 30, 28)
_INK: Final[Colour] = (235, 235, 235)
_FAINT: Final[Colour] = (150, 150, 150)
_ITEM: Final[Colour] = (255, 255, 255)
_ARROW: Final[Colour] = (90, 220, 120)
_LANES: Final[tuple[Colour, ...]] = ((220, 160, 60), (60, 170, 240))
"""Blue and orange in turn, which colour-blind people can distinguish."""
_FONT: Final = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True, slots=True)
class Sketch:
    """The measures that are drawn."""

    mm_per_px: float
    lanes: Sequence[Lane]
    blobs: Sequence[Blob]
    title: str
    subtitle: str
    outlets_mm: Mapping[str, float]
    """Distance of each outlet from column 0, millimetres."""


def draw(image: Image, sketch: Sketch) -> Image:
    """Returns the picture, enlarged when it is small, between a headline and a ruler.

    Args:
        image: uint8 (H, W, 3), the frame in which the blobs were seen.
        sketch: Measures to draw on it.
    """
    zoom = max(1, -(-_LEAST_WIDTH // image.shape[1]))
    picture = np.asarray(cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC), np.uint8)
    _shade_outside(picture, sketch.lanes, zoom)
    for number, lane in enumerate(sketch.lanes):
        _draw_lane(picture, lane, number, zoom)
    for blob in sketch.blobs:
        _draw_item(picture, blob, sketch, zoom)
    width = picture.shape[1]
    ruler = _ruler(width, sketch.mm_per_px / zoom)
    return np.vstack((_headline(width, sketch), picture, ruler, _outlets(width, image.shape[1], sketch)))


def _text(image: Image, text: str, at: tuple[int, int], colour: Colour) -> None:
    """Draws text on a dark plate, legible on every ground."""
    (wide, tall), below = cv2.getTextSize(text, _FONT, 0.55, 1)
    left, right = max(at[0] - 5, 0), at[0] + wide + 5
    plate = image[max(at[1] - tall - 5, 0) : at[1] + below + 3, left:right]
    cv2.addWeighted(plate, 0.25, np.full_like(plate, _PAPER), 0.75, 0.0, dst=plate)
    cv2.putText(image, text, at, _FONT, 0.55, colour, 1, cv2.LINE_AA)


def _shade_outside(picture: Image, lanes: Sequence[Lane], zoom: int) -> None:
    """Dims the rows that belong to no lane; the rest is the region in which the line finds items."""
    inside = np.zeros(picture.shape[0], np.bool_)
    for lane in lanes:
        inside[lane.top_px * zoom : lane.bottom_px * zoom] = True
    picture[~inside] = picture[~inside] // 3
    rows = np.flatnonzero(inside)
    cv2.rectangle(picture, (0, int(rows[0])), (picture.shape[1] - 1, int(rows[-1])), _INK, 1)


def _draw_lane(picture: Image, lane: Lane, number: int, zoom: int) -> None:
    colour = _LANES[number % len(_LANES)]
    top, bottom, width = lane.top_px * zoom, lane.bottom_px * zoom - 1, picture.shape[1]
    tint = picture[top : bottom + 1]
    cv2.addWeighted(tint, 0.88, np.full_like(tint, colour), 0.12, 0.0, dst=tint)
    cv2.rectangle(picture, (1, top + 1), (width - 2, bottom - 1), colour, 2)
    middle = (top + bottom) // 2
    for x in range(0, width, 24):
        cv2.line(picture, (x, middle), (min(x + 12, width - 1), middle), colour, 1, cv2.LINE_AA)
    _text(picture, f"lane {number}: rows {lane.top_px} to {lane.bottom_px}", (10, top + 24), colour)


def _draw_item(picture: Image, blob: Blob, sketch: Sketch, zoom: int) -> None:
    x, y = round(blob.x * zoom), round(blob.y * zoom)
    half = (round(blob.length * zoom / 2), round(blob.width * zoom / 2))
    cv2.ellipse(picture, (x, y), half, 0.0, 0.0, 360.0, _ITEM, 2, cv2.LINE_AA)
    cv2.drawMarker(picture, (x, y), _ITEM, cv2.MARKER_CROSS, 12, 1, cv2.LINE_AA)
    text = f"{blob.length * sketch.mm_per_px:.1f} mm"
    (wide, _), _ = cv2.getTextSize(text, _FONT, 0.55, 1)
    _text(picture, text, (x - wide // 2, y + 30), _INK)


def _headline(width: int, sketch: Sketch) -> Image:
    strip = np.full((_HEAD_PX, width, 3), _PAPER, np.uint8)
    cv2.putText(strip, sketch.title, (12, 26), _FONT, 0.6, _INK, 1, cv2.LINE_AA)
    cv2.putText(strip, sketch.subtitle, (12, 51), _FONT, 0.5, _FAINT, 1, cv2.LINE_AA)
    cv2.arrowedLine(strip, (width - 170, 32), (width - 24, 32), _ARROW, 4, cv2.LINE_AA, tipLength=0.16)
    return strip


def _ruler(width: int, mm_per_px: float) -> Image:
    """Draws ticks from column 0 at a distance that fits the picture."""
    strip = np.full((_RULER_PX, width, 3), _PAPER, np.uint8)
    length_mm = width * mm_per_px
    step_mm = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if s / mm_per_px >= 9.0), 1000)
    cv2.line(strip, (0, 4), (width, 4), _INK, 1)
    for number in range(int(length_mm / step_mm) + 1):
        x = min(round(number * step_mm / mm_per_px), width - 1)
        long = number % 5 == 0
        cv2.line(strip, (x, 4), (x, 20 if long else 11), _INK, 1)
        if number % 10 == 0:
            text = f"{number * step_mm} mm" if number == 0 else str(number * step_mm)
            (wide, _), _ = cv2.getTextSize(text, _FONT, 0.5, 1)
            left = min(max(x - wide // 2, 2), width - wide - 2)
            cv2.putText(strip, text, (left, 42), _FONT, 0.5, _INK, 1, cv2.LINE_AA)
    return strip


def _outlets(width: int, width_px: int, sketch: Sketch) -> Image:
    """Draws the belt behind the picture at a separate scale: the visible part, and an arrow to each outlet."""
    near_first = sorted(sketch.outlets_mm.items(), key=lambda pair: pair[1])
    shown, seen_mm = near_first[:_MOST_OUTLETS], width_px * sketch.mm_per_px
    strip = np.full((_OUTLET_PX * (len(shown) + 1), width, 3), _PAPER, np.uint8)
    if not shown:
        cv2.putText(strip, "no outlet needs an ejection", (12, 22), _FONT, 0.5, _FAINT, 1, cv2.LINE_AA)
        return strip
    far_mm = max(seen_mm, shown[-1][1])
    px_per_mm = (width - 230) / far_mm
    end = 12 + round(seen_mm * px_per_mm)
    strip[4:, 12:end] = _LANES[0]
    strip[5:-1, 13 : end - 1] = _PAPER
    text = f"camera sees {seen_mm:.0f} mm"
    (wide, _), _ = cv2.getTextSize(text, _FONT, 0.5, 1)
    at = (20, 23) if wide + 20 < end else (end + 8, 23)
    cv2.putText(strip, text, at, _FONT, 0.5, _LANES[0], 1, cv2.LINE_AA)
    if len(near_first) > len(shown):
        more = f"and {len(near_first) - len(shown)} more outlets"
        cv2.putText(strip, more, (width - 220, 23), _FONT, 0.5, _FAINT, 1, cv2.LINE_AA)
    for row, (name, mm) in enumerate(shown, start=1):
        y, x = row * _OUTLET_PX + _OUTLET_PX // 2, 12 + max(round(mm * px_per_mm), 1)
        cv2.arrowedLine(strip, (12, y), (x, y), _ARROW, 2, cv2.LINE_AA, tipLength=min(0.5, 12.0 / (x - 11)))
        legible = "".join(c if " " <= c <= "~" else "?" for c in name)[:24]
        cv2.putText(strip, f"{legible} {mm:.0f} mm", (x + 8, y + 5), _FONT, 0.5, _INK, 1, cv2.LINE_AA)
        if mm < seen_mm:
            cv2.putText(strip, "inside the picture!", (x + 8, y - 10), _FONT, 0.4, _LANES[1], 1, cv2.LINE_AA)
    return strip
