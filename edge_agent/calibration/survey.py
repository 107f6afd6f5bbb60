"""Surveys a line that has not been measured yet: belt, items, their sizes, and how they move.

It works in pixels alone: no lanes, no scale and no speed is known. It looks twice: once at shrunk pictures for the
belt and the direction of travel, once more for every item at full size, in pictures that are turned so that items
travel from left to right. A recording or simulation starts again for the second look, a live camera goes on. The image
encoder of the line follows the belt, so that jerky pictures, lost frames and stops do not change the measures.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import cv2
import numpy as np

from edge_agent.devices.frames import frames
from edge_agent.devices.image_encoder import ImageEncoder
from edge_agent.devices.orientation import TURN_FOR, OrientedCamera
from edge_agent.interfaces import Frame, FrameSource, Image
from edge_agent.line_config import Orientation
from edge_agent.vision.belt_motion import (
    MOVED_SHARE,
    BeltView,
    Floats,
    largest_change,
    learn_belt,
    mismatch,
    moved,
    shrink_of,
    shrunk,
)
from models.errors import InputError

Opener = Callable[[], FrameSource]
Progress = Callable[[int, int], None]

_FIRST_LOOK: Final = 240
_PAIRS: Final = 32
_LEAST_FRAMES: Final = 12
_LEAST_TRAVELLED: Final = 3
_STANDS_PX: Final = 0.5
"""A belt that moves by less per frame stands."""
_RIM: Final = 0.15
"""Share of the contrast between item and belt at which the rim of the item is placed at full size."""
_LEAST_RIM: Final = 9.0
"""Smallest contrast of a rim, in grey levels (largest channel, slightly smoothed), above noise."""
_WINDOW_S: Final = 1.0
"""The speed of the belt is read over so long, which spans several pictures of a jerky source."""
_RUNS: Final = 0.5
"""A window in which the belt ran at less than this share of its highest speed is a ramp or a stop."""
_GONE_S: Final = 0.1
"""An item that was not seen for so long, and at least two frames, has left."""
_SILENT_S: Final = 10.0
"""A camera without a frame for so long is silent."""


@dataclass(slots=True)
class SeenItem:
    """One item as it was followed through the picture, in full-size pixels."""

    first: int
    last: int
    """Frame numbers."""
    first_s: float
    last_s: float
    first_x: float
    last_x: float
    due_x: float
    """Column at which it should be in the present frame."""
    y: float
    lengths: list[float] = field(default_factory=list)
    """Extent along the belt in each frame it was whole."""
    widths: list[float] = field(default_factory=list)
    """Extent across the belt."""

    @property
    def length(self) -> float:
        """Median extent along the belt."""
        return float(np.median(self.lengths))

    @property
    def width(self) -> float:
        """Median extent across the belt."""
        return float(np.median(self.widths))


@dataclass(frozen=True, slots=True)
class Blob:
    """A whole item that touches no other, in one frame."""

    x: float
    y: float
    length: float
    width: float


@dataclass(slots=True)
class Survey:
    """The survey of a line, in pictures that were turned so that items travel from left to right."""

    width_px: int
    height_px: int
    frames: int
    belt: Floats
    items: list[SeenItem]
    px_per_frame: float
    px_per_s: float
    spread: float
    """Half the distance between the 10th and 90th percentile of the speed while the belt ran, as a share of it."""
    picture: Image
    blobs: list[Blob]
    """The items of `picture`, the frame with most of them."""
    direction: str
    """Travel in the camera's own picture: `left-right`, `right-left`, `top-bottom` or `bottom-top`."""
    turn: Orientation
    """The turn that was applied to the pictures."""


def frames_of(opener: Opener, limit: int) -> Iterator[Frame]:
    """Yields at most `limit` frames of a camera that is opened and closed here.

    Raises:
        CameraError: The camera fails, or is silent (`camera.stalled`).
    """
    source = opener()
    try:
        yield from frames(source, limit=limit, patience_s=_SILENT_S)
    finally:
        source.close()


def survey(opener: Opener, *, frames: int, progress: Progress = lambda _done, _all: None) -> Survey:
    """Surveys the line.

    Args:
        opener: Opens the camera; called two or three times.
        frames: Largest number of frames that are read at the second look.
        progress: Called with (frames so far, frames wanted).

    Raises:
        CameraError: The camera is not there or fails.
        InputError: `calibration.too_few_frames`, `calibration.belt_stands`, `calibration.no_items`,
            `calibration.too_few_items`.
    """
    looked = min(_FIRST_LOOK, frames)
    looks, numbers, period_s, shrink = _look(opener, looked, lambda done: progress(done, looked + frames))
    if len(looks) < _LEAST_FRAMES:
        raise InputError(
            "calibration.too_few_frames",
            "The camera gave too few readable frames to learn from; record some seconds of the running line.",
            expected=f">= {_LEAST_FRAMES}",
            got=len(looks),
        )
    belt = _belt(looks)
    direction, step = _direction(looks, belt, numbers, shrink)
    turn = TURN_FOR[direction]
    if turn != "none":
        opener = turned(opener, turn)
        belt = _belt(_look(opener, looked, lambda _done: None)[0])
    follower = _Follower(belt, step / period_s)
    for done, frame in enumerate(frames_of(opener, frames), start=looked + 1):
        follower.take(frame)
        progress(done, looked + frames)
    progress(looked + frames, looked + frames)
    return follower.result(direction, turn, period_s)


def turned(opener: Opener, turn: Orientation) -> Opener:
    """Returns an opener of the same camera with its pictures turned."""
    return opener if turn == "none" else lambda: OrientedCamera(opener(), turn)


def _look(opener: Opener, limit: int, progress: Callable[[int], None]) -> tuple[list[Floats], list[int], float, int]:
    """Returns shrunk pictures, their frame numbers, the median period (seconds), and the factor of shrinking."""
    looks: list[Floats] = []
    numbers: list[int] = []
    times: list[float] = []
    shrink = 1
    for frame in frames_of(opener, limit):
        shrink = shrink_of(frame.image.shape[1])
        looks.append(shrunk(frame.image, shrink))
        numbers.append(frame.number)
        times.append(frame.captured_s)
        progress(len(looks))
    steps = np.diff(times)
    period_s = float(np.median(steps[steps > 0.0])) if (steps > 0.0).any() else 1.0
    return looks, numbers, period_s, shrink


def _belt(looks: list[Floats]) -> Floats:
    """Returns the empty belt, from pictures that differ; refuses a belt that stands or carries nothing."""
    lively = [looks[0]]
    for look in looks[1:]:
        if moved(lively[-1], look):
            lively.append(look)
    if len(lively) >= _LEAST_FRAMES // 2:
        return learn_belt(lively)
    rows = np.median(looks[0], axis=1, keepdims=True)
    if float((largest_change(looks[0], np.asarray(rows, np.float32)) > 26.0).mean()) > MOVED_SHARE:
        raise InputError(
            "calibration.belt_stands",
            "There are things in the picture and they do not move; run the belt while you calibrate.",
            expected="moving items",
            got=f"{len(lively)} of {len(looks)} frames differ",
        )
    raise _no_items(len(looks), 0)


def _no_items(frames: int, items: int) -> InputError:
    return InputError(
        "calibration.no_items",
        "No items were seen on the belt; let single items run through the picture, well lit, on a plain belt.",
        expected="items that stand out from the belt",
        got=f"{items} in {frames} frames",
    )


def _direction(looks: list[Floats], belt: Floats, numbers: list[int], shrink: int) -> tuple[str, float]:
    """Returns the direction of travel, and the distance per frame in full-size pixels.

    The curves of many pairs are added: chance fits of one item with the next fall out, the true shift stays.
    """
    view = BeltView(belt)
    masks = [view.silhouettes(look) for look in looks]
    pairs = [at for at in range(1, len(masks)) if numbers[at] == numbers[at - 1] + 1 and masks[at].mean() > 0.002]
    if not pairs:
        raise _no_items(len(masks), 0)
    # A belt that stood for a while counts only while it ran; a slow one hardly differs from frame to frame.
    lively = [at for at in pairs if moved(looks[at - 1], looks[at])]
    pairs = lively if len(lively) >= _LEAST_FRAMES // 2 else pairs
    chosen = [pairs[at] for at in np.linspace(0, len(pairs) - 1, min(len(pairs), _PAIRS)).astype(int)]
    along, fit_along = _common_shift([(masks[at - 1], masks[at]) for at in chosen])
    upright = [(np.ascontiguousarray(masks[at - 1].T), np.ascontiguousarray(masks[at].T)) for at in chosen]
    across, fit_across = _common_shift(upright)
    if not np.isfinite(fit_along) and not np.isfinite(fit_across):
        raise _no_items(len(masks), 0)
    if fit_across < fit_along and abs(across) > 0.5:
        return ("top-bottom" if across > 0.0 else "bottom-top"), abs(across) * shrink
    return ("right-left" if along < 0.0 else "left-right"), abs(along) * shrink


def _common_shift(pairs: list[tuple[Floats, Floats]]) -> tuple[float, float]:
    """Returns the shift that fits all pairs best on the whole, and its mean mismatch."""
    reach = int(0.6 * pairs[0][0].shape[1])
    shifts = range(-reach, reach + 1)
    curves = np.stack([mismatch(first, second, shifts) for first, second in pairs])
    counts = np.isfinite(curves).sum(axis=0)
    total = np.where(np.isfinite(curves), curves, 0.0).sum(axis=0)
    mean = np.where(counts >= 0.4 * counts.max(), total / np.maximum(counts, 1), np.inf) if counts.any() else total + 9
    at = int(mean.argmin())
    # The parabola's vertex is not needed here: each pair is read again.
    return float(shifts[at]), float(mean[at])


class _Follower:
    """Finds the items of each frame at full size and follows them."""

    def __init__(self, belt: Floats, px_per_s: float) -> None:
        self._view, self._shrink = BeltView(belt), 1
        # One millimetre per pixel: the encoder measures pixels.
        self._encoder = ImageEncoder(1.0, nominal_mm_s=px_per_s, belt=belt)
        self._path: list[tuple[float, float]] = []
        """Time and position of the belt at each frame, seconds and pixels."""
        self._size = (0, 0)
        self._open: list[SeenItem] = []
        self._closed: list[SeenItem] = []
        self._areas: list[int] = []
        self._frames = 0
        self._best: tuple[Image | None, list[Blob]] = (None, [])

    def take(self, frame: Frame) -> None:
        self._size = (frame.image.shape[1], frame.image.shape[0])
        self._shrink = shrink_of(self._size[0])
        small = shrunk(frame.image, self._shrink)
        difference, mask = self._view.difference(small), self._view.silhouettes(small)
        position_px = self._encoder.feed(frame)
        moved_px = position_px - self._path[-1][1] if self._path else 0.0
        self._path.append((frame.captured_s, position_px))
        blobs = self._blobs(frame.image, mask, difference)
        if self._best[0] is None or len(blobs) > len(self._best[1]):
            self._best = (frame.image.copy(), blobs)
        self._follow(blobs, frame, moved_px)
        self._frames += 1

    def _blobs(self, image: Image, mask: Floats, difference: Floats) -> list[Blob]:
        solid = ((mask > 0.5) | (difference > 26.0)).astype(np.uint8)
        solid = np.asarray(cv2.morphologyEx(solid, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)), np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=4)
        height, width = solid.shape
        found = []
        for left, top, wide, tall, area in stats[1:count].tolist():
            inside = left > 0 and top > 0 and left + wide < width and top + tall < height
            if not inside or area < 12:
                continue
            self._areas.append(area)
            # Two that touch are longer than wide, or hollow at their waist.
            if area < 0.3 * float(np.median(self._areas[-400:])) or area < 0.6 * wide * tall:
                continue
            if 0.7 < wide / tall < 1.4 and (blob := self._refined(image, left, top, wide, tall)) is not None:
                found.append(blob)
        return found

    def _refined(self, image: Image, left: int, top: int, wide: int, tall: int) -> Blob | None:
        """Returns the same item measured at full size."""
        shrink, margin = self._shrink, 2
        rows = slice(max(top - margin, 0), min(top + tall + margin, self._view.belt.shape[0]))
        columns = slice(max(left - margin, 0), min(left + wide + margin, self._view.belt.shape[1]))
        y0, x0 = rows.start * shrink, columns.start * shrink
        crop = image[y0 : rows.stop * shrink, x0 : columns.stop * shrink]
        size = (crop.shape[1], crop.shape[0])
        belt = cv2.resize(self._view.belt[rows, columns], size, interpolation=cv2.INTER_LINEAR)
        smooth = np.asarray(cv2.GaussianBlur(crop, (3, 3), 0), np.float32)
        change = largest_change(smooth, np.asarray(belt, np.float32))
        # Relative to the item's own contrast, so that dim light does not make items smaller.
        rim = (change > max(_LEAST_RIM, _RIM * float(np.quantile(change, 0.75)))).astype(np.uint8)
        contours, _ = cv2.findContours(rim, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if not contours:
            return None
        x, y, length, width = cv2.boundingRect(max(contours, key=cv2.contourArea))
        return Blob(x0 + x + length / 2.0, y0 + y + width / 2.0, float(length), float(width))

    def _follow(self, blobs: list[Blob], frame: Frame, moved_px: float) -> None:
        """Assigns each blob to the item that should be at its place now, or to a new one."""
        for item in self._open:
            item.due_x += moved_px
        free = list(self._open)
        for blob in blobs:
            near = min(free, key=lambda i: abs(i.due_x - blob.x) + abs(i.y - blob.y), default=None)
            if near is not None and max(abs(near.due_x - blob.x), abs(near.y - blob.y)) < 0.3 * blob.length:
                free.remove(near)
            else:
                number, at_s = frame.number, frame.captured_s
                near = SeenItem(number, number, at_s, at_s, blob.x, blob.x, blob.x, blob.y)
                self._open.append(near)
            near.last, near.last_s, near.last_x, near.due_x = frame.number, frame.captured_s, blob.x, blob.x
            near.y += (blob.y - near.y) / (len(near.lengths) + 1)
            near.lengths.append(blob.length)
            near.widths.append(blob.width)
        for item in [i for i in self._open if frame.number - i.last > 2 and frame.captured_s - i.last_s > _GONE_S]:
            self._open.remove(item)
            self._closed.append(item)

    def result(self, direction: str, turn: Orientation, period_s: float) -> Survey:
        everything = self._closed + [i for i in self._open if i.lengths]
        if not everything or self._best[0] is None:
            raise _no_items(self._frames, 0)
        items = _of_one_kind(everything)
        travelled = sum(item.last > item.first and abs(item.last_x - item.first_x) > item.length for item in items)
        px_per_s, spread = _speed(self._path)
        if travelled < _LEAST_TRAVELLED and px_per_s * period_s > _STANDS_PX:
            raise InputError(
                "calibration.too_few_items",
                "Too few single items could be followed; let them run with gaps between, or record longer.",
                expected=f">= {_LEAST_TRAVELLED}",
                got=travelled,
            )
        return Survey(
            self._size[0],
            self._size[1],
            self._frames,
            self._view.belt,
            items,
            px_per_s * period_s,
            px_per_s,
            spread,
            self._best[0],
            self._best[1],
            direction,
            turn,
        )


def _of_one_kind(items: list[SeenItem]) -> list[SeenItem]:
    """Returns the items within a factor of the usual size, without specks, leaves and hands."""
    usual = float(np.median([item.length for item in items]))
    return [item for item in items if 0.5 * usual < item.length < 1.8 * usual]


def _speed(path: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns the speed of the belt while it ran, pixels per second, and its spread as a share.

    The belt's position is read over windows of a second. Ramps and stops are left out, the middle of the rest counts.

    Args:
        path: Time and position of the belt at each frame, seconds and pixels.
    """
    times, places = np.array(path).T
    window_s = min(_WINDOW_S, max((times[-1] - times[0]) / 2.0, 1.0e-6))
    ends = np.searchsorted(times, times + window_s)
    starts = np.flatnonzero(ends < len(times))
    passed_s = times[ends[starts]] - times[starts]
    speeds = (places[ends[starts]] - places[starts]) / np.maximum(passed_s, 1.0e-6)
    if not len(speeds):
        return 0.0, 0.0
    running = speeds[speeds >= _RUNS * np.quantile(speeds, 0.9)]
    middle = float(np.median(running))
    low, high = np.quantile(running, (0.1, 0.9))
    return middle, float(high - low) / 2.0 / abs(middle) if middle else 0.0
