"""Whether agents have reported anything that could move a rollout, found without reading the whole fleet.

A running line reports every ten seconds that nothing has changed. Only the reports that arrived since the last look
are read, and only what planning uses of them is compared.
"""

from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Text, cast
from sqlmodel import Session, col, select

from control_plane.database.tables.agents import Agent
from control_plane.fleet.reports import parse_report_text
from models.messages import Reported

_OVERLAP: Final = timedelta(seconds=2)
"""A transaction may commit a little after the time it wrote; what commits even later is found by the next full plan."""
_ITEMS_SHOWN: Final = 1000
"""Up to here every judged item counts as news; a rollout that waits for more items finds them by the next full plan."""


class ReportChanges:
    """Remembers, per agent, what planning would see; lives as long as the process leads the rollouts."""

    def __init__(self) -> None:
        self._since: datetime | None = None
        self._known: dict[str, tuple[object, ...]] = {}

    def look(self, session: Session, now: datetime) -> bool:
        """Returns whether any agent reports something new to planning since the last look; True the first time."""
        first, since = self._since is None, self._since or now
        query = select(Agent.id, Agent.reported_at, cast(col(Agent.reported), Text), Agent.generation)
        rows = session.exec(query.where(col(Agent.reported_at) > since - _OVERLAP)).all()
        news = first
        for agent_id, reported_at, text, generation in rows:
            self._since = max(self._since or reported_at, reported_at) if reported_at else self._since
            seen = (generation, *_relevant(parse_report_text(text)))
            if self._known.get(agent_id) != seen:
                self._known[agent_id] = seen
                news = True
        self._since = self._since or now
        return news


def _relevant(reported: Reported) -> tuple[object, ...]:
    fault = reported.fault and (reported.fault.code, reported.fault.message)
    champion = (reported.generation, reported.phase, reported.active, reported.previous, reported.blocked)
    challenger = (reported.shadow_phase, reported.shadow, reported.shadow_running)
    return (*champion, *challenger, reported.safe_state, fault, min(reported.items_on_active, _ITEMS_SHOWN))
