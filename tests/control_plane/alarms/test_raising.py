"""Alarms: one per condition, never milder, cleared only when their line was heard, escalated when unanswered."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from control_plane.alarms.acting import acknowledge, assign_owner, comment, resolve, silence
from control_plane.alarms.exhibits import MAX_BYTES, storable
from control_plane.alarms.grouping import grouping_of
from control_plane.alarms.lifecycle import TRANSITIONS, Event, allowed, next_state
from control_plane.alarms.raising import Look, Register, active_alarms, forget_old
from control_plane.config import AlarmsConfig
from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import writing
from control_plane.database.tables.alarms import Alarm, AlarmComment, AlarmState
from control_plane.database.tables.audit import Audit
from control_plane.detection.finding import Cause, Detector, Finding, Level, Severity
from control_plane.services import Services
from models.errors import ConflictError, InputError
from tests.simulators.plane import make_services

NOW = datetime(2026, 11, 1, 8, 0, tzinfo=UTC)
CONFIG = AlarmsConfig(hold_s=60.0, escalate_after_s=300.0)


def finding(line: str = "line-1", cause: Cause = Cause.CAMERA_DIRTY, **changes: Any) -> Finding:
    values: dict[str, Any] = {
        "detector": Detector.TILE,
        "cause": cause,
        "severity": Severity.WARNING,
        "level": Level.LINE,
        "site": "north",
        "line": line,
        "effect": 0.4,
        "effect_unit": "share of the lens",
        "action": f"Wipe the lens of {line}.",
    }
    return Finding(**(values | changes))


class Told:
    """Remembers what was announced."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, session: Session, alarm: Alarm, event: str, now: datetime) -> None:
        del session, now
        self.events.append((alarm.line or alarm.site, event))

    def take(self) -> list[tuple[str, str]]:
        found, self.events = self.events, []
        return found


class Plant:
    """Looks at a plant, seconds after `NOW`."""

    def __init__(self, services: Services, config: AlarmsConfig = CONFIG) -> None:
        self.services, self.told = services, Told()
        self.register = Register(config, announce=self.told, levels=2)

    def look(self, at_s: float, *findings: Finding, heard: tuple[str, ...] = ("line-1", "line-2", "line-3")) -> None:
        with writing(self.services.engine) as session:
            self.register.apply(session, Look(findings, frozenset(heard), NOW + timedelta(seconds=at_s)))
            session.commit()

    def active(self) -> dict[str, Alarm]:
        with writing(self.services.engine) as session:
            return active_alarms(session)

    def only(self) -> Alarm:
        with writing(self.services.engine) as session:
            return session.exec(select(Alarm)).one()


@pytest.fixture
def plant(services: Services) -> Plant:
    return Plant(services)


@pytest.fixture(scope="module")
def lasting_plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """One database for many random histories."""
    services = make_services(Path(tmp_path_factory.mktemp("plane")))
    yield services
    services.engine.dispose()


def test_a_finding_that_lasts_is_one_alarm_with_the_newest_evidence(plant: Plant) -> None:
    for at_s, effect in ((0, 0.2), (5, 0.3), (10, 0.5)):
        plant.look(at_s, finding(effect=effect, evidence={"share": effect}, lots=(f"lot-{at_s}",)))
    alarm = plant.only()
    assert (alarm.seen, alarm.effect, alarm.evidence) == (3, 0.5, {"share": 0.5})
    assert alarm.lots == ["lot-0", "lot-5", "lot-10"]
    assert (alarm.raised_at, alarm.seen_at) == (NOW, NOW + timedelta(seconds=10))
    assert plant.told.take() == [("line-1", "raised")]


def test_a_severity_grows_and_never_shrinks_and_asks_again(plant: Plant) -> None:
    plant.look(0, finding())
    with writing(plant.services.engine) as session:
        acknowledge(session, 1, actor="ida", reason="on my way", now=NOW, announce=plant.told)
        session.commit()
    plant.look(5, finding(severity=Severity.CRITICAL))
    plant.look(10, finding(severity=Severity.INFO))
    alarm = plant.only()
    assert (alarm.severity, alarm.state, alarm.owner) == ("critical", AlarmState.OPEN, "ida")
    assert [event for _, event in plant.told.take()] == ["raised", "acknowledged", "worsened"]


def test_an_alarm_closes_by_itself_after_the_hold_time_and_may_come_back_as_a_new_one(plant: Plant) -> None:
    plant.look(0, finding())
    plant.look(5)
    plant.look(60)
    assert plant.only().state is AlarmState.OPEN
    plant.look(65)
    alarm = plant.only()
    assert (alarm.state, alarm.reason, alarm.resolved_by) == (AlarmState.RESOLVED, "cause gone", "sortline")
    assert alarm.active_key is None
    plant.look(70, finding())
    with writing(plant.services.engine) as session:
        assert [a.state for a in session.exec(select(Alarm).order_by(Alarm.id))] == ["resolved", "open"]
    assert [event for _, event in plant.told.take()] == ["raised", "resolved", "raised"]


def test_a_cause_that_flickers_within_the_hold_time_stays_one_alarm(plant: Plant) -> None:
    for at_s in range(0, 300, 10):
        plant.look(at_s, *([finding()] if at_s % 50 == 0 else []))
    assert plant.only().state is AlarmState.OPEN


def test_a_line_that_is_not_heard_clears_nothing(plant: Plant) -> None:
    plant.look(0, finding())
    for at_s in range(5, 7200, 60):
        plant.look(at_s, heard=("line-2",))
    assert plant.only().state is AlarmState.OPEN
    plant.look(7300)
    assert plant.only().state is AlarmState.OPEN, "one look is no proof"
    plant.look(7361)
    assert plant.only().state is AlarmState.RESOLVED


def test_an_unanswered_alarm_is_escalated_step_by_step_to_an_end(plant: Plant) -> None:
    for at_s in range(0, 3000, 10):
        plant.look(at_s, finding())
    assert plant.only().escalation == 2
    assert [event for _, event in plant.told.take()] == ["raised", "escalated", "escalated"]


def test_an_acknowledged_alarm_and_mere_information_are_not_escalated(plant: Plant) -> None:
    plant.look(0, finding(), finding("line-2", Cause.PRIOR_SHIFT, severity=Severity.INFO))
    with writing(plant.services.engine) as session:
        acknowledge(session, 1, actor="ida", reason="", now=NOW, announce=plant.told)
        session.commit()
    for at_s in range(10, 2000, 100):
        plant.look(at_s, finding(), finding("line-2", Cause.PRIOR_SHIFT, severity=Severity.INFO))
    assert [alarm.escalation for alarm in plant.active().values()] == [0, 0]


def test_a_silence_ends_by_time_and_by_a_worse_finding(plant: Plant) -> None:
    plant.look(0, finding(), finding("line-2"))
    with writing(plant.services.engine) as session:
        for number in (1, 2):
            until = NOW + timedelta(seconds=100)
            silence(session, number, until, actor="ida", reason="cleaning", now=NOW, announce=plant.told)
        session.commit()
    plant.look(50, finding(severity=Severity.CRITICAL), finding("line-2"))
    assert [a.state for a in plant.active().values()] == [AlarmState.OPEN, AlarmState.SILENCED]
    plant.look(100, finding(), finding("line-2"))
    assert [a.state for a in plant.active().values()] == [AlarmState.OPEN, AlarmState.OPEN]
    assert plant.active()["line/line-2/camera-dirty"].reason == "the silence is over"


@pytest.mark.parametrize("minutes", [-1, 0, 7 * 24 * 60 + 1])
def test_a_silence_without_end_or_in_the_past_is_refused(plant: Plant, minutes: int) -> None:
    plant.look(0, finding())
    until = NOW + timedelta(minutes=minutes)
    with writing(plant.services.engine) as session, pytest.raises(InputError) as caught:
        silence(session, 1, until, actor="ida", reason="", now=NOW, announce=plant.told)
    assert caught.value.code == "alarm.bad_silence"


def test_one_cause_on_many_lines_of_a_site_is_announced_once_and_never_forgotten(plant: Plant) -> None:
    light = [finding(f"line-{n}", Cause.LIGHT_LEVEL) for n in (1, 2, 3)]
    plant.look(0, *light)
    assert plant.told.take() == [("line-1", "raised")]
    assert [a.leader_id for a in plant.active().values()] == [None, 1, 1]
    plant.look(5, *light[1:])
    plant.look(65, *light[1:])
    assert plant.told.take() == [("line-1", "resolved"), ("line-2", "raised")]
    assert [a.leader_id for a in plant.active().values()] == [None, 2]
    plant.look(70, *light[1:], finding("line-1", Cause.LIGHT_LEVEL, severity=Severity.CRITICAL))
    assert plant.told.take() == [("line-1", "raised")], "worse than what was announced"


def test_what_concerns_one_line_is_announced_line_by_line() -> None:
    assert grouping_of(finding("line-1")) != grouping_of(finding("line-2"))
    assert grouping_of(finding(level=Level.LANE, lane=2)) == grouping_of(finding())
    assert grouping_of(finding(level=Level.FLEET, site="", line="")) == "fleet/camera-dirty"
    nowhere = finding(cause=Cause.LIGHT_LEVEL, site="")
    assert grouping_of(nowhere) == "line line-1/light-level"


def test_two_processes_cannot_raise_the_same_condition_twice(plant: Plant) -> None:
    plant.look(0, finding())
    with writing(plant.services.engine) as session, pytest.raises(IntegrityError):
        plant.register._raise(session, finding(), [], NOW)


def test_people_answer_comment_and_take_over_and_the_trail_has_all_of_it(plant: Plant) -> None:
    plant.look(0, finding())
    with writing(plant.services.engine) as session:
        acknowledge(session, 1, actor="ida", reason="I go", now=NOW, announce=plant.told)
        comment(session, 1, "  wiped it ", actor="ida", now=NOW)
        assign_owner(session, 1, "omar", actor="ida", now=NOW)
        resolve(session, 1, actor="omar", reason="wiped", now=NOW, register=plant.register)
        comment(session, 1, "was grease", actor="omar", now=NOW)
        session.commit()
        actions = [entry.action for entry in session.exec(select(Audit).where(Audit.object == "1").order_by(Audit.id))]
        assert [c.text for c in session.exec(select(AlarmComment))] == ["wiped it", "was grease"]
        assert broken_audit_entry(session) is None
        with pytest.raises(ConflictError) as caught:
            acknowledge(session, 1, actor="ida", reason="", now=NOW, announce=plant.told)
    assert actions == [f"alarm.{w}" for w in ("raise", "acknowledge", "comment", "owner", "resolve", "comment")]
    assert (caught.value.code, caught.value.expected) == ("alarm.not_allowed", "nothing: it is over")


def test_what_nobody_wrote_is_no_comment(plant: Plant) -> None:
    plant.look(0, finding())
    for text in ("", "  ", "x" * 2001):
        with writing(plant.services.engine) as session, pytest.raises(InputError) as caught:
            comment(session, 1, text, actor="ida", now=NOW)
        assert caught.value.code == "alarm.bad_comment"


def test_old_alarms_are_forgotten_with_all_that_belongs_to_them(plant: Plant) -> None:
    plant.look(0, finding(), finding("line-2"))
    with writing(plant.services.engine) as session:
        comment(session, 1, "x", actor="ida", now=NOW)
        resolve(session, 1, actor="ida", reason="", now=NOW, register=plant.register)
        session.commit()
        assert forget_old(session, NOW) == 0
        assert forget_old(session, NOW + timedelta(seconds=1)) == 1
        session.commit()
        assert [a.line for a in session.exec(select(Alarm))] == ["line-2"]
        assert session.exec(select(AlarmComment)).all() == []


def test_evidence_of_the_field_becomes_finite_plain_and_small() -> None:
    wild = {
        "nan": float("nan"),
        "deep": [[[[[[[[[[1]]]]]]]]]],
        "object": object,
        "nul": "a\x00b",
        "big": [0.5] * 60_000,
    }
    found = storable(wild)
    assert found["nan"] is None
    assert found["nul"] == "ab"
    assert found["left_out"] == ["big"]
    assert len(str(found)) < MAX_BYTES


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["find", "find-worse", "absent", "unheard", "acknowledge", "silence", "resolve", "wait"]),
        st.integers(1, 400),
    ),
    max_size=25,
)


@given(history=EVENTS)
@settings(max_examples=40)
def test_no_history_leaves_the_table(lasting_plant: Services, history: list[tuple[str, int]]) -> None:
    plant, at_s = Plant(lasting_plant), 0.0
    with writing(plant.services.engine) as session:
        for alarm in active_alarms(session).values():
            resolve(session, alarm.id or 0, actor="test", reason="", now=NOW, register=plant.register)
        session.commit()
    states: dict[int, tuple[AlarmState, str]] = {}
    for event, seconds in history:
        at_s += seconds
        now = NOW + timedelta(seconds=at_s)
        before = set(states)
        if event.startswith("find"):
            plant.look(at_s, finding(severity=Severity.CRITICAL if event == "find-worse" else Severity.WARNING))
        elif event in {"absent", "unheard"}:
            plant.look(at_s, heard=("line-1",) if event == "absent" else ())
        elif event != "wait":
            act(plant, event, now)
        with writing(plant.services.engine) as session:
            for alarm in session.exec(select(Alarm).where(Alarm.raised_at >= NOW)):
                number, state = alarm.id or 0, AlarmState(alarm.state)
                old_state, old_severity = states.get(number, (AlarmState.OPEN, "warning"))
                steps = {to for (came, _), to in TRANSITIONS.items() if came is old_state}
                # One look may worsen and reopen; each single step is in the table, so two steps reach any of these.
                reach = steps | {to for (came, _), to in TRANSITIONS.items() if came in steps} | {old_state}
                assert state in reach
                assert old_state is not AlarmState.RESOLVED or state is AlarmState.RESOLVED
                assert Severity(alarm.severity).rank >= Severity(old_severity).rank
                assert (alarm.active_key is None) == (state is AlarmState.RESOLVED)
                assert (alarm.silenced_until is not None) == (state is AlarmState.SILENCED)
                states[number] = state, alarm.severity
            assert len(active_alarms(session)) <= 1
        assert before <= set(states)


def act(plant: Plant, event: str, now: datetime) -> None:
    """A person acts on the alarm that is not over; what the table refuses changes nothing."""
    with writing(plant.services.engine) as session:
        found = next(iter(active_alarms(session).values()), None)
        if found is None:
            return
        state, number = AlarmState(found.state), found.id or 0
        may = Event(event) in allowed(state)
        try:
            if event == "acknowledge":
                acknowledge(session, number, actor="p", reason="", now=now, announce=plant.told)
            elif event == "silence":
                until = now + timedelta(seconds=200)
                silence(session, number, until, actor="p", reason="", now=now, announce=plant.told)
            else:
                resolve(session, number, actor="p", reason="", now=now, register=plant.register)
        except ConflictError:
            assert not may
            return
        assert may
        session.commit()


def test_the_table_has_no_way_out_of_resolved_and_no_dead_end() -> None:
    for state in AlarmState:
        reached, todo = {state}, [state]
        while todo:
            came = todo.pop()
            new = {to for (start, _), to in TRANSITIONS.items() if start is came} - reached
            reached |= new
            todo += new
        assert AlarmState.RESOLVED in reached
    for event in Event:
        with pytest.raises(ConflictError):
            next_state(AlarmState.RESOLVED, event)
