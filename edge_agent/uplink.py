"""Sends what the spool holds, one batch in flight, again until it is acknowledged."""

import logging
from typing import Protocol

from edge_agent.spool import Spool
from models.messages import Ack, Batch, Record, encode_batch

log = logging.getLogger("sortline.uplink")
_MOST = 200
_LONGEST_RETRY_S = 120.0


class Sender(Protocol):
    """The part of the link that is needed."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Sends; False when it could not."""


class Uplink:
    """Drains a spool over a link.

    Args:
        spool: Where records wait.
        link: What sends.
        topic: Of the batches.
        retry_s: Without acknowledgement a batch is sent again after this; the pause doubles.
    """

    def __init__(self, spool: Spool, link: Sender, topic: str, *, retry_s: float) -> None:
        self._spool, self._link, self._topic, self._retry_s = spool, link, topic, retry_s
        self._sent: tuple[Record, ...] = ()
        self._due_s = 0.0
        self._pause_s = retry_s
        self.batches = 0
        self.repeats = 0

    def reset(self) -> None:
        """After a (re)connect: whatever was in flight is sent again at once."""
        self._sent, self._due_s, self._pause_s = (), 0.0, self._retry_s

    def tick(self, now: float) -> None:
        """Sends the next batch, or the last one again when its acknowledgement is overdue."""
        if not self._link.connected or (self._sent and now < self._due_s):
            return
        if self._sent:
            self.repeats += 1
            self._pause_s = min(self._pause_s * 2.0, _LONGEST_RETRY_S)
        records = self._spool.next_batch(_MOST)
        if not records:
            self._sent = ()
            return
        if self._link.publish(self._topic, encode_batch(Batch(records=records))):
            self._sent, self._due_s = records, now + self._pause_s
            self.batches += 1

    def acknowledged(self, ack: Ack) -> int:
        """The control plane has these records; returns how many were deleted.

        A stale or replayed acknowledgement, or one for another boot, deletes at most what was sent.
        """
        if not self._sent or ack.boot_id != self._sent[0].boot_id:
            return 0
        deleted = self._spool.acknowledge(ack, self._sent[-1].seq)
        if ack.through_seq >= self._sent[-1].seq:
            self.reset()
        return deleted
