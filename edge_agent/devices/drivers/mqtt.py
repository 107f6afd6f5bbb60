"""MQTT for drivers: one topic in or out over a `Link`, strict small JSON, and the sender's clock."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import msgspec

from edge_agent.config import BrokerConfig
from edge_agent.mqtt import Incoming, Link, LinkChanged, LinkTrouble
from models.errors import UnavailableError

log = logging.getLogger("sortline.drivers")
MAX_READING_BYTES: Final = 1024
_LATE_IN_A_ROW: Final = 5
_CREEP: Final = 0.001
MessageT = TypeVar("MessageT")


def decode_reading(payload: bytes, kind: type[MessageT], counters: Counter[str]) -> MessageT | None:
    """Decodes a message of a sensor; returns None and counts it when it is anything else."""
    if len(payload) > MAX_READING_BYTES:
        counters["oversize"] += 1
        return None
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        counters["malformed"] += 1
        return None


class SenderClock:
    """Maps a sender's milliseconds to our monotonic seconds: the message that travelled fastest sets the difference.

    The difference may creep up by 0.1 % (clocks drift); a message later than `late_s` behind it is dropped, and five
    such in a row mean that the sender's clock was set or restarted.
    """

    def __init__(self, late_s: float) -> None:
        self._late_s = late_s
        self._offset_s: float | None = None
        self._received_s = 0.0
        self._late = 0
        self.counters: Counter[str] = Counter()

    def local_s(self, at_ms: int, received_s: float) -> float | None:
        """Returns when the sender wrote this, on our clock, at most `received_s`; None for what comes too late."""
        offset_s = received_s - at_ms / 1000.0
        if self._offset_s is None:
            self._offset_s = offset_s
        else:
            crept_s = self._offset_s + _CREEP * max(received_s - self._received_s, 0.0)
            self._offset_s = min(crept_s, offset_s)
        self._received_s = received_s
        if offset_s - self._offset_s > self._late_s:
            self._late += 1
            if self._late < _LATE_IN_A_ROW:
                self.counters["delayed"] += 1
                return None
            self.counters["clock_set"] += 1
            self._offset_s = offset_s
        self._late = 0
        return received_s - (offset_s - self._offset_s)


class TopicFeed(Generic[MessageT]):
    """Subscribes to one topic and delivers the messages of one kind; runs in the link's thread.

    Args:
        broker: Address of the broker, user and password file.
        client_id: MQTT client id.
        topic: Exact topic.
        kind: Struct of the message.
        deliver: Called with each message and its time of arrival.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        broker: BrokerConfig,
        client_id: str,
        topic: str,
        kind: type[MessageT],
        *,
        deliver: Callable[[MessageT, float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topic, self._kind, self._deliver, self._clock = topic, kind, deliver, clock
        self.counters: Counter[str] = Counter()
        self.link = Link(broker, client_id, will=None, deliver=self.take)

    def take(self, event: Incoming | LinkChanged | LinkTrouble) -> bool:
        """Handles an event of the link; never raises."""
        received_s = self._clock()
        if isinstance(event, LinkTrouble):
            return True  # the link has logged it
        if isinstance(event, LinkChanged):
            if event.connected:
                self.link.subscribe([self._topic])
            return True
        if event.topic != self._topic:
            self.counters["foreign_topic"] += 1
            return True
        message = decode_reading(event.payload, self._kind, self.counters)
        if message is not None:
            try:
                self._deliver(message, received_s)
            except Exception:
                self.counters["deliver_failed"] += 1
                log.exception("a reading could not be used")
        return True

    def start(self) -> None:
        """Connects, and reconnects after every loss."""
        self.link.__enter__()

    def close(self) -> None:
        """Ends the connection. May be called twice."""
        self.link.__exit__()


class TopicOut:
    """Publishes to one topic, QoS 1, not retained: an old shot must never be fired later."""

    def __init__(self, broker: BrokerConfig, client_id: str, topic: str) -> None:
        self._topic = topic
        self.link = Link(broker, client_id, will=None, deliver=lambda _event: True)

    def send(self, payload: bytes) -> None:
        """Hands the message to the connection.

        Raises:
            UnavailableError: `driver.no_answer`.
        """
        if not self.link.publish(self._topic, payload):
            raise UnavailableError("driver.no_answer", "The device does not answer.", expected="a broker", got="none")

    def start(self) -> None:
        """Connects, and reconnects after every loss."""
        self.link.__enter__()

    def close(self) -> None:
        """Ends the connection. May be called twice."""
        self.link.__exit__()
