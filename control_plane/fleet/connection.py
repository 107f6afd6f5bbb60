"""The control plane's two connections to the MQTT broker; the only module of the control plane that imports paho.

Telemetry never delays control: the *bulk* connection carries batches, live figures and blobs, the *control* connection
carries presence, reports and desired states. Callbacks only hand a message over;
their content is handled by `intake` and `ingest`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from control_plane.config import BrokerConfig
from control_plane.identity.tls import client_context, load_client
from models.connection import guarded, read_secret
from models.errors import UnavailableError
from models.messages import KEEP_ALIVE_S
from models.topics import ROOT, SENTINEL_TOPIC, Channel

log = logging.getLogger("sortline.fleet")
Deliver = Callable[[str, bytes, bool], None]
"""Takes topic, payload, and whether the message is a retained one that the broker had kept."""
_CONTROL: Final = (Channel.PRESENCE, Channel.REPORTED, Channel.RESPONSE)
_BULK: Final = (Channel.BATCH, Channel.REQUEST)


class BrokerConnection:
    """Both connections.

    Args:
        config: The broker.
        deliver: Takes every message of an agent, on a thread of paho; it must not block and must not raise.
        counters: Counts what happened.
        client_id: Prefix of the two MQTT client ids.
        certificates: Folder with `ca.pem`, `control.pem`, `bulk.pem`; None = password, no TLS.

    Attributes:
        connected_again: Set at every connect of the control connection; the outbox clears it when it has acted on it.
        sentinel_seen: Set when the broker delivered the sentinel after that connect: it has kept its store.

    Raises:
        ConfigError: `site.bad_certificate`, `broker.no_password`.
    """

    def __init__(
        self,
        config: BrokerConfig,
        deliver: Deliver,
        counters: Counter[str],
        *,
        client_id: str = "control-plane",
        certificates: Path | None = None,
    ) -> None:
        self._config, self._deliver, self._counters = config, deliver, counters
        self._certificates = certificates
        self.connected_again = threading.Event()
        self.sentinel_seen = threading.Event()
        self._live = self._stopped = False
        self._outage = threading.Lock()
        self._away_since_s: float | None = None
        self._attempts = 0
        self.control = self._client("control", client_id, _CONTROL)
        self.bulk = self._client("bulk", client_id, _BULK)

    def _client(self, stem: str, client_id: str, channels: tuple[Channel, ...]) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=f"{client_id}-{stem}", clean_session=True, protocol=mqtt.MQTTv311
        )
        if self._certificates is None:
            client.username_pw_set(self._config.username, read_secret(self._config.password_file))
        else:
            own = f"{stem}-{self._config.replica}" if self._config.replica else stem
            context, pair = client_context(self._certificates, own), self._certificates / f"{own}.pem"
            client.tls_set_context(context)
            # Renewed certificates, and a new root beside the old one, are used from the next connection on.
            client.on_pre_connect = guarded(lambda *_: load_client(context, pair), self._counters, log)
        client.max_queued_messages_set(0)  # bounded by the number of agents: blobs are sent a few at a time
        client.max_inflight_messages_set(64)
        client.reconnect_delay_set(1, 15)
        client.on_connect = guarded(
            lambda _c, _d, _f, reason, _p: self._connected(client, channels, reason), self._counters, log
        )
        client.on_connect_fail = guarded(lambda *_: self._lost("it cannot be reached"), self._counters, log)
        client.on_disconnect = guarded(lambda _c, _d, _f, reason, _p: self._lost(str(reason)), self._counters, log)
        client.on_message = guarded(self._receive, self._counters, log)
        return client

    def _lost(self, reason: str) -> None:
        """Writes one line when the broker goes; more losses and attempts are counted until both connections stand."""
        self._counters["disconnected"] += 1
        with self._outage:
            if self._stopped:
                return
            self._attempts += 1
            if self._away_since_s is not None:
                return
            self._away_since_s = time.monotonic()
        where = f"{self._config.host}:{self._config.port}"
        log.warning("the broker at %s is away, which is written once, and is tried again: %s", where, reason)

    def _found(self) -> None:
        with self._outage:
            since_s, attempts = self._away_since_s, self._attempts
            if since_s is None or not self.connected:
                return
            self._away_since_s, self._attempts = None, 0
        log.warning("the broker is back after %.0f s; %s losses and attempts", time.monotonic() - since_s, attempts)

    def _connected(self, client: mqtt.Client, channels: tuple[Channel, ...], reason: Any) -> None:
        if reason.is_failure:
            self._counters["refused"] += 1
            log.warning("the broker refused the control plane: %s", reason)
            return
        self._counters["connected"] += 1
        self._found()
        client.subscribe([(_topic(channel), 1) for channel in channels])
        if Channel.PRESENCE in channels:
            self.sentinel_seen.clear()
            client.subscribe(SENTINEL_TOPIC, 1)
            self.connected_again.set()
        elif self._live:
            client.subscribe(_topic(Channel.LIVE), 0)

    def _receive(self, _client: Any, _data: Any, message: Any) -> None:
        if message.topic == SENTINEL_TOPIC:
            self.sentinel_seen.set()
        else:
            self._deliver(message.topic, bytes(message.payload), bool(message.retain))

    def start(self) -> None:
        """Connects in the background, and again whenever a connection is lost."""
        for client in (self.control, self.bulk):
            client.connect_async(self._config.host, self._config.port, keepalive=KEEP_ALIVE_S)
            client.loop_start()

    def stop(self) -> None:
        """Disconnects and ends paho's threads."""
        self._stopped = True
        for client in (self.bulk, self.control):
            client.disconnect()
            client.loop_stop()

    @property
    def connected(self) -> bool:
        """Whether both connections stand."""
        return bool(self.control.is_connected() and self.bulk.is_connected())

    def check_connected(self) -> None:
        """Refuses what would only wait for the broker.

        Raises:
            UnavailableError: `broker.not_connected`.
        """
        if not self.control.is_connected():
            raise UnavailableError("broker.not_connected", "The broker is not connected; try again.")

    def publish_confirmed(self, topic: str, payload: bytes, timeout_s: float) -> bool:
        """Publishes with QoS 1 and waits; returns whether the broker confirmed it in time.

        Raises:
            UnavailableError: `broker.not_connected`.
        """
        self.check_connected()
        sent = self.control.publish(topic, payload, qos=1)
        sent.wait_for_publish(timeout_s)
        return bool(sent.is_published())

    def follow_live(self, *, wanted: bool) -> None:
        """Subscribes to the live figures of all agents while somebody looks, and to none otherwise.

        They are five of six messages an agent sends, lossy by contract, and only pages and the API show them.
        """
        if wanted == self._live:
            return
        self._live = wanted
        if wanted:
            self.bulk.subscribe(_topic(Channel.LIVE), 0)
        else:
            self.bulk.unsubscribe(_topic(Channel.LIVE))


def _topic(channel: Channel) -> str:
    return f"{ROOT}/agents/+/{channel}"
