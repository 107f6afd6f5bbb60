"""The same probes on the embedded broker and on mosquitto: where MQTT says what happens, both must agree."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path  # noqa: TC003

import pytest

from tests.simulators.mqtt_probe import Probe, close_probes, packet, text
from tests.simulators.processes import embedded_broker, mosquitto_broker, wait_until

BROKERS = [
    pytest.param(embedded_broker, id="embedded"),
    pytest.param(mosquitto_broker, id="mosquitto", marks=pytest.mark.mosquitto),
]


@pytest.fixture(scope="module", params=BROKERS)
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    opened: Callable = request.param
    folder: Path = tmp_path_factory.mktemp("broker")
    with opened(folder) as number:
        yield number


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_probes()


def client(port: int, name: str, **options: object) -> Probe:
    # The embedded broker, when anonymous, takes sessions by user name; one user stands for one identity here.
    probe = Probe(port, name, {"user": "tester", "password": "x"} | options)
    assert probe.code == 0
    return probe


def test_other_protocol_versions_are_refused(port: int) -> None:
    assert Probe(port, "v6", {"level": 6}).code == 1


def test_a_retained_message_reaches_later_subscribers_also_by_wildcard(port: int) -> None:
    a = client(port, "ret-a")
    a.publish("sortline/ret/one", b"kept", 1, retain=True)
    assert a.wait_for(4)
    b = client(port, "ret-b")
    b.subscribe(("sortline/ret/+", 1))
    assert b.messages(1) == [("sortline/ret/one", b"kept", 1, True, False)]
    a.publish("sortline/ret/one", b"", 1, retain=True)
    assert a.wait_for(4)
    c = client(port, "ret-c")
    c.subscribe(("sortline/ret/#", 1))
    # `b` also sees the clearing message, unretained.
    assert b.messages(1) == [("sortline/ret/one", b"", 1, False, False)]
    assert c.messages(1, 0.3) == []


def test_a_client_without_subscription_gets_nothing(port: int) -> None:
    a = client(port, "none-a")
    a.publish("sortline/none", b"x", 0, retain=True)
    assert client(port, "none-b").messages(1, 0.3) == []
    a.publish("sortline/none", b"", 0, retain=True)


@pytest.mark.parametrize(("sent", "granted", "expected"), [(0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_delivered_qos_is_the_lower_one(port: int, sent: int, granted: int, expected: int) -> None:
    topic = f"sortline/qos/{sent}{granted}"
    b = client(port, f"qos-b{sent}{granted}")
    assert b.subscribe((topic, granted)) == [granted]
    a = client(port, f"qos-a{sent}{granted}")
    a.publish(topic, b"x", sent)
    assert b.messages(1)[0][2] == expected


def test_subscribing_again_changes_the_qos_and_repeats_the_retained_message(port: int) -> None:
    a = client(port, "again-a")
    a.publish("sortline/again", b"r", 1, retain=True)
    assert a.wait_for(4)
    b = client(port, "again-b")
    b.subscribe(("sortline/again", 1))
    assert b.messages(1)[0][2:4] == (1, True)
    b.subscribe(("sortline/again", 0))
    assert b.messages(1)[0][2:4] == (0, True)
    a.publish("sortline/again", b"n", 1)
    assert b.messages(1) == [("sortline/again", b"n", 0, False, False)]
    a.publish("sortline/again", b"", 1, retain=True)


def test_overlapping_subscriptions_deliver_once_per_message_at_the_highest_qos(port: int) -> None:
    b = client(port, "over-b")
    b.subscribe(("sortline/over/+", 0), ("sortline/over/x", 1))
    a = client(port, "over-a")
    a.publish("sortline/over/x", b"1", 1)
    found = b.messages(2, 0.5)
    # mosquitto may deliver once per subscription; what matters is that the highest QoS is among them.
    assert max(message[2] for message in found) == 1


def test_a_persistent_session_keeps_what_came_meanwhile_in_order(port: int) -> None:
    b = client(port, "per-b", clean=False)
    assert not b.present
    b.subscribe(("sortline/per", 1))
    b.close()
    a = client(port, "per-a")
    for number in range(50):
        a.publish("sortline/per", str(number).encode(), 1)
        assert a.wait_for(4)
    b = client(port, "per-b", clean=False)
    assert b.present
    assert [m[1] for m in b.messages(50)] == [str(n).encode() for n in range(50)]
    b.close()
    client(port, "per-b", clean=True).close()


def test_an_unacknowledged_message_is_sent_again_with_dup(port: int) -> None:
    b = client(port, "dup-b", clean=False)
    b.subscribe(("sortline/dup", 1))
    a = client(port, "dup-a")
    a.publish("sortline/dup", b"once", 1)
    assert b.messages(1, acknowledge=False) == [("sortline/dup", b"once", 1, False, False)]
    b.close(clean=False)
    b = client(port, "dup-b", clean=False)
    assert b.messages(1) == [("sortline/dup", b"once", 1, False, True)]
    b.close()
    b = client(port, "dup-b", clean=False)
    assert b.messages(1, 0.3) == []
    b.close()
    client(port, "dup-b", clean=True).close()


def test_a_clean_session_keeps_nothing(port: int) -> None:
    b = client(port, "clean-b", clean=False)
    b.subscribe(("sortline/clean", 1))
    b.close()
    client(port, "clean-b", clean=True).close()
    assert not client(port, "clean-b", clean=False).present


@pytest.mark.parametrize("how", ["abrupt", "keep-alive", "disconnect"])
def test_the_will_is_published_unless_the_client_disconnects(port: int, how: str) -> None:
    topic = f"sortline/will/{how}"
    watcher = client(port, f"will-w-{how}")
    watcher.subscribe((topic, 1))
    will = (topic, b"gone", 1, False)
    dying = client(port, f"will-d-{how}", will=will, keep_alive=1 if how == "keep-alive" else 60)
    if how != "keep-alive":
        dying.close(clean=how == "disconnect")
    # mosquitto looks at idle clients every five seconds only.
    found = watcher.messages(1, 9.0 if how != "disconnect" else 0.5)
    assert [m[1] for m in found] == ([] if how == "disconnect" else [b"gone"])


def test_a_second_connection_takes_over_and_the_first_is_closed(port: int) -> None:
    first = client(port, "take")
    second = client(port, "take")
    assert first.closed_by_peer()
    second.subscribe(("sortline/take", 0))
    client(port, "take-a").publish("sortline/take", b"x")
    assert len(second.messages(1)) == 1


def test_qos_2_inbound_arrives_exactly_once(port: int) -> None:
    b = client(port, "two-b")
    b.subscribe(("sortline/two", 1))
    a = client(port, "two-a")
    packet_id = a.publish("sortline/two", b"x", 2)
    assert a.wait_for(5)
    a.send(packet(3, 0b1100, text("sortline/two") + struct.pack(">H", packet_id) + b"x"))
    assert a.wait_for(5)
    a.send(packet(6, 2, struct.pack(">H", packet_id)))
    assert a.wait_for(7)
    assert len(b.messages(2, 0.5)) == 1


def test_a_large_message_passes_whole(port: int) -> None:
    b = client(port, "big-b")
    b.subscribe(("sortline/big", 1))
    payload = bytes(range(256)) * 3900
    client(port, "big-a").publish("sortline/big", payload, 1)
    assert b.messages(1, 5.0)[0][1] == payload


def test_an_empty_client_id_needs_a_clean_session(port: int) -> None:
    assert Probe(port, "", {"user": "tester", "password": "x"}).code == 0
    assert Probe(port, "", {"user": "tester", "password": "x", "clean": False}).code == 2


@pytest.mark.parametrize(
    ("wanted", "topic", "expected"),
    [
        ("sortline/a/+", "sortline/a/b", True),
        ("sortline/a/+", "sortline/a/b/c", False),
        ("sortline/a/#", "sortline/a", True),
        ("sortline/a/#", "sortline/a/b/c", True),
        ("sortline/+/c", "sortline/b/c", True),
        ("sortline/+", "sortline/", True),
        ("sortline/+/+", "sortline/b", False),
        ("sortline/a", "sortline/A", False),
    ],
)
def test_filters_match_as_the_standard_says(port: int, wanted: str, topic: str, expected: bool) -> None:
    name = f"m{abs(hash((wanted, topic))) % 10**9}"
    b = client(port, f"{name}b")
    b.subscribe((wanted, 0))
    client(port, f"{name}a").publish(topic, b"x")
    assert (len(b.messages(1, 1.0 if expected else 0.25)) == 1) is expected


def test_unsubscribing_ends_delivery(port: int) -> None:
    b = client(port, "un-b")
    b.subscribe(("sortline/un", 0))
    b.send(packet(10, 2, struct.pack(">H", 77) + text("sortline/un")))
    answer = b.wait_for(11)
    assert answer
    assert answer.body == struct.pack(">H", 77)
    client(port, "un-a").publish("sortline/un", b"x")
    assert b.messages(1, 0.3) == []


def test_ping_is_answered(port: int) -> None:
    a = client(port, "ping")
    a.send(packet(12, 0, b""))
    assert a.wait_for(13)


@pytest.mark.parametrize(
    "rubbish",
    [
        packet(3, 0b0110, text("sortline/x") + b"\0\1x"),  # QoS 3
        packet(8, 0, struct.pack(">H", 1) + text("sortline/x") + b"\0"),  # wrong flags
        packet(8, 2, struct.pack(">H", 1)),  # no filter
        packet(3, 0, text("sortline/+/x") + b"x"),  # wildcard in a topic
        packet(15, 0, b""),
        packet(0, 0, b""),
        b"\x30\xff\xff\xff\xff\x01",
        packet(1, 0, text("MQTT") + b"\4\2\0\0" + text("again")),  # second CONNECT
    ],
)
def test_a_broken_packet_closes_the_connection(port: int, rubbish: bytes) -> None:
    a = client(port, "broken")
    a.send(rubbish)
    assert a.closed_by_peer()
    wait_until(lambda: Probe(port, "after", {"user": "tester", "password": "x"}).code == 0, "a living broker")
