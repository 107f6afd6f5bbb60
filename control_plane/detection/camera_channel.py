"""C0: a camera against its own learnt level, on what does not depend on the fruit: belt, light, sharpness, dirt.

Each quantity is followed by an exponential mean and compared with the level of this camera. The threshold is the
larger of two: a change that matters (`HARMFUL`), and 1.3 times the largest excursion of the days in which the
reference was learnt, which holds the natural change of day and night. So a camera in a calm tunnel alarms at what
matters and not at what is merely significant, and one beside a window does not alarm at dusk. Until a whole day is
known, it takes twice the harmful change.

Level and excursion are final after two days, and nothing is learnt while something is present: what creeps for weeks
is not taken for usual. A dirty cell is known by its picture and needs no long reference: what was dirty from the
beginning is subtracted.
"""

from typing import Any, Final

import msgspec
import numpy as np

from control_plane.detection.finding import Detector, Signal
from control_plane.detection.moments import Floats
from control_plane.detection.sequential import Array, Latch, weight
from models.windows import DIRT_COLUMNS, DIRT_ROWS, CameraCounts

MEMORY_S: Final = 45.0
"""Both of the quantities and of the cells of dirt: a cell dirty in every look passes one half after 31 s."""
LEARN_LOOKS: Final = 60
"""Looks before a level is used."""
SLOW_LOOKS: Final = 4 * 3600
"""Fewest looks that a level is taken to come from, once it is used."""
LEARN_DAYS: Final = 2
MARGIN: Final = 1.3
FIRST_DAY: Final = 2.0
"""Factor on the harmful change while no whole day is known."""
DIRTY_SHARE: Final = 0.5
"""A cell is dirty when more of the recent looks say so than this, beyond what they said at the beginning."""
LEAST_CELLS: Final = 2
REPEATED_SHARE: Final = 0.1
"""Share of repeated frames from which the pictures are not believed."""
FRAMES_PER_LOOK: Final = 30.0
"""Repeated frames are counted by frame; where the number of frames is not known, a look stands for so many."""
DAY_S: Final = 86_400.0

QUANTITIES: Final = ("focus", "exposure", "red_to_green", "blue_to_green", "flicker", "shift_x", "shift_y")
HARMFUL: Final = np.array([0.35, 0.08, 0.04, 0.04, 0.05, 4.0, 4.0])
"""Least change of each quantity that is reported: natural logarithms for focus, exposure and colour (0.08 is 8 %), the
modulation of the light as a share of its mean, pixels for the shift. They are judgement, not measurement."""
_SIGNALS: Final[tuple[tuple[str, tuple[int, ...], int, str], ...]] = (
    ("focus", (0,), -1, "log variance"),
    ("exposure", (1,), 0, "log brightness"),
    ("colour", (2, 3), 0, "log ratio"),
    ("flicker", (4,), 1, "modulation"),
    ("shift", (5, 6), 0, "px"),
)
"""Signal, its quantities, the direction that matters (0 = both), unit of its effect."""
_LEAST: Final = 1e-6


class CameraState(msgspec.Struct, kw_only=True, eq=False):
    """What is known of one camera."""

    looks: int = 0
    level: Array = msgspec.field(default_factory=lambda: np.zeros(len(QUANTITIES)))
    fast: Array = msgspec.field(default_factory=lambda: np.zeros(len(QUANTITIES)))
    learnt: Array = msgspec.field(default_factory=lambda: np.zeros(len(QUANTITIES)))
    """Looks of which each first level was made: a quantity may be measured later than the others."""
    largest: Array = msgspec.field(default_factory=lambda: np.zeros(len(QUANTITIES)))
    """Largest excursion of the whole days."""
    largest_today: Array = msgspec.field(default_factory=lambda: np.zeros(len(QUANTITIES)))
    day_began_s: float = 0.0
    days: int = 0
    dirt: Array = msgspec.field(default_factory=lambda: np.zeros((DIRT_ROWS, DIRT_COLUMNS)))
    """Recent share of looks in which a cell was dirty."""
    dirt_usual: Array = msgspec.field(default_factory=lambda: np.zeros((DIRT_ROWS, DIRT_COLUMNS)))
    dirt_looks: int = 0
    repeated: float = 0.0
    factor: float = 1.0
    """Raised where people say that an alarm was false."""
    latches: dict[str, Latch] = {}

    @property
    def ready(self) -> bool:
        """Whether the level is known."""
        return self.looks >= LEARN_LOOKS

    def thresholds(self) -> Floats:
        """Returns float64 (7,): the change of each quantity that counts."""
        harmful = HARMFUL if self.days else FIRST_DAY * HARMFUL
        return np.asarray(self.factor * np.maximum(harmful, MARGIN * self.largest))

    def take(self, counts: CameraCounts, *, frames: int, span_s: float, now_s: float, items: int) -> list[Signal]:
        """Takes the looks of a span; returns what is present.

        Args:
            counts: The camera's looks; a quantity without a measurement stays as it was.
            frames: Frames of the span.
            span_s: Its length.
            now_s: Its end, seconds.
            items: Items judged in it.
        """
        found = [self._repeats(counts, frames, span_s, now_s, items)] if counts.looks or counts.repeated else []
        if counts.looks:
            found += self._quantities(_values(counts), counts.looks, span_s, now_s, items)
        if counts.dirt_looks:
            found.append(self._dirty(counts, span_s, now_s, items))
        return [signal for signal in found if signal is not None]

    def _latch(self, name: str, ratio: float, now_s: float, items: int) -> Latch | None:
        latch = self.latches.setdefault(name, Latch())
        return latch if latch.take(ratio, now_s, items) else None

    def _quantities(self, values: Floats, looks: int, span_s: float, now_s: float, items: int) -> list[Signal | None]:
        known = np.isfinite(values)
        first = known & (self.learnt < LEARN_LOOKS)
        share = looks / (self.learnt + looks)
        self.level = np.where(first, self.level + share * (values - self.level), self.level)
        self.fast = np.where(first, self.level, self.fast)
        self.learnt = self.learnt + looks * first
        if self.looks < LEARN_LOOKS:
            self.looks, self.day_began_s = self.looks + looks * bool(known.any()), self.day_began_s or now_s
            return []
        known &= ~first
        self.fast = np.where(known, self.fast + weight(span_s, MEMORY_S) * (values - self.fast), self.fast)
        change = np.where(self.learnt < LEARN_LOOKS, 0.0, self.fast - self.level)
        ratios = change / self.thresholds()
        found: list[Signal | None] = []
        for name, rows, sign, unit in _SIGNALS:
            part = ratios[list(rows)]
            largest = np.linalg.norm(part) if name == "shift" else (sign * part if sign else np.abs(part)).max()
            ratio = float(largest)
            latch = self._latch(name, ratio, now_s, items)
            if latch:
                found.append(self._signal(name, rows, unit, change, latch))
        if not any(latch.on for latch in self.latches.values()):
            self._learn(values, known, change, looks, now_s)
        return found

    def _learn(self, values: Floats, known: Any, change: Floats, looks: int, now_s: float) -> None:
        if self.days >= LEARN_DAYS:
            return
        self.looks += looks
        # In the first hours a look weighs little, or the level would run after a fault that comes early.
        share = min(looks / max(self.looks, SLOW_LOOKS), 1.0)
        self.level = np.where(known, self.level + share * (values - self.level), self.level)
        self.largest_today = np.maximum(self.largest_today, np.abs(change))
        if now_s - self.day_began_s >= DAY_S:
            self.largest = np.maximum(self.largest, self.largest_today)
            self.largest_today = np.zeros_like(self.largest)
            self.days, self.day_began_s = self.days + 1, now_s

    def _signal(self, name: str, rows: tuple[int, ...], unit: str, change: Floats, latch: Latch) -> Signal:
        part = change[list(rows)]
        effect = float(np.linalg.norm(part)) if name == "shift" else float(part[np.abs(part).argmax()])
        evidence = {
            "before": {QUANTITIES[k]: round(float(self.level[k]), 4) for k in rows},
            "now": {QUANTITIES[k]: round(float(self.fast[k]), 4) for k in rows},
            "threshold": {QUANTITIES[k]: round(float(self.thresholds()[k]), 4) for k in rows},
        }
        return _signal(name, latch, effect, unit, evidence, _WORDS.get(name, lambda _: {})(part))

    def _dirty(self, counts: CameraCounts, span_s: float, now_s: float, items: int) -> Signal | None:
        shares = counts.dirt_counts() / counts.dirt_looks
        if self.dirt_looks < LEARN_LOOKS:
            self.dirt_usual += counts.dirt_looks / (self.dirt_looks + counts.dirt_looks) * (shares - self.dirt_usual)
            self.dirt, self.dirt_looks = self.dirt_usual.copy(), self.dirt_looks + counts.dirt_looks
            return None
        self.dirt += weight(span_s, MEMORY_S) * (shares - self.dirt)
        dirty = self.dirt - self.dirt_usual > DIRTY_SHARE * self.factor
        cells = int(dirty.sum())
        latch = self._latch("dirt", cells / LEAST_CELLS, now_s, items)
        if latch is None:
            return None
        evidence = {"dirt": np.round(self.dirt, 2).tolist(), "cells": cells}
        return _signal("dirt", latch, cells / dirty.size, "share of the picture", evidence, {"where": place(dirty)})

    def _repeats(self, counts: CameraCounts, frames: int, span_s: float, now_s: float, items: int) -> Signal | None:
        share = min(counts.repeated / max(frames or counts.looks * FRAMES_PER_LOOK, 1.0), 1.0)
        self.repeated += weight(span_s, MEMORY_S) * (share - self.repeated)
        latch = self._latch("repeated", self.repeated / (REPEATED_SHARE * self.factor), now_s, items)
        if latch is None:
            return None
        return _signal("repeated", latch, self.repeated, "share of frames", {"repeated": round(self.repeated, 3)}, {})


def _signal(
    name: str, latch: Latch, effect: float, unit: str, evidence: dict[str, Any], words: dict[str, str]
) -> Signal:
    return Signal(
        name=name,
        detector=Detector.TILE,
        ratio=latch.ratio,
        effect=effect,
        effect_unit=unit,
        items=latch.since_items,
        delay_items=latch.delay_items,
        delay_s=latch.delay_s,
        evidence=evidence,
        words=words,
    )


_WORDS: Final[dict[str, Any]] = {
    "exposure": lambda part: {"direction": "darker" if part[0] < 0 else "brighter"},
    "colour": lambda part: {"direction": "redder" if part[0] - part[1] > 0 else "bluer"},
    "shift": lambda part: {
        "direction": f"{abs(part[0]):.0f} px to the {'right' if part[0] > 0 else 'left'} and "
        f"{abs(part[1]):.0f} px {'down' if part[1] > 0 else 'up'}"
    },
}


def _values(counts: CameraCounts) -> Floats:
    """Returns float64 (7,), NaN where nothing was measured.

    Focus is the logarithm of the variance of the Laplacian less twice the logarithm of the brightness: a picture of
    half the light has a quarter of the variance and is as sharp as before.
    """
    exposure = np.log(max(counts.exposure.mean, _LEAST)) if counts.exposure.count else np.nan
    red, blue = (
        np.log(max(m.mean, _LEAST)) if m.count else np.nan for m in (counts.red_to_green, counts.blue_to_green)
    )
    focus = counts.sharpness.mean - 2.0 * exposure
    return np.array(
        [focus, exposure, red, blue, counts.flicker.mean, counts.shift_x_px.mean, counts.shift_y_px.mean], np.float64
    )


def place(dirty: Any) -> str:
    """Returns in words where most of the dirty cells lie, as seen in the picture: `upper right`, `middle`."""
    rows, columns = np.nonzero(dirty)
    if not len(rows):
        return ""
    height, width = dirty.shape
    vertical = ("upper", "", "lower")[min(int(3.0 * np.median(rows + 0.5) / height), 2)]
    horizontal = ("left", "", "right")[min(int(3.0 * np.median(columns + 0.5) / width), 2)]
    return " ".join(word for word in (vertical, horizontal) if word) or "middle"
