"""Holds what arrived from agents until it is stored: bounded, and under overload the least important goes first.

Rules: of live figures, and of reports, only the newest of each agent is kept, so many that wait cost as much as one.
Presence, reports and responses are never dropped for lack of room: they are bounded by the number of agents. A batch
that is there already is not kept twice, and beyond its bounds a batch is left to its agent, which has not been
acknowledged and sends it again. Nothing is ever asked for again from the broker: a drop cannot bring more messages.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Final, NamedTuple

from control_plane.database.tables.columns import utc_now
from models.errors import MessageError
from models.messages import MAX_BATCH_BYTES, MAX_CONTROL_BYTES, MAX_LIVE_BYTES, MAX_REPORTED_BYTES, Live, decode
from models.topics import Channel, parse_agent_topic

log = logging.getLogger("sortline.fleet")
MAX_AGENTS: Final = 20_000
"""Agents whose messages may wait at once; the broker's access list admits none that did not enrol."""
MAX_BATCHES_OF_ONE: Final = 8
"""An agent has four batches in flight and repeats them."""
MAX_BATCH_BYTES_WAITING: Final = 64 * 1024 * 1024
MAX_OTHERS: Final = 2000
"""Responses and requests that may wait."""
MAX_PRESENCE_OF_ONE: Final = 4
AT_ONCE: Final = 500
"""Batches that are handed over at once: one transaction of about a tenth of a second."""
_BYTES_AT_ONCE: Final = 4 * 1024 * 1024
_LOG_EVERY_S: Final = 10.0
_LIVE_S: Final = 5.0
_WATCHED_S: Final = 60.0
_LIMITS: Final = {
    Channel.LIVE: MAX_LIVE_BYTES,
    Channel.PRESENCE: MAX_CONTROL_BYTES,
    Channel.REPORTED: MAX_REPORTED_BYTES,
    Channel.BATCH: MAX_BATCH_BYTES,
    Channel.REQUEST: MAX_CONTROL_BYTES,
    Channel.RESPONSE: MAX_CONTROL_BYTES,
}


class Message(NamedTuple):
    """One message of an agent as it arrived."""

    arrival: int
    """Grows with every message: the order of arrival."""
    at: datetime
    agent_id: str
    channel: Channel
    payload: bytes
    retained: bool
    """The broker had kept it: it says nothing about whether the agent lives now."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """How far the control plane is behind."""

    waiting: int
    """Messages that are not stored yet."""
    oldest_s: float
    """Age of the oldest of them."""
    shed_lately: int
    """Batches that were left to their agents in the last minute."""


class LiveFigures:
    """The last live figures of each agent: lossy by contract, so they stay in memory and are decoded when read.

    Args:
        counters: Counts what is refused.
        clock: Monotonic seconds.
    """

    def __init__(self, counters: Counter[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._counters, self._clock = counters, clock
        self._last: dict[str, tuple[float, bytes]] = {}
        self._decoded: dict[str, tuple[bytes, Live | None]] = {}
        self._watched_s = -1e9

    def put(self, agent_id: str, payload: bytes) -> None:
        """Keeps the newest figures of an agent."""
        if len(self._last) < MAX_AGENTS or agent_id in self._last:
            self._last[agent_id] = self._clock(), payload

    def watch(self) -> None:
        """Says that somebody looks: the figures are subscribed to for the next minute."""
        self._watched_s = self._clock()

    @property
    def watched(self) -> bool:
        """Whether somebody looked within the last minute."""
        return self._clock() - self._watched_s < _WATCHED_S

    def of(self, agent_id: str) -> Live | None:
        """Returns the figures of an agent while they are fresh (5 s)."""
        at_s, payload = self._last.get(agent_id, (-1e9, b""))
        if self._clock() - at_s >= _LIVE_S:
            return None
        known = self._decoded.get(agent_id)
        if known is None or known[0] is not payload:
            try:
                live: Live | None = decode(payload, Live, limit=MAX_LIVE_BYTES)
            except MessageError as error:
                self._counters[f"refused_{error.code}"] += 1
                live = None
            known = self._decoded[agent_id] = payload, live
        return known[1]


class Intake:
    """The waiting room between the MQTT callbacks and the thread that stores.

    Args:
        live: Takes the live figures.
        counters: Counts what arrived and what was shed.
        clock: Monotonic seconds.
    """

    def __init__(
        self, live: LiveFigures, counters: Counter[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._live, self._counters, self._clock = live, counters, clock
        self._changed = threading.Condition()
        self._arrivals = 0
        self._presence: dict[str, list[Message]] = {}
        self._reports: dict[str, Message] = {}
        self._others: deque[Message] = deque()
        self._batches: deque[Message] = deque()
        self._batch_bytes = 0
        self._batches_of: Counter[str] = Counter()
        self._keys: set[tuple[str, int]] = set()
        """Agent and hash of every batch that waits or is being stored."""
        self._in_hand: list[Message] = []
        self._shed: deque[float] = deque(maxlen=10_000)
        self._logged_s = -1e9
        self._unlogged = 0

    def put(self, topic: str, payload: bytes, retained: bool = False) -> None:
        """Takes a message; never blocks for long and never raises."""
        try:
            agent_id, channel = parse_agent_topic(topic)
        except MessageError as error:
            self._counters[f"refused_{error.code}"] += 1
            return
        self._counters[f"received_{channel}"] += 1
        if not payload:
            return
        if channel not in _LIMITS:
            self._counters["refused_topic.unknown"] += 1
        elif len(payload) > _LIMITS[channel]:
            self._counters["refused_message.oversize"] += 1
        elif channel is Channel.LIVE:
            self._live.put(agent_id, payload)
        else:
            with self._changed:
                self._arrivals += 1
                self._keep(Message(self._arrivals, utc_now(), agent_id, channel, payload, retained))
                self._changed.notify()

    def _keep(self, message: Message) -> None:
        match message.channel:
            case Channel.BATCH:
                self._keep_batch(message)
            case Channel.REPORTED if len(self._reports) < MAX_AGENTS or message.agent_id in self._reports:
                self._counters["replaced_reports"] += message.agent_id in self._reports
                self._reports[message.agent_id] = message
            case Channel.PRESENCE if len(self._presence) < MAX_AGENTS or message.agent_id in self._presence:
                waiting = self._presence.setdefault(message.agent_id, [])
                if waiting and waiting[-1].payload == message.payload and waiting[-1].retained == message.retained:
                    return
                waiting.append(message)
                del waiting[:-MAX_PRESENCE_OF_ONE]
            case _ if message.channel in {Channel.RESPONSE, Channel.REQUEST} and len(self._others) < MAX_OTHERS:
                self._others.append(message)
            case _:
                self._counters["incoming_dropped"] += 1

    def _keep_batch(self, message: Message) -> None:
        key = message.agent_id, hash(message.payload)
        if key in self._keys:
            self._counters["repeated_batches"] += 1
            return
        full = self._batch_bytes + len(message.payload) > MAX_BATCH_BYTES_WAITING
        if full or self._batches_of[message.agent_id] >= MAX_BATCHES_OF_ONE:
            self._say_shed()
            return
        self._keys.add(key)
        self._batches.append(message)
        self._batches_of[message.agent_id] += 1
        self._batch_bytes += len(message.payload)

    def _say_shed(self) -> None:
        now = self._clock()
        self._counters["shed_batches"] += 1
        self._shed.append(now)
        self._unlogged += 1
        if now - self._logged_s >= _LOG_EVERY_S:
            waiting = len(self._batches)
            log.warning("overload: %s batches left to their agents for later, %s wait", self._unlogged, waiting)
            self._logged_s, self._unlogged = now, 0

    def take(self, timeout_s: float) -> list[Message]:
        """Returns what shall be stored next, in the order of arrival; empty when nothing came in time.

        All presence, reports and responses, and the oldest batches up to a bound. Call `done` with them once stored.
        """
        with self._changed:
            if not self._waiting():
                self._changed.wait(timeout_s)
            taken = [message for waiting in self._presence.values() for message in waiting]
            taken += self._reports.values()
            taken += self._others
            self._presence, self._reports = {}, {}
            self._others.clear()
            size = count = 0
            while self._batches and count < AT_ONCE and size < _BYTES_AT_ONCE:
                message = self._batches.popleft()
                size, count = size + len(message.payload), count + 1
                taken.append(message)
        return sorted(taken)

    def done(self, messages: Sequence[Message]) -> None:
        """Frees the room of messages that were stored or refused."""
        with self._changed:
            for message in messages:
                if message.channel is Channel.BATCH:
                    self._keys.discard((message.agent_id, hash(message.payload)))
                    self._batch_bytes -= len(message.payload)
                    self._batches_of[message.agent_id] -= 1
                    if self._batches_of[message.agent_id] <= 0:
                        del self._batches_of[message.agent_id]
            self._in_hand = []

    @property
    def full(self) -> bool:
        """Whether as many batches wait as are handed over at once."""
        return len(self._batches) >= AT_ONCE

    def _waiting(self) -> int:
        return len(self._presence) + len(self._reports) + len(self._others) + len(self._batches)

    def backlog(self) -> Backlog:
        """Returns how far behind the control plane is now."""
        with self._changed:
            now = self._clock()
            while self._shed and now - self._shed[0] > 60.0:
                self._shed.popleft()
            first = [*self._in_hand[:1], *islice(self._batches, 1), *islice(self._reports.values(), 1)]
            oldest_s = max([0.0, *((utc_now() - message.at).total_seconds() for message in first)])
            return Backlog(self._waiting() + len(self._in_hand), oldest_s, len(self._shed))
