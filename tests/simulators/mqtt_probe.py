"""A raw MQTT 3.1.1 client for probes: writes given packets and reads all others. Its codec is separate on purpose."""

import contextlib
import socket
import ssl
import struct
from dataclasses import dataclass, field


@dataclass
class Packet:
    kind: int
    flags: int
    body: bytes

    def publish(self) -> tuple[str, bytes, int, bool, bool, int]:
        """(topic, payload, qos, retain, dup, packet id)"""
        size = struct.unpack_from(">H", self.body)[0]
        qos, at = (self.flags >> 1) & 3, 2 + size
        packet_id = struct.unpack_from(">H", self.body, at)[0] if qos else 0
        payload = self.body[at + (2 if qos else 0) :]
        return self.body[2:at].decode(), payload, qos, bool(self.flags & 1), bool(self.flags & 8), packet_id


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(data)) + data


def packet(kind: int, flags: int, body: bytes) -> bytes:
    length, size = b"", len(body)
    while True:
        size, low = size >> 7, size & 0x7F
        length += bytes([low | (0x80 if size else 0)])
        if not size:
            return bytes([kind << 4 | flags]) + length + body


def connect_packet(
    client_id: str,
    *,
    clean: bool = True,
    keep_alive: int = 60,
    will: tuple[str, bytes, int, bool] | None = None,
    user: str | None = None,
    password: str | None = None,
    level: int = 4,
    name: str = "MQTT",
) -> bytes:
    flags = 2 if clean else 0
    body = text(client_id)
    if will:
        flags |= 4 | (will[2] << 3) | (0x20 if will[3] else 0)
        body += text(will[0]) + text(will[1])
    if user is not None:
        flags |= 0x80
        body += text(user)
    if password is not None:
        flags |= 0x40
        body += text(password)
    return packet(1, 0, text(name) + bytes([level, flags]) + struct.pack(">H", keep_alive) + body)


OPENED: list[socket.socket] = []
"""Every socket a probe opened; `close_probes` closes them after each test."""


def close_probes() -> None:
    while OPENED:
        OPENED.pop().close()


@dataclass
class Probe:
    """One connection; `clean` and the rest go to CONNECT."""

    port: int
    client_id: str
    options: dict = field(default_factory=dict)
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=5.0)
        OPENED.append(self.socket)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.ids = 0
        answer = None
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            if self.tls is not None:
                self.socket = self.tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
                OPENED.append(self.socket)
            self.socket.sendall(connect_packet(self.client_id, **self.options))
            answer = self.read(5.0)
        self.code = answer.body[1] if answer and answer.kind == 2 else None
        self.present = bool(answer.body[0] & 1) if answer and answer.kind == 2 else False

    def read(self, timeout: float = 2.0) -> Packet | None:
        """The next packet; None when none came or the peer closed."""
        self.socket.settimeout(timeout)
        try:
            while True:
                found = self._cut()
                if found:
                    return found
                data = self.socket.recv(1 << 20)
                if not data:
                    return None
                self.buffer += data
        except (TimeoutError, ConnectionError, ssl.SSLError):
            return None

    def _cut(self) -> Packet | None:
        size, at = 0, 1
        while True:
            if at >= len(self.buffer):
                return None
            byte = self.buffer[at]
            size |= (byte & 0x7F) << (7 * (at - 1))
            at += 1
            if byte < 0x80:
                break
        if len(self.buffer) < at + size:
            return None
        found = Packet(self.buffer[0] >> 4, self.buffer[0] & 15, self.buffer[at : at + size])
        self.buffer = self.buffer[at + size :]
        return found

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def next_id(self) -> int:
        self.ids += 1
        return self.ids

    def publish(self, topic: str, payload: bytes, qos: int = 0, *, retain: bool = False, dup: bool = False) -> int:
        packet_id = self.next_id() if qos else 0
        body = text(topic) + (struct.pack(">H", packet_id) if qos else b"") + payload
        self.send(packet(3, (qos << 1) | int(retain) | (8 if dup else 0), body))
        return packet_id

    def subscribe(self, *filters: tuple[str, int]) -> list[int]:
        packet_id = self.next_id()
        body = b"".join(text(name) + bytes([qos]) for name, qos in filters)
        self.send(packet(8, 2, struct.pack(">H", packet_id) + body))
        answer = self.wait_for(9)
        return list(answer.body[2:]) if answer else []

    def wait_for(self, kind: int, timeout: float = 3.0) -> Packet | None:
        """The next packet of a kind; PUBLISH packets on the way are kept for `messages`."""
        while True:
            found = self.read(timeout)
            if found is None or found.kind == kind:
                return found
            self.kept.append(found)

    @property
    def kept(self) -> list[Packet]:
        return self.__dict__.setdefault("_kept", [])

    def messages(self, count: int, timeout: float = 3.0, *, acknowledge: bool = True) -> list[tuple]:
        """Up to `count` messages as (topic, payload, qos, retain, dup)."""
        found = []
        while len(found) < count:
            got = self.kept.pop(0) if self.kept else self.read(timeout)
            if got is None:
                break
            if got.kind == 3:
                topic, payload, qos, retain, dup, packet_id = got.publish()
                if qos and acknowledge:
                    self.send(packet(4, 0, struct.pack(">H", packet_id)))
                found.append((topic, payload, qos, retain, dup))
        return found

    def close(self, *, clean: bool = True) -> None:
        if clean:
            with contextlib.suppress(OSError):
                self.send(packet(14, 0, b""))
        self.socket.close()

    def closed_by_peer(self, timeout: float = 5.0) -> bool:
        self.socket.settimeout(timeout)
        try:
            while True:
                if not self.socket.recv(65536):
                    return True
        except TimeoutError:
            return False
        except (ConnectionError, ssl.SSLError):
            return True
