"""How far the data of an agent can be trusted: complete, timely, consistent, accurate; by hour.

The counts are kept per agent, hour and boot in the transaction that stores the records, by additions, least and largest
values alone, so that neither order nor repetition nor a restart changes them.

* complete: windows and events share one sequence of numbers, so a number that is missing is a record that is missing;
  and windows state how many items the agent has judged in its life, so items that no window counts are known exactly.
* timely: windows that arrived within 15 s of their end. Ages are corrected by the offset of the agent's clock, which is
  estimated by the least lag between the making and the arrival of a report: its clock is ahead by at most as much.
* consistent: windows whose counts agree with each other.
* accurate: windows without a value that no line can have, and features that have values at all.

Hours in which windows had to be placed by their arrival say nothing of missing items: their order is not known.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, case, func
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session, SQLModel, col, select

from control_plane.database.tables.windows import FidelityHour
from control_plane.fleet.spooled import Arrival, ReportArrival
from control_plane.monitoring.rollups import HOUR, start_of
from models.windows import Window

LATE_S: Final = 15.0
BACKFILLED_S: Final = 120.0
OFFSET_LIMIT_MS: Final = 2_000
"""A clock that is further off is shown; windows are placed by it as long as it is plausible at all."""
_MOST_ITEMS_PER_S: Final = 200.0
"""Per lane; lines sort 10 to 20 items per second and lane."""
_MOST_FRAMES_PER_S: Final = 2_000.0
_MOST_SECONDS: Final = 60.0
_MOST_AGENTS: Final = 100_000
_TABLE: Final[Any] = SQLModel.metadata.tables[str(FidelityHour.__tablename__)]
_KEY: Final = ("agent_id", "hour", "boot_id")
_ADDED: Final = (
    *("records", "duplicates", "windows", "late", "backfilled", "refused", "impossible", "by_arrival"),
    *("items", "unjudged", "counted_items", "cells", "nulls"),
)
_LEAST: Final = ("first_seq", "lifetime_low", "report_lag_ms", "window_lag_ms")
_LARGEST: Final = ("last_seq", "lifetime_high")
_LIMITS: Final = {
    "complete": (0.995, 0.98),
    "timely": (0.99, 0.95),
    "consistent": (1.0, 0.999),
    "accurate": (1.0, 0.99),
}
"""Share from which a part is green, and from which it is amber. Of 200 windows one may be missing, two late; one that
contradicts itself, or holds an impossible value, is a defect of the software or of a sensor however rare it is."""
_LAGS_KEPT: Final = 30
"""Five minutes of reports: a clock that was set is believed again after that."""


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent sent for one span of time. Shares are within [0, 1]; None = nothing can be said."""

    start: datetime
    records: int = 0
    missing_records: int = 0
    """Records whose numbers lie between those that arrived."""
    windows: int = 0
    duplicates: int = 0
    late: int = 0
    backfilled: int = 0
    refused: int = 0
    impossible: int = 0
    by_arrival: int = 0
    items: int = 0
    missing_items: int = 0
    """Items the agent judged and no window counts."""
    unjudged: int = 0
    boots: int = 0
    clock_offset_ms: int | None = None
    """How far the agent's clock is ahead of this one, at most (negative: behind, at least): transport takes time."""
    items_accounted: float | None = None
    complete: float | None = None
    timely: float | None = None
    consistent: float | None = None
    accurate: float | None = None
    state: str = "unknown"
    """green, amber or red by the worst part; unknown without windows."""


def impossible(window: Window) -> bool:
    """Returns whether a window holds a value that no line can have."""
    seconds = window.duration_ms / 1000.0
    if not 0.0 < seconds <= _MOST_SECONDS:
        return True
    lanes = max(1, len(window.lanes))
    return (
        window.items > _MOST_ITEMS_PER_S * lanes * max(seconds, 1.0)
        or window.frames > _MOST_FRAMES_PER_S * max(seconds, 1.0)
        or (window.views > 0 and window.views < window.items)
        or window.verdicts_late > window.items
    )


class FidelityCounts:
    """Counts arrivals; remembers the lags of reports, which correct the ages of windows."""

    def __init__(self) -> None:
        self._lags: dict[str, deque[int]] = {}
        """Agent -> lags of its newest reports, ms; the least is the offset of the clock that dates its windows."""

    def record(self, session: Session, arrivals: Sequence[Arrival], reports: Sequence[ReportArrival]) -> None:
        """Counts these in the caller's transaction."""
        rows: dict[tuple[str, datetime, str], dict[str, Any]] = {}
        for report in reports:
            lag_ms = _ms(report.arrived_at - report.made_at)
            if len(self._lags) > _MOST_AGENTS:
                self._lags.clear()
            self._lags.setdefault(report.agent_id, deque(maxlen=_LAGS_KEPT)).append(lag_ms)
            row = _row(rows, report.agent_id, start_of(report.arrived_at, HOUR), report.boot_id)
            row["report_lag_ms"] = _least(row["report_lag_ms"], lag_ms)
        for arrival in arrivals:
            row = _row(rows, arrival.agent_id, start_of(arrival.at, HOUR), arrival.boot_id)
            if not arrival.new:
                row["duplicates"] += 1
                continue
            row["records"] += 1
            row["first_seq"] = _least(row["first_seq"], arrival.seq)
            row["last_seq"] = _largest(row["last_seq"], arrival.seq)
            if arrival.is_window:
                self._count_window(row, arrival)
        if rows:
            _write(session, [rows[key] for key in sorted(rows)])

    def _count_window(self, row: dict[str, Any], arrival: Arrival) -> None:
        row["windows"] += 1
        row["by_arrival"] += arrival.by_arrival
        window = arrival.window
        if window is None:
            row["refused"] += 1
            return
        row["impossible"] += impossible(window)
        row["items"] += window.items
        row["unjudged"] += window.items_unjudged
        row["cells"] += window.items * len(window.nulls)
        row["nulls"] += sum(window.nulls)
        if window.lifetime_items >= window.items and window.lifetime_items:
            row["counted_items"] += window.items
            row["lifetime_low"] = _least(row["lifetime_low"], window.lifetime_items - window.items)
            row["lifetime_high"] = _largest(row["lifetime_high"], window.lifetime_items)
        if arrival.by_arrival:
            return
        lag_ms = _ms(arrival.arrived_at - arrival.at) - window.duration_ms
        row["window_lag_ms"] = _least(row["window_lag_ms"], lag_ms)
        age_s = (lag_ms - min(self._lags.get(arrival.agent_id, (0,)))) / 1000.0
        row["late"] += age_s > LATE_S
        row["backfilled"] += age_s > BACKFILLED_S


def _ms(length: timedelta) -> int:
    return length // timedelta(milliseconds=1)


def _row(rows: dict[tuple[str, datetime, str], dict[str, Any]], *key: Any) -> dict[str, Any]:
    row = rows.get(key)
    if row is None:
        row = rows[key] = dict.fromkeys((*_LEAST, *_LARGEST)) | dict.fromkeys(_ADDED, 0)
        row |= dict(zip(_KEY, key, strict=True))
    return row


def _least(a: int | None, b: int) -> int:
    return b if a is None else min(a, b)


def _largest(a: int | None, b: int) -> int:
    return b if a is None else max(a, b)


def _write(session: Session, rows: list[dict[str, Any]]) -> None:
    """Adds rows to those that are there, in one statement: nothing is read first."""
    session.connection().execute(_write_statement(session.get_bind().dialect.name), rows)


@cache
def _write_statement(dialect: str) -> Any:
    """Returns the statement of `_write`: to build it costs more than to run it."""
    insert: Any = postgresql_insert if dialect == "postgresql" else sqlite_insert
    statement = insert(_TABLE)
    new = statement.excluded
    values: dict[str, ColumnElement[Any]] = {name: _TABLE.c[name] + new[name] for name in _ADDED}
    for name in (*_LEAST, *_LARGEST):
        old = _TABLE.c[name]
        better = new[name] < old if name in _LEAST else new[name] > old
        values[name] = case((old.is_(None), new[name]), (better, new[name]), else_=old)
    return statement.on_conflict_do_update(index_elements=list(_KEY), set_=values)


def fidelity_of(
    session: Session, agent_id: str, since: datetime, until: datetime, span_s: int = HOUR
) -> list[Fidelity]:
    """Returns the fidelity of one agent by span, oldest first; spans for which nothing arrived are left out.

    Args:
        session: Reads.
        agent_id: Whose.
        since: Hours that begin then or later.
        until: Hours that begin before this.
        span_s: 3600 or a multiple of it.
    """
    rows, gaps = _read(session, agent_id, since, until)
    spans: dict[datetime, list[FidelityHour]] = {}
    for row in rows:
        spans.setdefault(start_of(row.hour, span_s), []).append(row)
    return [_fidelity(start, found, gaps) for start, found in spans.items()]


def fidelity_between(session: Session, agent_id: str, since: datetime, until: datetime) -> Fidelity | None:
    """Returns the fidelity of all hours that begin from `since` to before `until` as one; None without records."""
    rows, gaps = _read(session, agent_id, since, until)
    return _fidelity(rows[0].hour, rows, gaps) if rows else None


_Gaps = Mapping[tuple[datetime, str], tuple[int, int]]


def _read(session: Session, agent_id: str, since: datetime, until: datetime) -> tuple[list[FidelityHour], _Gaps]:
    """Returns the rows of these hours, and what is missing before each, also between the first and what was before."""
    mine, hour = FidelityHour.agent_id == agent_id, col(FidelityHour.hour)
    before = session.exec(select(func.max(hour)).where(mine, hour < since)).one()
    query = select(FidelityHour).where(mine, hour >= (before or since), hour < until)
    rows = list(session.exec(query.order_by(hour, col(FidelityHour.boot_id))))
    return [row for row in rows if row.hour >= since], _gaps(rows)


def _gaps(rows: Iterable[FidelityHour]) -> _Gaps:
    """Returns (records, items) that are missing between a row and the one before it, by hour and boot."""
    found: dict[tuple[datetime, str], tuple[int, int]] = {}
    last_seq: dict[str, int] = {}
    lifetime: int | None = None
    ordered = sorted(rows, key=lambda row: (row.hour, -1 if row.lifetime_low is None else row.lifetime_low))
    for row in ordered:
        records = items = 0
        if row.first_seq is not None and row.last_seq is not None:
            records = max(0, row.first_seq - last_seq.get(row.boot_id, row.first_seq - 1) - 1)
            last_seq[row.boot_id] = max(row.last_seq, last_seq.get(row.boot_id, -1))
        if _counts_items(row):
            # A count that is smaller than before is that of a box set up anew.
            items = max(0, (row.lifetime_low or 0) - lifetime) if lifetime is not None else 0
            lifetime = row.lifetime_high
        found[row.hour, row.boot_id] = (records, items)
    return found


def _counts_items(row: FidelityHour) -> bool:
    return row.lifetime_low is not None and row.lifetime_high is not None and not row.by_arrival


def _fidelity(start: datetime, rows: list[FidelityHour], gaps: _Gaps) -> Fidelity:
    total = {name: sum(getattr(row, name) for row in rows) for name in _ADDED}
    missing_records = missing_items = 0
    for row in rows:
        records, items = gaps[row.hour, row.boot_id]
        if row.first_seq is not None and row.last_seq is not None:
            records += max(0, row.last_seq - row.first_seq + 1 - row.records)
        if _counts_items(row):
            items += max(0, (row.lifetime_high or 0) - (row.lifetime_low or 0) - row.counted_items)
        missing_records, missing_items = missing_records + records, missing_items + items
    windows = total["windows"]
    accounted = _share(total["counted_items"], missing_items) if total["counted_items"] or missing_items else None
    complete = min((s for s in (_share(total["records"], missing_records), accounted) if s is not None), default=None)
    useful = windows - total["refused"]
    parts: dict[str, Any] = {
        "complete": complete,
        "timely": 1.0 - total["late"] / useful if useful else None,
        "consistent": 1.0 - total["refused"] / windows if windows else None,
        "accurate": (
            min(1.0 - total["impossible"] / useful, 1.0 - total["nulls"] / total["cells"] if total["cells"] else 1.0)
            if useful
            else None
        ),
    }
    shares: dict[str, Any] = dict(parts)
    return Fidelity(
        start=start,
        missing_records=missing_records,
        missing_items=missing_items,
        boots=len({row.boot_id for row in rows}),
        clock_offset_ms=_offset(rows),
        items_accounted=accounted,
        state=_state(parts),
        **shares,
        **{name: value for name, value in total.items() if name not in {"counted_items", "cells", "nulls"}},
    )


def _share(there: int, missing: int) -> float | None:
    return there / (there + missing) if there + missing else None


def _offset(rows: Iterable[FidelityHour]) -> int | None:
    """Returns the offset by the newest boot's reports, else by its windows."""
    for row in sorted(rows, key=lambda row: row.hour, reverse=True):
        lag = row.report_lag_ms if row.report_lag_ms is not None else row.window_lag_ms
        if lag is not None:
            return -lag
    return None


def _state(parts: Mapping[str, float | None]) -> str:
    known = {name: value for name, value in parts.items() if value is not None}
    if not known:
        return "unknown"
    if all(value >= _LIMITS[name][0] for name, value in known.items()):
        return "green"
    return "amber" if all(value >= _LIMITS[name][1] for name, value in known.items()) else "red"
