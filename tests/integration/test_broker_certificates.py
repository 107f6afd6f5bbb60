"""Mutual TLS on both brokers: revocation, expiry and rotation of certificates, and unauthenticated peers."""

import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from control_plane.identity.certificates import (
    AGENT_URI,
    certificate_pem,
    issue_client,
)
from control_plane.identity.publication import publish_admission, refresh_site
from models.messages import KEEP_ALIVE_S
from models.topics import bin_of, bin_topic
from tests.simulators.broker_place import BROKERS, Place, open_place
from tests.simulators.mqtt_probe import OPENED, Probe, close_probes, packet, text
from tests.simulators.processes import wait_until
from tests.simulators.site import embedded_mtls, key_text, new_key

AGENTS = "sortline/v1/agents"
BLOB = f"sortline/v1/blobs/{'ab' * 32}"
BIN = bin_topic(bin_of("line-1"))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_probes()


@pytest.fixture(scope="module", params=BROKERS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One broker for the tests that change nothing."""
    with open_place(request.param, tmp_path_factory.mktemp("shared")) as found:
        yield found


@pytest.fixture(params=BROKERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A broker of its own for a test that changes trust, admission or certificates."""
    with open_place(request.param, tmp_path) as found:
        yield found


# -- revocation, expiry, rotation -------------------------------------------------------------------------------------


def test_a_revoked_agent_gets_no_data_and_does_not_come_back(place: Place) -> None:
    agent, plane = place.agent("line-1"), place.plane("bulk")
    other = place.agent("line-2")
    for probe, name in ((agent, "line-1"), (other, "line-2")):
        probe.subscribe((f"{AGENTS}/{name}/desired", 1))
    place.site.enrolment.revoke("line-1", reason="stolen", actor="test", now=place.site.now)
    revoked = time.monotonic()

    def silenced() -> bool:
        """A message sent now does not arrive: the agent has no connection any more, or no right."""
        plane.publish(f"{AGENTS}/line-1/desired", b"secret", 1)
        assert plane.wait_for(4)
        return not agent.messages(1, 0.2)

    wait_until(silenced, "the silence")
    assert time.monotonic() - revoked < 5.0
    wait_until(lambda: place.connect(place.site.folder / "line-1.pair", "line-1").code != 0, "the refusal")
    plane.publish(f"{AGENTS}/line-2/desired", b"still", 1)
    assert other.messages(1)[0][1] == b"still"
    assert place.agent("line-2")


def test_an_agent_that_enrolls_now_is_admitted_now(place: Place) -> None:
    place.site.pair("line-3", place.site.folder / "line-3.pair")
    if place.embedded:
        assert place.connect(place.site.folder / "line-3.pair", "line-3").code == 0, "at the first attempt"
    plane = place.plane()

    def heard() -> bool:
        agent = place.agent("line-3")
        agent.subscribe((f"{AGENTS}/line-3/desired", 1))
        plane.publish(f"{AGENTS}/line-3/desired", b"hello", 1)
        return bool(agent.messages(1, 0.5))

    wait_until(heard, "the first message")


def test_the_old_certificate_is_refused_after_a_box_was_replaced(place: Place) -> None:
    old = place.site.folder / "line-1.pair"
    new = place.site.pair("line-1", place.site.folder / "new.pair")
    wait_until(lambda: place.connect(old, "line-1").code != 0, "the refusal of the old certificate")
    assert place.connect(new, "line-1").code == 0
    assert place.connect(old, "line-1").code != 0


def test_an_old_revocation_list_locks_no_agent_out(place: Place) -> None:
    """The upkeep did not run for a year: good agents still connect, revoked ones still do not."""
    site = place.site
    site.enrolment.revoke("line-2", reason="x", actor="x", now=site.now)
    agents, revoked = site.enrolment.admitted(site.now)
    (site.files / "crl.pem").unlink()
    publish_admission(site.enrolment.authority, agents, revoked, site.now - timedelta(days=390))
    for follower in site.followers:
        follower()
    wait_until(lambda: place.connect(site.folder / "line-2.pair", "line-2").code != 0, "the refusal")
    for _ in range(3):
        assert place.agent("line-1")


def test_a_new_issuing_authority_interrupts_no_agent(place: Place) -> None:
    site = place.site
    site.enrolment.authority.rotate(site.now, keep_root=True)
    site.publisher.publish()
    new = site.pair("line-3", site.folder / "line-3.pair")
    wait_until(lambda: place.connect(new, "line-3").code == 0, "the new issuer's certificate")
    assert place.agent("line-1"), "the old issuer's certificate"
    site.enrolment.revoke("line-1", reason="x", actor="x", now=site.now)
    wait_until(lambda: place.connect(site.folder / "line-1.pair").code != 0, "a revocation under the old issuer")
    assert place.connect(new, "line-3").code == 0


def test_a_new_authority_cuts_no_agent_off(tmp_path: Path) -> None:
    """Runs on the embedded broker only: mosquitto reads its trust when it starts."""
    with open_place(embedded_mtls, tmp_path) as place:
        site = place.site
        before = place.agent("line-1")
        before.subscribe((f"{AGENTS}/line-1/ack", 1))
        old_trust = site.tls(site.folder / "line-2.pair")
        site.enrolment.authority.rotate(site.now)
        site.publisher.publish()
        site.pair("line-3", site.folder / "line-3.pair")
        wait_until(lambda: place.connect(site.folder / "line-3.pair").code == 0, "the new certificate")
        assert place.agent("line-1", "again").code == 0, "the old certificate is good"
        stale = Probe(place.port, "line-2", {}, tls=old_trust)
        assert stale.code == 0, "a client that trusts only the old root still trusts the broker"
        refresh_site(site.enrolment.authority.retire(), site.now)
        assert stale.closed_by_peer(5), "the trust was withdrawn: every client must authenticate again"
        wait_until(lambda: place.connect(site.folder / "line-1.pair").code is None, "the refusal of the old one")
        assert place.agent("line-3")


@pytest.mark.slow
def test_a_certificate_that_ends_ends_its_connection(tmp_path: Path) -> None:
    with open_place(embedded_mtls, tmp_path) as place:
        key, path = new_key(), place.site.folder / "short.pair"
        issuer = place.site.enrolment.authority.issuer
        soon = place.site.now - timedelta(days=30) + timedelta(seconds=4)
        leaf = issue_client(issuer, key.public_key(), "line-1", AGENT_URI + "line-1", soon)
        path.write_bytes(key_text(key) + certificate_pem(leaf) + place.site.enrolment.authority.chain_pem)
        agent = place.connect(path, "line-1")
        assert agent.code == 0
        assert agent.closed_by_peer(10)


# -- unauthenticated peers -------------------------------------------------------------------------------------------


def broker_process(port: int) -> Path:
    """Returns the folder in /proc of the broker that listens on a port."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace")
            if "control_plane.broker" in arguments and _listens(folder.name, port):
                return folder
    raise AssertionError("no such process")


def resident(process: Path) -> int:
    """Returns the resident memory of a process in bytes."""
    return int((process / "status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def _listens(pid: str, port: int) -> bool:
    inodes = {
        line.split()[9]
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    links = (str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return bool({f"socket:[{inode}]" for inode in inodes} & set(links))


def raw_tls(place: Place, name: str) -> ssl.SSLSocket:
    """Returns a connection whose TLS handshake is complete and that has sent no MQTT packet yet."""
    connection = socket.create_connection(("127.0.0.1", place.port), timeout=300)
    OPENED.append(connection)
    found = place.site.tls(place.site.folder / f"{name}.pair").wrap_socket(connection, server_hostname="127.0.0.1")
    OPENED.append(found)
    return found


@pytest.mark.slow
def test_unproven_peers_cost_little_and_are_gone_in_five_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The peers are silent sockets, half a handshake, and certificates whose CONNECT is endless or never comes."""
    with open_place(embedded_mtls, tmp_path) as place:
        victim = place.agent("line-2")
        place.agent("line-1").close()  # what a first TLS connection takes once is not counted
        process = broker_process(place.port)
        before, started = resident(process), time.monotonic()
        sockets = [socket.create_connection(("127.0.0.1", place.port), timeout=300) for _ in range(200)]
        OPENED.extend(sockets)
        for slow in sockets[:100]:
            slow.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a ClientHello
        mute, *greedy = [raw_tls(place, "line-1") for _ in range(5)]
        for one in greedy:
            with contextlib.suppress(OSError):
                one.sendall(b"\x10\xff\xff\xff\x7f" + b"x" * 100_000)
        peak = resident(process)
        for one in (*sockets, mute, *greedy):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while one.recv(4096):
                    pass
            peak = max(peak, resident(process))
        elapsed = time.monotonic() - started
        with capsys.disabled():
            sys.stdout.write(f"\n205 unproven peers: gone after {elapsed:.1f} s, {(peak - before) / 1e6:.1f} MB more\n")
        assert elapsed < 8.0, "each is gone five seconds after it came"
        assert peak - before <= 5_000_000
        victim.send(packet(12, 0, b""))
        assert victim.wait_for(13)


@pytest.mark.slow
def test_an_agent_that_keeps_flooding_is_disconnected_for_a_while(tmp_path: Path) -> None:
    limits = ("--limit", "quarantine_after_s=2", "--limit", "quarantine_s=3", "--limit", "agent_messages_per_s=50")
    with open_place(lambda site, folder: embedded_mtls(site, folder, *limits), tmp_path) as place:
        good = place.agent("line-2")
        good.subscribe((f"{AGENTS}/line-2/ack", 1))
        flood = place.agent("line-1")
        body = packet(3, 0, text(f"{AGENTS}/line-1/live") + b"x" * 50) * 100
        stop = threading.Event()

        def pour() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    flood.socket.sendall(body)

        thread = threading.Thread(target=pour)
        thread.start()
        try:
            thread.join(15)
            assert not thread.is_alive(), "the flooding agent is cut off"
        finally:
            stop.set()
            flood.socket.close()
            thread.join(5)
        assert place.connect(place.site.folder / "line-1.pair", "line-1").code == 3
        place.plane().publish(f"{AGENTS}/line-2/ack", b"calm", 1)
        assert good.messages(1)[0][1] == b"calm"
        wait_until(lambda: place.connect(place.site.folder / "line-1.pair").code == 0, "the second chance")


def test_a_burst_is_no_flood(tmp_path: Path) -> None:
    from control_plane.broker.sessions import BrokerLimits, Quarantine

    quarantine = Quarantine(BrokerLimits())
    now = 0.0
    for _ in range(100):  # ten seconds held back, then ten minutes of peace, again and again
        assert not quarantine.record_throttling("line-1", 10.0, now)
        now += 600.0
    for second in range(100):
        if quarantine.record_throttling("rogue", 1.0, now + second):
            break
    assert 25 <= second <= 35
    assert quarantine.holds("rogue", now + second + 59)
    assert quarantine.names(now + second) == ["rogue"]
    assert not quarantine.holds("rogue", now + second + 61)
    for again in range(100):
        if quarantine.record_throttling("rogue", 1.0, now + 200 + again):
            break
    assert quarantine.holds("rogue", now + 200 + again + 110), "the second time is longer"


@pytest.mark.slow
def test_a_peer_that_is_silent_for_its_keep_alive_is_shown_offline_in_time(shared: Place) -> None:
    """A cable that was pulled: the will comes after one and a half keep-alives; mosquitto looks every 5 s."""
    watcher = shared.plane()
    watcher.subscribe((f"{AGENTS}/line-1/presence", 1))
    shared.agent("line-1", keep_alive=KEEP_ALIVE_S, will=(f"{AGENTS}/line-1/presence", b"offline", 1, False))
    started = time.monotonic()
    while not (found := watcher.messages(1, 5.0)):
        assert time.monotonic() - started < 29.0
        watcher.send(packet(12, 0, b""))
    assert found[0][1] == b"offline"
    assert 1.5 * KEEP_ALIVE_S - 1.0 <= time.monotonic() - started <= 25.0
