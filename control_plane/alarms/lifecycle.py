"""The life cycle of an alarm as one table: what may happen in which state, and where it leads.

People acknowledge, silence and resolve; the loop worsens (the severity grew), expires (a silence is over) and clears
(the cause is gone). What is not in the table is refused. Law: every history of events ends in a state of the table, and
a resolved alarm never changes again: when its cause comes back, a new alarm begins.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from control_plane.database.tables.alarms import AlarmState
from models.errors import ConflictError


class Event(StrEnum):
    """What may happen to an alarm."""

    ACKNOWLEDGE = "acknowledge"
    SILENCE = "silence"
    RESOLVE = "resolve"
    WORSEN = "worsen"
    EXPIRE = "expire"
    CLEAR = "clear"


_S: Final = AlarmState
TRANSITIONS: Final[Mapping[tuple[AlarmState, Event], AlarmState]] = {
    (_S.OPEN, Event.ACKNOWLEDGE): _S.ACKNOWLEDGED,
    (_S.OPEN, Event.SILENCE): _S.SILENCED,
    (_S.OPEN, Event.RESOLVE): _S.RESOLVED,
    (_S.OPEN, Event.WORSEN): _S.OPEN,
    (_S.OPEN, Event.CLEAR): _S.RESOLVED,
    (_S.ACKNOWLEDGED, Event.SILENCE): _S.SILENCED,
    (_S.ACKNOWLEDGED, Event.RESOLVE): _S.RESOLVED,
    # Who acknowledged the milder alarm did not answer for this one.
    (_S.ACKNOWLEDGED, Event.WORSEN): _S.OPEN,
    (_S.ACKNOWLEDGED, Event.CLEAR): _S.RESOLVED,
    (_S.SILENCED, Event.ACKNOWLEDGE): _S.ACKNOWLEDGED,
    (_S.SILENCED, Event.SILENCE): _S.SILENCED,
    (_S.SILENCED, Event.RESOLVE): _S.RESOLVED,
    (_S.SILENCED, Event.WORSEN): _S.OPEN,
    (_S.SILENCED, Event.EXPIRE): _S.OPEN,
    (_S.SILENCED, Event.CLEAR): _S.RESOLVED,
}
BY_PEOPLE: Final = (Event.ACKNOWLEDGE, Event.SILENCE, Event.RESOLVE)


def allowed(state: AlarmState) -> list[Event]:
    """Returns what people may do in this state, in the order of `BY_PEOPLE`."""
    return [event for event in BY_PEOPLE if (state, event) in TRANSITIONS]


def next_state(state: AlarmState, event: Event) -> AlarmState:
    """Returns where an event leads.

    Raises:
        ConflictError: `alarm.not_allowed`.
    """
    found = TRANSITIONS.get((state, event))
    if found is None:
        words = ", ".join(allowed(state)) or "nothing: it is over"
        raise ConflictError(
            "alarm.not_allowed", f"This alarm is {state}: it cannot take {event}.", expected=words, got=str(event)
        )
    return found
