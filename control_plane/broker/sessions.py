"""State that outlives a connection: limits, counters, messages, sessions."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from control_plane.broker.access import Identity

MIB = 1024 * 1024


class BrokerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every bound of the broker."""

    connect_deadline_s: float = 5.0
    """Seconds from accept to a verified CONNECT."""
    silent: int = 512
    """Accepted sockets without a first byte; one more closes the oldest."""
    handshakes: int = 32
    """TLS handshakes at a time; further connections wait, and replace one that takes longer than a second."""
    connect_bytes: int = 4096
    """Largest packet before authentication; a will is part of CONNECT."""
    packet_bytes: int = MIB
    """Largest packet after authentication."""
    connections: int = 1000
    sessions: int = 2000
    session_expiry_s: float = 24 * 3600.0
    """Seconds without its client after which a persistent session is removed."""
    subscriptions: int = 512
    """Subscriptions per session."""
    inflight: int = 32
    """QoS 1 messages sent and not yet acknowledged, per session."""
    queued_messages: int = 10_000
    """Waiting QoS 1 messages per session; the newest is dropped."""
    queued_bytes: int = 64 * MIB
    """Waiting bytes per session, queued or unsent. A client that reads too slowly is disconnected at this bound."""
    retained_messages: int = 100_000
    retained_bytes: int = 2048 * MIB
    messages_per_s: float = 2000.0
    """PUBLISH packets per connection; above it the broker stops reading (back-pressure), it drops nothing."""
    agent_messages_per_s: float = 400.0
    """The same for an agent; a drain of 10,000 records per second is 20 packets per second."""
    bytes_per_s: float = 64.0 * MIB
    quarantine_after_s: float = 30.0
    """Seconds of flooding without pause after which an agent is disconnected ..."""
    quarantine_s: float = 60.0
    """... for so many seconds, twice as many each further time, an hour at most."""
    verifications: int = 2
    """Password hashes computed at a time."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it is fanned out; the payload is shared by all subscribers."""

    topic: str
    topic_bytes: bytes
    payload: bytes
    qos: int


class Peer(Protocol):
    """The part of a connection that a session needs."""

    def send_publish(self, message: Message, *, qos: int, retain: bool, dup: bool, packet_id: int) -> None:
        """Queues one message for the client."""

    def drop(self, reason: str) -> None:
        """Closes the connection; a second call does nothing."""


@dataclass(slots=True, eq=False)
class Session:
    """State of one (identity, client id) [4.1]."""

    identity: Identity
    client_id: str
    clean: bool
    connection: Peer | None = None
    subscriptions: dict[str, int] = field(default_factory=dict)
    queue: deque[tuple[Message, bool]] = field(default_factory=deque)
    """QoS 1 messages not sent yet, with their retain flag."""
    queued_bytes: int = 0
    inflight: "OrderedDict[int, tuple[Message, bool]]" = field(default_factory=OrderedDict)
    """Messages sent and not acknowledged; resent with DUP after a reconnect, in order [4.4]."""
    received: set[int] = field(default_factory=set)
    """Packet ids of QoS 2 messages received but not released yet, which are not delivered twice [4.3.3]."""
    next_packet_id: int = 0
    left_at_s: float = 0.0

    def packet_id(self) -> int:
        """Returns a packet id that is not in flight; `inflight` is far below 65,535, so one is free."""
        while True:
            self.next_packet_id = self.next_packet_id % 65535 + 1
            if self.next_packet_id not in self.inflight:
                return self.next_packet_id


class RetainedStore:
    """Last message of each topic, within a budget [3.3.1.3]."""

    def __init__(self, limits: BrokerLimits, counters: Counter[str]) -> None:
        self._limits = limits
        self._counters = counters
        self.messages: dict[str, Message] = {}
        self.bytes = 0

    def keep(self, message: Message) -> None:
        """Keeps or replaces a message; an empty payload removes it. One over the budget is counted and not kept."""
        old = self.messages.get(message.topic)
        freed = len(old.payload) + len(old.topic_bytes) if old else 0
        if not message.payload:
            self.messages.pop(message.topic, None)
            self.bytes -= freed
            return
        size = len(message.payload) + len(message.topic_bytes)
        full = self.bytes - freed + size > self._limits.retained_bytes
        if full or (old is None and len(self.messages) >= self._limits.retained_messages):
            self._counters["retained_refused"] += 1
            return
        self.messages[message.topic] = message
        self.bytes += size - freed


class Quarantine:
    """Disconnects agents that do not stop flooding, for a while; it holds for the name, so reconnecting does not help.

    Each second held back adds one second of heat, each second takes half a second off: a flood without pause reaches
    the limit after `quarantine_after_s`, a burst never does.
    """

    def __init__(self, limits: BrokerLimits) -> None:
        self._limits = limits
        self._heat: dict[str, tuple[float, float]] = {}
        self._until: dict[str, tuple[float, float]] = {}
        """Name -> (end, length) of its latest quarantine."""

    def record_throttling(self, name: str, held_back_s: float, now_s: float) -> bool:
        """Adds the seconds an agent was held back; returns whether it is in quarantine from now on."""
        heat_s, at_s = self._heat.get(name, (0.0, now_s))
        heat_s = max(0.0, heat_s - (now_s - at_s) / 2.0) + held_back_s
        self._heat[name] = (heat_s, now_s)
        if heat_s < self._limits.quarantine_after_s / 2.0:
            return False
        _, length_s = self._until.get(name, (0.0, 0.0))
        length_s = min(max(self._limits.quarantine_s, 2.0 * length_s), 3600.0)
        self._until[name] = (now_s + length_s, length_s)
        del self._heat[name]
        return True

    def holds(self, name: str, now_s: float) -> bool:
        """Returns whether the agent must not connect now."""
        end_s, length_s = self._until.get(name, (0.0, 0.0))
        if length_s and now_s > end_s + 4.0 * length_s:
            del self._until[name]  # no flood for long enough: the next quarantine is short again
        return now_s < end_s

    def names(self, now_s: float) -> list[str]:
        """Returns the names in quarantine, sorted."""
        return sorted(name for name, (end_s, _) in self._until.items() if now_s < end_s)
