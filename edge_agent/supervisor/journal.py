"""The supervisor's journal: what happened (events), what is wrong (the reported fault), how often (counters).

Events go to the spool, so that a fault during an outage is still known afterwards. Law: an error that repeats is one
event until another one takes its place.
"""

import logging
import queue
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from models.errors import CapacityError, SortlineError
from models.messages import Event, Fault, RecordKind, fault_of, wall_ms
from models.text import mask

log = logging.getLogger("sortline.supervisor")


class Journal:
    """Implements `edge_agent.host.Host`.

    Args:
        events: The loop's queue.
        store: Keeps a record of this kind durably. Raises `CapacityError` when there is no room.
        publish: Publishes the reported state.
    """

    def __init__(
        self,
        events: "queue.Queue[Any]",
        store: Callable[[RecordKind, bytes], None],
        publish: Callable[[], None],
    ) -> None:
        self._events, self._store, self._publish = events, store, publish
        self.counters: Counter[str] = Counter()
        self.fault: Fault | None = None

    def enqueue(self, event: object) -> bool:
        """Hands an event to the loop, from any thread; False when it had to be dropped."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.counters["events_dropped"] += 1
            return False
        return True

    def record(self, kind: RecordKind, payload: bytes) -> None:
        """Stores a record; one that finds no room is counted and lost."""
        try:
            self._store(kind, payload)
        except CapacityError as error:
            self.counters["spool_full"] += 1
            log.warning("%s", error)

    def event(self, code: str, message: str, **facts: str) -> None:
        """Stores an event for the control plane."""
        message, facts = mask(message), {name: mask(value) for name, value in facts.items()}
        log.info("event %s %s %s", code, message, facts)
        event = Event(at_ms=wall_ms(), code=code, message=message[:600], facts=facts)
        self.record(RecordKind.EVENT, msgspec.msgpack.encode(event))

    def set_fault(self, fault: Fault) -> None:
        """Makes this the reported fault."""
        self.fault = msgspec.structs.replace(fault, message=mask(fault.message), at_ms=fault.at_ms or wall_ms())

    def report_error(self, error: SortlineError) -> None:
        """Makes an error the reported fault and stores an event, once while it stays the same."""
        if self.fault is None or self.fault.code != error.code:
            log.warning("%s", error)
            self.set_fault(fault_of(error))
            self.event(error.code, str(error))
            self.report()

    def report(self) -> None:
        """Publishes the reported state."""
        self._publish()
