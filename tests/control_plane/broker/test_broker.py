"""The broker's codec, filters, budgets and access rules, without sockets."""

import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from control_plane.broker import packets
from control_plane.broker.access import Action, Credentials, Identity, Role, add_identity, authorize
from control_plane.broker.packets import MalformedPacketError, PacketReader, PacketType
from control_plane.broker.sessions import BrokerLimits, Message, RetainedStore
from control_plane.broker.topics import MAX_LEVELS, SubscriptionIndex, matches, valid_filter, valid_topic
from models.errors import ConfigError
from tests.simulators.mqtt_probe import connect_packet, packet, text

topics = st.text(st.sampled_from("ab/"), min_size=1, max_size=12)


@given(topics, st.binary(max_size=300), st.integers(0, 2), st.booleans(), st.integers(1, 65535), st.data())
def test_a_publish_survives_any_cutting_of_the_stream(topic, payload, qos, retain, packet_id, data) -> None:
    head = packets.publish_head(topic.encode(), len(payload), qos=qos, retain=retain, dup=False, packet_id=packet_id)
    stream, reader = (head + payload) * 2, PacketReader(10_000)
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        reader.feed(stream[:size])
        stream = stream[size:]
        while (got := reader.next()) is not None:
            found.append(packets.parse_publish(got[1], got[2]))
    assert len(found) == 2
    assert (found[1].topic, found[1].payload, found[1].qos, found[1].retain) == (topic, payload, qos, retain)


@given(st.binary(max_size=400))
def test_random_bytes_never_crash_the_codec(data: bytes) -> None:
    reader = PacketReader(200)
    reader.feed(data)
    parsers = {
        PacketType.CONNECT: lambda f, b: packets.parse_connect(b),
        PacketType.PUBLISH: packets.parse_publish,
        PacketType.SUBSCRIBE: lambda f, b: packets.parse_subscribe(b),
        PacketType.UNSUBSCRIBE: lambda f, b: packets.parse_unsubscribe(b),
        PacketType.PUBACK: lambda f, b: packets.parse_packet_id(b),
    }
    try:
        while (got := reader.next()) is not None:
            parsers.get(got[0], lambda f, b: None)(got[1], got[2])
    except MalformedPacketError:
        event("refused")


def test_connect_is_read_whole() -> None:
    raw = connect_packet("me", clean=False, keep_alive=9, will=("w", b"bye", 1, True), user="u", password="p")
    reader = PacketReader(1000)
    reader.feed(raw)
    got = reader.next()
    assert got
    found = packets.parse_connect(got[2])
    assert (found.client_id, found.clean, found.keep_alive_s, found.username, found.password) == (
        "me",
        False,
        9,
        "u",
        b"p",
    )
    assert found.will == packets.Will("w", b"bye", 1, True)


def test_the_limit_holds_before_the_body_has_come() -> None:
    reader = PacketReader(100)
    reader.feed(packet(3, 0, b"x" * 200)[:10])
    with pytest.raises(MalformedPacketError, match="over the limit"):
        reader.next()


@given(topics, topics)
def test_a_filter_without_wildcard_matches_itself_only(a: str, b: str) -> None:
    assert matches(a, b) == (a == b)


def test_filters_and_topics_are_checked() -> None:
    assert all(valid_filter(f) for f in ("#", "+", "a/+/b", "a/#", "/"))
    assert not any(valid_filter(f) for f in ("", "a#", "#/a", "a+/b", "a/b+", "/" * MAX_LEVELS, "x" * 600))
    assert valid_topic("a/b")
    assert not any(valid_topic(t) for t in ("", "a/+", "#", "x" * 600))
    assert not matches("#", "$SYS/x")
    assert not matches("+/x", "$SYS/x")
    assert matches("$SYS/#", "$SYS/x")


@given(st.lists(st.tuples(st.sampled_from(["a", "a/b", "+", "a/+", "#", "a/#"]), st.integers(0, 3), st.integers(0, 1))))
def test_the_index_finds_each_subscriber_once_at_its_highest_qos(subscriptions) -> None:
    index: SubscriptionIndex[int] = SubscriptionIndex()
    wanted: dict[tuple[str, int], int] = {}
    for name, subscriber, qos in subscriptions:
        index.add(name, subscriber, qos)
        wanted[name, subscriber] = qos
    for topic in ("a", "a/b", "c"):
        expected: dict[int, int] = {}
        for (name, subscriber), qos in wanted.items():
            if matches(name, topic):
                expected[subscriber] = max(qos, expected.get(subscriber, 0))
        assert dict(index.match(topic)) == expected
    for name, subscriber in wanted:
        index.remove(name, subscriber)
    assert list(index.match("a")) == []


def test_the_retained_budget_refuses_and_counts() -> None:
    counters: Counter[str] = Counter()
    store = RetainedStore(BrokerLimits(retained_bytes=100, retained_messages=3), counters)
    store.keep(Message("a", b"a", b"x" * 60, 1))
    store.keep(Message("b", b"b", b"x" * 60, 1))
    assert (set(store.messages), counters["retained_refused"]) == ({"a"}, 1)
    store.keep(Message("a", b"a", b"y" * 90, 1))
    assert store.bytes == 91
    store.keep(Message("a", b"a", b"", 1))
    assert (store.messages, store.bytes) == ({}, 0)


def test_access_rules_follow_the_wire_contract() -> None:
    agent, plane = Identity("line-1", Role.AGENT), Identity("cp", Role.CONTROL_PLANE)
    own, other = "sortline/v1/agents/line-1", "sortline/v1/agents/line-10"
    assert authorize(agent, Action.PUBLISH, f"{own}/batch")
    assert authorize(agent, Action.RECEIVE, f"{own}/desired")
    for action in Action:
        assert not authorize(agent, action, f"{other}/batch")
        assert not authorize(agent, action, f"{other}/desired")
        assert not authorize(agent, action, "sortline/v1/agents/line-1")
        assert not authorize(agent, action, "$SYS/sortline/stats")
    assert not authorize(agent, Action.PUBLISH, f"{own}/desired")
    assert not authorize(agent, Action.SUBSCRIBE, f"{own}/batch")
    assert authorize(plane, Action.SUBSCRIBE, "sortline/v1/agents/+/batch")
    assert not authorize(plane, Action.PUBLISH, "$SYS/sortline/stats")
    assert not authorize(plane, Action.SUBSCRIBE, "#")


def test_a_broken_credentials_file_is_refused_and_known_identities_stay(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    password = add_identity(path, "line-1", Role.AGENT)
    credentials = Credentials(path)
    assert credentials.verify("line-1", password.encode()) == Identity("line-1", Role.AGENT)
    assert credentials.cached("line-1", password.encode()) == Identity("line-1", Role.AGENT)
    assert credentials.cached("line-1", b"other") is None
    path.write_text("{")
    with pytest.raises(ConfigError) as caught:
        credentials.reload()
    assert caught.value.code == "broker.bad_credentials_file"
    assert credentials.cached("line-1", password.encode()) is not None
    with pytest.raises(ConfigError):
        Credentials(tmp_path / "none.json")


def test_acknowledgements_carry_their_flags() -> None:
    assert packets.acknowledge(PacketType.PUBREL, 5) == b"\x62\x02\x00\x05"
    assert packets.suback(1, [0, 0x80]) == b"\x90\x04\x00\x01\x00\x80"
    assert packets.parse_subscribe(struct.pack(">H", 3) + text("a") + b"\1") == (3, [("a", 1)])
