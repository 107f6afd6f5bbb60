"""Why there is no connection: each cause by its name, said at once and then seldom; and two boxes with one identity."""

import errno
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from edge_agent.config import BrokerConfig
from edge_agent.mqtt import Complaints, Link, LinkChanged, LinkTrouble, cause_of
from models.errors import ConfigError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "broker.refused"),
        (socket.gaierror(-2, "Name or service not known"), "broker.unknown_host"),
        (TimeoutError("timed out"), "broker.timeout"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "broker.unreachable"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "broker.unreachable"),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "broker.tls_failed"),
        (ConfigError("identity.unreadable", "It cannot be used."), "identity.unreadable"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "broker.failed"),
    ],
)
def test_each_cause_has_a_name(error: Exception, code: str) -> None:
    assert cause_of(error) == code


def test_a_cause_is_said_at_once_then_with_growing_pauses_and_another_one_at_once() -> None:
    now = [0.0]
    complaints = Complaints(lambda: now[0])
    said = []
    for second in range(7200):
        now[0] = float(second)
        if complaints.due("broker.refused"):
            said.append(second)
    assert said == [0, 60, 180, 420, 900, 1860, 3780]
    assert complaints.due("broker.timeout")
    assert not complaints.due("broker.timeout")
    complaints.over()
    assert complaints.due("broker.timeout"), "after a connection it is news"
    for second in range(7200, 90_000):
        now[0] = float(second)
        complaints.due("broker.timeout")
    assert complaints.failures > 80_000


class Heard:
    """Everything a link says, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self._more = threading.Condition()

    def __call__(self, event: object) -> bool:
        with self._more:
            self.events.append(event)
            self._more.notify_all()
        return True

    def until(self, kind: type, count: int = 1) -> list[object]:
        with self._more:
            assert self._more.wait_for(lambda: sum(isinstance(e, kind) for e in self.events) >= count, 60.0)
            return [event for event in self.events if isinstance(event, kind)]


def config(port: int, **more: object) -> BrokerConfig:
    return BrokerConfig(port=port, reconnect_min_s=0.01, reconnect_max_s=0.02, **more)  # type: ignore[arg-type]


def test_a_port_where_nothing_listens_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    heard = Heard()
    link = Link(config(port), "line-1", will=None, deliver=heard)
    with link:
        found = heard.until(LinkTrouble)[0]
        assert isinstance(found, LinkTrouble)
        assert found.code == "broker.refused"
        assert f"127.0.0.1:{port}" in found.message
        while link.counters["connect_failed"] < 5:
            threading.Event().wait(0.01)
    assert len(heard.until(LinkTrouble)) == 1
    assert caplog.text.count("broker.refused") == 1


class Broker:
    """A listener that answers every CONNECT as a test says, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(30.0)
                connection.recv(1024)
                if self.answer:
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1024)


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    found = Broker(request.param)
    yield found
    found.server.close()


@pytest.mark.parametrize(
    ("broker", "code"),
    [
        (b"\x20\x02\x00\x04", "broker.not_authorised"),
        (b"\x20\x02\x00\x05", "broker.not_authorised"),
        (b"\x20\x02\x00\x03", "broker.unavailable"),
        (b"", "broker.closed"),
    ],
    indirect=["broker"],
)
def test_a_broker_that_refuses_is_named(broker: Broker, code: str) -> None:
    heard = Heard()
    with Link(config(broker.port), "line-1", will=None, deliver=heard):
        trouble = heard.until(LinkTrouble)[0]
    assert isinstance(trouble, LinkTrouble)
    assert trouble.code == code


@pytest.mark.parametrize("broker", [b"\x20\x02\x00\x00"], indirect=True)
def test_being_thrown_out_again_and_again_is_named_once(broker: Broker) -> None:
    heard = Heard()
    link = Link(config(broker.port), "line-1", will=None, deliver=heard)
    with link:
        trouble = heard.until(LinkTrouble)[0]
        heard.until(LinkChanged, 16)
    assert isinstance(trouble, LinkTrouble)
    assert trouble.code == "identity.shared"
    assert [event.code for event in heard.events if isinstance(event, LinkTrouble)] == ["identity.shared"]
    assert link.counters["thrown_out"] == 1
    assert link.address == "127.0.0.1"


def test_a_connection_that_lasts_ends_the_suspicion() -> None:
    now, heard = [0.0], Heard()
    link = Link(BrokerConfig(), "line-1", will=None, deliver=heard, clock=lambda: now[0])
    for _ in range(4):
        link._connected.set()
        link._since_s = now[0]
        now[0] += 2.0
        link._lost("gone")
    link._since_s = now[0]
    for _ in range(130):
        now[0] += 1.0
        link._look_at_age()
    codes = [event.code for event in heard.events if isinstance(event, LinkTrouble)]
    assert codes == ["identity.shared", "identity.alone"]


def test_a_bad_network_is_no_second_box() -> None:
    now, heard = [0.0], Heard()
    link = Link(BrokerConfig(), "line-1", will=None, deliver=heard, clock=lambda: now[0])
    for _ in range(20):
        link._connected.set()
        link._since_s = now[0]
        now[0] += 90.0
        link._lost("gone")
    assert not [event for event in heard.events if isinstance(event, LinkTrouble)]
