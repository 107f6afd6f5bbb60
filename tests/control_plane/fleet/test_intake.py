"""The waiting room: bounded, the least important goes first, and a drop brings no more messages."""

import logging
from collections import Counter

import pytest

from control_plane.fleet.intake import (
    AT_ONCE,
    MAX_BATCHES_OF_ONE,
    MAX_OTHERS,
    MAX_PRESENCE_OF_ONE,
    Intake,
    LiveFigures,
)
from models.messages import MAX_BATCH_BYTES, Live, Presence, encode
from models.topics import Channel, agent_topic

BOOT = "0123456789abcdef"


class Room:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.counters: Counter[str] = Counter()
        self.live = LiveFigures(self.counters, lambda: self.now_s)
        self.intake = Intake(self.live, self.counters, clock=lambda: self.now_s)

    def put(self, channel: Channel, payload: bytes, agent: str = "line-1", *, retained: bool = False) -> None:
        self.intake.put(agent_topic(agent, channel), payload, retained)


@pytest.fixture
def room() -> Room:
    return Room()


def test_the_newest_waiting_report_of_each_agent_is_kept(room: Room) -> None:
    for number in range(50):
        room.put(Channel.REPORTED, str(number).encode(), f"line-{number % 5}")
    assert [m.payload for m in room.intake.take(0.0)] == [b"45", b"46", b"47", b"48", b"49"]
    assert room.counters["replaced_reports"] == 45


def test_the_room_is_full_while_a_whole_transaction_waits(room: Room) -> None:
    for number in range(AT_ONCE + 1):
        assert room.intake.full is (number >= AT_ONCE)
        room.put(Channel.BATCH, b"x", f"line-{number}")
    room.intake.done(room.intake.take(0.0))
    assert not room.intake.full


def test_a_birth_survives_the_will_of_the_boot_before(room: Room) -> None:
    birth, will = (encode(Presence(online=online, boot_id=boot)) for online, boot in ((True, BOOT), (False, "f" * 16)))
    for payload in (birth, will, will):
        room.put(Channel.PRESENCE, payload)
    assert [m.payload for m in room.intake.take(0.0)] == [birth, will]
    for number in range(20):
        room.put(Channel.PRESENCE, str(number).encode())
    assert len(room.intake.take(0.0)) == MAX_PRESENCE_OF_ONE


def test_a_repeated_batch_is_kept_once_also_while_it_is_being_stored(room: Room) -> None:
    room.put(Channel.BATCH, b"one")
    taken = room.intake.take(0.0)
    room.put(Channel.BATCH, b"one")
    assert room.intake.take(0.0) == []
    room.intake.done(taken)
    room.put(Channel.BATCH, b"one")
    assert len(room.intake.take(0.0)) == 1
    assert room.counters["repeated_batches"] == 1


def test_batches_beyond_the_bound_are_left_to_their_agent_and_it_is_said_once(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sortline.fleet"):
        for number in range(MAX_BATCHES_OF_ONE + 30):
            room.put(Channel.BATCH, str(number).encode())
        room.put(Channel.REPORTED, b"report")
        room.put(Channel.BATCH, b"of another", "line-2")
    assert len(caplog.records) == 1
    assert room.counters["shed_batches"] == 30
    assert room.intake.backlog().shed_lately == 30
    taken = room.intake.take(0.0)
    assert {m.channel for m in taken} == {Channel.BATCH, Channel.REPORTED}
    assert {m.agent_id for m in taken} == {"line-1", "line-2"}
    room.now_s += 61.0
    assert room.intake.backlog().shed_lately == 0


def test_all_that_waits_together_is_bounded_in_bytes(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.fleet.intake.MAX_BATCH_BYTES_WAITING", 1000)
    for number in range(40):
        room.put(Channel.BATCH, str(number).encode().zfill(100), f"line-{number}")
    assert len(room.intake.take(0.0)) == 10
    assert room.counters["shed_batches"] == 30


def test_a_stall_brings_no_more_work_than_the_agents_have(room: Room) -> None:
    """Two hundred agents repeat what is not acknowledged, and report, for two minutes: what waits does not grow."""
    for second in range(120):
        for number in range(200):
            room.put(Channel.BATCH, f"{number} {second // 40}".encode(), f"line-{number}")
            room.put(Channel.REPORTED, f"{second}".encode(), f"line-{number}")
    waiting = room.intake.backlog().waiting
    assert waiting == 200 * (3 + 1)
    assert room.counters["incoming_dropped"] == 0
    taken = []
    while messages := room.intake.take(0.0):
        taken += messages
        room.intake.done(messages)
    assert len(taken) == waiting
    assert room.intake.backlog().waiting == 0


def test_hostile_topics_and_sizes_are_counted_and_kept_out(room: Room) -> None:
    room.intake.put("other", b"x")
    room.intake.put("sortline/v1/agents/LINE/batch", b"x")
    room.put(Channel.DESIRED, b"x")
    room.put(Channel.BATCH, bytes(MAX_BATCH_BYTES + 1))
    room.put(Channel.REPORTED, b"")
    for number in range(MAX_OTHERS + 5):
        room.put(Channel.RESPONSE, str(number).encode())
    assert len(room.intake.take(0.0)) == MAX_OTHERS
    assert room.counters["incoming_dropped"] == 5
    assert room.counters["refused_message.oversize"] == 1
    assert room.counters["refused_topic.unknown"] == 3


def test_live_figures_are_subscribed_to_while_a_page_is_open(room: Room) -> None:
    assert not room.live.watched
    room.live.watch()
    assert room.live.watched
    room.now_s += 61.0
    assert not room.live.watched
    room.put(Channel.LIVE, encode(Live(boot_id=BOOT, at_ms=1, items_per_s=3.0)))
    assert room.live.of("line-1").items_per_s == 3.0
    assert room.live.of("line-2") is None
    room.now_s += 6.0
    assert room.live.of("line-1") is None
