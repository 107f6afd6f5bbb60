"""A bad network: a TCP proxy that splits MQTT packets and loses, repeats or reorders them, or cuts connections."""

import random
import selectors
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

PUBLISH, PUBACK = 3, 4


@dataclass
class Noise:
    """Shares of PUBLISH and PUBACK packets (both ways) that meet each fate."""

    lose: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.3
    """Delayed packets are overtaken by the ones behind them."""


@dataclass
class _Way:
    """One direction of one connection."""

    source: socket.socket
    target: socket.socket
    buffer: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)


class Proxy:
    """Forwards connections to a port; use as a `with` block.

    Args:
        target: Port of the broker.
        seed: Of the noise.
    """

    def __init__(self, target: int, seed: int) -> None:
        self._target, self._rng = target, random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        self.noise = Noise()
        self.partitioned = False
        """While set, no byte moves and no connection is accepted; open ones stay open, as with a pulled cable."""
        self.counters: Counter[str] = Counter()
        self._selector = selectors.DefaultSelector()
        self._ways: dict[socket.socket, _Way] = {}
        self._later: list[tuple[float, _Way, bytes]] = []
        self._cut = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._drop_all()
        self._listener.close()

    def cut(self) -> None:
        """Closes every connection that is open now."""
        self._cut.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._cut.is_set():
                self._cut.clear()
                self._drop_all()
            if self.partitioned:
                time.sleep(0.02)
                continue
            now = time.monotonic()
            due = [entry for entry in self._later if entry[0] <= now]
            self._later = [entry for entry in self._later if entry[0] > now]
            for _, way, packet in due:
                if way.source in self._ways:
                    way.out += packet
                    self._flush(way)
            for key, _ in self._selector.select(0.02):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            for way in [w for w in self._ways.values() if w.out]:
                self._flush(way)

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        try:
            broker = socket.create_connection(("127.0.0.1", self._target), timeout=1.0)
        except OSError:
            peer.close()
            return
        self.counters["connections"] += 1
        for one, other in ((peer, broker), (broker, peer)):
            one.setblocking(False)
            self._ways[one] = _Way(one, other)
            self._selector.register(one, selectors.EVENT_READ)

    def _read(self, source: socket.socket) -> None:
        way = self._ways.get(source)
        if way is None:
            return
        if len(way.out) > 1 << 22:
            return  # back-pressure: what the target does not take is not read
        try:
            data = source.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(way)
            return
        way.buffer += data
        for packet in self._packets(way.buffer):
            self._forward(way, packet)
        self._flush(way)

    def _packets(self, buffer: bytearray) -> list[bytes]:
        found = []
        while len(buffer) >= 2:
            size, shift, place, whole = 0, 0, 1, False
            while place < len(buffer) and place < 5:
                size |= (buffer[place] & 0x7F) << shift
                shift += 7
                place += 1
                if buffer[place - 1] < 0x80:
                    whole = True
                    break
            if not whole or len(buffer) < place + size:
                break
            found.append(bytes(buffer[: place + size]))
            del buffer[: place + size]
        return found

    def _forward(self, way: _Way, packet: bytes) -> None:
        kind, dice = packet[0] >> 4, self._rng.random()
        noise = self.noise
        if kind in {PUBLISH, PUBACK} and dice < noise.lose + noise.repeat + noise.delay:
            if dice < noise.lose:
                self.counters["lost"] += 1
                return
            if dice < noise.lose + noise.repeat:
                self.counters["repeated"] += 1
                way.out += packet
                if kind == PUBLISH and packet[0] & 6:
                    packet = bytes([packet[0] | 8]) + packet[1:]
            else:
                self.counters["delayed"] += 1
                self._later.append((time.monotonic() + self._rng.uniform(0.0, noise.delay_s), way, packet))
                return
        self.counters["packets"] += 1
        way.out += packet

    def _flush(self, way: _Way) -> None:
        try:
            while way.out:
                sent = way.target.send(way.out[: 1 << 16])
                del way.out[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._drop(way)

    def _drop(self, way: _Way) -> None:
        for one in (way.source, way.target):
            if self._ways.pop(one, None) is not None:
                self._selector.unregister(one)
            one.close()

    def _drop_all(self) -> None:
        for way in list(self._ways.values()):
            self._drop(way)
        self.counters["cuts"] += 1
