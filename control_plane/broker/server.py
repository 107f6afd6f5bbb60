"""Connections and fan-out: one asyncio loop, no task per packet.

A connection is a small state machine: waiting for CONNECT, verifying, open, closed. Packets are parsed as bytes
arrive; what goes out is collected per connection and written once per loop turn, payloads by reference. A
connection that breaks the protocol or a bound is closed, counted, and touches nobody else.
"""

import asyncio
import logging
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec

from control_plane.broker import packets
from control_plane.broker.access import Action, Credentials, Identity, Role, authorize
from control_plane.broker.packets import Connect, ConnectCode, MalformedPacketError, PacketType, Publish
from control_plane.broker.sessions import BrokerLimits, Message, RetainedStore, Session, TokenBucket
from control_plane.broker.topics import SubscriptionIndex, has_wildcard, matches, valid_filter, valid_topic
from models.errors import ConfigError, UnavailableError

log = logging.getLogger("sortline.broker")
_WRITE_HIGH_BYTES = 256 * 1024
_JOIN_BYTES = 64 * 1024
_STATS_TOPIC = "$SYS/sortline/stats"
_SYSTEM = Identity("broker", Role.CONTROL_PLANE)


class Broker:
    """The message exchange. Knows sessions and connections, not sockets.

    Args:
        credentials: Who may connect.
        limits: Every bound.
        clock: Monotonic seconds.
    """

    def __init__(
        self, credentials: Credentials, limits: BrokerLimits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.credentials = credentials
        self.limits = limits
        self.clock = clock
        self.counters: Counter[str] = Counter()
        self.sessions: dict[tuple[str, str], Session] = {}
        self.connections: set[Connection] = set()
        self.retained = RetainedStore(limits, self.counters)
        self.index: SubscriptionIndex[Session] = SubscriptionIndex()
        self.verifier = ThreadPoolExecutor(limits.verifications, thread_name_prefix="verify")

    # -- sessions ---------------------------------------------------------------------------------------------

    def open_session(self, connection: "Connection", connect: Connect, identity: Identity) -> tuple[Session, bool]:
        """The session of an authenticated client: taken over, resumed or new [3.1.2.4].

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
        """Forgets what nobody came back to, and drops clients whose identity was removed."""
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

    # -- messages ---------------------------------------------------------------------------------------------

    def publish(self, message: Message, *, retain: bool) -> None:
        """Keeps what is retained and hands the message to everyone who wants it."""
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

    def _send(self, session: Session, connection: "Connection", message: Message, *, retain: bool) -> None:
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
        """After a reconnect: what was in flight again, with DUP and its old id, then what waits [4.4]."""
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
        """Retained messages of a new or repeated subscription [3.3.1.3]."""
        if has_wildcard(topic_filter):
            found = [m for topic, m in self.retained.messages.items() if matches(topic_filter, topic)]
        else:
            found = [self.retained.messages[topic_filter]] if topic_filter in self.retained.messages else []
        for message in found:
            self.deliver(session, message, min(granted, message.qos), retain=True)

    def publish_stats(self) -> None:
        """Counters for whoever may read `$SYS`."""
        facts = dict(self.counters) | {
            "connections": len(self.connections),
            "sessions": len(self.sessions),
            "retained_messages": len(self.retained.messages),
            "retained_bytes": self.retained.bytes,
        }
        payload = msgspec.json.encode(facts)
        self.publish(Message(_STATS_TOPIC, _STATS_TOPIC.encode(), payload, 0), retain=True)


class Connection(asyncio.Protocol):
    """One client's socket."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._reader = packets.PacketReader(broker.limits.connect_bytes)
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._will: packets.Will | None = None
        self._verifying = False
        self._closed = False
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._flush_scheduled = False
        self._write_paused = False
        self._read_paused = False
        self._keep_alive_s = 0.0
        self._last_seen_s = broker.clock()
        self._timer: asyncio.TimerHandle | None = None
        self._messages = TokenBucket(broker.limits.messages_per_s, self._last_seen_s)
        self._bytes = TokenBucket(broker.limits.bytes_per_s, self._last_seen_s)

    # -- asyncio's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts, within the bound."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._broker.counters["accepted"] += 1
        if len(self._broker.connections) >= self._broker.limits.connections:
            self.drop("too_many_connections")
            return
        self._broker.connections.add(self)
        self._timer = self._loop.call_later(self._broker.limits.connect_deadline_s, self.drop, "connect_deadline")

    def data_received(self, data: bytes) -> None:
        """Parses and handles every whole packet; whatever goes wrong ends this connection only."""
        self._last_seen_s = self._broker.clock()
        self._reader.feed(data)
        self._work()

    def _work(self) -> None:
        try:
            while not (self._closed or self._verifying or self._read_paused):
                packet = self._reader.next()
                if packet is None:
                    return
                self._handle(*packet)
        except MalformedPacketError as error:
            log.debug("malformed packet: %s", error)
            self.drop("malformed")
        except Exception:
            log.exception("a connection failed")
            self.drop("internal_error")

    def pause_writing(self) -> None:
        """The socket's buffer is full: what follows waits in our queue, by reference."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._write_paused = False
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        """The socket is gone, however it came about."""
        self._broker.connections.discard(self)
        self._leave()

    # -- protocol ---------------------------------------------------------------------------------------------

    def _handle(self, kind: PacketType, flags: int, body: bytes) -> None:
        if self._session is None:
            if kind is not PacketType.CONNECT:
                raise MalformedPacketError("The first packet is not CONNECT.", expected="CONNECT", got=kind.name)
            self._connect(packets.parse_connect(body))
            return
        match kind:
            case PacketType.PUBLISH:
                self._publish(self._session, packets.parse_publish(flags, body))
            case PacketType.PUBACK:
                self._session.inflight.pop(packets.parse_packet_id(body), None)
                self._broker.pump(self._session)
            case PacketType.PUBREL:
                packet_id = packets.parse_packet_id(body)
                self._session.received.discard(packet_id)
                self._send(packets.acknowledge(PacketType.PUBCOMP, packet_id))
            case PacketType.SUBSCRIBE:
                self._subscribe(self._session, *packets.parse_subscribe(body))
            case PacketType.UNSUBSCRIBE:
                packet_id, filters = packets.parse_unsubscribe(body)
                for topic_filter in filters:
                    self._session.subscriptions.pop(topic_filter, None)
                    self._broker.index.remove(topic_filter, self._session)
                self._send(packets.acknowledge(PacketType.UNSUBACK, packet_id))
            case PacketType.PINGREQ:
                self._send(packets.PINGRESP)
            case PacketType.DISCONNECT:
                self._will = None
                self.drop("disconnected")
            case _:
                raise MalformedPacketError("An unexpected packet.", expected="client packet", got=kind.name)

    def _connect(self, connect: Connect) -> None:
        if not connect.protocol_ok:
            self._refuse(ConnectCode.WRONG_PROTOCOL, "wrong_protocol")
            return
        identity = self._broker.credentials.cached(connect.username, connect.password)
        if identity is not None:
            self._admit(connect, identity)
            return
        self._verifying = True
        future = self._loop.run_in_executor(
            self._broker.verifier, self._broker.credentials.verify, connect.username, connect.password
        )
        future.add_done_callback(lambda done: self._verified(connect, done))

    def _verified(self, connect: Connect, done: "asyncio.Future[Identity | None]") -> None:
        self._verifying = False
        if self._closed or done.cancelled():
            return
        identity = None if done.exception() else done.result()
        if identity is None:
            self._refuse(ConnectCode.BAD_CREDENTIALS, "bad_credentials")
            return
        self._admit(connect, identity)
        self._work()

    def _admit(self, connect: Connect, identity: Identity) -> None:
        """From here on the client is who it says; only now a session is looked at."""
        broker = self._broker
        if not connect.client_id:
            if not connect.clean:
                self._refuse(ConnectCode.ID_REJECTED, "id_rejected")
                return
            connect = Connect(
                protocol_ok=True,
                client_id=f"auto-{id(self):x}-{broker.counters['accepted']}",
                clean=True,
                keep_alive_s=connect.keep_alive_s,
                will=connect.will,
                username=connect.username,
                password=None,
            )
        will = connect.will
        if will is not None and not (valid_topic(will.topic) and authorize(identity, Action.WILL, will.topic)):
            self._refuse(ConnectCode.NOT_AUTHORIZED, "will_denied")
            return
        new = (identity.name, connect.client_id) not in broker.sessions
        if new and len(broker.sessions) >= broker.limits.sessions:
            self._refuse(ConnectCode.UNAVAILABLE, "too_many_sessions")
            return
        session, present = broker.open_session(self, connect, identity)
        self._session, self._will = session, will
        self._reader.max_packet_bytes = broker.limits.packet_bytes
        self._keep_alive_s = connect.keep_alive_s * 1.5
        self._restart_timer()
        self._send(packets.connack(ConnectCode.ACCEPTED, session_present=present and not connect.clean))
        broker.redeliver(session)

    def _publish(self, session: Session, publish: Publish) -> None:
        broker = self._broker
        wait_s = max(
            self._messages.take(1.0, self._last_seen_s),
            self._bytes.take(len(publish.payload), self._last_seen_s),
        )
        if wait_s > 0.0:
            self._pause_reading(wait_s)
        if not valid_topic(publish.topic):
            raise MalformedPacketError("No topic to publish under.", expected="a topic name", got=publish.topic[:60])
        repeated = publish.qos == 2 and publish.packet_id in session.received
        if not authorize(session.identity, Action.PUBLISH, publish.topic):
            # 3.1.1 has no negative acknowledgement [4.3.2]: it is dropped and counted.
            broker.counters["publish_denied"] += 1
        elif not repeated:
            message = Message(publish.topic, publish.topic.encode(), publish.payload, min(publish.qos, 1))
            broker.publish(message, retain=publish.retain)
        if publish.qos == 1:
            self._send(packets.acknowledge(PacketType.PUBACK, publish.packet_id))
        elif publish.qos == 2:
            if len(session.received) >= 65535:
                raise MalformedPacketError("Too many unreleased messages.", expected="PUBREL", got="none")
            session.received.add(publish.packet_id)
            self._send(packets.acknowledge(PacketType.PUBREC, publish.packet_id))

    def _subscribe(self, session: Session, packet_id: int, wanted: list[tuple[str, int]]) -> None:
        codes = self._broker.subscribe(session, wanted)
        self._send(packets.suback(packet_id, codes))
        for (topic_filter, _), code in zip(wanted, codes, strict=True):
            if code != 0x80:
                self._broker.send_retained(session, topic_filter, code)

    def _refuse(self, code: ConnectCode, reason: str) -> None:
        if self._transport is not None:
            self._transport.write(packets.connack(code))
        self.drop(reason)

    # -- writing ----------------------------------------------------------------------------------------------

    def send_publish(self, message: Message, *, qos: int, retain: bool, dup: bool, packet_id: int) -> None:
        """Queues one message; cuts a client that does not read."""
        head = packets.publish_head(
            message.topic_bytes, len(message.payload), qos=qos, retain=retain, dup=dup, packet_id=packet_id
        )
        self._broker.counters["messages_out"] += 1
        if len(message.payload) > _JOIN_BYTES:
            self._send(head)
            self._send(message.payload)
        else:
            self._send(head + message.payload)
        if self._out_bytes > self._broker.limits.queued_bytes:
            self.drop("too_slow")

    def _send(self, data: bytes) -> None:
        if self._closed:
            return
        self._out.append(data)
        self._out_bytes += len(data)
        if not self._flush_scheduled and not self._write_paused:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Writes what has collected, small packets joined, until the socket is full."""
        self._flush_scheduled = False
        transport = self._transport
        while transport is not None and self._out and not self._write_paused and not self._closed:
            part = self._out.popleft()
            if self._out and len(part) < _JOIN_BYTES:
                parts, size = [part], len(part)
                while self._out and size + len(self._out[0]) <= _JOIN_BYTES:
                    size += len(self._out[0])
                    parts.append(self._out.popleft())
                part = b"".join(parts)
            self._out_bytes -= len(part)
            transport.write(part)

    # -- time -------------------------------------------------------------------------------------------------

    def _pause_reading(self, wait_s: float) -> None:
        """Back-pressure on one client: its packets wait in its own socket."""
        if self._transport is None or self._read_paused:
            return
        self._broker.counters["rate_limited"] += 1
        self._read_paused = True
        self._transport.pause_reading()
        self._loop.call_later(min(wait_s, 5.0), self._resume_reading)

    def _resume_reading(self) -> None:
        if self._transport is None or self._closed:
            return
        self._read_paused = False
        self._last_seen_s = self._broker.clock()
        self._transport.resume_reading()
        self._work()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._keep_alive_s > 0.0:
            idle_s = self._broker.clock() - self._last_seen_s
            self._timer = self._loop.call_later(max(0.01, self._keep_alive_s - idle_s), self._check_keep_alive)

    def _check_keep_alive(self) -> None:
        """One and a half keep-alive periods without a packet: the peer is gone [3.1.2.10]."""
        silent_s = self._broker.clock() - self._last_seen_s
        if silent_s >= self._keep_alive_s and not self._read_paused:
            self.drop("keep_alive")
        else:
            self._restart_timer()

    # -- the end ----------------------------------------------------------------------------------------------

    def drop(self, reason: str) -> None:
        """Closes the connection; a second call does nothing."""
        if self._closed:
            return
        self._broker.counters[f"closed_{reason}"] += 1
        if reason == "disconnected":
            self._flush()
        self._closed = True
        self._out.clear()
        self._out_bytes = 0
        if self._transport is not None:
            if reason in {"too_slow", "keep_alive", "taken_over", "identity_removed"}:
                self._transport.abort()
            else:
                self._transport.close()
        self._leave()

    def _leave(self) -> None:
        """Lets go of the session and publishes the will, once."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        session, will = self._session, self._will
        self._session = self._will = None
        if session is not None and session.connection is self:
            session.connection = None
            session.left_at_s = self._broker.clock()
            if session.clean:
                self._broker.forget(session)
        if will is not None:
            message = Message(will.topic, will.topic.encode(), will.payload, will.qos)
            self._broker.publish(message, retain=will.retain)


async def serve(
    broker: Broker,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    on_ready: Callable[[str, int], Any],
    stop: asyncio.Event,
) -> None:
    """Runs the broker until `stop` is set.

    Args:
        broker: The exchange.
        host: Address to bind.
        port: 0 chooses a free one.
        tls: Context of a TLS listener.
        on_ready: Called with the address once it listens.
        stop: Ends the broker.

    Raises:
        UnavailableError: `broker.port_in_use`.
    """
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(lambda: Connection(broker), host, port, ssl=tls, backlog=512)
    except OSError as error:
        raise UnavailableError(
            "broker.port_in_use",
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what uses the port, or choose another.",
            expected="a free port",
            got=f"{host}:{port}",
        ) from error
    address = server.sockets[0].getsockname()
    on_ready(address[0], address[1])
    upkeep = asyncio.create_task(_upkeep(broker), name="upkeep")
    await stop.wait()
    upkeep.cancel()
    server.close()
    for connection in list(broker.connections):
        connection.drop("shutdown")
    broker.verifier.shutdown(wait=False, cancel_futures=True)
    await asyncio.sleep(0)


async def _upkeep(broker: Broker) -> None:
    """Every second: follow the credentials file, expire sessions; every ten: statistics."""
    turn = 0
    while True:
        try:
            broker.credentials.reload()
        except ConfigError as error:
            broker.counters["credentials_broken"] += 1
            log.warning("%s", error)
        broker.expire_sessions()
        if turn % 10 == 0:
            broker.publish_stats()
        turn += 1
        await asyncio.sleep(1.0)
