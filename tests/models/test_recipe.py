"""The recipe: expected loss decides, thresholds follow, lots go before varieties, contradictions are refused."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.errors import BundleError
from models.fusion import FusionSpec
from models.recipe import UNSURE, Grade, Recipe, Terms, layered, parse_recipe
from models.statistics import wilson_interval

GOLDEN = Path(__file__).parents[1] / "golden" / "recipe-v2.json"
CLASSES = ("sound", "rot", "worm")
RECIPE = Recipe(classes=CLASSES, good_class="sound")
MARKET = Recipe(
    classes=CLASSES,
    good_class="sound",
    grades={
        "first": Grade(outlet="pass", classes=("sound",)),
        "juice": Grade(outlet="juice", classes=("worm",)),
        "waste": Grade(outlet="reject", classes=("rot",)),
    },
    terms=Terms(
        prices={"first": 0.30, "juice": 0.05},
        escaped=0.5,
        escaped_by_class={"rot": 3.0},
        wasted=0.0,
        misgraded=1.0,
        defect_share=0.08,
    ),
    varieties={"russet": Terms(escaped_by_class={"rot": 0.4}, prices={"first": 0.25})},
    lots={"L7": Terms(prices={"first": 0.01})},
    unsure_outlet="recheck",
)
money = st.floats(-2.0, 2.0)
cost = st.floats(0.0, 4.0)


@st.composite
def terms(draw: st.DrawFn) -> Terms:
    return Terms(
        prices={"first": draw(money), "juice": draw(money)},
        escaped=draw(cost),
        escaped_by_class={"rot": draw(cost)},
        wasted=draw(cost),
        misgraded=draw(cost),
        defect_share=draw(st.floats(0.01, 0.99)),
        abstain_budget=draw(st.sampled_from([0.0, 0.1])),
        abstain_above=draw(st.floats(0.0, 1.0)),
    )


def views(*defects: tuple[float, float]) -> np.ndarray:
    return np.array([[1.0 - rot - worm, rot, worm] for rot, worm in defects])


def test_with_equal_mistakes_the_threshold_is_a_half_and_the_likeliest_defect_names_the_grade() -> None:
    assert RECIPE.threshold() == pytest.approx(0.5)
    found = RECIPE.decide(views((0.3, 0.5), (0.3, 0.5)))
    assert (found.klass, found.grade, found.outlet) == ("worm", "worm", "reject")
    assert RECIPE.decide(views((0.2, 0.2), (0.2, 0.2))).outlet == "pass"


def test_the_threshold_is_the_known_ratio_of_the_costs() -> None:
    recipe = msgspec.structs.replace(RECIPE, terms=Terms(escaped=4.0, wasted=1.0, prices={"sound": 0.5}))
    # Keeping a good item gains 1 + 0.5, keeping a bad one loses 4 - 0.5: (1.5) / (1.5 + 3.5).
    assert recipe.threshold() == pytest.approx(0.3)
    rare = msgspec.structs.replace(RECIPE, terms=Terms(defect_share=0.1))
    assert rare.threshold() == pytest.approx(0.9), "calibrated at a half, nine times rarer on the belt"


@given(terms(), st.integers(1, 2))
@example(Terms(prices={"first": 1.5, "juice": 2.0}, escaped_by_class={"rot": 0.0}, abstain_above=5e-324), 1)
def test_the_cuts_are_where_decisions_change(found: Terms, k: int) -> None:
    recipe = msgspec.structs.replace(MARKET, terms=found)
    cut = recipe.cuts()[CLASSES[k]]
    policy = recipe.policy()
    grid = np.linspace(0.0005, 0.9995, 1000)
    fused = np.zeros((len(grid), 3))
    fused[:, k], fused[:, 0] = grid, 1.0 - grid
    chosen, regrets = policy.choose(fused)
    posterior = fused * policy.shift / (fused * policy.shift).sum(axis=1, keepdims=True)
    expected = posterior @ policy.losses.T
    clear = np.abs(expected[:, 0] - expected[:, 1:].min(axis=1)) > 1e-6  # elsewhere both decisions are right
    low, high = cut.good or (2.0, 2.0)
    assert ((chosen == 0) == ((grid > low) & (grid < high)))[clear].all()
    assert (chosen[clear & (grid > (2.0 if cut.threshold is None else cut.threshold))] != 0).all()
    clear = np.abs(regrets - policy.abstain_above) > 1e-6
    low, high = cut.unsure or (2.0, 2.0)
    unsure = regrets > policy.abstain_above
    assert (unsure == ((grid > low) & (grid < high)))[clear].all()


@given(terms(), st.lists(st.floats(0.01, 0.98), min_size=3, max_size=3))
def test_no_other_grade_is_expected_to_lose_less(found: Terms, weights: list[float]) -> None:
    recipe = msgspec.structs.replace(MARKET, terms=found)
    fused = np.array(weights) / sum(weights)
    policy = recipe.policy()
    row = int(policy.choose(fused[None])[0][0])
    posterior = fused * policy.shift / (fused * policy.shift).sum()
    for k, price in enumerate((found.prices["first"], found.prices["juice"], 0.0)):
        name = ("first", "juice", "waste")[k]
        penalty = [
            {"first": 0.0, "juice": found.wasted, "waste": found.wasted}[name],
            {"first": found.escaped_by_class["rot"], "juice": found.misgraded, "waste": 0.0}[name],
            {"first": found.escaped, "juice": 0.0, "waste": found.misgraded}[name],
        ]
        expected = float(posterior @ np.array(penalty)) - price
        assert float(posterior @ policy.losses[row]) <= expected + 1e-9


def test_a_class_that_costs_more_when_it_escapes_is_caught_earlier() -> None:
    cuts = MARKET.cuts()
    assert cuts["rot"].threshold < cuts["worm"].threshold
    likely_rot, likely_worm = MARKET.decide(views((0.7, 0.1))), MARKET.decide(views((0.1, 0.7)))
    assert (likely_rot.outlet, likely_worm.outlet) == ("reject", "pass")


def test_a_lot_goes_before_its_variety_and_unknown_names_take_the_recipes_own_terms() -> None:
    assert MARKET.terms_of("russet").prices == {"first": 0.25, "juice": 0.05}
    assert MARKET.terms_of("russet", "L7").prices["first"] == 0.01
    assert MARKET.terms_of("russet", "L7").escaped_by_class == {"rot": 0.4}
    assert MARKET.terms_of("gala", "L8") == MARKET.terms_of()
    doubtful, wormy = views((0.6, 0.05)), views((0.05, 0.6))
    assert MARKET.decide(doubtful).outlet == "reject"
    assert MARKET.decide(doubtful, "russet").outlet == "pass"
    assert MARKET.decide(wormy).outlet == "pass"
    assert MARKET.decide(wormy, "", "L7").outlet == "juice", "first class pays less than juice"


def test_policies_are_made_once_and_names_from_outside_do_not_fill_memory() -> None:
    recipe = msgspec.structs.replace(MARKET)
    for number in range(200):
        recipe.policy(f"variety-{number}", f"lot-{number}")
    assert len(recipe._policies) == 1
    assert recipe.policy("russet") is recipe.policy("russet", "L8")


def test_the_line_abstains_only_within_its_budget_and_where_a_second_look_pays() -> None:
    base = Terms(abstain_budget=0.05, abstain_above=0.2)
    recipe = msgspec.structs.replace(RECIPE, terms=base, unsure_outlet="recheck")
    found = recipe.decide(views((0.25, 0.15), (0.25, 0.15)))
    assert (found.grade, found.outlet, found.klass) == (UNSURE, "recheck", "sound")
    assert recipe.cuts()["rot"].unsure == pytest.approx((0.2, 0.8))
    dear = msgspec.structs.replace(recipe, terms=layered((base, Terms(recirculated=0.45))))
    assert dear.decide(views((0.25, 0.15), (0.25, 0.15))).outlet == "pass"
    none = msgspec.structs.replace(recipe, terms=layered((base, Terms(abstain_budget=0.0))))
    assert none.cuts()["rot"].unsure is None


def test_good_items_of_a_grade_that_also_takes_scars_are_not_torn_apart() -> None:
    recipe = Recipe(
        classes=("sound", "scar", "rot"),
        good_class="sound",
        grades={"table": Grade(outlet="pass", classes=("sound", "scar")), "rot": Grade(outlet="bin", classes=("rot",))},
    )
    recipe.check()
    assert recipe.cuts()["scar"].threshold is None
    found = recipe.decide(np.array([[0.1, 0.85, 0.05]] * 2))
    assert (found.klass, found.grade, found.outlet) == ("scar", "table", "pass")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"good_class": "gala"}, "recipe.inconsistent"),
        ({"classes": ("sound", "sound")}, "recipe.inconsistent"),
        ({"grades": {"first": {"outlet": "pass", "classes": ["sound"]}}}, "recipe.inconsistent"),
        ({"grades": {"first": {"outlet": "pass", "classes": ["sound", "plum"]}}}, "recipe.inconsistent"),
        ({"grades": {"unsure": {"outlet": "pass", "classes": list(CLASSES)}}}, "recipe.inconsistent"),
        ({"terms": {"prices": {"plum": 1.0}}}, "recipe.inconsistent"),
        ({"varieties": {"gala": {"escaped_by_class": {"sound": 1.0}}}}, "recipe.inconsistent"),
        ({"terms": {"escaped": -1.0}}, "recipe.malformed"),
        ({"terms": {"defect_share": 0.0}}, "recipe.malformed"),
        ({"terms": {"threshold": 0.5}}, "recipe.malformed"),
        ({"lots": {"../x": {}}}, "recipe.malformed"),
        ({"replaces": "yesterday"}, "recipe.malformed"),
        ({"schema_version": 1}, "recipe.wrong_version"),
        ({"schema_version": 3}, "recipe.wrong_version"),
        ({"classes": ("sound",)}, "recipe.malformed"),
        ({"surprise": 1}, "recipe.malformed"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(change: dict[str, object], code: str) -> None:
    data = msgspec.to_builtins(RECIPE) | change
    with pytest.raises(BundleError) as caught:
        parse_recipe(msgspec.json.encode(data))
    assert caught.value.code == code


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b"null", b'{"schema_version": "x"}'])
def test_a_malformed_recipe_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_recipe(data)
    assert caught.value.code == "recipe.malformed"


def test_recipe_round_trip_and_the_format_has_not_moved() -> None:
    assert parse_recipe(msgspec.json.encode(RECIPE)) == RECIPE
    assert parse_recipe(msgspec.json.encode(MARKET)) == MARKET
    golden = msgspec.structs.replace(
        MARKET, fusion=FusionSpec(top_k=3, scale=0.75, offset=-0.5, calibration_items=600), reason="juice pays more"
    )
    assert json.loads(GOLDEN.read_text()) == json.loads(msgspec.json.encode(golden))
    assert parse_recipe(GOLDEN.read_bytes()) == golden


def test_wilson_is_honest_about_none_and_all() -> None:
    assert wilson_interval(0.0, 20.0) == pytest.approx((0.0, 0.1611), abs=1e-4)  # 1.96^2 / (20 + 1.96^2)
    assert wilson_interval(0.5, 100.0) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(1.0, 20.0)[1] == 1.0
    assert wilson_interval(0.0, 500.0)[0] == 0.0, "not 2e-17: it is compared with budgets of zero"
    assert wilson_interval(0.3, 0.0) == (0.0, 1.0)
