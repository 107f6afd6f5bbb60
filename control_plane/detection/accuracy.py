"""How accurate a line probably is, without labels: a range with a state, and the plan of an audit where it fails.

Four estimates are made from the counts of a span, each exact on the reference by construction:

* confidence: the share judged right in each bin of the confidence on held-out items, weighted by the bins seen now
  (CBPE, debiased);
* threshold: the share of items whose confidence lies above the one that as many held-out items exceed as were judged
  right (ATC, Garg et al. 2022);
* recall: the recall of each class, weighted by the estimated true shares (BBSE);
* regression: where the bundle was tried on corrupted pictures, the change it showed for such changes of the first two.

None is best everywhere (measured on shifts of twelve kinds), so the answer is the range of all of them and of the
reference. Confidence is blind to what the model has never seen: with a new defect such ranges covered the truth in
1 to 48 of 100 cases. So while a finding says that the items have changed, the estimate does not hold, and an audit is
proposed instead.
"""

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from control_plane.detection.class_shares import true_shares
from control_plane.detection.facts import AccuracyReference, BundleFacts
from control_plane.detection.finding import Cause
from control_plane.detection.moments import Floats, class_counts
from models.profile import BINS
from models.statistics import Z95
from models.windows import Window

LEAST_ITEMS: Final = 300
STALE_S: Final = 900.0
SLACK: Final = 0.015
"""Half a range is never less than this."""
AUDIT_FLOOR: Final = 0.2
"""Share of an audit that is drawn in proportion, whatever the reference says of a bin."""
BLINDING: Final = frozenset(
    {Cause.NEW_VARIETY, Cause.COVARIATE_SHIFT, Cause.CONCEPT_DRIFT, Cause.FROZEN, Cause.CAMERA_MOVED}
)
"""Causes with which confidence says nothing of accuracy."""


class AccuracyState(StrEnum):
    """Whether an estimate may be believed."""

    OK = "ok"
    STALE = "stale"
    """The newest items are too old or too few."""
    DOES_NOT_HOLD = "does-not-hold"
    """A finding says that the items are no longer those of the reference."""
    UNKNOWN = "unknown"
    """The bundle has no reference."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate of the share of items that are judged right."""

    state: AccuracyState
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    """On held-out items."""
    items: int = 0
    methods: dict[str, float] = {}
    reason: str = ""
    """Why the state is not `ok`."""


def accuracy_reference(
    confidence: Floats,
    right: NDArray[np.bool_],
    edges: Sequence[float],
    *,
    lots: Sequence[str] = (),
    feature: str = "entropy",
) -> AccuracyReference:
    """Returns the reference from held-out items.

    Args:
        confidence: (N,) values of the feature.
        right: (N,) whether the item was judged right.
        edges: (15,) of the profile.
        lots: (N,) name of the lot of each item; without them the error between lots is taken to be 0.
        feature: Its name in the profile.
    """
    bins = np.searchsorted(np.asarray(edges, np.float64), confidence)
    items = np.bincount(bins, minlength=BINS)
    good = np.bincount(bins[right], minlength=BINS)
    by_bin = (good + right.mean()) / (items + 1.0)
    errors = []
    for lot in dict.fromkeys(lots):
        own = np.asarray(lots) == lot
        estimate, truth = float(by_bin[bins[own]].mean()), float(right[own].mean())
        # The truth of a lot is known from its items alone; their noise is no error of the estimate.
        errors.append((estimate - truth) ** 2 - estimate * (1.0 - estimate) / int(own.sum()))
    return AccuracyReference(
        feature=feature,
        items=tuple(int(n) for n in items),
        right=tuple(int(n) for n in good),
        lot_error=math.sqrt(max(float(np.mean(errors)), 0.0)) if errors else 0.0,
    )


def accuracy_of(window: Window | None, facts: BundleFacts | None, causes: Iterable[Cause], age_s: float) -> Accuracy:
    """Estimates the accuracy of a line and variety over a span.

    Args:
        window: Sum of the windows of one line, bundle and variety; None = there is none.
        facts: Of the bundle.
        causes: Of the findings that are present on the line, its site and the fleet.
        age_s: Age of the newest item.
    """
    reference = facts.accuracy if facts is not None else None
    if facts is None or reference is None or reference.feature not in facts.features or not sum(reference.items):
        return Accuracy(state=AccuracyState.UNKNOWN, reason="the bundle has no held-out items of known truth")
    counts = window.feature_counts() if window is not None else np.zeros((0, BINS), np.int64)
    row = facts.features.index(reference.feature)
    if window is None or len(counts) <= row or counts[row].sum() == 0:
        return Accuracy(state=AccuracyState.STALE, reference=reference.accuracy, reason="no items")
    seen = counts[row].astype(np.float64)
    methods = _methods(seen, class_counts(window.classes, facts.classes), facts, reference)
    value = methods["regression"] if "regression" in methods else float(np.median(list(methods.values())))
    known, items = float(sum(reference.items)), int(seen.sum())
    spread = math.sqrt(max(reference.accuracy * (1.0 - reference.accuracy), 1e-4) * (1.0 / items + 1.0 / known))
    slack = max(SLACK, Z95 * math.hypot(spread, reference.lot_error))
    ends = (*methods.values(), reference.accuracy)
    state, reason = _state(causes, items, age_s)
    return Accuracy(
        state=state,
        value=round(value, 4),
        low=round(max(0.0, min(ends) - slack), 4),
        high=round(min(1.0, max(ends) + slack), 4),
        reference=round(reference.accuracy, 4),
        items=items,
        methods={name: round(v, 4) for name, v in methods.items()},
        reason=reason,
    )


def _state(causes: Iterable[Cause], items: int, age_s: float) -> tuple[AccuracyState, str]:
    blinding = sorted(set(causes) & BLINDING)
    if blinding:
        return AccuracyState.DOES_NOT_HOLD, f"{', '.join(blinding)}: audit 100 items"
    if age_s > STALE_S:
        return AccuracyState.STALE, f"the newest item is {age_s:.0f} s old"
    if items < LEAST_ITEMS:
        return AccuracyState.STALE, f"{items} of {LEAST_ITEMS} items"
    return AccuracyState.OK, ""


def _methods(seen: Floats, classes: Floats, facts: BundleFacts, reference: AccuracyReference) -> dict[str, float]:
    items, right = (np.asarray(c, np.float64) for c in (reference.items, reference.right))
    overall = reference.accuracy
    # A bin with few held-out items is drawn to the mean of all.
    by_bin = (right + overall) / (items + 1.0)
    now, before = seen / seen.sum(), items / items.sum()
    confidence = overall + float((now - before) @ by_bin)
    doubtful = _doubtful(by_bin, before, 1.0 - overall)
    threshold = 1.0 - float(now @ doubtful)
    found = {"confidence": confidence, "threshold": threshold}
    if facts.confusion and classes.sum():
        confusion = np.asarray(facts.confusion, np.float64)
        recall = (np.diag(confusion) + overall) / (confusion.sum(axis=1) + 1.0)
        shares = true_shares(classes, confusion)[0]
        usual = confusion.sum(axis=1) / confusion.sum()
        found["recall"] = overall + float((shares - usual) @ recall)
    if reference.slopes is not None:
        first, second = reference.slopes
        found["regression"] = overall + first * (confidence - overall) + second * (threshold - overall)
    return {name: min(max(value, 0.0), 1.0) for name, value in found.items()}


def _doubtful(by_bin: Floats, shares: Floats, errors: float) -> Floats:
    """Returns for each bin the part of its items below the threshold that `errors` of the reference items lie below."""
    found = np.zeros_like(by_bin)
    left = errors
    for k in np.argsort(by_bin):
        if left <= 0.0 or shares[k] <= 0.0:
            continue
        found[k] = min(1.0, left / shares[k])
        left -= found[k] * shares[k]
    return found


def audit_plan(seen: Sequence[int], reference: AccuracyReference, size: int = 100) -> tuple[int, ...]:
    """Returns how many items of each bin of the confidence to have reviewed (Neyman allocation with a floor).

    A fifth of the audit is drawn in proportion to what was seen; the rest goes where verdicts are least sure. It was
    worth 1.6 to 2.8 times as many items drawn at random (measured).

    Args:
        seen: (16,) items of the span in each bin.
        reference: Of the bundle.
        size: Items of the audit.
    """
    counts = np.asarray(seen, np.float64)
    if counts.sum() == 0.0:
        return (0,) * len(counts)
    items, right = (np.asarray(c, np.float64) for c in (reference.items, reference.right))
    rates = (right + 1.0) / (items + 2.0)
    spread = counts * np.sqrt(rates * (1.0 - rates))
    wanted = size * (AUDIT_FLOOR * counts / counts.sum() + (1.0 - AUDIT_FLOOR) * spread / spread.sum())
    plan = np.minimum(np.maximum(np.round(wanted), np.minimum(counts, 2.0)), counts)
    return tuple(int(n) for n in plan)


def audited(seen: Sequence[int], reviewed: Sequence[int], right: Sequence[int]) -> tuple[float, float, float]:
    """Returns the accuracy that a stratified audit shows, with its 95 % interval (value, low, high).

    Args:
        seen: (16,) items of the span in each bin.
        reviewed: (16,) of them, those reviewed.
        right: (16,) of these, those judged right.
    """
    counts, trials, good = (np.asarray(c, np.float64) for c in (seen, reviewed, right))
    used = trials > 0.0
    if not used.any():
        return math.nan, 0.0, 1.0
    weights = np.where(used, counts, 0.0)
    weights /= max(float(weights.sum()), 1.0)
    value = float(weights[used] @ (good[used] / trials[used]))
    # One success and one failure are added for the variance: no bin is sure because all of three items were right.
    rates = (good + 1.0) / (trials + 2.0)
    variance = float((weights[used] ** 2 * rates[used] * (1.0 - rates[used]) / trials[used]).sum())
    half = Z95 * math.sqrt(variance)
    return value, max(0.0, value - half), min(1.0, value + half)
