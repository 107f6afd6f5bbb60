"""The rules name the cause, explain what follows from it, find what is independent, and are read as a table."""

from dataclasses import replace

import pytest

from control_plane.detection.causes import RULES, Pattern, explain, raise_level
from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Cause, Detector, Finding, Level, Severity, Signal


def signal(name: str, *marks: str, lane: int | None = None, effect: float = 0.2, **words: str) -> Signal:
    return Signal(
        name=name,
        detector=Detector.TILE,
        ratio=1.5,
        effect=effect,
        effect_unit="x",
        lane=lane,
        marks=marks,
        words=words,
    )


def causes(*signals: Signal) -> list[Cause]:
    return [f.cause for f in explain(Pattern("north", "line-3", signals))]


ITEMS = (signal("camera", "sharp"), signal("covariate"), signal("label"), signal("lane", lane=1), signal("errors"))


@pytest.mark.parametrize(
    ("present", "cause"),
    [
        ((signal("repeated"), signal("dirt"), signal("exposure"), *ITEMS), Cause.FROZEN),
        ((signal("shift"), signal("focus"), signal("scale"), *ITEMS), Cause.CAMERA_MOVED),
        ((signal("dirt"), signal("focus"), signal("exposure"), *ITEMS), Cause.CAMERA_DIRTY),
        ((signal("colour"), signal("exposure"), *ITEMS), Cause.LIGHT_COLOUR),
        ((signal("exposure"), signal("focus"), *ITEMS), Cause.LIGHT_LEVEL),
        ((signal("flicker"), *ITEMS), Cause.FLICKER),
        ((signal("focus"), *ITEMS), Cause.CAMERA_BLURRED),
        ((signal("camera", "place"), signal("covariate")), Cause.CAMERA_MOVED),
        ((signal("camera", "sharp"),), Cause.CAMERA_BLURRED),
        ((signal("camera", "light"), signal("label")), Cause.LIGHT_LEVEL),
        ((signal("camera"),), Cause.UNKNOWN),
        ((signal("lane", lane=2),), Cause.LANE_DIFFERS),
        ((signal("ejector", lane=0),), Cause.WEAK_EJECTOR),
        ((signal("scale"),), Cause.SCALE_DRIFT),
        ((signal("variety"), signal("covariate"), signal("odd-lot")), Cause.NEW_VARIETY),
        ((signal("odd-lot", "shape"), signal("covariate"), signal("label"), signal("scale")), Cause.NEW_VARIETY),
        ((signal("errors"), signal("covariate")), Cause.CONCEPT_DRIFT),
        ((signal("covariate"), signal("label")), Cause.COVARIATE_SHIFT),
        ((signal("odd-lot"),), Cause.COVARIATE_SHIFT),
        ((signal("label"),), Cause.PRIOR_SHIFT),
        ((signal("nothing-known"),), Cause.UNKNOWN),
    ],
)
def test_one_pattern_has_one_cause(present: tuple[Signal, ...], cause: Cause) -> None:
    assert causes(*present) == [cause]


def test_independent_causes_stand_side_by_side() -> None:
    assert causes(signal("dirt"), signal("ejector", lane=1), signal("covariate")) == [
        Cause.CAMERA_DIRTY,
        Cause.WEAK_EJECTOR,
    ]


def test_what_was_explained_is_kept_as_evidence() -> None:
    found = explain(Pattern("north", "line-3", [signal("dirt"), signal("covariate"), signal("focus")]))
    assert set(found[0].evidence["explains"]) == {"covariate", "focus"}


def test_without_its_rule_a_dirty_lens_is_taken_for_something_else() -> None:
    """The table decides: take one row away and the answer changes."""
    present = [signal("dirt"), signal("focus"), signal("covariate")]
    rules = [rule for rule in RULES if rule.cause is not Cause.CAMERA_DIRTY]
    assert Cause.CAMERA_DIRTY not in [f.cause for f in explain(Pattern("n", "l", present), rules)]
    blind = [replace(rule, explains=()) for rule in RULES]
    assert len(explain(Pattern("n", "l", present), blind)) == 3


def test_each_lane_has_a_finding_of_its_own() -> None:
    found = explain(Pattern("north", "line-3", [signal("lane", lane=0), signal("lane", lane=2), signal("label")]))
    assert [f.key for f in found] == [
        "lane/line-3:0/lane-differs",
        "lane/line-3:2/lane-differs",
        "line/line-3/prior-shift",
    ]


def test_the_instruction_names_line_and_place() -> None:
    found = explain(Pattern("north", "line-3", [signal("dirt", where="upper right")]))
    assert found[0].action == "Wipe the lens of line-3; the dirt is at the upper right."


def test_every_instruction_is_whole_with_the_words_of_its_signal() -> None:
    words = {
        "direction": "darker", "where": "middle", "feature": "area", "outlet": "reject", "percent": "5%",
        "samples": "100", "variety": "fuji", "class": "rot",
    }  # fmt: skip
    for rule in RULES:
        name, _, mark = rule.needs[0].split("|")[0].partition(":")
        given = signal(name, *([mark] if mark else []), lane=1, **words)
        for found in explain(Pattern("north", "line-3", [given])):
            assert "{" not in found.action
            assert "  " not in found.action
            assert found.action.endswith(".")


def test_a_word_that_is_missing_does_not_lose_the_finding() -> None:
    assert causes(signal("shift")) == [Cause.CAMERA_MOVED]


def test_a_large_effect_is_critical() -> None:
    def severity(effect: float) -> Severity:
        return explain(Pattern("n", "l", [signal("dirt", effect=effect)]))[0].severity

    assert [severity(0.05), severity(0.3)] == [Severity.WARNING, Severity.CRITICAL]


def test_a_prior_shift_names_true_shares_with_an_interval() -> None:
    facts = BundleFacts(features=(), counts=(), classes=("sound", "rot"), confusion=((960, 40), (20, 80)))
    evidence = {
        "counts": {"sound": 7360, "rot": 2640},
        "usual_shares": {"sound": 0.922, "rot": 0.078},
        "shares": {"sound": 0.736, "rot": 0.264},
    }
    given = Signal(
        name="label", detector=Detector.LABEL, ratio=1.1, effect=0.186, effect_unit="share of rot", evidence=evidence,
        words={"class": "rot", "direction": "more"},
    )  # fmt: skip
    found = explain(Pattern("n", "l", [given], facts))[0]
    low, high = found.interval or (0.0, 0.0)
    # A counted share of 0.264 is (0.264 - 0.04) / 0.76 = 0.295 of true rot; 0.078 is 0.05.
    assert found.effect == pytest.approx(0.245, abs=0.01)
    assert low < found.effect < high
    assert found.severity is Severity.INFO
    assert found.evidence["true_shares"]["rot"]["share"] == pytest.approx(0.295, abs=0.01)


def finding(line: str, cause: Cause, site: str = "north") -> Finding:
    return Finding(
        detector=Detector.COVARIATE, cause=cause, severity=Severity.WARNING, level=Level.LINE, site=site, line=line,
        effect=1.0, effect_unit="x", items=10, action=f"Look at {line}.",
    )  # fmt: skip


def test_what_most_lines_of_a_site_show_is_one_finding_of_the_site() -> None:
    same = [finding(f"l{k}", Cause.COVARIATE_SHIFT) for k in range(3)]
    found = raise_level(same, {"north": 4, "south": 4})
    assert [f.key for f in found] == ["site/north/covariate-shift"]
    assert found[0].items == 30
    assert found[0].evidence["members"] == ["l0", "l1", "l2"]
    assert found[0].action == "Look at north."


def test_what_most_sites_show_is_one_finding_of_the_fleet() -> None:
    same = [finding(f"{s}{k}", Cause.NEW_VARIETY, s) for s in ("north", "south") for k in range(4)]
    assert [f.key for f in raise_level(same, {"north": 4, "south": 4})] == ["fleet/fleet/new-variety"]


def test_two_of_four_lines_and_faults_of_cameras_stay_with_their_lines() -> None:
    few = [finding(f"l{k}", Cause.COVARIATE_SHIFT) for k in range(2)]
    dirty = [finding(f"l{k}", Cause.CAMERA_DIRTY) for k in range(4)]
    assert raise_level(few + dirty, {"north": 4}) == few + dirty
