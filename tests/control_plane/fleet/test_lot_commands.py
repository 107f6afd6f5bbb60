"""A lot is sent once to a connected agent, with its actor; the answer and the running lot are kept apart."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.audit import Audit
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.lot_commands import LIFE, ask, lot_status, terms_of
from control_plane.registry.recipes import with_recipe
from control_plane.registry.versions import register
from control_plane.services import Services
from models.errors import ConflictError, InputError, MessageError
from models.messages import Command, Fault, LotSource, Presence, Response, RunningLot, encode
from models.recipe import Recipe, Terms
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import BOOT, reported, say
from tests.simulators.plane import make_client
from tests.simulators.tiny_bundle import tiny_bundle

NOW = utc_now().replace(microsecond=0)
FIRST, SECOND = "1" * 32, "2" * 32


@pytest.fixture
def agent(services: Services) -> str:
    say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT)))
    return "line-1"


def named(services: Services, request_id: str = FIRST, *, lot: str = "B-1182", at: timedelta = timedelta()) -> Command:
    with writing(services.engine) as session:
        command = ask(
            session, "line-1", lot, "gala", actor="ida", reason="truck 7", request_id=request_id, now=NOW + at
        )
        session.commit()
    return command


def seen(services: Services, at: timedelta = timedelta()) -> dict:
    with reading(services.engine) as session:
        return lot_status(session.get_one(Agent, "line-1").lot_asked, NOW + at)


def test_the_audit_trail_holds_the_lot_its_actor_and_the_reason(services: Services, agent: str) -> None:
    command = named(services)
    assert (command.lot, command.variety) == ("B-1182", "gala")
    assert command.expires_at_ms - command.issued_at_ms == LIFE.total_seconds() * 1000
    with reading(services.engine) as session:
        entry = session.exec(select(Audit)).one()
        assert broken_audit_entry(session) is None
    assert (entry.actor, entry.action, entry.object) == ("ida", "agent.lot", agent)
    assert entry.details == {"lot": "B-1182", "variety": "gala", "reason": "truck 7", "request_id": FIRST}


def test_an_offline_agent_is_sent_no_lot(services: Services, agent: str) -> None:
    with writing(services.engine) as session, pytest.raises(InputError) as unknown:
        ask(session, "none", "B", "", actor="x", reason="", request_id=FIRST, now=NOW)
    assert unknown.value.code == "agent.unknown"
    say(services, Channel.PRESENCE, encode(Presence(online=False, boot_id=BOOT)))
    with pytest.raises(ConflictError) as away:
        named(services)
    assert away.value.code == "agent.not_connected"
    assert seen(services) == {}


def test_later_commands_have_later_times_on_a_replica_whose_clock_is_behind(services: Services, agent: str) -> None:
    first, second = named(services), named(services, SECOND, at=timedelta(seconds=-30))
    assert second.issued_at_ms == first.issued_at_ms + 1


@pytest.mark.parametrize(
    ("fault", "state"), [(None, "accepted"), (Fault(code="command.from_future", message="a clock"), "refused")]
)
def test_the_answer_to_what_was_asked_last_is_kept(
    services: Services, agent: str, fault: Fault | None, state: str
) -> None:
    named(services)
    assert seen(services, LIFE)["state"] == "waiting"
    assert seen(services, 2 * LIFE)["state"] == "unanswered"
    say(services, Channel.RESPONSE, encode(Response(request_id=SECOND, at_ms=1)))
    assert seen(services)["state"] == "waiting", "an answer to something else"
    say(services, Channel.RESPONSE, encode(Response(request_id=FIRST, at_ms=1, fault=fault)))
    found = seen(services, 2 * LIFE)
    assert found["state"] == state
    assert (found["fault"] or {}).get("code") == (fault.code if fault else None)
    # It is confirmed again whenever the command comes again; the first word counts.
    say(services, Channel.RESPONSE, encode(Response(request_id=FIRST, at_ms=1, fault=Fault(code="x.y", message=""))))
    assert seen(services, 2 * LIFE) == found
    named(services, SECOND)
    assert (seen(services)["state"], seen(services)["request_id"]) == ("waiting", SECOND)
    assert services.counters["responses_unknown"] == 2


def test_an_agent_answers_for_itself_alone(services: Services, agent: str) -> None:
    named(services)
    say(services, Channel.RESPONSE, encode(Response(request_id=FIRST, at_ms=1)), agent="line-2")
    assert seen(services)["state"] == "waiting"
    with pytest.raises(MessageError):
        say(services, Channel.COMMAND, b"{}")


def test_the_lot_is_what_the_agent_reports_with_an_age_by_its_own_clock(services: Services, agent: str) -> None:
    lot = RunningLot(
        lot="B-1182", variety="gala", source=LotSource.OPERATOR, since_ms=5_000, begun=True, terms="recipe"
    )
    say(services, Channel.REPORTED, encode(reported(at_ms=65_000, lot=lot)))
    status = services.board.one(agent)
    assert (status.lot["lot"], status.lot["source"], status.lot["terms"]) == ("B-1182", "operator", "recipe")
    assert status.lot["age_s"] == pytest.approx(60.0, abs=5.0), "the agent's clock says 1970"
    assert status.lot_asked == {}
    say(services, Channel.REPORTED, encode(reported()))
    assert services.board.one(agent).lot["age_s"] is None


def test_whose_terms_hold_is_known_before_the_line_begins(services: Services, agent: str, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a")
    recipe = Recipe(
        classes=("sound", "defect"),
        good_class="sound",
        varieties={"gala": Terms(escaped=3.0)},
        lots={"B-1182": Terms(escaped=4.0)},
    )
    changed = with_recipe(tmp_path / "a", tmp_path / "b", recipe, reason="terms")
    with writing(services.engine) as session:
        register(session, services.store, tmp_path / "b", actor="t", now=NOW)
        session.commit()
    say(services, Channel.REPORTED, encode(reported(active=changed.digest)))
    with reading(services.engine) as session:
        found = session.get_one(Agent, agent)
        asked = [terms_of(services.store, found, *words) for words in (("B-1182", "fuji"), ("x", "gala"), ("x", "y"))]
        assert asked == ["lot", "variety", "recipe"]
        found.reported = {"active": "f" * 64}
        assert terms_of(services.store, found, "B-1182", "gala") == ""


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"lot": "B"}, 422, "api.malformed"),
        ({"lot": "two\nlines", "variety": ""}, 422, "api.malformed"),
        ({"lot": "x" * 65, "variety": ""}, 422, "api.malformed"),
        ({"lot": "B", "variety": "", "bundle": "x"}, 422, "api.malformed"),
        ({"lot": "B", "variety": "gala"}, 503, "broker.not_connected"),
    ],
)
def test_the_route_refuses_by_name_and_asks_nothing(
    services: Services, agent: str, body: dict[str, str], status: int, code: str
) -> None:
    with make_client(services) as client:
        answer = client.post(f"/api/v1/agents/{agent}/lot", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert seen(services) == {}


def test_a_clock_that_was_far_ahead_keeps_nothing_out_once_it_is_right(services: Services, agent: str) -> None:
    with writing(services.engine) as session:
        row = session.get(Agent, agent)
        row.seen_at = NOW + timedelta(hours=1)
        session.add(row)
        session.commit()
    named(services, at=timedelta(hours=1))
    assert named(services, SECOND).issued_at_ms == round(NOW.timestamp() * 1000)
