"""The agent's MQTT connection. Its lifetime is a `with` block; its callbacks only enqueue.

An exception in a paho callback ends paho's thread without a word, so every callback is guarded and counted. Nothing
is queued while there is no connection: what matters is in the spool or published again after the next connect.
"""

import logging
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.config import BrokerConfig
from edge_agent.identity.certificate import BrokerTls
from models.connection import guarded, read_secret
from models.errors import ConfigError
from models.messages import KEEP_ALIVE_S
from models.topics import MAX_BLOB_BYTES

log = logging.getLogger("sortline.link")


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
        deliver: Callable[[Incoming | LinkChanged], bool],
        rng: random.Random | None = None,
    ) -> None:
        self._config, self._deliver = config, deliver
        self._rng = rng or random.Random()  # noqa: S311  spreads load, keeps no secret
        self.counters: Counter[str] = Counter()
        self._connected = threading.Event()
        self._stopping = threading.Event()
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
                while not self._stopping.is_set() and self._client.loop(0.5) == mqtt.MQTT_ERR_SUCCESS:
                    if self._connected.is_set():
                        wait_s = self._config.reconnect_min_s
            except (OSError, ValueError, ConfigError) as error:
                self.counters["connect_failed"] += 1
                log.debug("no connection: %s", error)
                if isinstance(error, (ConfigError, ssl.SSLError)):
                    self.counters["tls_failed"] += 1
                    log.warning("no connection by TLS: %s", error)
            self._lost("connection lost")
            wait_s = min(wait_s * 2.0, self._config.reconnect_max_s)
            self._stopping.wait(self._rng.uniform(self._config.reconnect_min_s / 2.0, wait_s))
        # Say goodbye properly, so that the will is not published by a planned stop.
        self._client.loop(0.1)

    def _on_connect(self, _client: object, _data: object, _flags: object, reason: Any, _props: object) -> None:
        if reason.is_failure:
            self.counters["refused"] += 1
            log.warning("the broker refused us: %s", reason)
            return
        self.counters["connected"] += 1
        self._connected.set()
        self._offer(LinkChanged(connected=True))

    def _on_disconnect(self, _client: object, _data: object, _flags: object, reason: Any, _props: object) -> None:
        self._lost(str(reason))

    def _lost(self, reason: str) -> None:
        if self._connected.is_set():
            self._connected.clear()
            self.counters["lost"] += 1
            self._offer(LinkChanged(connected=False, reason=reason))

    def _on_message(self, _client: object, _data: object, message: Any) -> None:
        if len(message.payload) > MAX_BLOB_BYTES:
            self.counters["oversize"] += 1
            return
        self._offer(Incoming(message.topic, bytes(message.payload)))

    def _on_subscribe(self, _client: object, _data: object, _mid: object, reasons: Any, _props: object) -> None:
        if any(reason.is_failure for reason in reasons):
            self.counters["subscribe_refused"] += 1
            log.warning("the broker refused a subscription")

    def _offer(self, event: Incoming | LinkChanged) -> None:
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
