"""One client's connection: waiting for CONNECT, verifying, open, closed. One asyncio loop, no task per packet.

Packets are parsed as bytes arrive; what goes out is collected and written once per loop turn, payloads by reference.
A connection that breaks the protocol or a bound is closed and counted, without effect on others.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from control_plane.broker import packets
from control_plane.broker.access import Action, Identity, Role, authorize
from control_plane.broker.broker import Broker
from control_plane.broker.client_certificates import Certificates
from control_plane.broker.packets import Connect, ConnectCode, MalformedPacketError, PacketType, Publish
from control_plane.broker.sessions import Message, Session
from control_plane.broker.topics import valid_topic
from models.token_bucket import TokenBucket

log = logging.getLogger("sortline.broker")
_WRITE_HIGH_BYTES = 256 * 1024
_JOIN_BYTES = 64 * 1024


class Connection(asyncio.Protocol):
    """One client's socket.

    Args:
        broker: The exchange.
        accepted_s: When the socket was accepted, by the broker's clock: the deadline of CONNECT runs from there.
    """

    def __init__(self, broker: Broker, accepted_s: float) -> None:
        self._broker, self._accepted_s = broker, accepted_s
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
        self._messages = _one_second(broker.limits.messages_per_s, broker.clock)
        self._bytes = _one_second(broker.limits.bytes_per_s, broker.clock)

    # -- asyncio's side ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts the transport, within the limit of connections."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        self._broker.counters["accepted"] += 1
        if len(self._broker.connections) >= self._broker.limits.connections:
            self.drop("too_many_connections")
            return
        self._broker.connections.add(self)
        left_s = self._broker.limits.connect_deadline_s - (self._broker.clock() - self._accepted_s)
        self._timer = self._loop.call_later(max(0.1, left_s), self.drop, "connect_deadline")

    def data_received(self, data: bytes) -> None:
        """Parses and handles every whole packet; an error ends this connection only."""
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
        """Pauses writing while the socket's buffer is full; later messages wait in our queue, by reference."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """Resumes writing when the peer reads again."""
        self._write_paused = False
        self._flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Cleans up after the socket was closed by either side."""
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
        credentials = self._broker.credentials
        if isinstance(credentials, Certificates):
            self._connect_by_certificate(connect, credentials)
            return
        identity = credentials.cached(connect.username, connect.password)
        if identity is not None:
            self._admit(connect, identity)
            return
        self._verifying = True
        future = self._loop.run_in_executor(
            self._broker.verifier, credentials.verify, connect.username, connect.password
        )
        future.add_done_callback(lambda done: self._verified(connect, done))

    def _connect_by_certificate(self, connect: Connect, certificates: Certificates) -> None:
        """Identifies the client by its certificate alone: a user name is ignored, an agent's client id is its name."""
        tls = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        identity = certificates.identify(tls.getpeercert() if tls is not None else None)
        if identity is None:
            self._refuse(ConnectCode.NOT_AUTHORIZED, "bad_certificate")
            return
        # Replicas of the control plane share an identity and have separate client ids.
        self._admit(replace(connect, client_id=identity.name) if identity.role is Role.AGENT else connect, identity)

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
        """Opens the session of the client, which is authenticated from here on."""
        broker = self._broker
        if broker.quarantine.holds(identity.name, broker.clock()):
            self._refuse(ConnectCode.UNAVAILABLE, "in_quarantine")
            return
        if not connect.client_id:
            if not connect.clean:
                self._refuse(ConnectCode.ID_REJECTED, "id_rejected")
                return
            client_id = f"auto-{id(self):x}-{broker.counters['accepted']}"
            connect = replace(connect, client_id=client_id, clean=True)
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
        if identity.role is Role.AGENT:
            self._messages = _one_second(broker.limits.agent_messages_per_s, broker.clock)
        self._reader.max_packet_bytes = broker.limits.packet_bytes
        self._keep_alive_s = connect.keep_alive_s * 1.5
        self._restart_timer()
        self._send(packets.connack(ConnectCode.ACCEPTED, session_present=present and not connect.clean))
        broker.redeliver(session)

    def _publish(self, session: Session, publish: Publish) -> None:
        broker = self._broker
        wait_s = max(self._messages.charge(1.0), self._bytes.charge(len(publish.payload)))
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
        """Queues one message; disconnects a client that does not read."""
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
        """Writes the collected packets, small ones joined, until the socket is full."""
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
        """Applies back-pressure to one client: its packets wait in its own socket."""
        if self._transport is None or self._read_paused:
            return
        wait_s = min(wait_s, 5.0)
        self._read_paused = True
        self._transport.pause_reading()
        self._loop.call_later(wait_s, self._resume_reading)
        if self._session is not None:
            self._broker.throttled(self, self._session.identity, wait_s)

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
        """Closes the connection after one and a half keep-alive periods without a packet [3.1.2.10]."""
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
            if reason in {"too_slow", "keep_alive", "taken_over", "identity_removed", "quarantined"}:
                self._transport.abort()
            else:
                self._transport.close()
        self._leave()

    def _leave(self) -> None:
        """Detaches the session and publishes the will, once."""
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


def _one_second(rate_per_s: float, clock: Callable[[], float]) -> TokenBucket:
    """Returns a bucket that admits one second's worth at once."""
    return TokenBucket(rate_per_s, rate_per_s, clock)
