"""Standing conditions of an agent: faults that have not recovered yet, beside the events that began them.

An event passes; a weak ejector stays weak. Rules: a condition stands from the event that names it until the event that
ends it; each subject (the camera, one ejector) has at most its newest condition; conditions reported by the line end
with its process, because the next one detects and reports them again.
"""

from typing import Final

import msgspec

from models.messages import MAX_CONDITIONS, Fault

_ENDS: Final = {
    "camera.": "camera.recovered",
    "optics.": "optics.recovered",
    "ejector.": "ejector.recovered",
    "line.fail_safe": "line.fail_safe_over",
    "recipe.over_budget": "recipe.within_budget",
    "identity.shared": "identity.alone",
}
"""Beginning of the codes that name a condition, and the code that ends it."""
_MESSAGE: Final = 200
"""Most characters of a message: a report must stay small."""
_OF_LINE: Final = ("camera.", "optics.", "ejector.", "line.fail_safe", "recipe.over_budget")


class Conditions:
    """The conditions of one agent."""

    def __init__(self) -> None:
        self._standing: dict[tuple[str, str], Fault] = {}

    def note(self, fault: Fault, subject: str = "") -> bool:
        """Takes an event; returns whether it changed what stands.

        Args:
            fault: The event.
            subject: Which of several things of a kind it is about.
        """
        for kind, end in _ENDS.items():
            if fault.code == end:
                return self._standing.pop((kind, subject), None) is not None
            if fault.code.startswith(kind):
                before = self._standing.get((kind, subject))
                self._standing[kind, subject] = msgspec.structs.replace(fault, message=fault.message[:_MESSAGE])
                return before is None or before.code != fault.code
        return False

    def line_gone(self) -> None:
        """Ends the conditions that the line process reported, after that process has ended."""
        self._standing = {key: fault for key, fault in self._standing.items() if key[0] not in _OF_LINE}

    @property
    def standing(self) -> tuple[Fault, ...]:
        """The conditions that stand now, oldest first."""
        return tuple(self._standing.values())[:MAX_CONDITIONS]
