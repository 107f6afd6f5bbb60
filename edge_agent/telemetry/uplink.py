"""Sends what the spool holds, a few batches in flight, each again until it is acknowledged.

Records made since the connection began go ahead of those that waited before, so after a long partition the present
state of a line arrives before its past. Rules: a batch is deleted only by an acknowledgement that names its numbers;
after a reconnect everything is sent again.
"""

import logging
from dataclasses import dataclass
from typing import Final, Protocol

from edge_agent.telemetry.spool import Spool
from models.messages import MAX_BATCH_RECORDS, Ack, Batch, encode_batch

log = logging.getLogger("sortline.uplink")
_IN_FLIGHT: Final = 4
_LONGEST_RETRY_S: Final = 120.0


class Sender(Protocol):
    """The part of the link that is needed."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Sends; False when it could not."""


@dataclass(slots=True)
class _Flight:
    """A batch that was sent: its places in the spool, its numbers, when it is sent again."""

    first_id: int
    last_id: int
    boot_id: str
    first: int
    last: int
    due_s: float


class Uplink:
    """Drains a spool over a link.

    Args:
        spool: Where records wait.
        link: The connection.
        topic: Topic of the batches.
        retry_s: Without acknowledgement a batch is sent again after this; the pause doubles.
    """

    def __init__(self, spool: Spool, link: Sender, topic: str, *, retry_s: float) -> None:
        self._spool, self._link, self._topic, self._retry_s = spool, link, topic, retry_s
        self._flights: list[_Flight] = []
        self._pause_s = retry_s
        self._split: int | None = None
        """Place of the last record that waited when the connection came."""
        self.batches = 0
        self.repeats = 0

    def reset(self) -> None:
        """Sends everything that was in flight again at once, after a (re)connect."""
        self._flights.clear()
        self._pause_s, self._split = self._retry_s, None

    def tick(self, now: float) -> None:
        """Sends more batches, and again those whose acknowledgement is overdue."""
        if not self._link.connected:
            return
        if self._split is None:
            self._split = self._spool.last_id
        if self._spool.has_gaps:
            self._spool.seal_gaps()
        if any(flight.due_s <= now for flight in self._flights):
            # Starts again at the oldest one; at worst the records in flight beyond it are sent twice.
            self._pause_s = min(self._pause_s * 2.0, _LONGEST_RETRY_S)
            self.repeats += len(self._flights)
            self._flights.clear()
        while len(self._flights) < _IN_FLIGHT:
            fresh = max([self._split, *(f.last_id for f in self._flights)])
            waiting = max([0, *(f.last_id for f in self._flights if f.last_id <= self._split)])
            if not self._send(fresh, None, now) and not self._send(waiting, self._split, now):
                return

    def _send(self, after: int, through: int | None, now: float) -> bool:
        """Sends the next slice there; False when there is none or the link is congested."""
        found = self._spool.read(after=after, through=through, most=MAX_BATCH_RECORDS)
        if found is None or not self._link.publish(self._topic, encode_batch(Batch(records=found.records))):
            return False
        first, last = found.records[0], found.records[-1]
        due_s = now + self._pause_s
        self._flights.append(_Flight(found.first_id, found.last_id, first.boot_id, first.seq, last.seq, due_s))
        self.batches += 1
        return True

    def acknowledged(self, ack: Ack) -> int:
        """Deletes the records that the control plane acknowledged; returns how many were deleted.

        A stale or replayed acknowledgement, or one for another boot, deletes at most what was sent.
        """
        deleted = 0
        for flight in [f for f in self._flights if f.boot_id == ack.boot_id]:
            first, last = max(ack.from_seq, flight.first), min(ack.through_seq, flight.last)
            if first > last:
                continue
            deleted += self._spool.forget(ack.boot_id, first, last, first_id=flight.first_id, last_id=flight.last_id)
            if (first, last) == (flight.first, flight.last):
                self._flights.remove(flight)
                self._pause_s = self._retry_s
        return deleted
