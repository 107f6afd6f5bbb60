"""Accuracy without labels: right where it can be, a range where it cannot, and silence where it would mislead."""

import msgspec
import numpy as np
import pytest

from control_plane.detection.accuracy import (
    AccuracyState,
    accuracy_of,
    accuracy_reference,
    audit_plan,
    audited,
)
from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Cause
from models.windows import Window

RNG = np.random.default_rng(5)
BUNDLE = "b" * 64


def judged(count: int, hard: float = 1.0, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of items and whether they were judged right; a calibrated model: the answer is right with its
    probability, and `hard` items are less sure."""
    rng = np.random.default_rng(seed)
    doubt = np.clip(rng.beta(0.5, 8.0, count) * hard, 0.0, 0.6)
    return doubt, rng.random(count) > doubt


HELD_OUT = judged(20_000)
EDGES = tuple(float(e) for e in np.quantile(HELD_OUT[0], np.arange(1, 16) / 16))
FACTS = BundleFacts(
    features=("entropy",),
    counts=((1250,) * 16,),
    classes=("sound", "rot"),
    confusion=((9000, 300), (200, 500)),
    accuracy=accuracy_reference(HELD_OUT[0], HELD_OUT[1], EDGES),
)


def window_of(confidence: np.ndarray, rot: float = 0.07) -> Window:
    n = len(confidence)
    counts = np.bincount(np.searchsorted(EDGES, confidence), minlength=16)
    bad = round(rot * n)
    return Window(
        started_ms=0,
        duration_ms=60_000,
        bundle=BUNDLE,
        items=n,
        lanes=(n,),
        classes={"sound": n - bad, "rot": bad},
        features=counts.astype("<u4").tobytes(),
        nulls=(0,),
    )


def test_on_items_like_the_reference_the_estimate_is_the_reference() -> None:
    confidence, right = judged(5000, seed=2)
    found = accuracy_of(window_of(confidence), FACTS, (), 10.0)
    assert found.state is AccuracyState.OK
    assert found.value == pytest.approx(right.mean(), abs=0.01)
    assert (found.low or 1.0) < right.mean() < (found.high or 0.0)


@pytest.mark.parametrize("hard", [1.5, 2.5])
def test_harder_items_lower_the_estimate_and_the_range_covers_the_truth(hard: float) -> None:
    confidence, right = judged(5000, hard, seed=3)
    found = accuracy_of(window_of(confidence), FACTS, (), 10.0)
    assert found.methods["confidence"] < (found.reference or 0.0) - 0.01
    assert (found.low or 1.0) <= right.mean() <= (found.high or 0.0)


def test_a_range_is_never_narrower_than_its_methods_and_its_floor() -> None:
    found = accuracy_of(window_of(judged(50_000, seed=4)[0]), FACTS, (), 10.0)
    assert (found.high or 0.0) - (found.low or 0.0) >= 0.0299


def test_lots_that_the_estimate_gets_wrong_make_the_range_wide() -> None:
    confidence, right = judged(20_000, seed=6)
    lots = np.repeat(np.arange(40), 500)
    # Half of the lots are judged worse than their confidence says.
    worse = right & ~((lots % 2 == 0) & (RNG.random(20_000) < 0.08))
    names = [str(lot) for lot in lots]
    honest = accuracy_reference(confidence, right, EDGES, lots=names)
    wrong = accuracy_reference(confidence, worse, EDGES, lots=names)
    assert honest.lot_error < 0.01
    assert wrong.lot_error == pytest.approx(0.04, abs=0.012)
    wide, narrow = (
        accuracy_of(window_of(confidence), msgspec.structs.replace(FACTS, accuracy=reference), (), 10.0)
        for reference in (wrong, honest)
    )
    assert (wide.high or 0.0) - (wide.low or 0.0) > (narrow.high or 0.0) - (narrow.low or 0.0) + 0.05


@pytest.mark.parametrize("cause", [Cause.COVARIATE_SHIFT, Cause.NEW_VARIETY, Cause.CONCEPT_DRIFT, Cause.FROZEN])
def test_with_changed_items_it_does_not_hold(cause: Cause) -> None:
    found = accuracy_of(window_of(judged(5000)[0]), FACTS, (Cause.WEAK_EJECTOR, cause), 10.0)
    assert found.state is AccuracyState.DOES_NOT_HOLD
    assert str(cause) in found.reason


def test_a_weak_ejector_is_no_reason_to_doubt_the_estimate() -> None:
    assert accuracy_of(window_of(judged(5000)[0]), FACTS, (Cause.WEAK_EJECTOR,), 1.0).state is AccuracyState.OK


@pytest.mark.parametrize(("items", "age_s"), [(5000, 2000.0), (100, 1.0)])
def test_old_or_few_items_are_stale(items: int, age_s: float) -> None:
    found = accuracy_of(window_of(judged(items)[0]), FACTS, (), age_s)
    assert found.state is AccuracyState.STALE
    assert found.reason


def test_nothing_is_invented_without_reference_or_items() -> None:
    window = window_of(judged(500)[0])
    assert accuracy_of(window, None, (), 1.0).state is AccuracyState.UNKNOWN
    assert accuracy_of(window, msgspec.structs.replace(FACTS, accuracy=None), (), 1.0).value is None
    assert accuracy_of(None, FACTS, (), 1.0).state is AccuracyState.STALE
    empty = msgspec.structs.replace(window, items=0, features=b"", nulls=(), classes={}, lanes=())
    assert accuracy_of(empty, FACTS, (), 1.0).value is None


def test_a_regression_over_corruptions_is_used_where_it_was_made() -> None:
    sloped = msgspec.structs.replace(
        FACTS,
        accuracy=msgspec.structs.replace(FACTS.accuracy, slopes=(0.5, 0.0)),  # type: ignore[type-var]
    )
    window = window_of(judged(5000, 2.5, seed=7)[0])
    plain, found = accuracy_of(window, FACTS, (), 1.0), accuracy_of(window, sloped, (), 1.0)
    fall = (plain.reference or 0.0) - plain.methods["confidence"]
    assert found.value == pytest.approx((found.reference or 0.0) - 0.5 * fall, abs=1e-3)


def test_an_audit_looks_where_the_verdicts_are_unsure_and_forgets_no_bin() -> None:
    reference = FACTS.accuracy
    assert reference is not None
    seen = [int(n) for n in np.bincount(np.searchsorted(EDGES, judged(4000, seed=8)[0]), minlength=16)]
    plan = audit_plan(seen, reference)
    assert 90 <= sum(plan) <= 130
    assert min(plan) >= 2
    assert plan[-1] > 3 * plan[0]
    assert audit_plan([0] * 16, reference) == (0,) * 16


def test_a_planned_audit_is_surer_than_a_random_one_and_its_interval_covers() -> None:
    reference = FACTS.accuracy
    assert reference is not None
    confidence, right = judged(20_000, seed=9)
    bins = np.searchsorted(EDGES, confidence)
    seen = [int(n) for n in np.bincount(bins, minlength=16)]
    plan = audit_plan(seen, reference)
    rng = np.random.default_rng(10)
    planned, covered, random = [], 0, []
    for _ in range(200):
        drawn = [rng.choice(np.flatnonzero(bins == k), n, replace=False) for k, n in enumerate(plan)]
        value, low, high = audited(seen, plan, [int(right[rows].sum()) for rows in drawn])
        planned.append(value)
        covered += low <= right.mean() <= high
        random.append(right[rng.choice(len(right), sum(plan), replace=False)].mean())
    assert np.std(planned) < 0.85 * np.std(random)
    assert covered >= 180
    assert audited(seen, [0] * 16, [0] * 16)[1:] == (0.0, 1.0)
