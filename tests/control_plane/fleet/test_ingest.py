"""A malformed record never blocks an agent, a retained message is no sign of life, and boots are kept apart."""

import zlib
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy.exc import DataError, OperationalError
from sqlmodel import select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.fleet.intake import Message
from control_plane.fleet.twins import WITHIN, TwinWatch, twins_of
from control_plane.monitoring.windows import windows_of
from control_plane.services import Services
from models.errors import InputError
from models.messages import Ack, Event, Presence, Record, RecordKind, encode
from models.topics import Channel, agent_topic
from tests.control_plane.fleet.test_fleet import BOOT, batch, reported, say, window

OTHER = "f" * 16


def rows(services: Services, table: type) -> list:
    with reading(services.engine) as session:
        return list(session.exec(select(table).order_by(table.seq)))


def agent(services: Services) -> Agent:
    with reading(services.engine) as session:
        return session.get_one(Agent, "line-1")


@pytest.fixture
def acks(services: Services) -> list[Ack]:
    found: list[Ack] = []
    services.outbox.acknowledge = lambda _agent, ack: found.append(ack)
    return found


def test_counts_as_large_as_the_contract_admits_and_text_with_nul_are_stored(
    services: Services, acks: list[Ack]
) -> None:
    most = 2**53
    large = window(most, features=b"", nulls=())
    odd = Event(at_ms=most, code="x.y", message="a\x00b", facts={"k\x00": "v\x00"})
    say(services, Channel.BATCH, batch(large, odd, window(3, bundle="\x00")))
    assert [row.items for row in rows(services, WindowRow)] == [most, 3]
    (event,) = rows(services, EventRow)
    assert (event.message, event.facts) == ("a\u2400b", {"k\u2400": "v\u2400"})
    assert [(ack.from_seq, ack.through_seq) for ack in acks] == [(0, 2)]


def test_a_record_that_is_malformed_is_kept_as_refused_and_the_rest_of_its_batch_is_stored(
    services: Services, acks: list[Ack]
) -> None:
    good = Record(boot_id=BOOT, seq=1, kind=RecordKind.WINDOW, payload=msgspec.msgpack.encode(window()))
    odd = msgspec.to_builtins(good) | {"seq": 0, "kind": "hologram", "payload": b"x"}
    body = {"schema_version": 1, "records": [odd, msgspec.to_builtins(good, builtin_types=(bytes,))]}
    say(services, Channel.BATCH, zlib.compress(msgspec.msgpack.encode(body)))
    assert [row.seq for row in rows(services, WindowRow)] == [1]
    assert [(row.seq, row.code) for row in rows(services, EventRow)] == [(0, "message.malformed")]
    assert [(ack.from_seq, ack.through_seq) for ack in acks] == [(0, 1)]


def test_a_record_the_database_refuses_is_kept_as_refused_and_its_neighbours_are_stored(
    services: Services, acks: list[Ack], monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = services.ingest._insert

    def picky(session: object, table: type, values: list[dict]) -> int:
        if any(row.get("items") == 7 for row in values):
            raise DataError("insert", {}, Exception("out of range"))
        return insert(session, table, values)

    monkeypatch.setattr(services.ingest, "_insert", picky)
    topic = agent_topic("line-1", Channel.BATCH)
    for payload in (batch(window(5)), batch(window(7), window(8), first=1)):
        services.intake.put(topic, payload)
    messages = services.intake.take(0.0)
    services.ingest.store_until_done(messages)
    assert [row.items for row in rows(services, WindowRow)] == [5, 8]
    (refused,) = rows(services, EventRow)
    assert (refused.seq, refused.code) == (1, "record.unstorable")
    assert {n for ack in acks for n in range(ack.from_seq, ack.through_seq + 1)} == {0, 1, 2}


def test_one_bad_message_among_many_holds_up_none_of_them(services: Services) -> None:
    for number in range(20):
        services.intake.put(agent_topic(f"line-{number}", Channel.BATCH), batch(window()))
    services.intake.put(agent_topic("line-1", Channel.BATCH), b"rubbish")
    services.intake.put(agent_topic("line-2", Channel.REPORTED), b"{}")
    refusals = services.ingest.store(services.intake.take(0.0))
    assert sorted(error.code for error in refusals) == ["message.malformed", "message.malformed"]
    with reading(services.engine) as session:
        assert len(session.exec(select(WindowRow)).all()) == 20


def test_while_the_database_is_away_nothing_is_acknowledged_and_nothing_is_lost(
    services: Services, acks: list[Ack], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, failures = services.ingest._store, [1, 2, 3]

    def away(messages: object, **options: object) -> object:
        if failures:
            failures.pop()
            assert acks == []
            raise OperationalError("begin", {}, Exception("database is locked"))
        return store(messages, **options)

    monkeypatch.setattr(services.ingest, "_store", away)
    monkeypatch.setattr(services.ingest._stopping, "wait", lambda _s: False)
    services.intake.put(agent_topic("line-1", Channel.BATCH), batch(window()))
    services.ingest.store_until_done(services.intake.take(0.0))
    assert len(acks) == 1
    assert services.counters["database_away"] == 3
    assert services.ingest.stalled_s == 0.0


def test_a_retained_message_is_no_sign_of_life(services: Services) -> None:
    made = datetime(2026, 3, 1, tzinfo=UTC)
    old = reported(at_ms=round(made.timestamp() * 1000))
    services.ingest.take(
        agent_topic("line-1", Channel.PRESENCE), encode(Presence(online=True, boot_id=BOOT)), retained=True
    )
    services.ingest.take(agent_topic("line-1", Channel.REPORTED), encode(old), retained=True)
    row = agent(services)
    assert (row.online, row.seen_at, row.reported_at) == (True, None, made)
    found = services.board.one("line-1")
    assert (found.link.connection, found.link.seen_age_s, found.state) == ("never", None, "offline")
    say(services, Channel.REPORTED, encode(reported()))
    assert services.board.one("line-1").link.connection == "live"


def test_an_unchanged_report_is_not_stored_again(services: Services) -> None:
    say(services, Channel.REPORTED, encode(reported(at_ms=1)))
    first = agent(services)
    say(services, Channel.REPORTED, encode(reported(at_ms=10_000)))
    second = agent(services)
    assert second.reported_at == first.reported_at
    assert second.seen_at > first.seen_at
    say(services, Channel.REPORTED, encode(reported(at_ms=20_000, items_on_active=5)))
    assert agent(services).reported["items_on_active"] == 5


def test_a_persons_label_holds_over_the_reported_one_and_a_dropped_one_is_gone(services: Services) -> None:
    from tests.simulators.plane import make_client

    client = make_client(services)
    say(services, Channel.REPORTED, encode(reported(labels={"site": "north", "line": "4", "old": "x"})))
    answer = client.put("/api/v1/agents/line-1/labels", json={"labels": {"line": "7"}, "actor": "ida"})
    assert answer.status_code == 200, answer.text
    say(services, Channel.REPORTED, encode(reported(labels={"site": "south", "line": "4"})))
    row = agent(services)
    assert row.labels == {"site": "south", "line": "7"}
    assert row.labels_assigned == {"line": "7"}
    page = client.get("/agents/line-1").text
    assert "line 7" in page
    assert "the agent reports 4" in page
    for labels in ({"": "x"}, {"a": "b" * 200}, {str(n): "x" for n in range(40)}):
        answer = client.put("/api/v1/agents/line-1/labels", json={"labels": labels, "actor": "ida"})
        assert answer.json()["code"] in {"agent.bad_labels", "api.malformed"}


def test_reported_labels_are_bounded_and_the_rest_is_counted(services: Services) -> None:
    many = {f"label-{n:03d}": "x" for n in range(40)} | {"k" * 64: "x", "a\x1b": "x"}
    say(services, Channel.REPORTED, encode(reported(labels=many)))
    assert len(agent(services).labels) == 32
    assert services.counters["labels_refused"] == 10


def test_two_boots_in_turn_are_two_boxes_and_a_restart_is_none(services: Services) -> None:
    watch, now = TwinWatch(), datetime(2026, 3, 1, tzinfo=UTC)
    for second, boot in enumerate([BOOT, BOOT, OTHER, OTHER]):
        assert watch.observe("line-1", boot, now + timedelta(seconds=second), "") is None
    # One return may be a message that was overtaken; two are proof.
    assert watch.observe("line-1", BOOT, now + timedelta(seconds=5), "address 10.0.0.7") is None
    found = watch.observe("line-1", OTHER, now + timedelta(seconds=6), "address 10.0.0.9")
    assert found is not None
    assert [(t["boot_id"], t["box"]) for t in twins_of(found.stored(), now)] == [
        (BOOT, "address 10.0.0.7"),
        (OTHER, "address 10.0.0.9"),
    ]
    assert twins_of(found.stored(), now + WITHIN + timedelta(seconds=7)) == []
    assert twins_of({}, now) == []
    for boot in (BOOT, OTHER, BOOT, OTHER):
        say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=boot)))
    status = services.board.one("line-1")
    assert status.state == "failure"
    assert status.reason.startswith("identity.twins")
    assert {twin["boot_id"] for twin in status.twins} == {BOOT, OTHER}


def test_two_boxes_under_one_identity_are_named_with_both_addresses_in_state_page_and_one_event(
    services: Services,
) -> None:
    from tests.simulators.plane import make_client

    client = make_client(services)
    for boot, address in ((BOOT, "10.0.0.7"), (OTHER, "10.0.0.9")) * 3:
        say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=boot)))
        box = {"host": "grader-3", "address": address, "cores": "4"}
        say(services, Channel.REPORTED, encode(reported(boot_id=boot, hardware=box)))
    boxes = ("address 10.0.0.7, host grader-3", "address 10.0.0.9, host grader-3")
    status = services.board.one("line-1")
    assert status is not None
    assert all(box in status.reason for box in boxes)
    (event,) = rows(services, EventRow)
    assert event.code == "identity.twins"
    assert all(box in event.message for box in boxes)
    assert set(event.facts.values()) == {f"{BOOT} {boxes[0]}", f"{OTHER} {boxes[1]}"}
    page = client.get("/agents/line-1").text
    assert page.count("10.0.0.7") >= 2
    assert page.count("10.0.0.9") >= 2


def test_an_agent_that_reports_no_address_is_named_by_its_boot_after_a_while() -> None:
    watch, now = TwinWatch(), datetime(2026, 3, 1, tzinfo=UTC)
    found = [
        watch.observe("line-1", boot, now + timedelta(seconds=10 * turn), "")
        for turn, boot in enumerate((BOOT, OTHER) * 4)
    ]
    first, *later = [twins for twins in found if twins is not None]
    assert not first.described
    assert str(first) == f"{BOOT[:8]} and {OTHER[:8]}"
    assert {twins.began for twins in later} == {first.began}
    # A case that is over and comes back is another case.
    late = now + timedelta(hours=1)
    again = [watch.observe("line-1", (BOOT, OTHER)[turn % 2], late + timedelta(seconds=turn), "") for turn in range(5)]
    assert [twins.began > first.began for twins in again if twins is not None] == [True]


def test_a_lot_for_an_agent_without_a_sign_of_life_is_refused(services: Services) -> None:
    from control_plane.fleet.lot_commands import ask

    services.ingest.take(
        agent_topic("line-1", Channel.PRESENCE), encode(Presence(online=True, boot_id=BOOT)), retained=True
    )
    facts = {"actor": "ida", "reason": "", "request_id": "0" * 32, "now": datetime.now(UTC)}
    with reading(services.engine) as session, pytest.raises(Exception, match=r"not connected") as caught:
        ask(session, "line-1", "L-1", "", **facts)
    assert caught.value.code == "agent.not_connected"


def test_a_page_of_windows_goes_on_where_the_one_before_ended_while_more_arrive(services: Services) -> None:
    for number in range(0, 10, 2):
        say(services, Channel.BATCH, batch(window(), window(), first=number), f"line-{number % 4}")
    seen: list[tuple[str, int]] = []
    cursor = ""
    for turn in range(6):
        with reading(services.engine) as session:
            page = windows_of(session, before=cursor, limit=3)
        seen += [(w.agent_id, w.seq) for w in page]
        cursor = page[-1].cursor if page else cursor
        say(services, Channel.BATCH, batch(window(), first=100 + turn), "line-9")
    expected = {(f"line-{n % 4}", n + k) for n in range(0, 10, 2) for k in (0, 1)}
    assert len(seen) == len(set(seen))
    assert set(seen) == expected
    with reading(services.engine) as session, pytest.raises(InputError) as caught:
        windows_of(session, before="nonsense")
    assert caught.value.code == "windows.bad_cursor"


def test_messages_are_taken_in_the_order_in_which_they_arrived(services: Services) -> None:
    services.intake.put(agent_topic("line-1", Channel.REPORTED), encode(reported()))
    services.intake.put(agent_topic("line-1", Channel.PRESENCE), encode(Presence(online=True, boot_id=OTHER)))
    services.intake.put(agent_topic("line-1", Channel.BATCH), batch(window()))
    taken = services.intake.take(0.0)
    assert [m.channel for m in taken] == [Channel.REPORTED, Channel.PRESENCE, Channel.BATCH]
    assert all(isinstance(m, Message) for m in taken)
