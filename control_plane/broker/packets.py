"""MQTT 3.1.1 control packets: bytes in, checked values out, and back. A pure codec without sockets and sessions.

Source: OASIS MQTT Version 3.1.1; section numbers in brackets.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from models.errors import MessageError

_U16 = struct.Struct(">H")
MAX_REMAINING_BYTES = 268_435_455


class PacketType(IntEnum):
    """Control packet types [2.2.1]. The numbers are the protocol's own."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14


class ConnectCode(IntEnum):
    """CONNACK return codes [3.2.2.3]."""

    ACCEPTED = 0
    WRONG_PROTOCOL = 1
    ID_REJECTED = 2
    UNAVAILABLE = 3
    BAD_CREDENTIALS = 4
    NOT_AUTHORIZED = 5


class MalformedPacketError(MessageError):
    """The peer broke the protocol: close the connection [4.8]."""

    def __init__(self, message: str, *, expected: object = None, got: object = None) -> None:
        super().__init__("mqtt.malformed", message, expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class Will:
    """The will, published for a client that leaves without DISCONNECT [3.1.2.5]."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """The fields of CONNECT [3.1]."""

    protocol_ok: bool
    client_id: str
    clean: bool
    keep_alive_s: int
    will: Will | None
    username: str | None
    password: bytes | None


@dataclass(frozen=True, slots=True)
class Publish:
    """The fields of PUBLISH [3.3]."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    packet_id: int


# Flags each type must have [2.2.2]; PUBLISH carries its own.
_FLAGS = {PacketType.PUBREL: 2, PacketType.SUBSCRIBE: 2, PacketType.UNSUBSCRIBE: 2}
_FROM_CLIENT = {
    PacketType.CONNECT,
    PacketType.PUBLISH,
    PacketType.PUBACK,
    PacketType.PUBREC,
    PacketType.PUBREL,
    PacketType.PUBCOMP,
    PacketType.SUBSCRIBE,
    PacketType.UNSUBSCRIBE,
    PacketType.PINGREQ,
    PacketType.DISCONNECT,
}


class PacketReader:
    """Cuts a byte stream into packets; holds at most one packet of `max_packet_bytes`."""

    def __init__(self, max_packet_bytes: int) -> None:
        self.max_packet_bytes = max_packet_bytes
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Adds what came from the socket."""
        self._buffer += data

    def next(self) -> tuple[PacketType, int, bytes] | None:
        """Returns the next whole packet as (type, flags, body), or None when more bytes are needed.

        Raises:
            MalformedPacketError: Wrong type, flags or length, or a packet over the limit.
        """
        buffer, start = self._buffer, self._start
        available = len(buffer) - start
        if available < 2:
            self._compact()
            return None
        kind, flags = _check_header(buffer[start])
        size, used = 0, 1
        while True:
            if used >= available:
                self._compact()
                return None
            byte = buffer[start + used]
            size |= (byte & 0x7F) << (7 * (used - 1))
            used += 1
            if byte < 0x80:
                break
            if used > 4:
                raise MalformedPacketError("Remaining length is too long.", expected="<= 4 bytes", got="more")
        if used + size > self.max_packet_bytes:
            raise MalformedPacketError(
                "A packet is over the limit.", expected=f"<= {self.max_packet_bytes} bytes", got=used + size
            )
        if available < used + size:
            self._compact()
            return None
        begin = start + used
        body = bytes(memoryview(buffer)[begin : begin + size])
        self._start = begin + size
        return kind, flags, body

    def _compact(self) -> None:
        """Frees what was consumed before more is added."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0


def _check_header(first: int) -> tuple[PacketType, int]:
    kind_number, flags = first >> 4, first & 0x0F
    if not 1 <= kind_number <= 14 or PacketType(kind_number) not in _FROM_CLIENT:
        raise MalformedPacketError("No packet a client may send.", expected="types 1-14", got=kind_number)
    kind = PacketType(kind_number)
    if kind is not PacketType.PUBLISH and flags != _FLAGS.get(kind, 0):
        raise MalformedPacketError(f"{kind.name} has wrong flags.", expected=_FLAGS.get(kind, 0), got=flags)
    return kind, flags


class _Cursor:
    """Reads fields of a packet's body and refuses to read past its end."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = 0

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.body):
            raise MalformedPacketError("A packet is truncated.", expected=f"{end} bytes", got=len(self.body))
        part = self.body[self.at : end]
        self.at = end
        return part

    def data(self) -> bytes:
        return self.take(self.u16())

    def text(self) -> str:
        raw = self.data()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedPacketError("A string is not UTF-8.", expected="UTF-8", got=raw[:20].hex()) from error
        if "\0" in text:
            raise MalformedPacketError("A string holds U+0000.", expected="no NUL", got="NUL")
        return text

    def end(self) -> None:
        if self.at != len(self.body):
            raise MalformedPacketError("A packet has bytes too many.", expected=f"{self.at} bytes", got=len(self.body))


def parse_connect(body: bytes) -> Connect:
    """Reads CONNECT; another protocol version is reported, not refused, so that it can be answered [3.1.2.2].

    Raises:
        MalformedPacketError: Anything else that is not as in [3.1].
    """
    cursor = _Cursor(body)
    name, level = cursor.text(), cursor.u8()
    if name not in {"MQTT", "MQIsdp"}:
        raise MalformedPacketError("Unknown protocol name.", expected="MQTT", got=name[:20])
    if name != "MQTT" or level != 4:
        return Connect(
            protocol_ok=False, client_id="", clean=True, keep_alive_s=0, will=None, username=None, password=None
        )
    flags = cursor.u8()
    has_will, qos, retain = bool(flags & 4), (flags >> 3) & 3, bool(flags & 0x20)
    has_user, has_password = bool(flags & 0x80), bool(flags & 0x40)
    if flags & 1 or qos == 3 or (not has_will and (qos or retain)) or (has_password and not has_user):
        raise MalformedPacketError("CONNECT flags contradict each other.", expected="[3.1.2.3]", got=f"{flags:#x}")
    keep_alive_s, client_id = cursor.u16(), cursor.text()
    will = None
    if has_will:
        topic = cursor.text()
        will = Will(topic=topic, payload=cursor.data(), qos=min(qos, 1), retain=retain)
    username = cursor.text() if has_user else None
    password = cursor.data() if has_password else None
    cursor.end()
    return Connect(
        protocol_ok=True,
        client_id=client_id,
        clean=bool(flags & 2),
        keep_alive_s=keep_alive_s,
        will=will,
        username=username,
        password=password,
    )


def parse_publish(flags: int, body: bytes) -> Publish:
    """Reads PUBLISH.

    Raises:
        MalformedPacketError: QoS 3, packet id 0, truncated topic, DUP on QoS 0 [3.3.1].
    """
    qos = (flags >> 1) & 3
    if qos == 3 or (qos == 0 and flags & 8):
        raise MalformedPacketError("PUBLISH has wrong flags.", expected="QoS 0-2, DUP only with QoS > 0", got=flags)
    cursor = _Cursor(body)
    topic = cursor.text()
    packet_id = cursor.u16() if qos else 0
    if qos and packet_id == 0:
        raise MalformedPacketError("Packet id 0.", expected="1-65535", got=0)
    return Publish(
        topic=topic,
        payload=body[cursor.at :],
        qos=qos,
        retain=bool(flags & 1),
        dup=bool(flags & 8),
        packet_id=packet_id,
    )


def parse_packet_id(body: bytes) -> int:
    """Reads PUBACK, PUBREC, PUBREL, PUBCOMP.

    Raises:
        MalformedPacketError: Not exactly a packet id.
    """
    cursor = _Cursor(body)
    packet_id = cursor.u16()
    cursor.end()
    if packet_id == 0:
        raise MalformedPacketError("Packet id 0.", expected="1-65535", got=0)
    return packet_id


def parse_subscribe(body: bytes) -> tuple[int, list[tuple[str, int]]]:
    """Reads SUBSCRIBE: packet id and (filter, QoS) pairs.

    Raises:
        MalformedPacketError: No filter, QoS 3, reserved bits [3.8].
    """
    cursor = _Cursor(body)
    packet_id = cursor.u16()
    wanted: list[tuple[str, int]] = []
    while cursor.at < len(body):
        topic_filter = cursor.text()
        qos = cursor.u8()
        if qos > 2:
            raise MalformedPacketError("SUBSCRIBE asks for a QoS there is not.", expected="0-2", got=qos)
        wanted.append((topic_filter, qos))
    if not wanted or packet_id == 0:
        raise MalformedPacketError("SUBSCRIBE without filter or id.", expected=">= 1 filter", got=len(wanted))
    return packet_id, wanted


def parse_unsubscribe(body: bytes) -> tuple[int, list[str]]:
    """Reads UNSUBSCRIBE.

    Raises:
        MalformedPacketError: No filter.
    """
    cursor = _Cursor(body)
    packet_id = cursor.u16()
    filters: list[str] = []
    while cursor.at < len(body):
        filters.append(cursor.text())
    if not filters or packet_id == 0:
        raise MalformedPacketError("UNSUBSCRIBE without filter or id.", expected=">= 1 filter", got=len(filters))
    return packet_id, filters


def _length(size: int) -> bytes:
    out = bytearray()
    while True:
        size, low = size >> 7, size & 0x7F
        out.append(low | (0x80 if size else 0))
        if not size:
            return bytes(out)


def connack(code: ConnectCode, *, session_present: bool = False) -> bytes:
    """Returns the bytes of a CONNACK [3.2]."""
    return bytes((0x20, 2, int(session_present), code))


def acknowledge(kind: PacketType, packet_id: int) -> bytes:
    """Returns the bytes of a PUBACK, PUBREC, PUBREL, PUBCOMP or UNSUBACK."""
    return bytes(((kind << 4) | _FLAGS.get(kind, 0), 2)) + _U16.pack(packet_id)


def suback(packet_id: int, codes: list[int]) -> bytes:
    """Returns the bytes of a SUBACK [3.9]; 0x80 = refused."""
    return b"\x90" + _length(2 + len(codes)) + _U16.pack(packet_id) + bytes(codes)


PINGRESP = b"\xd0\x00"


def publish_head(topic: bytes, payload_size: int, *, qos: int, retain: bool, dup: bool, packet_id: int) -> bytes:
    """Returns everything of a PUBLISH but its payload, which stays shared between subscribers."""
    first = 0x30 | (dup << 3) | (qos << 1) | retain
    variable = _U16.pack(len(topic)) + topic + (_U16.pack(packet_id) if qos else b"")
    return bytes((first,)) + _length(len(variable) + payload_size) + variable
