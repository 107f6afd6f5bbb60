"""Figures of one agent from the sum of its recent windows. Pure functions: what they need comes in."""

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from control_plane.data.class_order import in_class_order
from control_plane.monitoring.sorting import Sorting
from models.profile import Profile, stability_index
from models.recipe import UNSURE
from models.windows import Window

DRIFT_LIMIT: Final = 0.25
"""Noise-corrected stability index from which a feature is shown as drifting. An effect size for the eye: lots differ
from each other by as much, so it does not change an agent's state until false alarms are controlled."""
DRIFT_MIN_ITEMS: Final = 200
LATENCY_BUDGET_MS: Final = 50.0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent counted in the last minutes with its active bundle."""

    items: int = 0
    items_per_s: float = 0.0
    views: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    slow_share: float = 0.0
    """Verdicts beyond the latency budget / verdicts."""
    classes: dict[str, int] = {}
    class_order: tuple[str, ...] = ()
    """The classes of the bundle's recipe, the good one first; those counted, by name, where the recipe is not known."""
    outlets: dict[str, int] = {}
    grades: dict[str, int] = {}
    """As the recipe graded the items, `unsure` among them."""
    reject_share: float | None = None
    """Items that were not let through / items; None where the bundle's recipe is not known."""
    unsure_share: float | None = None
    """Items on which the line abstained / items."""
    ejections: dict[str, int] = {}
    shots: dict[str, int] = {}
    """What became of the shots; see `models.windows.Window`."""
    ejectors: dict[str, int] = {}
    """`lane/outlet/what`: fired, and with a photo-eye confirmed, missed, double, unexpected."""
    lead_ms: dict[str, float] = {}
    """Learnt lead per ejector."""
    jitter_p99_ms: float | None = None
    camera: dict[str, int] = {}
    """Faults named, and what went by while the camera was blind."""
    truth: dict[str, int] = {}
    escape_rate: float | None = None
    """Where truth and recipe are known: defective items that were let through / defective items."""
    false_reject_rate: float | None = None
    frames_dropped: int = 0
    items_unjudged: int = 0
    verdicts_late: int = 0
    shadow: dict[str, int] = {}
    """Outlets `champion>challenger` of items that a challenger judged too."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far the features lie from the bundle's reference."""

    drift: str = "unknown"
    """calm, drifting, learning (too few items), unknown."""
    drift_value: float | None = None
    """Largest stability index of a feature, noise removed."""
    drift_feature: str = ""
    drift_by_feature: dict[str, float] = {}


NO_FIGURES: Final = Figures()
NO_DRIFT: Final = Drift()


def figures_of(window: Window | None, sorting: Sorting | None) -> Figures:
    """Returns the figures of a sum of windows.

    Args:
        window: All windows of the active bundle as one; None = there is none.
        sorting: What the names of its recipe mean; None = the bundle is not known here.
    """
    if window is None:
        return NO_FIGURES
    escape, waste = sorting.rates(window.truth) if sorting else (None, None)
    seconds = window.duration_ms / 1000.0
    slow = window.latency_ms.share_above(LATENCY_BUDGET_MS)
    others = in_class_order(set(window.classes) - set(sorting.classes if sorting else ()))
    return Figures(
        items=window.items,
        items_per_s=round(window.items / seconds, 2) if seconds else 0.0,
        views=window.views,
        p50_ms=_quantile(window, 0.5),
        p99_ms=_quantile(window, 0.99),
        slow_share=0.0 if math.isnan(slow) else slow,
        classes=window.classes,
        class_order=(*(sorting.classes if sorting else ()), *others),
        outlets=window.outlets,
        grades=window.grades,
        reject_share=sorting.reject_share(window.outlets) if sorting else None,
        unsure_share=round(window.grades.get(UNSURE, 0) / window.items, 5) if window.items else None,
        ejections=window.ejections,
        shots=window.shots,
        ejectors=window.ejectors,
        lead_ms=window.lead_ms,
        jitter_p99_ms=round(window.jitter_ms.quantile(0.99), 3) if window.jitter_ms.count else None,
        camera=window.camera,
        truth=window.truth,
        escape_rate=escape,
        false_reject_rate=waste,
        frames_dropped=window.frames_dropped,
        items_unjudged=window.items_unjudged,
        verdicts_late=window.verdicts_late,
        shadow=window.shadow,
    )


def drift_of(window: Window | None, profile: Profile | None) -> Drift:
    """Returns the drift of a sum of windows against the profile of its bundle; unknown when nothing can be said."""
    if window is None or profile is None or window.items == 0:
        return NO_DRIFT
    counts = window.feature_counts()
    reference = profile.count_array()
    if counts.shape != reference.shape:
        return NO_DRIFT
    values = stability_index(reference, counts)
    by_feature = {
        name: round(float(value), 4)
        for name, value in zip(profile.features, values, strict=True)
        if math.isfinite(value)
    }
    feature = max(by_feature, key=lambda name: by_feature[name], default="")
    if not feature:
        return NO_DRIFT
    enough = window.items >= DRIFT_MIN_ITEMS
    name = "learning" if not enough else ("drifting" if by_feature[feature] > DRIFT_LIMIT else "calm")
    return Drift(drift=name, drift_value=by_feature[feature], drift_feature=feature, drift_by_feature=by_feature)


def completeness_of(sequence: Sequence[tuple[str, int]]) -> float | None:
    """Returns the share of (boot, number) keys that arrived between the lowest and the highest number of each boot."""
    numbers: dict[str, list[int]] = {}
    for boot, number in sequence:
        numbers.setdefault(boot, []).append(number)
    expected = sum(max(found) - min(found) + 1 for found in numbers.values())
    return len(sequence) / expected if expected else None


def _quantile(window: Window, q: float) -> float | None:
    if window.latency_ms.count == 0:
        return None
    return round(window.latency_ms.quantile(q), 2)


def flat(part: msgspec.Struct) -> dict[str, Any]:
    """Returns a part of a status as the API shows it."""
    return dict(msgspec.to_builtins(part))
