"""What a camera shows of a line nobody has measured yet: belt, items, their sizes, and how they move.

Works in pixels alone: no lanes, no scale and no speed is known. It looks twice: once at shrunk pictures for the
belt and the direction of travel, once more for every item at full size. A recording or simulation starts again for
the second look, a live camera goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import cv2
import numpy as np

from edge_agent.devices.frames import frames
from edge_agent.interfaces import Frame, FrameSource, Image
from edge_agent.vision.belt_motion import (
    MOVED_SHARE,
    BeltView,
    Floats,
    best_shift,
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
_RIM: Final = 0.15
"""Share of an item's contrast to the belt at which its rim is drawn at full size."""
_LEAST_RIM: Final = 9.0
"""In grey levels (largest channel, slightly smoothed): above noise."""
_SILENT_S: Final = 10.0
"""A camera without a frame for so long is silent."""


@dataclass(slots=True)
class SeenItem:
    """One item as it was followed through the picture; full-size pixels."""

    first: int
    last: int
    """Frame numbers."""
    first_s: float
    last_s: float
    first_x: float
    last_x: float
    due_x: float
    """Where it should be in the present frame."""
    y: float
    lengths: list[float] = field(default_factory=list)
    """Extent along the belt in each frame it was whole."""
    widths: list[float] = field(default_factory=list)
    """Extent across the belt."""

    @property
    def length(self) -> float:
        """Its typical extent along the belt."""
        return float(np.median(self.lengths))

    @property
    def width(self) -> float:
        """Its typical extent across the belt."""
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
    """What was seen. Speeds are signed: positive towards growing columns."""

    width_px: int
    height_px: int
    frames: int
    belt: Floats
    items: list[SeenItem]
    px_per_frame: float
    px_per_s: float
    spread: float
    """Half the distance between the 10th and 90th percentile of the items' speeds, as a share of the speed."""
    picture: Image
    blobs: list[Blob]
    """The frame with most items, and where they are in it."""


def frames_of(opener: Opener, limit: int) -> Iterator[Frame]:
    """Yields at most `limit` frames of a camera that is opened and closed here.

    Raises:
        CameraError: The camera fails, or is silent (`camera.stalled`).
    """
    source = opener()
    try:
        yield from frames(source, limit=limit, silent_s=_SILENT_S)
    finally:
        source.close()


def survey(opener: Opener, *, frames: int, progress: Progress = lambda _done, _all: None) -> Survey:
    """Looks at the line.

    Args:
        opener: Opens the camera; called twice.
        frames: Most frames that are read at the second look.
        progress: Called with (frames so far, frames wanted).

    Raises:
        CameraError: The camera is not there or fails.
        InputError: `calibration.too_few_frames`, `calibration.belt_stands`, `calibration.no_items`,
            `calibration.vertical_travel`, `calibration.too_few_items`.
    """
    looked = min(_FIRST_LOOK, frames)
    numbers: list[int] = []
    looks: list[Floats] = []
    shape: tuple[int, ...] = (0, 0)
    for frame in frames_of(opener, looked):
        shape = frame.image.shape
        looks.append(shrunk(frame.image, shrink_of(shape[1])))
        numbers.append(frame.number)
        progress(len(looks), looked + frames)
    if len(looks) < _LEAST_FRAMES:
        raise InputError(
            "calibration.too_few_frames",
            "The camera gave too few readable frames to learn from; record some seconds of the running line.",
            expected=f">= {_LEAST_FRAMES}",
            got=len(looks),
        )
    belt = _belt(looks)
    step = _direction(looks, belt, numbers)
    follower = _Follower(belt, shape[1], step)
    for done, frame in enumerate(frames_of(opener, frames), start=looked + 1):
        follower.take(frame)
        progress(done, looked + frames)
    progress(looked + frames, looked + frames)
    return follower.result(shape[1], shape[0])


def _belt(looks: list[Floats]) -> Floats:
    """The empty belt, from pictures that differ; a belt that stands, or carries nothing, is named."""
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


def _direction(looks: list[Floats], belt: Floats, numbers: list[int]) -> float:
    """Shift per frame along the rows, shrunk columns.

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
        raise InputError(
            "calibration.vertical_travel",
            "Items travel up or down in the picture; turn the camera by 90 degrees, or the recording"
            " (ffmpeg -vf transpose=1), so that they travel from left to right.",
            expected="travel along the rows",
            got=f"{across:+.1f} rows against {along:+.1f} columns per frame, in shrunk pixels",
        )
    return along


def _common_shift(pairs: list[tuple[Floats, Floats]]) -> tuple[float, float]:
    """The shift that fits all pairs best on the whole, and its mean mismatch."""
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

    def __init__(self, belt: Floats, width_px: int, step: float) -> None:
        self._view, self._shrink, self._step = BeltView(belt), shrink_of(width_px), step
        self._last: tuple[Floats, int] | None = None
        self._open: list[SeenItem] = []
        self._closed: list[SeenItem] = []
        self._areas: list[int] = []
        self._frames = 0
        self._best: tuple[Image | None, list[Blob]] = (None, [])

    def take(self, frame: Frame) -> None:
        small = shrunk(frame.image, self._shrink)
        difference, mask = self._view.difference(small), self._view.silhouettes(small)
        moved_px = self._moved_px(mask, frame.number)
        blobs = self._blobs(frame.image, mask, difference)
        if self._best[0] is None or len(blobs) > len(self._best[1]):
            self._best = (frame.image.copy(), blobs)
        self._follow(blobs, frame, moved_px)
        self._frames += 1

    def _moved_px(self, mask: Floats, number: int) -> float:
        """How far the belt ran since the last frame, full-size pixels: read near what is usual, else assumed."""
        passed = 1 if self._last is None else max(1, number - self._last[1])
        shift = self._step * passed
        if self._last is not None:
            reach = 3.0 + 0.3 * abs(shift)
            # A belt that slows down or stops is read as well.
            low, high = min(shift - reach, -2.0), max(shift + reach, 2.0)
            match = best_shift(self._last[0], mask, int(low), int(np.ceil(high)))
            shift = match[0] if match is not None and match[1] < 0.3 else shift
        self._last = (mask, number)
        return shift * self._shrink

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
        """The same item at full size."""
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
        """Each blob belongs to the item that should be there now, or is a new one."""
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
        for item in [i for i in self._open if frame.number - i.last > 2]:
            self._open.remove(item)
            self._closed.append(item)

    def result(self, width_px: int, height_px: int) -> Survey:
        everything = self._closed + [i for i in self._open if i.lengths]
        if not everything or self._best[0] is None:
            raise _no_items(self._frames, 0)
        items = _of_one_kind(everything)
        px_per_frame, px_per_s, spread = _speed(items)
        return Survey(
            width_px,
            height_px,
            self._frames,
            self._view.belt,
            items,
            px_per_frame,
            px_per_s,
            spread,
            self._best[0],
            self._best[1],
        )


def _of_one_kind(items: list[SeenItem]) -> list[SeenItem]:
    """Without specks, leaves and hands: within a factor of the usual size."""
    usual = float(np.median([item.length for item in items]))
    return [item for item in items if 0.5 * usual < item.length < 1.8 * usual]


def _speed(items: list[SeenItem]) -> tuple[float, float, float]:
    """Pixels per frame and per second over each item's whole way, and their spread.

    The middle of all items counts: a stop of the belt in between touches only those in sight.

    Raises:
        InputError: `calibration.too_few_items`.
    """
    travelled = [item for item in items if item.last > item.first and item.last_s > item.first_s]
    if len(travelled) < _LEAST_TRAVELLED:
        raise InputError(
            "calibration.too_few_items",
            "Too few single items could be followed; let them run with gaps between, or record longer.",
            expected=f">= {_LEAST_TRAVELLED}",
            got=len(travelled),
        )
    ways = np.array([item.last_x - item.first_x for item in travelled])
    per_frame = ways / np.array([item.last - item.first for item in travelled])
    per_s = ways / np.array([item.last_s - item.first_s for item in travelled])
    middle = float(np.median(per_s))
    low, high = np.quantile(per_s, (0.1, 0.9))
    spread = float(high - low) / 2.0 / abs(middle) if middle else 0.0
    return float(np.median(per_frame)), middle, spread
