"""The supervisor's interface for its parts: its queue, its journal and its report.

`edge_agent.supervisor.journal` implements it; `trust`, `delivery` and `supervisor` are written against it.
"""

from collections import Counter
from typing import Protocol

from models.errors import SortlineError
from models.messages import Fault


class Host(Protocol):
    """The supervisor, as its parts see it. All but `enqueue` belong to the supervisor's loop."""

    counters: Counter[str]
    """Counts by name, as they are reported."""
    fault: Fault | None
    """The reported fault of the update or the agent; None = there is none."""

    def enqueue(self, event: object) -> bool:
        """Hands an event to the loop, from any thread; False when it had to be dropped."""

    def event(self, code: str, message: str, **facts: str) -> None:
        """Stores an event for the control plane."""

    def report_error(self, error: SortlineError) -> None:
        """Makes an error the reported fault and stores an event, once while it stays the same."""

    def set_fault(self, fault: Fault) -> None:
        """Makes this the reported fault."""

    def report(self) -> None:
        """Publishes the reported state."""
