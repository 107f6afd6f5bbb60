"""How every agent is, from the database and the last live figures, cheap enough to be asked once a second.

The windows of the last minutes are the costly part: 200 agents have 6,000 of them. Their keys are read at every look,
payloads only of agents whose set of windows changed since the last one. What is remembered is a cache: another
replica, or this one after a restart, finds the same.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Engine, tuple_
from sqlmodel import Session, col, select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import Agent, EventRow, WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.fleet.connection import FleetLink
from control_plane.fleet.lot_commands import lot_status
from control_plane.monitoring.status import AgentStatus, agent_status, merged_window
from control_plane.registry.store import Store
from models.bundle import PROFILE
from models.errors import SortlineError
from models.messages import Live, decode_packed
from models.profile import Profile, parse_profile
from models.windows import Window

_LIVE_S: Final = 5.0
RECENT_S: Final = 300.0
"""Windows of so many seconds make the figures of an agent."""
_AT_ONCE: Final = 200
"""Payloads fetched by one statement: SQLite takes no more than some thousand parameters."""

Key = tuple[str, int]
"""Boot and number of a record."""


@dataclass(slots=True)
class _Recent:
    """What one agent sent in the last minutes, oldest first."""

    windows: list[Key] = field(default_factory=list)
    events: list[Key] = field(default_factory=list)
    last_at: datetime | None = None


class FleetBoard:
    """The fleet's board.

    Args:
        engine: Database.
        store: Where the profiles of bundles are.
        fleet: Has the live figures and says what is released.
    """

    def __init__(self, engine: Engine, store: Store, fleet: FleetLink) -> None:
        self._engine, self._store, self._fleet = engine, store, fleet
        self._merged: dict[str, tuple[str, tuple[Key, ...], Window | None]] = {}
        self._lock = threading.Lock()
        self._board: tuple[float, list[AgentStatus]] = (-1e9, [])

    def board(self, max_age_s: float) -> list[AgentStatus]:
        """Every agent as of at most so long ago: many who look at once cost one look."""
        oldest_s = time.monotonic() - max_age_s
        with self._lock:
            # Whoever waited for a look that began late enough shares it, however long it took.
            if self._board[0] < oldest_s:
                self._board = (time.monotonic(), self._look(None))
            return self._board[1]

    def all(self) -> list[AgentStatus]:
        """Every agent, as of now."""
        return self.board(0.0)

    def one(self, agent_id: str) -> AgentStatus | None:
        """One agent, as of now; None when there is none of this name."""
        with self._lock:
            return next(iter(self._look(agent_id)), None)

    def _look(self, only: str | None) -> list[AgentStatus]:
        now = utc_now()
        # `at_ms` less an age must be the same moment in every look, or rows in which nothing happened change.
        now = now.replace(microsecond=now.microsecond // 1000 * 1000)
        with reading(self._engine) as session:
            query = select(Agent).order_by(col(Agent.id))
            agents = session.exec(query if only is None else query.where(col(Agent.id) == only)).all()
            recent = _recent(session, now - timedelta(seconds=RECENT_S), only)
            windows = {agent.id: self._window(session, agent, recent[agent.id].windows) for agent in agents}
            names = _names(session, {_active(agent) for agent in agents})
            released = self._fleet.assignments.released_now(session)
        if only is None:
            self._merged = {agent.id: self._merged[agent.id] for agent in agents}
        return [
            self._status(agent, windows[agent.id], recent[agent.id], names.get(_active(agent), ""), released, now)
            for agent in agents
        ]

    def _window(self, session: Session, agent: Agent, keys: list[Key]) -> Window | None:
        """The recent windows of the active bundle as one."""
        active, wanted = _active(agent), tuple(keys)
        known = self._merged.get(agent.id)
        if known is None or known[:2] != (active, wanted):
            windows = [decode_packed(payload, Window) for payload in _payloads(session, agent.id, keys)]
            known = self._merged[agent.id] = (active, wanted, merged_window(windows, active))
        return known[2]

    def _status(
        self,
        agent: Agent,
        window: Window | None,
        recent: _Recent,
        model: str,
        released: frozenset[str] | None,
        now: datetime,
    ) -> AgentStatus:
        active = _active(agent)
        at_s, live = self._fleet.live.get(agent.id, (0.0, None))
        fresh: Live | None = live if live is not None and time.monotonic() - at_s < _LIVE_S else None
        return agent_status(
            agent_id=agent.id,
            labels=agent.labels,
            online=agent.online,
            seen_at=agent.seen_at,
            reported=agent.reported,
            reported_at=agent.reported_at,
            desired_bundle=agent.desired_bundle,
            generation=agent.generation,
            lot_asked=lot_status(agent.lot_asked, now),
            window=window,
            last_window_at=recent.last_at,
            # Windows and events share one sequence: a gap in it is a record that is missing.
            sequence=recent.windows + recent.events,
            profile=self._profile(active) if active else None,
            live=fresh,
            model=model,
            released=released,
            now=now,
        )

    def _profile(self, digest: str) -> Profile | None:
        try:
            return _profile(self._store, digest)
        except SortlineError:
            return None


def _active(agent: Agent) -> str:
    return str(agent.reported.get("active", ""))


def _recent(session: Session, since: datetime, only: str | None) -> defaultdict[str, _Recent]:
    """Keys of the windows that can be used, keys of all the rest, per agent."""
    found: defaultdict[str, _Recent] = defaultdict(_Recent)
    windows = select(WindowRow.agent_id, WindowRow.boot_id, WindowRow.seq, WindowRow.received_at)
    good = windows.where(WindowRow.refused == "").order_by(
        col(WindowRow.agent_id), col(WindowRow.received_at), col(WindowRow.seq)
    )
    for agent_id, boot_id, seq, received_at in session.exec(_of(good, WindowRow, since, only)):
        found[agent_id].windows.append((boot_id, seq))
        found[agent_id].last_at = received_at
    events = select(EventRow.agent_id, EventRow.boot_id, EventRow.seq, EventRow.received_at)
    for query in (
        _of(windows.where(WindowRow.refused != ""), WindowRow, since, only),
        _of(events, EventRow, since, only),
    ):
        for agent_id, boot_id, seq, _ in session.exec(query):
            found[agent_id].events.append((boot_id, seq))
    return found


def _of(query: Any, table: type[WindowRow] | type[EventRow], since: datetime, only: str | None) -> Any:
    recent = query.where(col(table.received_at) > since)
    return recent if only is None else recent.where(table.agent_id == only)


def _payloads(session: Session, agent_id: str, keys: list[Key]) -> Iterable[bytes]:
    """Payloads of these windows in this order."""
    for start in range(0, len(keys), _AT_ONCE):
        part = keys[start : start + _AT_ONCE]
        rows = session.exec(
            select(WindowRow.boot_id, WindowRow.seq, WindowRow.payload).where(
                WindowRow.agent_id == agent_id, tuple_(col(WindowRow.boot_id), col(WindowRow.seq)).in_(part)
            )
        )
        found = {(boot_id, seq): payload for boot_id, seq, payload in rows}
        yield from (found[key] for key in part if key in found)


def _names(session: Session, bundles: set[str]) -> dict[str, str]:
    """Bundle -> `model:number`, where it is registered."""
    registered = session.exec(
        select(ModelVersion.bundle, Model.name, ModelVersion.number)
        .join(Model, col(Model.id) == col(ModelVersion.model_id))
        .where(col(ModelVersion.bundle).in_(bundles))
    )
    return {bundle: f"{name}:{number}" for bundle, name, number in registered}


@lru_cache(maxsize=64)
def _profile(store: Store, digest: str) -> Profile:
    return parse_profile(store.part(digest, PROFILE))
