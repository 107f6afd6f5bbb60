"""Rollouts on a real database: what is planned is written once, by the one that leads, and people may always act."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import select

from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import _Turns, reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.audit import Audit
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import RolloutAgent, RolloutState
from control_plane.fleet.desired_state import DesiredChange, assign
from control_plane.rollouts.description import describe
from control_plane.rollouts.executor import RolloutExecutor
from control_plane.rollouts.records import act
from control_plane.services import Services
from models.errors import ConflictError, InputError
from models.messages import Mode, Phase, Swap, encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import batch, register_tiny, reported, say, start_rollout, state_of, window
from tests.simulators.plane import make_client, make_services
from tests.simulators.processes import wait_until


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Services]:
    """Services on SQLite alone; the behaviour under test does not depend on the database."""
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


def fleet_of(plane: Services, count: int, **labels: str) -> None:
    for number in range(count):
        facts = {"labels": {"site": "north" if number % 2 else "south", **labels}}
        say(plane, Channel.REPORTED, encode(reported(**facts)), f"line-{number}")


def report_done(plane: Services, agent_id: str, bundle: str, **changes: object) -> None:
    with reading(plane.engine) as session:
        generation = session.get(Agent, agent_id).generation
    facts = {"generation": generation, "active": bundle, "phase": Phase.COMMITTED, "items_on_active": 60}
    say(plane, Channel.REPORTED, encode(reported(**(facts | changes))), agent_id)


def desired(plane: Services) -> dict[str, tuple[int, str]]:
    with reading(plane.engine) as session:
        return {a.id: (a.generation, a.desired_bundle) for a in session.exec(select(Agent))}


def person(plane: Services, rollout_id: int, action: str, *, actor: str = "t", reason: str = "because") -> None:
    with writing(plane.engine) as session:
        act(session, rollout_id, action, actor=actor, reason=reason, now=utc_now())
        session.commit()


def rollout_facts(plane: Services, rollout_id: int) -> dict[str, object]:
    with reading(plane.engine) as session:
        from control_plane.database.tables.rollouts import Rollout

        return describe(session, session.get(Rollout, rollout_id), utc_now())


def test_a_rollout_goes_wave_by_wave_and_only_what_agents_report_counts(services: Services, tmp_path: Path) -> None:
    bundle = register_tiny(services, tmp_path / "1")
    fleet_of(services, 3)
    rollout_id = start_rollout(services, waves=(1, "100%"))
    step = services.rollouts.step
    assert step(utc_now()) == 1
    assert step(utc_now()) == 0
    assert {a: d for a, (_, d) in desired(services).items()} == {"line-0": bundle, "line-1": "", "line-2": ""}
    report_done(services, "line-0", bundle, items_on_active=0)
    assert rollout_facts(services, rollout_id)["counts"] == {"QUEUED": 2, "IN_PROGRESS": 1}
    step(utc_now())
    assert state_of(services, rollout_id).wave == 0, "committed, but no item judged"
    report_done(services, "line-0", bundle)
    step(utc_now())
    step(utc_now())
    assert step(utc_now()) == 2
    for agent_id in ("line-1", "line-2"):
        report_done(services, agent_id, bundle)
    step(utc_now())
    step(utc_now())
    assert state_of(services, rollout_id).state == RolloutState.COMPLETED
    facts = rollout_facts(services, rollout_id)
    assert facts["counts"] == {"SUCCEEDED": 3}
    assert [w["size"] for w in facts["wave_progress"]] == [1, 2]
    with reading(services.engine) as session:
        actions = [entry.action for entry in session.exec(select(Audit).order_by(Audit.id))]
        assert broken_audit_entry(session) is None
    assert actions[1:] == ["rollout.create", "rollout.assign", "rollout.wave", "rollout.assign", "rollout.completed"]


def test_a_rollout_that_fails_stops_itself_and_goes_back_to_what_ran_before(
    services: Services,
    tmp_path: Path,
) -> None:
    old = register_tiny(services, tmp_path / "1")
    fleet_of(services, 3)
    first = start_rollout(services, waves=("100%",))
    services.rollouts.step(utc_now())
    for number in range(3):
        report_done(services, f"line-{number}", old)
    services.rollouts.step(utc_now())
    services.rollouts.step(utc_now())
    assert state_of(services, first).state == RolloutState.COMPLETED
    new = register_tiny(services, tmp_path / "2", bias=1.0)
    second = start_rollout(services, waves=("100%",))
    services.rollouts.step(utc_now())
    report_done(services, "line-0", new)
    report_done(services, "line-1", old, blocked=(new,), phase=Phase.ROLLED_BACK)
    services.rollouts.step(utc_now())
    assert state_of(services, second).state == RolloutState.ABORTED
    services.rollouts.step(utc_now())
    found = desired(services)
    assert found["line-2"] == (3, old), "who is not done is recalled"
    assert found["line-0"][1] == found["line-1"][1] == new
    person(services, second, "rollback", reason="bad")
    services.rollouts.step(utc_now())
    assert {d for _, d in desired(services).values()} == {old}
    assert state_of(services, second).state == RolloutState.ROLLING_BACK
    for number in range(3):
        report_done(services, f"line-{number}", old)
    services.rollouts.step(utc_now())
    services.rollouts.step(utc_now())
    assert state_of(services, second).state == RolloutState.ROLLED_BACK
    assert state_of(services, second).reason == "3 of 3 agents report a bundle they had committed before"
    with pytest.raises(ConflictError):
        person(services, second, "resume")


def test_a_rollout_without_a_former_bundle_assigns_none(plane: Services, tmp_path: Path) -> None:
    bundle = register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1)
    rollout_id = start_rollout(plane, waves=("100%",))
    plane.rollouts.step(utc_now())
    assert desired(plane)["line-0"] == (1, bundle)
    person(plane, rollout_id, "abort")
    plane.rollouts.step(utc_now())
    assert desired(plane)["line-0"] == (2, "")


def test_an_offline_agent_comes_back_to_the_newest_assignment_only(services: Services, tmp_path: Path) -> None:
    for number in range(3):
        register_tiny(services, tmp_path / str(number), bias=float(number))
    fleet_of(services, 1)
    published: list[tuple[int, str]] = []
    services.outbox.publish_desired = lambda *agents: published.extend((a.generation, a.desired_bundle) for a in agents)
    rollouts = [start_rollout(services, reference=f"tiny:{n}", waves=("100%",)) for n in (1, 2, 3)]
    # Whatever the order in which they move, the newest rollout wins and stays.
    for _ in range(4):
        services.rollouts.step(utc_now())
    generation, bundle = desired(services)["line-0"]
    with reading(services.engine) as session:
        newest = session.get(Agent, "line-0").rollout_id
    assert newest == rollouts[2]
    assert [rollout_facts(services, r)["counts"] for r in rollouts] == [{"CANCELED": 1}, {"CANCELED": 1}, {"QUEUED": 1}]
    generations = [g for g, _ in published]
    assert generations == sorted(generations)
    assert published[-1] == (generation, bundle)
    # It reports its former state; only the newest assignment is published to it again.
    published.clear()
    say(services, Channel.REPORTED, encode(reported(generation=0)), "line-0")
    services.outbox._publish_behind()
    assert published == [(generation, bundle)]


def test_an_older_rollout_that_resumes_does_not_undo_a_newer_one(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    newer = register_tiny(plane, tmp_path / "2", bias=1.0)
    fleet_of(plane, 2)
    first = start_rollout(plane, reference="tiny:1", waves=("100%",))
    person(plane, first, "pause")
    start_rollout(plane, reference="tiny:2", waves=("100%",))
    plane.rollouts.step(utc_now())
    person(plane, first, "resume")
    for _ in range(3):
        plane.rollouts.step(utc_now())
    assert {d for _, d in desired(plane).values()} == {newer}
    assert state_of(plane, first).state == RolloutState.COMPLETED
    assert "0 of 2" in state_of(plane, first).reason


def test_a_second_person_must_approve(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1)
    rollout_id = start_rollout(plane, needs_approval=True, actor="maria")
    plane.rollouts.step(utc_now())
    assert state_of(plane, rollout_id).state == RolloutState.AWAITING_APPROVAL
    assert desired(plane)["line-0"] == (0, "")
    with pytest.raises(ConflictError) as caught:
        person(plane, rollout_id, "approve", actor="maria")
    assert caught.value.code == "rollout.self_approval"
    with pytest.raises(ConflictError):
        person(plane, rollout_id, "resume", actor="otto")
    person(plane, rollout_id, "approve", actor="otto")
    assert plane.rollouts.step(utc_now()) == 1
    assert state_of(plane, rollout_id).approved_by == "otto"


def test_an_approved_rollout_still_waits_for_its_start(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1)
    now = utc_now()
    start = (now + timedelta(hours=1)).isoformat()
    rollout_id = start_rollout(plane, needs_approval=True, policy={"schedulingConfig": {"startTime": start}})
    person(plane, rollout_id, "approve", actor="otto")
    assert state_of(plane, rollout_id).state == RolloutState.SCHEDULED
    assert plane.rollouts.step(now) == 0
    plane.rollouts.step(now + timedelta(hours=2))
    assert state_of(plane, rollout_id).state == RolloutState.RUNNING


def test_a_rollout_without_agents_or_model_is_refused(plane: Services, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        start_rollout(plane)
    assert caught.value.code == "registry.unknown_version"
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 2)
    for changes, code in (
        ({"selector": "site=west"}, "rollout.no_agents"),
        ({"agents": ("line-9",)}, "rollout.no_agents"),
        ({"waves": ("2", "1")}, "rollout.bad_waves"),
        ({"selector": "site="}, "rollout.bad_selector"),
        ({"agents": ("line-1",), "selector": "site=north"}, "rollout.bad_selector"),
        ({"policy": {"abortConfig": {}, "x": 1}}, "rollout.bad_policy"),
    ):
        with pytest.raises(InputError) as caught:
            start_rollout(plane, **changes)
        assert caught.value.code == code
    assert state_of(plane, start_rollout(plane, agents=("line-1",))).selector["agents"] == ["line-1"]


def test_the_assignment_carries_mode_and_changeover_to_the_agent(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1)
    sent: list[bytes] = []
    plane.connection.control.publish = lambda _topic, payload, **_: sent.append(payload)
    start_rollout(plane, swap=Swap.LOT_CHANGE, swap_within_s=900.0, waves=("100%",))
    plane.rollouts.step(utc_now())
    assert b'"swap":"lot-change","swap_within_s":900.0' in sent[-1]


def test_agents_that_appear_later_join_a_dynamic_rollout(plane: Services, tmp_path: Path) -> None:
    bundle = register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1, site="west")
    rollout_id = start_rollout(plane, selector="site=west", dynamic=True, waves=("100%",))
    plane.rollouts.step(utc_now())
    say(plane, Channel.REPORTED, encode(reported(labels={"site": "west"})), "late-1")
    say(plane, Channel.REPORTED, encode(reported(labels={"site": "east"})), "late-2")
    plane.rollouts.step(utc_now())
    plane.rollouts.step(utc_now())
    found = desired(plane)
    assert found["late-1"] == (1, bundle)
    assert found["late-2"] == (0, "")
    for agent_id in ("line-0", "late-1"):
        report_done(plane, agent_id, bundle)
    plane.rollouts.step(utc_now())
    assert state_of(plane, rollout_id).state == RolloutState.RUNNING
    person(plane, rollout_id, "finish")
    assert state_of(plane, rollout_id).state == RolloutState.COMPLETED


def test_a_leader_that_slept_beyond_its_lease_writes_nothing(services: Services, tmp_path: Path) -> None:
    register_tiny(services, tmp_path / "1")
    fleet_of(services, 2)
    rollout_id = start_rollout(services, waves=("100%",))
    now = utc_now()
    sleeper = RolloutExecutor(services.engine, services.outbox, "sleeper")
    waker = RolloutExecutor(services.engine, services.outbox, "waker")
    # It takes the lease, then sleeps between its lease and its turn while the other takes over and works.
    original = sleeper._advance
    late: list[int] = []

    def sleep_first(rollout: int, fence: int, at: object) -> int:
        assert waker.step(now + timedelta(seconds=10.0 + 1)) == 2
        late.append(original(rollout, fence, at))
        return late[-1]

    sleeper._advance = sleep_first
    assert sleeper.step(now) == 0
    assert late == [0]
    assert (waker.leading, waker.step(now + timedelta(seconds=10.0 + 2))) == (True, 0)
    assert sleeper.step(now + timedelta(seconds=10.0 + 3)) == 0
    assert not sleeper.leading
    with reading(services.engine) as session:
        parts = session.exec(select(RolloutAgent).where(RolloutAgent.rollout_id == rollout_id)).all()
    assert [(part.attempt, part.generation) for part in parts] == [(1, 1), (1, 1)]


def test_what_a_dead_leader_committed_is_published_by_the_next(plane: Services, tmp_path: Path) -> None:
    bundle = register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 2)
    start_rollout(plane, waves=("100%",))
    dying = RolloutExecutor(plane.engine, plane.outbox, "dying")
    dying.publish = lambda _agents: None
    dying.step(utc_now())
    told_to: list[str] = []
    plane.outbox.publish_desired = lambda *agents: told_to.extend(f"{a.id} {a.desired_bundle[:4]}" for a in agents)
    following = RolloutExecutor(plane.engine, plane.outbox, "following")
    following.step(utc_now() + timedelta(seconds=10.0 + 1))
    assert sorted(told_to) == [f"line-0 {bundle[:4]}", f"line-1 {bundle[:4]}"]


def test_a_rollout_that_cannot_be_carried_out_does_not_hold_up_the_others(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 2)
    broken = start_rollout(plane, agents=("line-0",))
    with writing(plane.engine) as session:
        from control_plane.database.tables.rollouts import Rollout

        rollout = session.get(Rollout, broken)
        rollout.policy = {"unknown": 1}
        session.add(rollout)
        session.commit()
    start_rollout(plane, agents=("line-1",))
    assert plane.rollouts.step(utc_now()) == 1
    assert plane.rollouts.failures == 1


def test_the_generation_is_above_whatever_the_agent_reports(services: Services) -> None:
    say(services, Channel.REPORTED, encode(reported(generation=41)), "line-0")
    with writing(services.engine) as session:
        assert assign(session, "line-0", DesiredChange(bundle="a" * 64)) == 42
        assert assign(session, "line-0", replace(DesiredChange(bundle="b" * 64), mode=Mode.LIVE)) == 43
        with pytest.raises(InputError):
            assign(session, "nobody", DesiredChange(bundle="a" * 64))
        session.commit()


def test_the_api_previews_starts_and_acts_and_says_what_it_refuses(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 4)
    say(plane, Channel.BATCH, batch(window(items=170)), "line-0")
    aws = {
        "jobExecutionsRolloutConfig": {"maximumPerMinute": 3},
        "abortConfig": {
            "criteriaList": [
                {"failureType": "ALL", "action": "CANCEL", "thresholdPercentage": 20, "minNumberOfExecutedThings": 2}
            ]
        },
    }
    with make_client(plane) as client:
        body = {"model": "tiny", "selector": "site in (north,south)", "waves": [["line-0"], "100%"], "actor": "maria"}
        seen = client.post("/api/v1/rollouts/preview", json=body | aws).json()
        assert [(w["agents"], w["items_per_h"], w["unknown"]) for w in seen["waves"]] == [(1, 61_200, 0), (3, 0, 3)]
        assert seen["worst_case"]["agents"] == 4
        assert client.get("/api/v1/rollouts").json() == []
        made = client.post("/api/v1/rollouts", json=body | aws | {"needs_approval": True})
        assert made.status_code == 201
        assert made.json()["rate"]["per_minute"] == 3
        path = f"/api/v1/rollouts/{made.json()['id']}"
        for action, actor, status, code in (
            ("approve", "maria", 409, "rollout.self_approval"),
            ("resume", "otto", 409, "rollout.not_allowed"),
            ("explode", "otto", 404, "api.unknown_path"),
            ("approve", "otto", 200, None),
            ("pause", "otto", 200, None),
            ("abort", "otto", 200, None),
        ):
            answer = client.post(f"{path}/{action}", json={"actor": actor, "reason": "r"})
            assert (answer.status_code, answer.json().get("code")) == (status, code), action
        assert answer.json()["reason"] == "abort by otto: r"
        for wrong in ({"abortConfig": {"criteriaList": []}}, {"selector": "a="}, {"waves": [["nobody"]]}):
            refused = client.post("/api/v1/rollouts", json=body | wrong)
            assert refused.status_code == 422
            assert refused.json()["code"].startswith("rollout.bad_")
        page = client.get("/rollouts").text
        assert "abort by otto: r" in page
        examples = client.get("/openapi.json").json()["components"]["schemas"]["NewRollout"]["properties"]
        assert all(examples[name].get("examples") for name in ("jobExecutionsRolloutConfig", "abortConfig", "waves"))


def test_the_page_shows_what_people_wrote_as_text(plane: Services, tmp_path: Path) -> None:
    register_tiny(plane, tmp_path / "1")
    fleet_of(plane, 1)
    rollout_id = start_rollout(plane, actor="<b>x</b>")
    person(plane, rollout_id, "pause", reason="<script>alert(1)</script>")
    with make_client(plane) as client:
        text = client.get("/rollouts").text
    assert "<script>alert" not in text
    assert "<b>x</b>" not in text
    assert "&lt;script&gt;" in text


def test_a_database_that_is_locked_is_said_with_503(tmp_path: Path) -> None:
    found = make_services(tmp_path / "plane", wait_s=0.2)
    register_tiny(found, tmp_path / "1")
    fleet_of(found, 1)
    path = tmp_path / "plane" / "sortline.sqlite"
    with make_client(found) as client, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = client.post("/api/v1/rollouts", json={"model": "tiny"})
        assert (answer.status_code, answer.json()["code"]) == (503, "database.unavailable")
        assert answer.headers["retry-after"] == "5"
        with pytest.raises(OperationalError):
            say(found, Channel.REPORTED, encode(reported()), "line-0")
        other.execute("ROLLBACK")
        assert client.post("/api/v1/rollouts", json={"model": "tiny"}).status_code == 201
    found.engine.dispose()


def test_writers_of_one_process_take_turns_in_the_order_in_which_they_asked() -> None:
    turns, order = _Turns(), []
    assert turns.take(1.0)

    def write(name: str) -> None:
        assert turns.take(10.0)
        order.append(name)
        turns.give_back()

    threads = []
    for number in range(5):
        threads.append(threading.Thread(target=write, args=(str(number),)))
        threads[-1].start()
        wait_until(lambda n=number: len(turns._waiting) == n + 1, "the writer to queue up")
    assert not turns.take(0.01), "a turn that does not come in time is given up"
    assert len(turns._waiting) == 5
    turns.give_back()
    for thread in threads:
        thread.join(5)
    assert order == ["0", "1", "2", "3", "4"]
    assert turns.take(0.01)


def test_a_transaction_gives_its_turn_back_however_it_ends(plane: Services) -> None:
    fleet_of(plane, 1)
    for _ in range(3):
        with pytest.raises(InputError), writing(plane.engine) as session:
            assign(session, "nobody", DesiredChange(bundle="a" * 64))
        with writing(plane.engine) as session:
            assign(session, "line-0", DesiredChange(bundle="a" * 64))
    with writing(plane.engine) as session:
        assert assign(session, "line-0", DesiredChange(bundle="a" * 64)) == 1, "what was not committed was not written"
