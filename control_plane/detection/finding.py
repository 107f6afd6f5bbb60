"""The vocabulary of detection: a finding says what is present, where, how large it is, and what a person should do.

A finding carries no state of its own: a detector returns the findings that are present now, and the same condition has
the same `key` at every step. Whether it was seen before, who looks after it and when it is over belong to the alarms.
"""

from enum import StrEnum
from typing import Any, Final

import msgspec

from models.windows import Window


class Detector(StrEnum):
    """The channel that saw it."""

    TILE = "tile"
    """The camera against its own learnt level, on what does not depend on the lot: belt, light, sharpness, dirt."""
    CAMERA = "camera"
    """One line's camera against its siblings on the same lot."""
    COVARIATE = "covariate"
    """The items of a line against the spread between lots."""
    LABEL = "label"
    """The shares of the classes against the spread between lots."""
    FIDELITY = "fidelity"
    EJECTOR = "ejector"
    ACCURACY = "accuracy"
    LANE = "lane"
    """One lane against the other lanes of the line on the same lot."""


class Cause(StrEnum):
    """The reason for a finding; `unknown` where the pattern of the channels fits no rule."""

    CAMERA_DIRTY = "camera-dirty"
    CAMERA_BLURRED = "camera-blurred"
    CAMERA_MOVED = "camera-moved"
    LIGHT_LEVEL = "light-level"
    LIGHT_COLOUR = "light-colour"
    FLICKER = "flicker"
    FROZEN = "frozen"
    CAMERA_BLIND = "camera-blind"
    """The line itself names a fault of its camera: absent, stalled, pictures it cannot use."""
    PRIOR_SHIFT = "prior-shift"
    NEW_VARIETY = "new-variety"
    COVARIATE_SHIFT = "covariate-shift"
    CONCEPT_DRIFT = "concept-drift"
    WEAK_EJECTOR = "weak-ejector"
    SCALE_DRIFT = "scale-drift"
    LANE_DIFFERS = "lane-differs"
    INCOMPLETE = "incomplete"
    CLOCK = "clock"
    UNKNOWN = "unknown"


class Severity(StrEnum):
    """How soon somebody should look."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for info, 1 for warning, 2 for critical."""
        return _RANKS[self]


_RANKS: Final = {Severity.INFO: 0, Severity.WARNING: 1, Severity.CRITICAL: 2}


class Level(StrEnum):
    """How much of the fleet a finding concerns."""

    LANE = "lane"
    LINE = "line"
    SITE = "site"
    FLEET = "fleet"


class LineSum(msgspec.Struct, frozen=True, kw_only=True):
    """What detection takes: the sum of the windows of one line over a short span, of one bundle and one lot."""

    site: str
    line: str
    """Agent id."""
    window: Window
    """Ten seconds to some minutes; its `bundle`, `lot` and `variety` hold for all of it."""


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """What one channel sees, before a cause is named."""

    name: str
    """Of the vocabulary of the rules, such as `dirt`, `exposure`, `covariate`."""
    detector: Detector
    ratio: float
    """Statistic / threshold."""
    effect: float
    effect_unit: str
    interval: tuple[float, float] | None = None
    items: int = 0
    delay_items: int = 0
    delay_s: float = 0.0
    lots: tuple[str, ...] = ()
    lane: int | None = None
    evidence: dict[str, Any] = {}
    words: dict[str, str] = {}
    """What the instruction needs to say, such as `where`."""
    marks: tuple[str, ...] = ()
    """Features of its pattern that a rule may ask for, such as `shape`."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is present now."""

    detector: Detector
    cause: Cause
    severity: Severity
    level: Level
    site: str = ""
    """Empty at the level of the fleet."""
    line: str = ""
    """Agent id; empty above the line."""
    lane: int | None = None
    lots: tuple[str, ...] = ()
    """Lots that passed since it began, newest last."""
    effect: float
    """How large it is, in `effect_unit`."""
    effect_unit: str
    interval: tuple[float, float] | None = None
    """95 % interval of the effect; None where the method has none."""
    items: int = 0
    """Items behind the effect."""
    delay_items: int = 0
    """Items from the estimated beginning to the first step in which it was present."""
    delay_s: float = 0.0
    evidence: dict[str, Any] = {}
    """Data that show it, fit for JSON: histograms, grid of dirt, figures before and after."""
    action: str
    """One instruction to a person, in full sentences."""

    @property
    def subject(self) -> str:
        """The line, with its lane where one is concerned, else the site, else the fleet."""
        if self.level is Level.LANE:
            return f"{self.line}:{self.lane}"
        return {Level.LINE: self.line, Level.SITE: self.site}.get(self.level, "fleet")

    @property
    def key(self) -> str:
        """`level/subject/cause`: findings of equal key are the same condition."""
        return f"{self.level}/{self.subject}/{self.cause}"
