"""Keeps the status of every agent, from the database and the last live figures, fresh once a second at little cost.

A look reads the light columns of every agent, the report of those that sent one, and the windows that were stored
since the last look; sums of windows are kept, not added up again. What is remembered is a cache: another replica, or
this one after a restart, finds the same.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, TypeVar

from sqlalchemy import Engine, Text, cast, text
from sqlmodel import Session, col, select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.fleet.intake import LiveFigures
from control_plane.fleet.lot_commands import lot_status
from control_plane.fleet.reports import NO_REPORT, connection_of, parse_report_text
from control_plane.fleet.twins import twins_of
from control_plane.monitoring.figures import (
    NO_DRIFT,
    NO_FIGURES,
    Drift,
    Figures,
    completeness_of,
    drift_of,
    figures_of,
)
from control_plane.monitoring.sorting import Sorting, sorting_of
from control_plane.monitoring.status import AgentStatus, Facts, Link, agent_status, grown_older
from control_plane.monitoring.windows import RECENT_S, Key, RollingSum, StoredWindow, arrived
from control_plane.registry.store import Store
from models.bundle import PROFILE, RECIPE
from models.errors import SortlineError
from models.messages import Reported
from models.profile import Profile, parse_profile
from models.recipe import parse_recipe

R = TypeVar("R")
_RECENT: Final = timedelta(seconds=RECENT_S)
_IDS_AT_ONCE: Final = 500
_DOCUMENTS: Final = ("labels", "labels_assigned", "lot_asked", "twins")
_TIMES: Final = ("seen_at", "stored_at", "window_at", "reported_at")
_LIGHT: Final = ("id", "online", *_TIMES, "desired_bundle", "mode", "generation")
"""Columns that are read of every agent at every look; the report is read when it is another one."""
_SELECT: Final = f"SELECT {', '.join(_LIGHT)}, {', '.join(f'CAST({name} AS TEXT)' for name in _DOCUMENTS)} FROM agent"  # noqa: S608  constants
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Row:
    """The light columns of one agent. Most rows are the same from look to look and are not made again."""

    id: str
    online: bool
    seen_at: datetime | None
    stored_at: datetime | None
    window_at: datetime | None
    reported_at: datetime | None
    desired_bundle: str
    mode: str
    generation: int
    documents: tuple[Any, ...]
    """Labels that hold, labels that were assigned, the lot that was asked for, twins."""
    seen_us: int | None
    """As `seen_at`, in microseconds since 1970: ages are differences of integers."""
    window_us: int | None
    reported_us: int | None


@dataclass(slots=True)
class _Remembered:
    """What is kept of one agent between two looks."""

    reported: Reported = NO_REPORT
    reported_at: datetime | None = None
    read: bool = False
    """Whether the report was read at all."""
    stored_at: datetime | None = None
    """When the newest record that was read had been stored."""
    windows: deque[StoredWindow] = field(default_factory=deque)
    """The usable ones of the last minutes, whatever bundle judged."""
    keys: dict[Key, datetime] = field(default_factory=dict)
    """When each record of the last minutes was stored, also those that are used for no figure."""
    bundle: str = ""
    """Whose windows are summed."""
    sums: RollingSum = field(default_factory=RollingSum)
    figures: Figures = NO_FIGURES
    drift: Drift = NO_DRIFT
    completeness: float | None = None
    raw: tuple[Any, ...] = ()
    """The light columns as the driver gave them, and what they say: they are read again when they are others."""
    row: _Row | None = None
    fresh: bool = False
    """Row, report, figures and drift are those that `status` was made of."""
    status_of: tuple[Any, ...] = ()
    """What else the last status was made of, times aside."""
    status: AgentStatus | None = None


class FleetBoard:
    """The fleet's board.

    Args:
        engine: Database.
        store: Where profiles and recipes of bundles are.
        live: The last live figures.
        released: Returns the bundles a release key lists; None where nothing is signed.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        live: LiveFigures,
        released: Callable[[Session], frozenset[str] | None],
    ) -> None:
        self._engine, self._store, self._live, self._released = engine, store, live, released
        self._agents: dict[str, _Remembered] = {}
        self._lock = threading.Lock()
        self._last: tuple[float, list[AgentStatus]] = (-1e9, [])
        self._missing: set[tuple[Callable[..., object], str]] = set()
        """Parts of bundles that the store did not have in this look."""

    def snapshot(self, max_age_s: float) -> list[AgentStatus]:
        """Returns every agent as of at most so long ago: many who look at once cost one look."""
        oldest_s = time.monotonic() - max_age_s
        with self._lock:
            # A look that began late enough is shared by all that waited for it, however long it took.
            if self._last[0] < oldest_s:
                self._last = (time.monotonic(), self._look(None))
            return self._last[1]

    def all(self) -> list[AgentStatus]:
        """Returns every agent as of now."""
        return self.snapshot(0.0)

    def one(self, agent_id: str) -> AgentStatus | None:
        """Returns one agent as of now; None when there is none of this name."""
        with self._lock:
            return next(iter(self._look(agent_id)), None)

    def _look(self, only: str | None) -> list[AgentStatus]:
        now = utc_now()
        self._missing.clear()
        # `at_ms` less an age must be the same moment in every look, or rows in which nothing happened change.
        now = now.replace(microsecond=now.microsecond // 1000 * 1000)
        with reading(self._engine) as session:
            rows = self._read_rows(session, only)
            agents = {agent_id: self._agents[agent_id] for agent_id in rows}
            _read_reports(session, rows, agents)
            self._read_records(session, rows, agents, now)
            names = _names(session, {known.reported.active for known in agents.values()} - {""})
            released = self._released(session)
        now_us = _microseconds(now) or 0
        return [
            self._status(row, agents[agent_id], names.get(agents[agent_id].reported.active, ""), released, now, now_us)
            for agent_id, row in rows.items()
        ]

    def _read_rows(self, session: Session, only: str | None) -> dict[str, _Row]:
        """Reads the light columns; of all agents, those that are gone are let go of."""
        connection = session.connection()
        if only is None:
            found = connection.exec_driver_sql(f"{_SELECT} ORDER BY id").all()
            self._agents = {raw[0]: self._agents.get(raw[0]) or _Remembered() for raw in found}
        else:
            found = connection.execute(text(f"{_SELECT} WHERE id = :id"), {"id": only}).all()
        rows: dict[str, _Row] = {}
        for raw in map(tuple, found):
            known = self._agents.get(raw[0]) or self._agents.setdefault(raw[0], _Remembered())
            if known.row is None or known.raw != raw:
                known.raw, known.row, known.fresh = raw, _row_of(raw), False
            rows[raw[0]] = known.row
        return rows

    def _read_records(
        self, session: Session, rows: Mapping[str, _Row], agents: Mapping[str, _Remembered], now: datetime
    ) -> None:
        """Reads what was stored since the last look, and lets go of what is too old."""
        horizon = now - _RECENT
        watermarks = {
            agent_id: max(known.stored_at or horizon, horizon)
            for agent_id, known in agents.items()
            if (at := rows[agent_id].stored_at) is not None and at != known.stored_at and at > horizon
        }
        changed: set[str] = set()
        if watermarks:
            windows, events = arrived(session, watermarks)
            for stored in windows:
                known, key = agents[stored.agent_id], (stored.boot_id, stored.seq)
                if key in known.keys or stored.received_at <= horizon:
                    continue
                known.keys[key] = stored.received_at
                changed.add(stored.agent_id)
                if stored.window is not None:
                    known.windows.append(stored)
                    if stored.bundle == known.bundle:
                        known.sums.add(stored.received_at, stored.window)
            for agent_id, key, at in events:
                if at > horizon and key not in agents[agent_id].keys:
                    agents[agent_id].keys[key] = at
                    changed.add(agent_id)
            for agent_id in watermarks:
                agents[agent_id].stored_at = rows[agent_id].stored_at
        for agent_id, known in agents.items():
            if self._keep_recent(known, horizon) or agent_id in changed:
                self._work_out(known)

    def _keep_recent(self, known: _Remembered, horizon: datetime) -> bool:
        """Lets go of records older than the horizon; returns whether the figures are others now."""
        other = known.bundle != known.reported.active
        while known.windows and known.windows[0].received_at <= horizon:
            known.windows.popleft()
        if other:
            known.bundle, known.sums = known.reported.active, RollingSum()
            for stored in known.windows:
                if stored.bundle == known.bundle and stored.window is not None:
                    known.sums.add(stored.received_at, stored.window)
        expired = known.sums.expire(horizon)
        # The oldest stands first, but for rows that were read again: those go with the next.
        if known.keys and next(iter(known.keys.values())) <= horizon:
            known.keys = {key: at for key, at in known.keys.items() if at > horizon}
            expired = True
        return other or expired

    def _work_out(self, known: _Remembered) -> None:
        total, known.fresh = known.sums.total(), False
        known.figures = figures_of(total, self._known(_sorting, known.bundle))
        known.drift = drift_of(total, self._known(_profile, known.bundle))
        known.completeness = completeness_of(list(known.keys))

    def _status(
        self,
        row: _Row,
        known: _Remembered,
        model: str,
        released: frozenset[str] | None,
        now: datetime,
        now_us: int,
    ) -> AgentStatus:
        labels, assigned, lot_asked, twins = row.documents
        link, live = _link(row, now_us), self._live.of(row.id)
        made_of = (link.connection, model, released is None or known.reported.active in released)
        # A lot that was asked for and two boxes under one identity end with time.
        if known.status is not None and known.fresh and made_of == known.status_of and not lot_asked and not twins:
            known.status = grown_older(known.status, link, live, now)
            return known.status
        known.fresh = True
        known.status_of = made_of
        known.status = agent_status(
            Facts(
                agent_id=row.id,
                now=now,
                reported=known.reported,
                labels=labels,
                labels_assigned=assigned,
                online=row.online,
                seen_at=row.seen_at,
                reported_at=row.reported_at,
                window_at=row.window_at,
                desired_bundle=row.desired_bundle,
                mode=row.mode,
                generation=row.generation,
                lot_asked=lot_status(lot_asked, now),
                twins=twins_of(twins, now),
                figures=known.figures,
                drift=known.drift,
                completeness=known.completeness,
                live=live,
                model=model,
                released=released,
            )
        )
        return known.status

    def sorting(self, bundle: str) -> Sorting | None:
        """Returns what the names of this bundle's recipe mean; None for a bundle that was never pushed here."""
        return self._part(_sorting, bundle)

    def profile(self, bundle: str) -> Profile | None:
        """Returns the reference profile of this bundle; None for a bundle that was never pushed here."""
        return self._part(_profile, bundle)

    def _part(self, read: Callable[[Store, str], R], bundle: str) -> R | None:
        try:
            return read(self._store, bundle) if bundle else None
        except SortlineError:
            return None

    def _known(self, read: Callable[[Store, str], R], bundle: str) -> R | None:
        """Returns a part of a bundle; that the store lacks it is found out once in a look, not for each agent."""
        if (read, bundle) in self._missing:
            return None
        found = self._part(read, bundle)
        if found is None:
            self._missing.add((read, bundle))
        return found


def _row_of(raw: Sequence[Any]) -> _Row:
    agent_id, online, *others = raw
    times, (desired_bundle, mode, generation), texts = map(_time, others[:4]), others[4:7], others[7:]
    seen_at, stored_at, window_at, reported_at = times
    return _Row(
        agent_id,
        bool(online),
        seen_at,
        stored_at,
        window_at,
        reported_at,
        desired_bundle,
        mode,
        generation,
        tuple(json.loads(document) for document in texts),
        _microseconds(seen_at),
        _microseconds(window_at),
        _microseconds(reported_at),
    )


def _time(value: datetime | str | None) -> datetime | None:
    """Reads a time as the driver gives it: aware (PostgreSQL), or text without zone that means UTC (SQLite)."""
    if value is None:
        return None
    at = datetime.fromisoformat(value) if isinstance(value, str) else value
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _microseconds(at: datetime | None) -> int | None:
    return None if at is None else (at - _EPOCH) // timedelta(microseconds=1)


def _link(row: _Row, now_us: int) -> Link:
    """Returns what `status.link_of` returns, ten times as fast."""
    seen_s, reported_s, window_s = (
        None if at_us is None else max(0.0, (now_us - at_us) / 1e6)
        for at_us in (row.seen_us, row.reported_us, row.window_us)
    )
    return Link(
        connection=connection_of(seen_s, online=row.online),
        seen_age_s=seen_s,
        reported_age_s=reported_s,
        window_age_s=window_s,
    )


def _read_reports(session: Session, rows: Mapping[str, _Row], agents: Mapping[str, _Remembered]) -> None:
    """Reads the reports that came since the last look."""
    new = [i for i, row in rows.items() if not agents[i].read or row.reported_at != agents[i].reported_at]
    for start in range(0, len(new), _IDS_AT_ONCE):
        query = select(Agent.id, cast(col(Agent.reported), Text), Agent.reported_at)
        part = session.connection().execute(query.where(col(Agent.id).in_(new[start : start + _IDS_AT_ONCE])))
        for agent_id, reported, reported_at in part:
            known = agents[agent_id]
            known.reported, known.reported_at, known.read = parse_report_text(reported), reported_at, True
            known.fresh = False


def _names(session: Session, bundles: Iterable[str]) -> dict[str, str]:
    """Returns `model:number` by bundle, where it is registered."""
    registered = session.exec(
        select(ModelVersion.bundle, Model.name, ModelVersion.number)
        .join(Model, col(Model.id) == col(ModelVersion.model_id))
        .where(col(ModelVersion.bundle).in_(list(bundles)))
    )
    return {bundle: f"{name}:{number}" for bundle, name, number in registered}


@lru_cache(maxsize=64)
def _profile(store: Store, digest: str) -> Profile:
    return parse_profile(store.part(digest, PROFILE))


@lru_cache(maxsize=64)
def _sorting(store: Store, digest: str) -> Sorting:
    return sorting_of(parse_recipe(store.part(digest, RECIPE)))
