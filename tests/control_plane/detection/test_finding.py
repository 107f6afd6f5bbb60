"""A condition has one key, whichever step saw it, and another subject or cause has another."""

import msgspec

from control_plane.detection.finding import Cause, Detector, Finding, Level, Severity


def finding(**changes: object) -> Finding:
    given = {
        "detector": Detector.TILE,
        "cause": Cause.CAMERA_DIRTY,
        "severity": Severity.WARNING,
        "level": Level.LINE,
        "site": "north",
        "line": "line-3",
        "effect": 0.2,
        "effect_unit": "share of the picture",
        "action": "Wipe the lens of line-3.",
    }
    return Finding(**(given | changes))


def test_the_key_names_level_subject_and_cause() -> None:
    assert finding().key == "line/line-3/camera-dirty"
    assert finding(level=Level.LANE, lane=2).key == "lane/line-3:2/camera-dirty"
    assert finding(level=Level.SITE, line="").key == "site/north/camera-dirty"
    assert finding(level=Level.FLEET, site="", line="").key == "fleet/fleet/camera-dirty"


def test_the_size_of_an_effect_is_no_part_of_the_key() -> None:
    assert finding(effect=0.9, items=7, lots=("a",)).key == finding().key


def test_a_finding_survives_json() -> None:
    before = finding(interval=(0.1, 0.3), evidence={"grid": [[0, 1]]}, lots=("a", "b"), lane=1)
    assert msgspec.json.decode(msgspec.json.encode(before), type=Finding) == before


def test_severities_are_ordered() -> None:
    assert [s.rank for s in Severity] == [0, 1, 2]
