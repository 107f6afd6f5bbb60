"""Fusion and terms on held-out items: what is learnt, what it costs, what a budget buys, and what is refused."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from control_plane.evaluation.operating_point import HeldOut, cost_report, held_out_of, hold_out, tuned
from control_plane.training.fusion import balanced, fit_platt, learn_fusion
from models.errors import InputError
from models.fusion import FusionSpec, fuse
from models.recipe import Recipe, Terms

CLASSES = ("sound", "defect")
RECIPE = Recipe(classes=CLASSES, good_class="sound")


def views_of(logits: np.ndarray) -> np.ndarray:
    bad = 1.0 / (1.0 + np.exp(-logits))
    return np.column_stack((1.0 - bad, bad))


def world(rng: np.random.Generator, *, seen: int, crop: float, items: int = 300) -> tuple[list[np.ndarray], np.ndarray]:
    """Items of eight views: defects show in `seen` of them; three sound items in ten have one bad crop."""
    found, bad = [], rng.random(items) < 0.4
    for ill in bad:
        logits = rng.normal(-3.5, 1.0, 8)
        if ill:
            logits[rng.choice(8, seen, replace=False)] = rng.normal(4.0, 1.0, seen)
        elif rng.random() < 0.3:
            logits[rng.integers(8)] = rng.normal(crop, 1.0)
        found.append(views_of(logits))
    return found, bad


def rates(spec: FusionSpec, items: list[np.ndarray], bad: np.ndarray) -> tuple[float, float]:
    """(defects caught, sound items with a bad crop condemned)."""
    condemned = np.array([1.0 - fuse(views, spec, 0)[0] >= 0.5 for views in items])
    cropped = np.array([(views[:, 1] > 0.3).any() for views in items]) & ~bad
    return float(condemned[bad].mean()), float(condemned[cropped].mean())


def test_a_defect_seen_once_in_eight_views_counts_and_one_bad_crop_does_not() -> None:
    items, bad = world(np.random.default_rng(1), seen=1, crop=-0.5)
    learnt = learn_fusion(items, bad)
    assert learnt.spec.top_k == 1, "only the one view shows the defect"
    caught, condemned = rates(learnt.spec, *world(np.random.default_rng(2), seen=1, crop=-0.5, items=2000))
    assert caught > 0.97
    assert condemned < 0.05


def test_where_bad_crops_look_like_defects_several_views_must_agree() -> None:
    items, bad = world(np.random.default_rng(3), seen=3, crop=3.5)
    learnt = learn_fusion(items, bad)
    assert learnt.spec.top_k in {2, 3}
    losses = learnt.report["log_loss"]
    assert losses["1"] > 2.0 * min(losses.values())
    caught, condemned = rates(learnt.spec, *world(np.random.default_rng(4), seen=3, crop=3.5, items=2000))
    assert caught > 0.99
    assert condemned < 0.02


def test_twenty_items_do_not_move_the_number_of_views_and_say_how_little_they_know() -> None:
    chosen = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sides = [rng.normal(1.0 if k % 2 else -1.0, 1.0) for k in range(20)]
        items = [views_of(side + rng.normal(0.0, 0.3, 6)) for side in sides]
        learnt = learn_fusion(items, np.arange(20) % 2 == 1)
        chosen.append(learnt.spec.top_k)
    assert chosen.count(2) >= 5, "the views are near-copies: there is nothing to choose"
    assert learnt.spec.calibration_items == 20
    assert "20 items in 2 bins" in learnt.report["note"]
    few = learn_fusion(items[:12], np.arange(12) % 2 == 1)
    assert few.spec == FusionSpec(), "too few to learn from"


@pytest.mark.parametrize("gap", [0.0, 0.5, 3.0, 30.0])
def test_the_sigmoid_is_the_one_scikit_learn_finds(gap: float) -> None:
    rng = np.random.default_rng(8)
    bad = rng.random(60) < 0.3
    evidence = rng.normal(np.where(bad, gap, -gap), 1.0)
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    model.fit(evidence[:, None], bad, sample_weight=balanced(bad))
    assert fit_platt(evidence, bad) == pytest.approx((model.coef_[0, 0], model.intercept_[0]), abs=2e-5)


def test_an_items_reported_result_was_learnt_without_it() -> None:
    items, bad = world(np.random.default_rng(6), seen=2, crop=0.5, items=60)
    flipped = bad.copy()
    flipped[0] = not flipped[0]
    one, other = learn_fusion(items, bad), learn_fusion(items, flipped)
    assert one.spec != other.spec
    assert one.report["brier"]["low"] <= one.report["brier"]["value"] <= one.report["brier"]["high"]
    in_sample = np.stack([fuse(views, one.spec, 0) for views in items])
    assert not np.allclose(in_sample, one.fused, atol=1e-6)


def test_calibrated_probabilities_mean_what_they_say() -> None:
    rng = np.random.default_rng(7)
    truth = rng.random(4000) < 0.5
    items = [views_of(np.array([rng.normal(1.0 if t else -1.0, 1.0) * 3.0] * 2)) for t in truth]  # over-confident
    report = learn_fusion(items, truth).report
    assert report["calibration_error"] < 0.03
    for row in report["reliability"]:
        assert row["low"] - 0.02 <= row["predicted"] <= row["high"] + 0.02
    assert "note" not in report


def held(count: int = 400, *, seed: int = 0, spread: float = 1.5) -> HeldOut:
    """Items whose probabilities are calibrated at equal shares."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(count) < 0.5).astype(int)
    logits = rng.normal(np.where(truth, 1.0, -1.0) * spread**2 / 2.0, spread)
    return hold_out(CLASSES, truth, views_of(logits))


def test_the_minimum_of_the_curve_lies_where_the_terms_put_the_threshold() -> None:
    recipe = msgspec.structs.replace(RECIPE, terms=Terms(escaped=4.0, prices={"sound": 0.2}, defect_share=0.2))
    report = cost_report(held(4000), recipe)
    assert report["recipe"]["threshold"] == pytest.approx(recipe.threshold(), abs=1e-6)
    low, high = report["minimum"]["low"], report["minimum"]["high"]
    assert low <= recipe.threshold() <= high
    assert high - low < 0.35
    saves = report["minimum"]["saves"]
    assert 0.0 <= saves["value"] < 0.03 * report["minimum"]["cost"]
    curve = report["curve"]
    assert curve[0]["escape_rate"] == 0.0
    assert curve[0]["false_reject_rate"] == 1.0
    # All are thrown away: every good item loses its price and its waste, (0.2 + 1) * 80 % of 1000.
    assert curve[0]["cost"] == pytest.approx(960.0)
    # None is: every defect costs its claim less the price it is paid.
    assert curve[-1]["cost"] == pytest.approx(1000 * 0.2 * 3.8, rel=0.01)
    assert all(row["low"] <= row["cost"] <= row["high"] for row in curve)


@pytest.mark.parametrize("count", [20, 40, 80])
def test_the_cheapest_threshold_lies_in_its_interval_where_a_gap_parts_the_classes(count: int) -> None:
    """Every threshold in the gap costs the same: the estimate and its resamples take the middle of them."""
    truth = np.arange(count) % 2
    logits = np.where(truth, 4.0, -4.0) + np.random.default_rng(count).normal(0.0, 0.5, count)
    found = cost_report(hold_out(CLASSES, truth, views_of(logits)), RECIPE)["minimum"]
    assert found["low"] <= found["threshold"] <= found["high"]


def test_few_items_give_wide_intervals_and_a_note() -> None:
    report = cost_report(held(20), RECIPE)
    many = cost_report(held(2000), RECIPE)
    width = {len_: r["minimum"]["high"] - r["minimum"]["low"] for len_, r in ((20, report), (2000, many))}
    assert width[20] > 2.0 * width[2000]
    assert "read the intervals" in report["note"]
    assert many["note"] == ""


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 1.0), st.integers(10, 300), st.integers(0, 50), st.floats(0.02, 0.98))
def test_no_more_items_than_the_budget_are_unsure(budget: float, count: int, seed: int, share: float) -> None:
    found = held(count, seed=seed)
    if len(set(found.truth)) < 2:
        return
    terms = Terms(abstain_budget=budget, defect_share=share, escaped=2.0)
    recipe = tuned(msgspec.structs.replace(RECIPE, terms=terms), found)
    abstain = cost_report(found, recipe)["recipe"]["abstain"]
    assert abstain["value"] <= budget + 5e-5  # figures are rounded to 4 digits
    assert abstain["low"] <= abstain["value"] <= abstain["high"]


def test_the_budget_is_used_and_buys_fewer_mistakes() -> None:
    found = held(2000)
    plain = cost_report(found, RECIPE)["recipe"]
    recipe = tuned(msgspec.structs.replace(RECIPE, terms=Terms(abstain_budget=0.1)), found)
    careful = cost_report(found, recipe)["recipe"]
    assert careful["abstain"]["value"] == pytest.approx(0.1, abs=0.002)
    assert careful["escape_rate"]["value"] < plain["escape_rate"]["value"] - 0.02
    assert careful["false_reject_rate"]["value"] < plain["false_reject_rate"]["value"] - 0.02
    fresh = cost_report(held(2000, seed=9), recipe)["recipe"]["abstain"]
    assert fresh["low"] < 0.1 < fresh["high"], "on items the band was not learnt from"


def test_every_variety_and_lot_gets_a_band_for_its_own_terms() -> None:
    recipe = msgspec.structs.replace(
        RECIPE,
        terms=Terms(abstain_budget=0.05),
        varieties={"russet": Terms(escaped=5.0), "gala": Terms(abstain_budget=0.0)},
        lots={"L1": Terms(abstain_budget=0.2)},
    )
    found = tuned(recipe, held(800))
    assert found.terms.abstain_above > 0.0
    assert found.varieties["russet"].abstain_above > found.terms.abstain_above, "more is at stake"
    assert found.varieties["gala"].abstain_above is None
    assert found.lots["L1"].abstain_above < found.terms.abstain_above
    for variety, lot, budget in (("russet", "", 0.05), ("", "L1", 0.2)):
        share = cost_report(held(800), found, variety=variety, lot=lot)["recipe"]["abstain"]["value"]
        assert share == pytest.approx(budget, abs=0.005)


def test_many_items_are_sampled_and_the_lineage_round_trips() -> None:
    rng = np.random.default_rng(0)
    fused = rng.dirichlet((1.0, 1.0), 6000)
    found = hold_out(CLASSES, rng.integers(0, 2, 6000), fused)
    assert len(found.truth) == 5000
    assert held_out_of({"held_out": msgspec.to_builtins(found)}, RECIPE) == found


@pytest.mark.parametrize(
    ("lineage", "code"),
    [
        ({}, "recipe.no_held_out"),
        ({"held_out": 3}, "recipe.no_held_out"),
        ({"held_out": {"classes": ["sound", "defect"], "truth": [], "probabilities": []}}, "recipe.bad_held_out"),
        ({"held_out": {"classes": ["a", "b"], "truth": [0], "probabilities": [[1, 0]]}}, "recipe.bad_held_out"),
        ({"held_out": {"classes": CLASSES, "truth": [2], "probabilities": [[1, 0]]}}, "recipe.bad_held_out"),
        ({"held_out": {"classes": CLASSES, "truth": [0], "probabilities": [[0.7, 0.7]]}}, "recipe.bad_held_out"),
        ({"held_out": {"classes": CLASSES, "truth": [0], "probabilities": [[1, 0], [1]]}}, "recipe.bad_held_out"),
    ],
)
def test_a_lineage_that_contradicts_itself_is_refused(lineage: dict[str, object], code: str) -> None:
    with pytest.raises(InputError) as caught:
        held_out_of(lineage, RECIPE)
    assert caught.value.code == code


def test_items_of_one_kind_tell_no_costs() -> None:
    one = HeldOut(classes=CLASSES, truth=(0, 0), probabilities=((1.0, 0.0), (0.5, 0.5)))
    with pytest.raises(InputError) as caught:
        cost_report(one, RECIPE)
    assert caught.value.code == "recipe.one_kind"
