"""The camera as a sensor: about once a second it looks at the belt between the items and counts what it finds.

The sorting thread only hands over frames it has done with (`offer`, some microseconds, no copy, no wait); everything
else happens in a thread of its own with the lowest priority (`run`). Between the two is a slot for one burst of four
frames: a burst that was not looked at is replaced. A defect in here ends no line: it is logged and counted, and the
next look is another chance.

Looks come at uneven times, so that neither a belt's repeating pattern nor a lamp keeps step with them.
"""

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.health.belt_look import BeltLook, Box, Exposure, Floats, look_at, static_part
from edge_agent.health.camera_levels import (
    LOOKS,
    CameraLevels,
    Measured,
    Reference,
    learn,
    picture_of,
    read_levels,
    write_levels,
)
from edge_agent.health.registration import Grey, StaticPicture
from edge_agent.interfaces import Frame
from models.errors import InputError
from models.histogram import pack_counts
from models.messages import wall_ms
from models.statistics import Moments
from models.windows import DIRT_COLUMNS, DIRT_ROWS, QUANTITIES, CameraCounts

log = logging.getLogger("sortline.camera")
BURST: Final = 4
"""Frames of a look: at 30 a second a lamp of 100 Hz shows all its phases in three."""
_GOLDEN: Final = 0.6180339887498949
_MEMORY: Final = 5
"""Looks whose median is compared with the learnt band."""
_CELL_MEMORY: Final = 9
"""Looks of a cell whose median says whether it is dirty: a seam of the belt is in one of them."""
_LEAST_OF_A_CELL: Final = 5
_TONE: Final = 0.07
"""Least share by which a dirty cell is brighter or darker than the rest has become."""
_TEXTURE: Final = 0.25
"""Least loss of sharpness of a dirty cell against the rest, natural logarithm."""
_WIDE: Final = 6.0
"""Standard deviations of a cell's median beyond which it is dirty: 192 cells are tried in each look."""
_BY_CHANCE: Final = 1e-4
"""Probability below which a cell is not hidden by items alone."""
_MOST_COVERED: Final = 0.2
"""Larger share of the belt that is hidden all the time: the items are dense."""
_MOVED_PX: Final = 2.0
"""Where the camera has moved by more, cells are not those that were learnt: nothing is said of dirt."""
_FEWEST_DIRTY: Final = 2
_AGAIN: Final = 3
"""Looks in a row that must agree before a quantity is said to be outside its band, or inside again."""


@dataclass(frozen=True, slots=True)
class CameraChange:
    """A quantity has left its learnt band, or come back."""

    quantity: str
    """One of `models.windows.QUANTITIES`, or `dirt`."""
    outside: bool
    value: float
    """The median of the last looks; of `dirt`, the number of dirty cells."""
    level: float
    image: NDArray[np.uint8]
    """A frame of the look, uint8 (H, W, 3)."""
    dirty: NDArray[np.bool_]
    """bool (12, 16)."""
    before_jpeg: bytes
    """How the picture looked when the levels were learnt."""


@dataclass(slots=True)
class _Learning:
    """Looks gathered for the levels."""

    looks: list[BeltLook] = field(default_factory=list)
    statics: list[Grey] = field(default_factory=list)


class CameraSensor:
    """Watches one camera by its own picture.

    Args:
        mm_per_px: Scale of the picture.
        edge_px: Width of the strips at both ends of the belt in which an item may not be found yet.
        key: Names camera and geometry; levels of another key are not used.
        path: Where the learnt levels are kept; None = in memory only.
        every_s: Mean time between two looks.
        repeated: Returns how many frames repeated the one before, since the start.
        on_change: Called from the sensor's thread when a quantity leaves its band or comes back.
    """

    def __init__(
        self,
        mm_per_px: float,
        *,
        key: str,
        edge_px: int = 0,
        path: Path | None = None,
        every_s: float = 1.0,
        repeated: Callable[[], int] = lambda: 0,
        on_change: Callable[[CameraChange], None] = lambda _change: None,
    ) -> None:
        self._mm_per_px, self._edge_px, self._key, self._path, self._every_s = mm_per_px, edge_px, key, path, every_s
        self._repeated, self._repeated_seen, self._on_change = repeated, 0, on_change
        self._due_s = -math.inf
        self._looks = 0
        """Bursts handed over, which decide when the next one is due."""
        self._burst: list[Exposure] = []
        self._slot: tuple[Exposure, ...] | None = None
        self._ready = threading.Condition()
        self._lock = threading.Lock()
        self._counts = CameraCounts()
        self.failed = 0
        """Looks that ended in a defect of this program."""
        self._static = StaticPicture()
        self._reference: Reference | None = None
        self._learning = _Learning()
        self._restart_memory()
        self._load()

    # -- the sorting thread -----------------------------------------------------------------------------------

    def offer(self, frame: Frame, boxes: Callable[[], Sequence[Box]]) -> None:
        """Hands over a frame that is done with. Nobody may change its image afterwards. Never waits.

        Args:
            frame: The frame.
            boxes: Returns the places of the items in it; called only where a look is due.
        """
        if frame.captured_s < self._due_s:
            return
        if self._burst and frame.image.shape != self._burst[0].frame.image.shape:
            self._burst = []
        self._burst.append(Exposure(frame, tuple(boxes())))
        if len(self._burst) < BURST:
            return
        burst, self._burst = tuple(self._burst), []
        self._looks += 1
        self._due_s = frame.captured_s + self._every_s * (0.7 + 0.6 * ((self._looks * _GOLDEN) % 1.0))
        if self._ready.acquire(blocking=False):
            try:
                self._slot = burst
                self._ready.notify()
            finally:
                self._ready.release()

    # -- the sensor's own thread ------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Looks until the line stops."""
        while not stop.is_set():
            burst = self._take(0.25)
            if burst is not None:
                try:
                    self.look(burst)
                except Exception:
                    self.failed += 1
                    log.exception("a look at the camera failed")

    def _take(self, timeout_s: float) -> tuple[Exposure, ...] | None:
        with self._ready:
            if self._slot is None:
                self._ready.wait(timeout_s)
            burst, self._slot = self._slot, None
        return burst

    def look(self, burst: Sequence[Exposure]) -> None:
        """Examines one burst of frames: learns from it, or measures it and counts."""
        if self._reference is not None and self._path is not None and not self._path.exists():
            log.warning("the levels of the camera were taken away; they are learnt again")
            self.relearn()
        moving = _moves(burst, self._mm_per_px)
        if moving:
            for grey, mask in static_part(burst, self._mm_per_px):
                self._static.add(grey, mask)
        look = look_at(burst, self._mm_per_px, edge_px=self._edge_px)
        if self._reference is None:
            self._count(CameraCounts(looks=1))
            if moving:
                self._learn(look, burst[-1].frame.image)
        else:
            self._measure(self._reference, look, burst[-1].frame.image, moving=moving)

    def relearn(self) -> None:
        """Learns the levels again from the next looks."""
        self._reference, self._learning = None, _Learning()
        self._static.restart()
        self._restart_memory()

    @property
    def levels(self) -> CameraLevels | None:
        """The learnt levels; None while they are being learnt."""
        return self._reference.levels if self._reference else None

    def take(self) -> CameraCounts:
        """Returns the counts since the last call, with the learnt levels; any thread may call it."""
        repeated = self._repeated()
        levels = self.levels
        with self._lock:
            taken, self._counts = self._counts, CameraCounts()
        known = {name: round(value * 1000.0) for name, value in levels.level.items()} if levels else {}
        more = CameraCounts(repeated=max(repeated - self._repeated_seen, 0), levels=known)
        self._repeated_seen = repeated
        return taken.merged(more)

    # -- levels -----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            levels = read_levels(self._path, self._key)
        except InputError as error:
            log.warning("%s", error)
            levels = None
        self._reference = Reference(levels) if levels else None

    def _learn(self, look: BeltLook, image: NDArray[np.uint8]) -> None:
        learning = self._learning
        learning.looks.append(look)
        if len(learning.looks) == LOOKS // 2 and self._static.picture is not None:
            learning.statics.append(self._static.picture)
            self._static.restart()
        static = self._static.picture
        if len(learning.looks) < LOOKS or static is None:
            return
        levels = learn(
            learning.looks[-LOOKS:],
            [*learning.statics, static],
            key=self._key,
            scale=static.shape[1] / image.shape[1],
            at_ms=wall_ms(),
            before_jpeg=picture_of(image),
        )
        self._learning = _Learning()
        if levels is None:
            log.warning("the belt is hidden too much to learn the camera's levels; the next looks are tried")
            return
        self._reference = Reference(levels)
        log.info("camera levels learnt: %s", {name: round(value, 3) for name, value in levels.level.items()})
        if self._path is not None:
            try:
                write_levels(self._path, levels)
            except OSError as error:
                log.warning("the camera's levels are not kept: %s", error)
                self._path = None

    # -- looks ------------------------------------------------------------------------------------------------

    def _restart_memory(self) -> None:
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_MEMORY) for name in QUANTITIES}
        self._tone = np.full((_CELL_MEMORY, DIRT_ROWS, DIRT_COLUMNS), np.nan)
        self._texture = self._tone.copy()
        self._cell_looks = np.zeros((DIRT_ROWS, DIRT_COLUMNS), np.int64)
        self._hidden = np.zeros((DIRT_ROWS, DIRT_COLUMNS), np.int64)
        """Looks in a row in which a cell showed no belt."""
        self._looked_mm: float | None = None
        self._outside: dict[str, bool] = {}
        self._streak: Counter[str] = Counter()

    def _measure(self, reference: Reference, look: BeltLook, image: NDArray[np.uint8], *, moving: bool) -> None:
        found = reference.measure(look, self._static.picture if moving else None)
        if found is None:
            self._count(CameraCounts(looks=1))
            return
        levels, outside = reference.levels, Counter[str]()
        for name, value in found.values.items():
            recent = self._recent[name]
            recent.append(min(max(value, -9999.0), 9999.0))
            middle = float(np.median(recent))
            out = len(recent) == _MEMORY and abs(middle - levels.level[name]) > levels.half_band(name)
            outside[name] += out
            self._say(name, out, middle, levels, image, _NO_DIRT)
        dirty = self._dirty(reference, found, look, moving=moving)
        if dirty is not None:
            cells = int(dirty.sum())
            outside["dirt"] += cells >= _FEWEST_DIRTY
            self._say("dirt", cells >= _FEWEST_DIRTY, cells, levels, image, dirty)
        counts = CameraCounts(
            looks=1,
            dirt_looks=int(dirty is not None),
            dirt=pack_counts(dirty.astype(np.int64)) if dirty is not None and dirty.any() else b"",
            outside=dict(+outside),
        )
        with self._lock:
            moments: dict[str, Any] = {
                name: getattr(self._counts, name) + Moments.of(min(max(value, -9999.0), 9999.0))
                for name, value in found.values.items()
            }
            self._counts = msgspec.structs.replace(self._counts.merged(counts), **moments)

    def _dirty(
        self, reference: Reference, found: Measured, look: BeltLook, *, moving: bool
    ) -> NDArray[np.bool_] | None:
        """Returns which cells are dirty, bool (12, 16): what is on the belt moves on, what is on the lens stays."""
        levels = reference.levels
        if not moving or look.belt_mm == self._looked_mm:
            return None
        self._looked_mm = look.belt_mm
        if any(self._off_by(name, levels) > _MOVED_PX for name in ("shift_x_px", "shift_y_px")):
            self._cell_looks[:] = self._hidden[:] = 0
            return None
        seen = np.isfinite(found.tone) & np.isfinite(found.texture)
        at = self._cell_looks[seen] % _CELL_MEMORY
        rows, columns = np.nonzero(seen)
        self._tone[at, rows, columns] = found.tone[seen]
        self._texture[at, rows, columns] = found.texture[seen]
        self._cell_looks += seen
        self._hidden = np.where(seen, 0, self._hidden + 1)
        known = self._cell_looks >= _LEAST_OF_A_CELL
        tone, texture = _medians(self._tone, known), _medians(self._texture, known)
        # The median of n values of deviation s has a deviation of about 1.25 s / sqrt(n).
        enough = _WIDE * 1.25 / math.sqrt(_LEAST_OF_A_CELL)
        dirty = np.abs(tone) > max(_TONE, enough * levels.tone_spread)
        if self._off_by("sharpness", levels) < levels.half_band("sharpness") / 2.0:
            # A lens out of focus takes more from cells with edges than from the bare belt: that is no dirt.
            dirty |= texture < -max(_TEXTURE, enough * levels.texture_spread)
        return np.asarray((known & dirty) | self._covered(reference), np.bool_)

    def _covered(self, reference: Reference) -> NDArray[np.bool_]:
        """Returns the cells that have shown no belt for longer than chance allows: dirt there is found as an item.

        Where items have become so dense that much of the belt is hidden, it is not dirt.
        """
        learnt = reference.seen > 0.0
        chance = np.power(1.0 - np.minimum(reference.seen, 0.99), self._hidden)
        covered = learnt & (chance < _BY_CHANCE)
        return covered if covered.sum() <= _MOST_COVERED * learnt.sum() else _NO_DIRT

    def _off_by(self, name: str, levels: CameraLevels) -> float:
        """Returns how far the last value of a quantity lies from its level; 0 where it is not known."""
        recent = self._recent[name]
        return abs(recent[-1] - levels.level[name]) if recent and name in levels.level else 0.0

    def _say(
        self,
        name: str,
        out: bool,
        value: float,
        levels: CameraLevels,
        image: NDArray[np.uint8],
        dirty: NDArray[np.bool_],
    ) -> None:
        """Reports a quantity whose state has changed, once it has stayed so for some looks."""
        if out == self._outside.get(name, False):
            self._streak[name] = 0
            return
        self._streak[name] += 1
        if self._streak[name] >= _AGAIN:
            self._outside[name], self._streak[name] = out, 0
            level = levels.level.get(name, 0.0)
            self._on_change(CameraChange(name, out, value, level, image, dirty, levels.before_jpeg))

    def _count(self, counts: CameraCounts) -> None:
        with self._lock:
            self._counts = self._counts.merged(counts)


_NO_DIRT: Final = np.zeros((DIRT_ROWS, DIRT_COLUMNS), bool)


def _moves(burst: Sequence[Exposure], mm_per_px: float) -> bool:
    """Whether the belt ran far enough within the burst to tell what stands still."""
    return abs(burst[-1].frame.belt_mm - burst[0].frame.belt_mm) >= 4.0 * mm_per_px


def _medians(ring: Floats, known: NDArray[np.bool_]) -> Floats:
    """Returns the median over the looks of each cell, (12, 16); 0 where it is not known."""
    return np.asarray(np.nanmedian(np.where(known, ring, 0.0), axis=0), np.float64)
