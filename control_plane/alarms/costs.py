"""What an alarm costs per hour of waiting, in the plant's currency, where the recipe's terms say what mistakes cost.

Formula: items per hour * (share escaping * cost of an escape + share wasted * cost of a waste). Where a finding states
its harm (`evidence["harm"]`), those shares are used; a weak ejector lets through the items it misses; for a fault of
camera, light or place the change of the rejected share since the fault began is taken as mistakes, which is the most it
can be. A changed crop is no mistake and has no cost. Pure functions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from control_plane.detection.finding import Cause, Detector, Finding
from models.recipe import Recipe, Terms, layered
from models.windows import Window

_OF_THE_LINE: Final = frozenset(
    {
        Cause.CAMERA_DIRTY,
        Cause.CAMERA_BLURRED,
        Cause.CAMERA_MOVED,
        Cause.LIGHT_LEVEL,
        Cause.LIGHT_COLOUR,
        Cause.FLICKER,
        Cause.SCALE_DRIFT,
        Cause.LANE_DIFFERS,
    }
)
_HALF_LIFE_ITEMS: Final = 20_000
"""The usual rejected share forgets half of what it saw in so many items: some lots."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What mistakes cost per item under the terms in force."""

    escaped: float
    wasted: float

    @classmethod
    def of(cls, recipe: Recipe, variety: str, lot: str) -> "Prices | None":
        """Returns the prices of a recipe; None where it names none (its defaults count mistakes, not money)."""
        given = layered((recipe.terms, recipe.varieties.get(variety, Terms()), recipe.lots.get(lot, Terms())))
        if given.escaped is None and given.wasted is None and not given.prices:
            return None
        terms = recipe.terms_of(variety, lot)
        grades = recipe.graded
        good = [terms.prices.get(name, 0.0) for name, grade in grades.items() if recipe.good_class in grade.classes]
        other = [
            terms.prices.get(name, 0.0) for name, grade in grades.items() if recipe.good_class not in grade.classes
        ]
        lost = max(0.0, max(good, default=0.0) - max(other, default=0.0))
        return cls(escaped=terms.escaped or 0.0, wasted=(terms.wasted or 0.0) + lost)


class Traffic:
    """What went over one line lately: items per hour, the rejected share now and as usual."""

    def __init__(self) -> None:
        self._items = self._rejected = self._usual_items = self._usual_rejected = 0.0
        self._seconds = 0.0

    def add(self, window: Window, accepted: frozenset[str], *, usual: bool) -> None:
        """Counts a window.

        Args:
            window: Ten seconds or more.
            accepted: Outlets that let an item through.
            usual: Whether nothing is known to be wrong with the line: only then the usual share learns.
        """
        items, seconds = sum(window.outlets.values()), window.duration_ms / 1000.0
        rejected = items - sum(window.outlets.get(name, 0) for name in accepted)
        keep = math.exp(-seconds / 120.0)
        self._items, self._rejected = self._items * keep + items, self._rejected * keep + rejected
        self._seconds = self._seconds * keep + seconds
        if usual:
            forget = 0.5 ** (items / _HALF_LIFE_ITEMS)
            self._usual_items = self._usual_items * forget + items
            self._usual_rejected = self._usual_rejected * forget + rejected

    @property
    def items_per_h(self) -> float:
        """Items per hour over the last two minutes or so; 0 without any."""
        return 3600.0 * self._items / self._seconds if self._seconds > 0.0 else 0.0

    @property
    def rejected(self) -> float:
        """Rejected share over the last two minutes or so, 0..1."""
        return self._rejected / self._items if self._items > 0.0 else 0.0

    @property
    def usual_rejected(self) -> float:
        """Rejected share while nothing was wrong, 0..1."""
        return self._usual_rejected / self._usual_items if self._usual_items > 0.0 else self.rejected


def cost_of_waiting(finding: Finding, prices: Prices | None, traffic: Traffic | None) -> dict[str, Any]:
    """Returns `per_h`, in the plant's currency, and `basis`, a sentence that says how; empty where it is not known."""
    if prices is None or traffic is None or traffic.items_per_h <= 0.0:
        return {}
    escaped, wasted, basis = _harm(finding, traffic)
    if not basis:
        return {}
    per_h = traffic.items_per_h * (escaped * prices.escaped + wasted * prices.wasted)
    return {"per_h": round(per_h, 2), "basis": f"{basis}, at {traffic.items_per_h:,.0f} items per hour"}


def _harm(finding: Finding, traffic: Traffic) -> tuple[float, float, str]:
    """Returns the shares of items that escape and are wasted, and where they come from; empty words = not known."""
    said = finding.evidence.get("harm")
    if isinstance(said, Mapping):
        escaped, wasted = _share(said.get("escaped")), _share(said.get("wasted"))
        return (
            escaped,
            wasted,
            f"{escaped:.1%} of the items escape, {wasted:.1%} are wasted, by estimate",
        )
    if finding.detector is Detector.EJECTOR and finding.cause is Cause.WEAK_EJECTOR:
        missed = _share(finding.effect)
        escaped = missed * traffic.rejected
        words = f"{missed:.1%} of the shots miss, and {traffic.rejected:.1%} of the items are rejected"
        return escaped, 0.0, words
    if finding.cause in _OF_THE_LINE:
        change = traffic.rejected - traffic.usual_rejected
        words = f"at most: {traffic.rejected:.1%} of the items are rejected, {traffic.usual_rejected:.1%} are usual"
        return max(0.0, -change), max(0.0, change), words
    return 0.0, 0.0, ""


def _share(value: object) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return min(max(float(value), 0.0), 1.0)
    return 0.0
