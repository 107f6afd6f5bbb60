"""Attacks on the embedded broker: no stranger connects, reads foreign messages, or slows other clients."""

import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane.broker.access import Role, add_identities, add_identity, remove_identity
from tests.simulators.mqtt_probe import OPENED, Probe, close_probes, connect_packet, packet, text
from tests.simulators.processes import embedded_broker, running, wait_until

AGENT = "sortline/v1/agents"


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_probes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, str], Path]]:
    folder = tmp_path_factory.mktemp("secure")
    path = folder / "credentials.json"
    roles = {"control-plane": Role.CONTROL_PLANE, "line-1": Role.AGENT, "line-2": Role.AGENT, "rogue": Role.AGENT}
    passwords = add_identities(path, roles)
    limits = ("--limit", "connect_deadline_s=1", "--limit", "queued_bytes=4000000", "--limit", "messages_per_s=300")
    with embedded_broker(folder, "--credentials", str(path), *limits) as port:
        yield port, passwords, path


def login(place: tuple[int, dict[str, str], Path], user: str, client_id: str = "", **options: object) -> Probe:
    port, passwords, _ = place
    return Probe(port, client_id or user, {"user": user, "password": passwords[user]} | options)


def raw(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    OPENED.append(connection)
    return connection


def gone(connection: socket.socket, timeout: float) -> bool:
    connection.settimeout(timeout)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_no_and_wrong_passwords_are_refused_and_the_file_holds_none(place) -> None:
    port, passwords, path = place
    for options in ({}, {"user": "line-1"}, {"user": "line-1", "password": "x"}, {"user": "nobody", "password": "x"}):
        assert Probe(port, "line-1", options).code == 4
    assert login(place, "line-1").code == 0
    assert all(password not in path.read_text() for password in passwords.values())
    assert path.stat().st_mode & 0o077 == 0


def test_a_wrong_password_does_not_touch_the_session_of_its_victim(place) -> None:
    victim = login(place, "line-1", clean=False)
    victim.subscribe((f"{AGENT}/line-1/ack", 1))
    assert Probe(place[0], "line-1", {"user": "line-1", "password": "guess", "clean": True}).code == 4
    login(place, "control-plane").publish(f"{AGENT}/line-1/ack", b"yours", 1)
    assert victim.messages(1)[0][1] == b"yours"


def test_another_identity_with_the_victims_client_id_has_a_session_of_its_own(place) -> None:
    victim = login(place, "line-1", "shared", clean=False)
    victim.subscribe((f"{AGENT}/line-1/desired", 1))
    thief = login(place, "rogue", "shared", clean=False)
    assert (thief.code, thief.present) == (0, False)
    login(place, "control-plane").publish(f"{AGENT}/line-1/desired", b"secret", 1)
    assert victim.messages(1)[0][1] == b"secret"
    assert thief.messages(1, 0.3) == []


@pytest.mark.parametrize(
    "wanted",
    ["#", "sortline/#", f"{AGENT}/+/desired", f"{AGENT}/line-2/desired", "$SYS/#", "sortline/v1/blobs/#", "+/+"],
)
def test_an_agent_cannot_subscribe_to_what_is_not_its_own(place, wanted: str) -> None:
    assert login(place, "rogue").subscribe((wanted, 1)) == [0x80]


def test_an_agent_may_read_chunks_and_its_own_topics(place) -> None:
    blob = f"sortline/v1/blobs/{'ab' * 32}"
    wanted = [blob, f"{AGENT}/rogue/desired", f"{AGENT}/rogue/ack", "sortline/v1/sentinel"]
    assert login(place, "rogue").subscribe(*((name, 1) for name in wanted)) == [1, 1, 1, 1]


@pytest.mark.parametrize("topic", [f"{AGENT}/line-1/batch", f"{AGENT}/rogue/desired", "sortline/v1/sentinel", "other"])
def test_a_forbidden_publication_is_acknowledged_but_delivered_to_no_client(place, topic: str) -> None:
    watcher = login(place, "control-plane", "watch")
    watcher.subscribe(("sortline/#", 1))
    watcher.messages(50, 0.2)
    rogue = login(place, "rogue")
    rogue.publish(topic, b"forged", 1, retain=True)
    assert rogue.wait_for(4)
    assert watcher.messages(1, 0.3) == []


def test_a_forbidden_will_is_refused_at_connect(place) -> None:
    assert login(place, "rogue", will=(f"{AGENT}/line-1/presence", b"x", 1, True)).code == 5
    assert login(place, "rogue", will=(f"{AGENT}/rogue/presence", b"x", 1, True)).code == 0


def test_an_oversize_connect_is_closed_before_it_is_stored(place) -> None:
    connection = raw(place[0])
    connection.sendall(b"\x10\xff\xff\xff\x7f" + b"x" * 5000)
    assert gone(connection, 3)


def test_silent_and_slow_clients_are_closed_at_the_deadline(place) -> None:
    silent, slow = raw(place[0]), raw(place[0])
    slow.sendall(connect_packet("slow")[:5])
    assert gone(silent, 4)
    assert gone(slow, 4)


def test_an_oversize_publish_ends_that_client_only(place) -> None:
    other, loud = login(place, "line-2"), login(place, "rogue")
    loud.send(b"\x30" + b"\xff\xff\xff\x7f" + b"x" * 100)
    assert loud.closed_by_peer()
    other.send(packet(12, 0, b""))
    assert other.wait_for(13)


def test_a_reader_that_does_not_read_is_cut_and_the_others_go_on(place) -> None:
    slow = login(place, "line-1")
    slow.subscribe((f"{AGENT}/line-1/desired", 0))
    good = login(place, "line-2")
    good.subscribe((f"{AGENT}/line-2/desired", 1))
    sender = login(place, "control-plane", "bulk")
    for _ in range(40):
        sender.publish(f"{AGENT}/line-1/desired", b"x" * 500_000)
    sender.publish(f"{AGENT}/line-2/desired", b"still here", 1)
    assert good.messages(1, 5.0)[0][1] == b"still here"
    assert slow.closed_by_peer(10)


def test_a_flood_is_slowed_down_and_others_are_not(place) -> None:
    flood = login(place, "rogue")
    flood.socket.settimeout(20)
    body = packet(3, 0, text(f"{AGENT}/rogue/live") + b"x" * 50)
    flood.socket.setblocking(False)
    try:
        for _ in range(50):
            flood.socket.send(body * 200)
    except BlockingIOError:
        pass
    good = login(place, "line-2", "calm")
    good.subscribe((f"{AGENT}/line-2/ack", 1))
    sender = login(place, "control-plane", "calm-sender")
    times = []
    for number in range(20):
        started = time.monotonic()
        sender.publish(f"{AGENT}/line-2/ack", str(number).encode(), 1)
        assert good.messages(1, 3.0)
        times.append(time.monotonic() - started)
    assert sorted(times)[10] < 0.5, "half of the messages must pass while somebody floods"


def test_a_removed_identity_loses_its_connection(place) -> None:
    port, _, path = place
    password = add_identity(path, "line-9", Role.AGENT)
    found: list[Probe] = []

    def admitted() -> bool:
        found.append(Probe(port, "line-9", {"user": "line-9", "password": password}))
        return found[-1].code == 0

    wait_until(admitted, "the new identity")
    remove_identity(path, "line-9")
    assert found[-1].closed_by_peer(5)
    assert Probe(port, "line-9", {"user": "line-9", "password": password}).code == 4


def test_thousands_of_mutated_packets_do_not_hurt(place) -> None:
    rng = random.Random(5)
    seeds = [
        packet(3, 2, text(f"{AGENT}/rogue/live") + struct.pack(">H", 7) + b"payload"),
        packet(8, 2, struct.pack(">H", 9) + text(f"{AGENT}/rogue/ack") + b"\1"),
        packet(10, 2, struct.pack(">H", 9) + text("x")),
        packet(6, 2, struct.pack(">H", 1)),
        connect_packet("rogue", will=("a", b"b", 1, True), user="rogue", password="x"),
    ]
    for _ in range(60):
        probe = login(place, "rogue", f"fuzz{rng.random()}")
        assert probe.code == 0
        data = bytearray(b"".join(rng.choice(seeds) for _ in range(40)))
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            probe.send(bytes(data))
        except OSError:
            continue
    assert login(place, "line-2").code == 0


def test_the_statistics_say_what_was_refused(place) -> None:
    login(place, "rogue").subscribe(("#", 1))
    watcher = login(place, "control-plane", "stats")
    watcher.subscribe(("$SYS/sortline/stats", 0))
    import json

    found = [json.loads(message[1]) for message in watcher.messages(2, 12.0)]
    assert found[-1]["subscribe_denied"] >= 1
    assert found[-1]["closed_bad_credentials"] >= 1


def test_a_port_in_use_is_said_with_what_to_do(place, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "control_plane.broker", "--anonymous", "--port", str(place[0])]
    with running(command, stderr=subprocess.PIPE) as process:
        message = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(300.0) == 1
    assert "broker.port_in_use" in message
    assert str(place[0]) in message
