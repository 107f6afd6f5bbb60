"""The message exchange: sessions, fan-out, retention, quarantine. It sees peers, not sockets."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from control_plane.broker.access import Action, Credentials, Identity, Role, authorize
from control_plane.broker.client_certificates import Certificates
from control_plane.broker.packets import Connect
from control_plane.broker.sessions import BrokerLimits, Message, Peer, Quarantine, RetainedStore, Session
from control_plane.broker.topics import SubscriptionIndex, has_wildcard, matches, valid_filter

log = logging.getLogger("sortline.broker")
_STATS_TOPIC = "$SYS/sortline/stats"


class Broker:
    """The message exchange between sessions.

    Args:
        credentials: Identifies clients by certificate, or by password on this machine.
        limits: Every bound.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        credentials: Credentials | Certificates,
        limits: BrokerLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.credentials = credentials
        self.limits = limits
        self.clock = clock
        self.counters: Counter[str] = Counter()
        self.sessions: dict[tuple[str, str], Session] = {}
        self.connections: set[Peer] = set()
        self.quarantine = Quarantine(limits)
        self.retained = RetainedStore(limits, self.counters)
        self.index: SubscriptionIndex[Session] = SubscriptionIndex()
        self.verifier = ThreadPoolExecutor(limits.verifications, thread_name_prefix="verify")

    # -- sessions ---------------------------------------------------------------------------------------------

    def open_session(self, connection: Peer, connect: Connect, identity: Identity) -> tuple[Session, bool]:
        """Returns the session of an authenticated client: taken over, resumed or new [3.1.2.4].

        Returns:
            The session, and whether it was there before.
        """
        key = (identity.name, connect.client_id)
        old = self.sessions.get(key)
        if old is not None and old.connection is not None:
            self.counters["taken_over"] += 1
            old.connection.drop("taken_over")
        if old is not None and (connect.clean or old.clean):
            self.forget(old)
            old = None
        session = old or Session(identity=identity, client_id=connect.client_id, clean=connect.clean)
        session.clean, session.identity, session.connection = connect.clean, identity, connection
        self.sessions[key] = session
        return session, old is not None

    def forget(self, session: Session) -> None:
        """Removes a session and its subscriptions."""
        for topic_filter in session.subscriptions:
            self.index.remove(topic_filter, session)
        session.subscriptions.clear()
        session.queue.clear()
        session.inflight.clear()
        key = (session.identity.name, session.client_id)
        if self.sessions.get(key) is session:
            del self.sessions[key]

    def expire_sessions(self) -> None:
        """Removes expired sessions, and disconnects clients whose identity was removed."""
        now = self.clock()
        for session in list(self.sessions.values()):
            gone = session.connection is None and now - session.left_at_s > self.limits.session_expiry_s
            if not self.credentials.known(session.identity):
                self.counters["identity_removed"] += 1
                if session.connection is not None:
                    session.connection.drop("identity_removed")
                gone = True
            if gone:
                self.forget(session)

    def throttled(self, connection: Peer, identity: Identity, wait_s: float) -> None:
        """Counts a client that sends more than it may; one that continues is disconnected for a while."""
        self.counters["rate_limited"] += 1
        if identity.role is Role.AGENT and self.quarantine.record_throttling(identity.name, wait_s, self.clock()):
            self.counters["quarantined"] += 1
            log.warning("%s floods the broker and is cut off for a while", identity.name)
            connection.drop("quarantined")

    # -- messages ---------------------------------------------------------------------------------------------

    def publish(self, message: Message, *, retain: bool) -> None:
        """Keeps a retained message and delivers the message to every subscriber."""
        self.counters["messages_in"] += 1
        if retain:
            self.retained.keep(message)
        for session, granted in self.index.match(message.topic):
            self.deliver(session, message, min(granted, message.qos), retain=False)

    def deliver(self, session: Session, message: Message, qos: int, *, retain: bool) -> None:
        """Sends, queues or drops one message for one session; authorised again for every message."""
        if not authorize(session.identity, Action.RECEIVE, message.topic):
            self.counters["receive_denied"] += 1
            return
        connection = session.connection
        if qos == 0:
            if connection is not None:
                connection.send_publish(message, qos=0, retain=retain, dup=False, packet_id=0)
            return
        if connection is not None and not session.queue and len(session.inflight) < self.limits.inflight:
            self._send(session, connection, message, retain=retain)
            return
        size = len(message.payload)
        full = session.queued_bytes + size > self.limits.queued_bytes
        if full or len(session.queue) >= self.limits.queued_messages:
            self.counters["queue_dropped"] += 1
            return
        session.queue.append((message, retain))
        session.queued_bytes += size

    def _send(self, session: Session, connection: Peer, message: Message, *, retain: bool) -> None:
        packet_id = session.packet_id()
        session.inflight[packet_id] = (message, retain)
        connection.send_publish(message, qos=1, retain=retain, dup=False, packet_id=packet_id)

    def pump(self, session: Session) -> None:
        """Moves waiting messages into flight as far as the window allows."""
        connection = session.connection
        while connection is not None and session.queue and len(session.inflight) < self.limits.inflight:
            message, retain = session.queue.popleft()
            session.queued_bytes -= len(message.payload)
            self._send(session, connection, message, retain=retain)

    def redeliver(self, session: Session) -> None:
        """Resends messages in flight after a reconnect, with DUP and their old ids, then the waiting ones [4.4]."""
        connection = session.connection
        if connection is None:
            return
        for packet_id, (message, retain) in session.inflight.items():
            connection.send_publish(message, qos=1, retain=retain, dup=True, packet_id=packet_id)
        self.pump(session)

    def subscribe(self, session: Session, wanted: list[tuple[str, int]]) -> list[int]:
        """Grants at most QoS 1; refuses what is invalid, not allowed or too many with 0x80 [3.9.3]."""
        codes: list[int] = []
        for topic_filter, qos in wanted:
            new = topic_filter not in session.subscriptions
            too_many = new and len(session.subscriptions) >= self.limits.subscriptions
            allowed = valid_filter(topic_filter) and authorize(session.identity, Action.SUBSCRIBE, topic_filter)
            if not allowed or too_many:
                self.counters["subscribe_denied"] += 1
                codes.append(0x80)
                continue
            granted = min(qos, 1)
            session.subscriptions[topic_filter] = granted
            self.index.add(topic_filter, session, granted)
            codes.append(granted)
        return codes

    def send_retained(self, session: Session, topic_filter: str, granted: int) -> None:
        """Sends the retained messages of a new or repeated subscription [3.3.1.3]."""
        if has_wildcard(topic_filter):
            found = [m for topic, m in self.retained.messages.items() if matches(topic_filter, topic)]
        else:
            found = [self.retained.messages[topic_filter]] if topic_filter in self.retained.messages else []
        for message in found:
            self.deliver(session, message, min(granted, message.qos), retain=True)

    def publish_stats(self) -> None:
        """Publishes the counters under `$SYS`."""
        facts = dict(self.counters) | {
            "connections": len(self.connections),
            "sessions": len(self.sessions),
            "retained_messages": len(self.retained.messages),
            "retained_bytes": self.retained.bytes,
            "in_quarantine": self.quarantine.names(self.clock()),
        }
        payload = msgspec.json.encode(facts)
        self.publish(Message(_STATS_TOPIC, _STATS_TOPIC.encode(), payload, 0), retain=True)
