"""The event queue of a process: bounded, and handed over without loss where loss is not allowed."""

import queue
import time
from collections.abc import Callable
from typing import Any, Final

Deliver = Callable[[Any], bool]
_RETRY_S: Final = 0.1
_MAX_WAITING: Final = 1024
"""Events of a supervisor: some seconds of a busy link; a full queue makes the sender wait or count a drop."""


def deliver_surely(deliver: Deliver, event: object) -> None:
    """Hands over what must not be lost; waits while the queue is full. For threads of their own."""
    while deliver(event) is False:
        time.sleep(_RETRY_S)


def bounded_queue() -> "queue.Queue[Any]":
    """Returns the queue all events of a supervisor go through."""
    return queue.Queue(_MAX_WAITING)
