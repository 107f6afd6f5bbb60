"""The agent's MQTT connection. Its lifetime is a `with` block; its callbacks only enqueue.

An exception in a paho callback ends paho's thread without a word, so every callback is guarded and counted. Nothing
is queued while there is no connection: what matters is in the spool or published again after the next connect.
"""

import errno
import logging
import random
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.config import BrokerConfig
from edge_agent.identity.certificate import BrokerTls
from models.connection import guarded, read_secret
from models.errors import ConfigError, SortlineError
from models.messages import KEEP_ALIVE_S
from models.topics import MAX_BLOB_BYTES

log = logging.getLogger("sortline.link")
_FIRST_SILENCE_S: Final = 60.0
_LONGEST_SILENCE_S: Final = 3600.0
"""A cause that lasts is said again after a minute, then after twice that, at last once an hour."""
_SHORT_LIFE_S: Final = 60.0
_THROWN_OUT: Final = 4
_THROWN_OUT_WITHIN_S: Final = 300.0
"""Two boxes with one identity throw each other out every few seconds; a bad network rarely is so fast."""
_CAUSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ssl.SSLError, "broker.tls_failed"),
    (socket.gaierror, "broker.unknown_host"),
    (ConnectionRefusedError, "broker.refused"),
    (TimeoutError, "broker.timeout"),
)
_LASTING_S: Final = 120.0
"""A connection that lasts so long is this box's own."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from the broker."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """The connection came or went."""

    connected: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LinkTrouble:
    """Why there is no connection, or none that lasts; `identity.alone` = that is over."""

    code: str
    message: str


class Complaints:
    """Says why there is no connection: each cause at once, then now and then while it lasts.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._code, self._next_s, self._pause_s, self.failures = "", 0.0, 0.0, 0

    def due(self, code: str) -> bool:
        """Counts a failure with this cause; returns whether it is time to say so."""
        now_s = self._clock()
        self.failures += 1
        if code != self._code:
            self._code, self._pause_s = code, _FIRST_SILENCE_S
        elif now_s < self._next_s:
            return False
        else:
            self._pause_s = min(self._pause_s * 2.0, _LONGEST_SILENCE_S)
        self._next_s = now_s + self._pause_s
        return True

    def over(self) -> None:
        """There is a connection: the next failure is a new one."""
        self._code, self.failures = "", 0


def cause_of(error: Exception) -> str:
    """Returns the stable code of what keeps a connection from being made."""
    if isinstance(error, SortlineError):
        return error.code
    if isinstance(error, OSError) and error.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}:
        return "broker.unreachable"
    return next((code for kind, code in _CAUSES if isinstance(error, kind)), "broker.failed")


class Link:
    """One connection of one agent.

    Args:
        config: The broker.
        client_id: The agent's id; also the user name unless the configuration says otherwise.
        will: Topic and payload the broker publishes (retained) when we vanish; None = nothing.
        deliver: Gets every `Incoming` and `LinkChanged`; must not block.
        rng: Spreads reconnects.
    """

    def __init__(
        self,
        config: BrokerConfig,
        client_id: str,
        *,
        will: tuple[str, bytes] | None,
        deliver: Callable[[Incoming | LinkChanged | LinkTrouble], bool],
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._deliver, self._clock = config, deliver, clock
        self._complaints = Complaints(clock)
        self._since_s = 0.0
        """When the present connection began."""
        self.address = ""
        """This box's own address in the connection made last; empty before the first one."""
        self._short: deque[float] = deque(maxlen=_THROWN_OUT)
        """When connections that did not last ended."""
        self._shared = False
        """Something ends the connections soon after they begin."""
        self._rng = rng or random.Random()  # noqa: S311  spreads load, keeps no secret
        self.counters: Counter[str] = Counter()
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._answered = False
        """The broker has said whether it takes this connection."""
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True, protocol=mqtt.MQTTv311
        )
        self._tls = BrokerTls(config) if config.tls_ca else None
        if self._tls is not None:
            client.tls_set_context(self._tls.context)
        if not config.tls_cert:
            client.username_pw_set(config.username or client_id, read_secret(config.password_file))
        if will is not None:
            client.will_set(*will, qos=1, retain=True)
        client.max_queued_messages_set(256)
        client.on_connect = guarded(self._on_connect, self.counters, log)
        client.on_disconnect = guarded(self._on_disconnect, self.counters, log)
        client.on_message = guarded(self._on_message, self.counters, log)
        client.on_subscribe = guarded(self._on_subscribe, self.counters, log)
        # paho 2.2 else writes from whatever thread publishes, and two threads must not use one TLS connection at once.
        client.on_socket_register_write = lambda *_: None
        self._client = client
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._client.disconnect()
        self._thread.join(3.0)

    def _run(self) -> None:
        """Connects, and again after every loss, at random intervals that grow."""
        wait_s = self._config.reconnect_min_s
        while not self._stopping.is_set():
            try:
                if self._tls is not None:
                    self._tls.follow()
                self._client.connect(self._config.host, self._config.port, keepalive=KEEP_ALIVE_S)
                self._answered = False
                while not self._stopping.is_set() and self._client.loop(0.5) == mqtt.MQTT_ERR_SUCCESS:
                    if self._connected.is_set():
                        wait_s = self._config.reconnect_min_s
                        self._look_at_age()
                if not self._answered and not self._stopping.is_set():
                    self._complain("broker.closed", "The broker ended the connection before it had accepted it.")
            except (OSError, ValueError, ConfigError) as error:
                self.counters["connect_failed"] += 1
                if isinstance(error, (ConfigError, ssl.SSLError)):
                    self.counters["tls_failed"] += 1
                self._complain(cause_of(error), str(error))
            self._lost("connection lost")
            wait_s = min(wait_s * 2.0, self._config.reconnect_max_s)
            self._stopping.wait(self._rng.uniform(self._config.reconnect_min_s / 2.0, wait_s))
        # Say goodbye properly, so that the will is not published by a planned stop.
        self._client.loop(0.1)

    def _complain(self, code: str, message: str) -> None:
        if self._complaints.due(code):
            host = self._config.host
            place = f"[{host}]:{self._config.port}" if ":" in host else f"{host}:{self._config.port}"
            log.warning("no connection to %s: %s: %s (failure %d)", place, code, message, self._complaints.failures)
            self._offer(LinkTrouble(code, f"{place}: {message}"[:600]))

    def _look_at_age(self) -> None:
        """A connection that has lasted ends what was said about those before."""
        if self._shared and self._clock() - self._since_s > _LASTING_S:
            self._shared = False
            self._short.clear()
            self._offer(LinkTrouble("identity.alone", "The connection to the broker lasts again."))

    def _on_connect(self, _client: object, _data: object, _flags: object, reason: Any, _props: object) -> None:
        self._answered = True
        if reason.is_failure:
            self.counters["refused"] += 1
            denied = str(reason) in {"Bad user name or password", "Not authorized"}
            self._complain("broker.not_authorised" if denied else "broker.unavailable", f"The broker says: {reason}.")
            return
        self._complaints.over()
        self._since_s = self._clock()
        self.address = self._own_address() or self.address
        self.counters["connected"] += 1
        self._connected.set()
        self._offer(LinkChanged(connected=True))

    def _own_address(self) -> str:
        connection = self._client.socket()
        try:
            return str(connection.getsockname()[0]) if isinstance(connection, socket.socket) else ""
        except OSError:  # the connection ended meanwhile
            return ""

    def _on_disconnect(self, _client: object, _data: object, _flags: object, reason: Any, _props: object) -> None:
        self._lost(str(reason))

    def _lost(self, reason: str) -> None:
        if self._connected.is_set():
            self._connected.clear()
            self.counters["lost"] += 1
            self._note_short_life()
            self._offer(LinkChanged(connected=False, reason=reason))

    def _note_short_life(self) -> None:
        """Names what MQTT 3.1.1 does not say: a broker ends a connection when another with its name begins."""
        now_s = self._clock()
        if self._stopping.is_set() or now_s - self._since_s > _SHORT_LIFE_S:
            return
        self._short.append(now_s)
        if len(self._short) == _THROWN_OUT and now_s - self._short[0] < _THROWN_OUT_WITHIN_S and not self._shared:
            self._shared = True
            self.counters["thrown_out"] += 1
            message = (
                f"The broker ended {_THROWN_OUT} connections soon after they began: another box may use the identity of"
                " this one (a copied disk). Enrol one of the two again."
            )
            log.warning("identity.shared: %s", message)
            self._offer(LinkTrouble("identity.shared", message))

    def _on_message(self, _client: object, _data: object, message: Any) -> None:
        if len(message.payload) > MAX_BLOB_BYTES:
            self.counters["oversize"] += 1
            return
        self._offer(Incoming(message.topic, bytes(message.payload)))

    def _on_subscribe(self, _client: object, _data: object, _mid: object, reasons: Any, _props: object) -> None:
        if any(reason.is_failure for reason in reasons):
            self.counters["subscribe_refused"] += 1
            log.warning("the broker refused a subscription")

    def _offer(self, event: Incoming | LinkChanged | LinkTrouble) -> None:
        if not self._deliver(event):
            self.counters["incoming_dropped"] += 1

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected.is_set()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hands a message to the connection; False when there is none or it is congested."""
        if not self._connected.is_set():
            return False
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:
            self.counters["publish_failed"] += 1
            return False
        return True

    def subscribe(self, topics: list[str]) -> None:
        """Subscribes to exact topics, QoS 1."""
        if topics and self._connected.is_set():
            self._client.subscribe([(topic, 1) for topic in topics])

    def unsubscribe(self, topics: list[str]) -> None:
        """Ends subscriptions."""
        if topics and self._connected.is_set():
            self._client.unsubscribe(topics)
