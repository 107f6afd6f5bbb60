"""Many receivers of one bundle in one process, on raw sockets: they cost little, so the broker is what is measured.

`python -m benchmarks.receivers --port P --count N --way window|whole|ask|plain --bundle DIRECTORY`. Prints `ready` when
all are connected, waits for a line on standard input, then prints the seconds until the last one had every byte.
"""

import argparse
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.broker import packet, text
from models.bundle import blobs_of, read_bundle
from models.messages import Request, encode
from models.topics import BLOBS, blob_topic

WINDOW = 8
WHOLE_TOPIC = "sortline/v1/blobs/whole"


def connect(port: int, name: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(packet(1, 0, text("MQTT") + b"\4\xc2\0\0" + text(name) + text(name) + text("x")))
    assert connection.recv(4)[3] == 0
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Receiver:
    """One agent that gets the blobs in one of the four ways, without disk and hashes; every byte is compared."""

    def __init__(self, connection: socket.socket, name: str, way: str, blobs: dict[str, bytes], whole: int) -> None:
        self.connection, self.name, self.way, self.blobs, self.whole = connection, name, way, blobs, whole
        self.left = list(blobs)
        self.open: set[str] = set()
        self.buffer = bytearray()
        self.got = 0
        self.wrong = 0
        self.done = False
        self._number = 0

    def begin(self) -> None:
        if self.way == "whole":
            self._subscribe([WHOLE_TOPIC])
        elif self.way == "ask":
            self._subscribe([f"sortline/v1/agents/{self.name}/blob"])
            self._more()
        elif self.way == "window":
            self._more()

    def _id(self) -> bytes:
        self._number = self._number % 65535 + 1
        return struct.pack(">H", self._number)

    def _subscribe(self, topics: list[str]) -> None:
        self.connection.sendall(packet(8, 2, self._id() + b"".join(text(topic) + b"\1" for topic in topics)))

    def _more(self) -> None:
        new = [digest for digest in self.left[:WINDOW] if digest not in self.open]
        if not new:
            return
        self.open |= set(new)
        if self.way == "window":
            self._subscribe([blob_topic(digest) for digest in new])
            return
        request = encode(Request(digests=tuple(new)))
        body = text(f"sortline/v1/agents/{self.name}/request") + self._id() + request
        self.connection.sendall(packet(3, 2, body))

    def read(self) -> None:
        data = self.connection.recv(1 << 18)
        if not data:
            raise ConnectionError(f"{self.name} was cut off after {self.got} bytes")
        if self.way == "plain":
            self.got += len(data)
            self.done = self.got >= self.whole
            return
        self.buffer += data
        for first, body in self._packets():
            if first >> 4 == 3:
                self._message(first, body)

    def _packets(self) -> Iterator[tuple[int, bytes]]:
        at, view = 0, memoryview(self.buffer)
        while len(view) - at >= 2:
            size, shift, place = 0, 0, at + 1
            while place < len(view):
                size |= (view[place] & 0x7F) << shift
                shift += 7
                place += 1
                if view[place - 1] < 0x80:
                    break
            else:
                break
            if len(view) - place < size:
                break
            yield view[at], bytes(view[place : place + size])
            at = place + size
        view.release()
        if at:
            del self.buffer[:at]

    def _message(self, first: int, body: bytes) -> None:
        length = struct.unpack_from(">H", body)[0]
        topic, at = body[2 : 2 + length].decode(), 2 + length
        if first & 6:
            self.connection.sendall(packet(4, 0, body[at : at + 2]))
            at += 2
        payload = body[at:]
        self.got += len(payload)
        if self.way == "whole":
            self.done = len(payload) == self.whole
            return
        digest = topic.removeprefix(BLOBS) if self.way == "window" else self.open_blob(payload)
        self.wrong += self.blobs.get(digest) != payload
        if digest in self.open:
            self.open.discard(digest)
            self.left.remove(digest)
            if self.way == "window":
                self.connection.sendall(packet(10, 2, self._id() + text(topic)))
        self._more()
        self.done = not self.left

    def open_blob(self, payload: bytes) -> str:
        return next((digest for digest in self.open if self.blobs[digest] == payload), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--way", choices=("window", "whole", "ask", "plain"), required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    given = parser.parse_args()
    bundle = read_bundle(given.bundle)
    blobs = dict(blobs_of(bundle.manifest, lambda entry: (given.bundle / entry.path).read_bytes()))
    whole = sum(map(len, blobs.values()))
    selector, receivers = selectors.DefaultSelector(), []
    for number in range(given.count):
        name = f"r-{number}"
        if given.way == "plain":
            connection = socket.create_connection(("127.0.0.1", given.port))
        else:
            connection = connect(given.port, name)
        receivers.append(Receiver(connection, name, given.way, blobs, whole))
        selector.register(connection, selectors.EVENT_READ, receivers[-1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    started, waiting = time.perf_counter(), set(receivers)
    for receiver in receivers:
        receiver.begin()
    while waiting:
        for key, _ in selector.select(30.0) or [(None, None)]:
            if key is None:
                raise TimeoutError(f"{len(waiting)} of {given.count} receivers wait for bytes")
            key.data.read()
            if key.data.done:
                # This receiver is done: the end of its connection is no loss while others still receive.
                selector.unregister(key.fileobj)
                waiting.discard(key.data)
    elapsed = time.perf_counter() - started
    assert not sum(receiver.wrong for receiver in receivers), "wrong bytes arrived"
    sys.stdout.write(f"{elapsed} {sum(receiver.got for receiver in receivers)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
