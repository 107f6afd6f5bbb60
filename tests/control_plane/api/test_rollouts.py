"""Routes of rollouts: repeated requests, ways back said before and after, agents that leave."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlmodel import select

from control_plane.app import create_app
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import Rollout
from control_plane.services import Services
from models.messages import Phase, encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import register_tiny, reported, say
from tests.simulators.plane import make_services


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url="http://127.0.0.1")


def count(services: Services) -> int:
    with reading(services.engine) as session:
        return len(session.exec(select(Rollout)).all())


def test_a_repeated_request_makes_no_second_rollout(client: TestClient, services: Services, tmp_path: Path) -> None:
    register_tiny(services, tmp_path / "1")
    say(services, Channel.REPORTED, encode(reported()), "line-0")
    order = {"model": "tiny", "waves": ["100%"], "actor": "maria"}
    first = client.post("/api/v1/rollouts", json=order, headers={"Idempotency-Key": "k1"})
    again = client.post("/api/v1/rollouts", json=order, headers={"Idempotency-Key": "k1"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert (first.json()["id"], count(services)) == (again.json()["id"], 1)
    other = client.post("/api/v1/rollouts", json=order | {"dynamic": True}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (409, "api.key_reused")
    refused = client.post("/api/v1/rollouts", json=order | {"model": "no"}, headers={"Idempotency-Key": "k2"})
    assert refused.status_code == 422
    assert client.post("/api/v1/rollouts", json=order, headers={"Idempotency-Key": "k2"}).status_code == 201
    assert count(services) == 2


def test_a_repeated_action_is_answered_and_not_refused(client: TestClient, services: Services, tmp_path: Path) -> None:
    register_tiny(services, tmp_path / "1")
    say(services, Channel.REPORTED, encode(reported()), "line-0")
    number = client.post("/api/v1/rollouts", json={"model": "tiny"}).json()["id"]
    path = f"/api/v1/rollouts/{number}/abort"
    answers = [client.post(path, json={"reason": "bad"}, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [(a.status_code, a.json()["state"]) for a in answers] == [(200, "aborted")] * 2
    assert client.post(path, json={"reason": "bad"}).json()["code"] == "rollout.not_allowed"


def test_without_a_way_back_a_rollback_is_refused_until_a_safe_state_is_named(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    bundle = register_tiny(services, tmp_path / "1")
    say(services, Channel.REPORTED, encode(reported()), "line-0")
    order = {"model": "tiny", "waves": ["100%"]}
    preview = client.post("/api/v1/rollouts/preview", json=order).json()
    assert [a["agent"] for a in preview["without_way_back"]] == ["line-0"]
    number = client.post("/api/v1/rollouts", json=order).json()["id"]
    services.rollouts.step(utc_now())
    facts = {"generation": 1, "active": bundle, "phase": Phase.COMMITTED, "items_on_active": 60}
    say(services, Channel.REPORTED, encode(reported(**facts)), "line-0")
    services.rollouts.step(utc_now())
    shown = client.get(f"/api/v1/rollouts/{number}").json()
    assert [a["reason"] for a in shown["without_way_back"]] == ["it has reported no other bundle as committed"]
    path = f"/api/v1/rollouts/{number}/rollback"
    assert client.post(path, json={}).json()["code"] == "rollout.no_way_back"
    assert client.post(path, json={"safe_state": "eject-all"}).json()["state"] == "rolling-back"
    services.rollouts.step(utc_now())
    desired = client.get("/api/v1/agents/line-0").json()
    assert desired["desired"] == ""
    say(services, Channel.REPORTED, encode(reported(**facts | {"generation": 2, "safe_state": "eject-all"})), "line-0")
    for _ in range(2):
        services.rollouts.step(utc_now())
    shown = client.get(f"/api/v1/rollouts/{number}").json()
    assert (shown["state"], shown["returns"]) == ("rolled-back", {"SAFE": 1})
    assert "0 of 1 agents report a bundle they had committed before" in shown["reason"]


def test_an_excluded_agent_leaves_and_holds_up_nothing(client: TestClient, services: Services, tmp_path: Path) -> None:
    register_tiny(services, tmp_path / "1")
    for agent_id in ("line-0", "line-1", "line-2"):
        say(services, Channel.REPORTED, encode(reported()), agent_id)
    order = {"model": "tiny", "waves": ["100%"], "exclude": ["line-2"], "budgetConfig": {"maximumInChange": 1}}
    made = client.post("/api/v1/rollouts", json=order).json()
    assert [a["agent"] for a in made["agents"]] == ["line-0", "line-1"]
    path = f"/api/v1/rollouts/{made['id']}/exclude"
    assert client.post(path, json={"agents": ["line-9"]}).json()["code"] == "rollout.no_agents"
    found = client.post(path, json={"agents": ["line-0"], "reason": "scrapped", "actor": "maria"}).json()
    assert found["counts"] == {"QUEUED": 1, "REMOVED": 1}
    assert found["agents"][0]["reason"] == "excluded by maria: scrapped"
    assert found["waiting"]["for"] == "1 agent to be notified, within the rate and the budget: line-1"


def test_a_schedule_that_can_never_begin_is_refused(client: TestClient, services: Services, tmp_path: Path) -> None:
    register_tiny(services, tmp_path / "1")
    say(services, Channel.REPORTED, encode(reported()), "line-0")
    never = [{"startTime": "cron(0 0 31 2 ? *)", "durationInMinutes": 60}]
    for schedule, code in (
        ({"endTime": "2020-01-01T00:00"}, "rollout.bad_time"),
        ({"maintenanceWindows": never}, "rollout.never_opens"),
        (
            {"maintenanceWindows": [{"startTime": "cron(0 0 1 1 ? 2019)", "durationInMinutes": 9}]},
            "rollout.never_opens",
        ),
    ):
        answer = client.post("/api/v1/rollouts", json={"model": "tiny", "schedulingConfig": schedule})
        assert answer.json()["code"] == code


def test_a_forgotten_agent_leaves_rollouts_and_stays_in_their_history(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    register_tiny(services, tmp_path / "1")
    for agent_id in ("line-0", "line-1"):
        say(services, Channel.REPORTED, encode(reported()), agent_id)
    number = client.post("/api/v1/rollouts", json={"model": "tiny", "waves": ["100%"]}).json()["id"]
    services.rollouts.step(utc_now())
    cleared: list[str] = []
    services.outbox.clear_agent = cleared.append
    with writing(services.engine) as session:
        agent = session.get(Agent, "line-0")
        agent.online = False
        session.add(agent)
        session.commit()
    facts = client.post("/api/v1/agents/line-0/forget", json={"reason": "scrapped", "actor": "maria"}).json()
    assert (facts["generation"], facts["reason"], cleared) == (1, "scrapped", ["line-0"])
    assert client.get("/api/v1/agents/line-0").json()["code"] == "agent.unknown"
    services.rollouts.step(utc_now() + timedelta(seconds=11))
    shown = client.get(f"/api/v1/rollouts/{number}").json()
    assert [(a["agent"], a["outcome"], a["reason"]) for a in shown["agents"]] == [
        ("line-0", "REMOVED", "it was forgotten"),
        ("line-1", "QUEUED", ""),
    ]
    entry = client.get("/api/v1/audit?limit=5").json()["entries"]
    assert any(e["action"] == "agent.forget" and e["object"] == "line-0" for e in entry)
    with reading(services.engine) as session:
        assert services.signer.document(session, "line-0") == b""


def test_an_agent_that_is_connected_is_not_forgotten_and_a_safe_state_is_signed(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    register_tiny(services, tmp_path / "1")
    say(services, Channel.REPORTED, encode(reported()), "line-0")
    with writing(services.engine) as session:
        agent = session.get(Agent, "line-0")
        agent.online, agent.seen_at = True, utc_now()
        session.add(agent)
        session.commit()
    refused = client.post("/api/v1/agents/line-0/forget", json={"reason": "x"})
    assert (refused.status_code, refused.json()["code"]) == (409, "agent.still_connected")
    assert client.post("/api/v1/agents/line-0/safe-state", json={"safe_state": "stop"}).json()["generation"] == 1
    with reading(services.engine) as session:
        assert b'"safe_state":"stop"' in services.signer.document(session, "line-0")
    assert client.post("/api/v1/agents/line-0/safe-state", json={"safe_state": "reject"}).status_code == 422
