"""Unauthenticated TCP connections, which are limited in memory and time.

A connection is a bare socket until its first byte comes and a place is free; only then a TLS handshake (about a
hundred kilobytes) begins. One silent socket more than the limit closes the oldest; a handshake that takes longer
than a second loses its place to a waiting connection, the newest first. So neither silent nor slow peers keep a valid
client out, and a whole fleet that comes back at once is admitted in turn. One deadline runs from the accept to a
verified CONNECT.
"""

import asyncio
import contextlib
import logging
import socket
import ssl

from control_plane.broker.broker import Broker
from control_plane.broker.client_certificates import Certificates
from control_plane.broker.connection import Connection

log = logging.getLogger("sortline.broker")
_ACCEPT_AT_ONCE = 64
_SLOW_HANDSHAKE_S = 1.0


class Acceptor:
    """Accepts connections for a broker.

    Args:
        broker: Gets a `Connection` once a peer has sent a byte and, under TLS, completed the handshake.
        listener: A listening socket; closed by `close`.
    """

    def __init__(self, broker: Broker, listener: socket.socket) -> None:
        self._broker, self._listener = broker, listener
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[socket.socket, asyncio.TimerHandle] = {}
        """Connections without a place, the oldest first, with their deadlines."""
        self._spoken: dict[socket.socket, float] = {}
        """Connections that have sent a byte and wait for a place, with the time of their accept."""
        self._shaking: dict[asyncio.Task[None], float] = {}
        """Running handshakes with the time of their start."""
        self._turn: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accepts no more, and closes every connection that is not authenticated."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for peer in list(self._waiting):
            self._dismiss(peer, "shutdown")
        for task in list(self._shaking):
            task.cancel()
        if self._turn is not None:
            self._turn.cancel()

    def _accept(self) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # No file descriptors left, or a peer that is gone already: try again after a short pause.
                log.warning("cannot accept: %s", error)
                self._broker.counters["accept_failed"] += 1
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.5, self._reopen)
                return
            self._seat(peer)

    def _reopen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _seat(self, peer: socket.socket) -> None:
        """Waits for the first byte of a connection."""
        peer.setblocking(False)
        if len(self._waiting) >= self._broker.limits.silent:
            self._dismiss(next(iter(self._waiting)), "crowded")
        deadline_s = self._broker.limits.connect_deadline_s
        self._waiting[peer] = self._loop.call_later(deadline_s, self._dismiss, peer, "connect_deadline")
        self._loop.add_reader(peer, self._spoke, peer, self._broker.clock())

    def _dismiss(self, peer: socket.socket, reason: str) -> None:
        self._leave(peer)
        self._broker.counters[f"closed_{reason}"] += 1
        peer.close()

    def _leave(self, peer: socket.socket) -> None:
        self._loop.remove_reader(peer)
        self._waiting.pop(peer).cancel()
        self._spoken.pop(peer, None)

    def _spoke(self, peer: socket.socket, accepted_s: float) -> None:
        self._loop.remove_reader(peer)
        self._spoken[peer] = accepted_s
        self._fill()

    def _fill(self) -> None:
        """Gives free places to connections that have sent a byte, the newest first; ends a slow handshake for one."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        places = self._broker.limits.handshakes
        while self._spoken and len(self._shaking) < places:
            peer, accepted_s = self._spoken.popitem()
            self._leave(peer)
            task = self._loop.create_task(self._shake(peer, accepted_s), name="handshake")
            self._shaking[task] = self._broker.clock()
            task.add_done_callback(self._done)
        if self._spoken:
            oldest, began_s = next(iter(self._shaking.items()))
            left_s = _SLOW_HANDSHAKE_S - (self._broker.clock() - began_s)
            if left_s <= 0.0:
                self._broker.counters["closed_slow_handshake"] += 1
                oldest.cancel()
            self._turn = self._loop.call_later(max(0.02, left_s), self._fill)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._shaking.pop(task, None)
        if self._listener.fileno() >= 0:
            self._fill()

    async def _shake(self, peer: socket.socket, accepted_s: float) -> None:
        broker, credentials = self._broker, self._broker.credentials
        context: ssl.SSLContext | None = None
        left_s: float | None = None
        if isinstance(credentials, Certificates):
            context = credentials.context
            left_s = max(0.1, broker.limits.connect_deadline_s - (broker.clock() - accepted_s))
        try:
            await self._loop.connect_accepted_socket(
                lambda: Connection(broker, accepted_s),
                peer,
                ssl=context,
                ssl_handshake_timeout=left_s,
                ssl_shutdown_timeout=left_s,
            )
        except (OSError, ssl.SSLError) as error:  # includes the handshake's timeout
            broker.counters["handshake_failed"] += 1
            log.debug("no handshake: %s", error)
            with contextlib.suppress(OSError):
                peer.close()
