"""From stored windows to an alarm of the right cause: a lens gets dirty and is wiped; missing data; wrong clocks."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from sqlmodel import select

from control_plane.alarms.detectors import FidelityChecks, KnownBundles, findings_of
from control_plane.database.engine import reading
from control_plane.database.tables.alarms import Alarm, AlarmState
from control_plane.detection.finding import Cause, Level, Severity
from control_plane.monitoring.fidelity import Fidelity
from control_plane.services import Services
from models.messages import encode
from models.statistics import Moments
from models.topics import Channel
from models.windows import QUANTITIES, CameraCounts, Window, pack_counts
from tests.control_plane.alarms.test_raising import NOW, Plant, finding
from tests.control_plane.fleet.test_fleet import batch, reported, say, window

DIRT = np.zeros((12, 16), int)
DIRT[1:4, 12:15] = 1
LEVELS = {"sharpness": 5.0, "exposure": 90.0, "red_to_green": 0.9, "blue_to_green": 0.6, "flicker": 0.01}


def looked(start: datetime, dirt: np.ndarray | None = None) -> Window:
    """Ten seconds of a line whose camera looked at its belt ten times."""
    values: dict[str, Any] = {name: Moments.of(LEVELS.get(name, 0.0)) for name in QUANTITIES}
    cells = np.zeros((12, 16), int) if dirt is None else dirt * 10
    health = CameraCounts(looks=10, dirt_looks=10, dirt=pack_counts(cells), **values)
    return window(items=30, started_ms=round(start.timestamp() * 1000), camera_health=health, bundle="")


def test_a_lens_that_gets_dirty_is_an_alarm_of_that_line_within_two_minutes_and_closes_when_wiped(
    services: Services,
) -> None:
    begun = datetime.now(UTC) - timedelta(minutes=10)
    for line in ("line-1", "line-2"):
        at_ms = round(datetime.now(UTC).timestamp() * 1000)
        say(services, Channel.REPORTED, encode(reported(labels={"site": "north"}, at_ms=at_ms)), line)
    watcher, story = services.alarms.watcher, []
    for number in range(60):
        start = begun + timedelta(seconds=10 * number)
        dirty = 12 <= number < 24
        say(services, Channel.BATCH, batch(looked(start, DIRT if dirty else None), first=number))
        say(services, Channel.BATCH, batch(looked(start), first=number), "line-2")
        watcher.look(start + timedelta(seconds=11))
        with reading(services.engine) as session:
            story.append([(a.line, a.cause, str(a.state)) for a in session.exec(select(Alarm))])
    raised = next(number for number, found in enumerate(story) if found)
    assert story[raised] == [("line-1", "camera-dirty", "open")]
    assert 10 * (raised - 12) <= 120
    over = next(number for number, found in enumerate(story) if found and found[0][2] == "resolved")
    assert 10 * (over - 24) <= 180
    assert story[-1] == [("line-1", "camera-dirty", "resolved")]
    with reading(services.engine) as session:
        [alarm] = session.exec(select(Alarm))
    assert (alarm.state, alarm.reason) == (AlarmState.RESOLVED, "cause gone")
    assert "upper right" in alarm.action
    assert np.array(alarm.evidence["dirt"]).shape == (12, 16)


def fidelity(**changes: Any) -> Fidelity:
    return Fidelity(start=NOW, **({"windows": 360, "items": 10_000, "complete": 1.0} | changes))


def test_missing_data_and_a_wrong_clock_are_findings_with_figures() -> None:
    assert list(findings_of("line-1", "north", fidelity())) == []
    [gap] = findings_of("line-1", "north", fidelity(complete=0.97, items_accounted=0.978))
    assert (gap.cause, gap.severity, gap.effect) == (Cause.INCOMPLETE, Severity.WARNING, pytest.approx(0.03))
    assert gap.action.endswith("97.8% of its items are accounted for.")
    [severe] = findings_of("line-1", "north", fidelity(complete=0.5))
    assert severe.severity is Severity.CRITICAL
    [clock] = findings_of("line-1", "north", fidelity(clock_offset_ms=-90_000))
    assert clock.action == "Set the clock of line-1: it is 90 s behind the control plane's."
    assert list(findings_of("line-1", "north", fidelity(windows=5, complete=0.1))) == []


def test_every_line_comes_around_however_many_there_are(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def look(_session: Any, line: str, *_: Any) -> Fidelity:
        seen.append(line)
        return fidelity(complete=0.9 if line == "line-07" else 1.0)

    monkeypatch.setattr("control_plane.alarms.detectors.fidelity_between", look)
    checks, sites = FidelityChecks(), {f"line-{n:02}": "north" for n in range(50)}
    with reading(services.engine) as session:
        found = [checks.look(session, sites, NOW) for _ in range(4)]
        assert set(seen) == set(sites)
        assert [[f.line for f in one] for one in found] == [["line-07"]] * 4
        del sites["line-07"]
        assert checks.look(session, sites, NOW) == []


def test_a_bundle_that_is_not_known_is_asked_for_again() -> None:
    asked: list[str] = []
    facts = KnownBundles(asked.append, lambda _: None)
    assert facts.get("a") is None
    assert facts.get("a") is None
    assert asked == ["a", "a"]
    assert len(facts) == 0


def test_alarms_of_lines_become_part_of_the_alarm_of_their_site(services: Services) -> None:
    plant = Plant(services)
    lines = [finding(f"line-{n}", Cause.LIGHT_LEVEL) for n in (1, 2)]
    plant.look(0, *lines)
    wide = finding("", Cause.LIGHT_LEVEL, level=Level.SITE, evidence={"members": ["line-1", "line-2"]})
    plant.look(5, wide)
    with reading(services.engine) as session:
        found = [(a.level, str(a.state), a.reason) for a in session.exec(select(Alarm).order_by(Alarm.id))]
    part = "part of alarm 3, which concerns more lines"
    assert found == [("line", "resolved", part), ("line", "resolved", part), ("site", "open", "")]
    assert plant.active()["site/north/light-level"].leader_id is None
