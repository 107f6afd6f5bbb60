"""Adds windows up over minutes, hours and days, in the transaction that stores them.

A row is the sum of an agent's windows of one span that belong to one series: judged by one bundle, beside one
challenger, in one lot of one variety. So a lot is the sum of its rows, and no row mixes what does not add.

Rules: a window is added once, when it is stored for the first time; it goes into the row of its minute alone, and a
minute goes into its hour, an hour into its day, when a newer one of the agent begins (the row is then `folded`); what
arrives late for a folded row is added to the next longer span, too. Law: the row of an hour is the sum of the folded
minutes in it, the row of a day the sum of the folded hours; with the rows that are still open this is the sum of all
windows, in whatever order they arrive and however often. Adding costs one row a window instead of three.

What does not add to the rest (another number of features, counts beyond the format) is counted in `left_out`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import bindparam, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session, SQLModel, col, select

from control_plane.database.tables.agents import Agent
from control_plane.database.tables.windows import Rollup
from control_plane.fleet.spooled import Arrival, storable
from control_plane.fleet.window_payload import pack_window, unpack_window
from models.errors import MessageError
from models.messages import decode_packed
from models.windows import Window, merge

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400
LONGER: Final = {MINUTE: HOUR, HOUR: DAY}
"""Span -> the next longer one."""
_TABLE: Final[Any] = SQLModel.metadata.tables[str(Rollup.__tablename__)]
_KEY: Final = ("agent_id", "span_s", "start", "bundle", "lot", "variety", "challenger")
_VALUES: Final = ("windows", "left_out", "by_arrival", "items", "first_at", "last_at", "folded", "payload")
_AT_ONCE: Final = 400
"""Parameters of one statement: SQLite takes no more than some thousand."""
_LONGEST: Final = timedelta(minutes=1)
"""A window that claims to last longer ends after this, for the times of a row alone."""


class Place(NamedTuple):
    """Key of a row."""

    agent_id: str
    span_s: int
    start: datetime
    bundle: str
    lot: str
    variety: str
    challenger: str


@dataclass(slots=True)
class Total:
    """A sum of windows of one series.

    Attributes:
        window: The sum; None when none of them could be used.
        windows: Number of windows, those left out among them.
        left_out: Windows that are part of no count of `window`.
        by_arrival: Windows whose clock was implausible.
        first_at: Start of the earliest.
        last_at: End of the latest.
    """

    window: Window | None
    windows: int
    left_out: int
    by_arrival: int
    first_at: datetime
    last_at: datetime

    def add(self, other: "Total") -> None:
        """Adds another sum of the same series; the lead times are those of the later one."""
        self.windows += other.windows
        self.left_out += other.left_out
        self.by_arrival += other.by_arrival
        first, second = (self, other) if self.last_at <= other.last_at else (other, self)
        if self.window is None or other.window is None:
            self.window = self.window or other.window
        else:
            try:
                self.window = merge(first.window or self.window, second.window or self.window)
            except MessageError:
                self.left_out += other.windows - other.left_out
        self.first_at, self.last_at = min(self.first_at, other.first_at), max(self.last_at, other.last_at)

    @property
    def items(self) -> int:
        """Items of the sum."""
        return self.window.items if self.window is not None else 0


def start_of(at: datetime, span_s: int) -> datetime:
    """Returns when the span began that holds this moment; spans begin at multiples of their length since 1970, UTC."""
    return datetime.fromtimestamp(int(at.timestamp()) // span_s * span_s, UTC)


def add_windows(session: Session, arrivals: Sequence[Arrival]) -> int:
    """Adds the new windows of a transaction to the sums of their minutes, in the caller's transaction.

    The caller holds what keeps other replicas from adding to the same agents meanwhile (`lock_agents`).

    Returns:
        How many windows were added.
    """
    totals: dict[Place, Total] = {}
    added = 0
    for arrival in arrivals:
        if not arrival.new or arrival.window is None:
            continue
        window, added = arrival.window, added + 1
        series = (window.bundle, window.lot, window.variety, window.shadow_bundle)
        place = Place(arrival.agent_id, MINUTE, start_of(arrival.at, MINUTE), *map(storable, series))
        end = arrival.at + min(timedelta(milliseconds=window.duration_ms), _LONGEST)
        _add_to(totals, place, Total(window, 1, 0, int(arrival.by_arrival), arrival.at, end))
    if totals:
        _add(session, totals)
    return added


def fold_all(session: Session, before: datetime, limit: int) -> int:
    """Folds open rows that ended before then, oldest first: those of agents that went silent.

    Returns:
        How many rows were folded; fewer than `limit` when nothing is left.
    """
    folded = 0
    for span_s in LONGER:
        due = (~col(Rollup.folded), Rollup.span_s == span_s, col(Rollup.start) < before - timedelta(seconds=span_s))
        oldest = select(Rollup.agent_id).where(*due).order_by(col(Rollup.start)).limit(limit - folded)
        agents = set(session.exec(oldest)) if folded < limit else set()
        if not agents:
            continue
        lock_agents(session, agents)
        query = select(Rollup).where(*due, col(Rollup.agent_id).in_(agents)).order_by(col(Rollup.start))
        rows = session.exec(query.limit(limit - folded)).all()
        _fold(session, [(Place(*(getattr(row, name) for name in _KEY)), total_of(row)) for row in rows])
        folded += len(rows)
    return folded


def lock_agents(session: Session, agents: set[str]) -> None:
    """Keeps other replicas from adding to the same agents' sums until the end of the transaction.

    In SQLite a writing transaction is alone anyway.
    """
    if session.get_bind().dialect.name == "sqlite":
        return
    ids = sorted(agents)
    for start in range(0, len(ids), 500):
        query = select(Agent.id).where(col(Agent.id).in_(ids[start : start + 500])).order_by(col(Agent.id))
        session.exec(query.with_for_update()).all()


def _add_to(totals: dict[Place, Total], place: Place, total: Total) -> None:
    known = totals.get(place)
    if known is None:
        totals[place] = total
    else:
        known.add(total)


def _add(session: Session, totals: Mapping[Place, Total]) -> None:
    """Adds to the rows of one span, and folds the rows that are closed by new ones."""
    (span_s,) = {place.span_s for place in totals}
    known = dict(_rows(session, totals))
    longer: dict[Place, Total] = {}
    written: dict[Place, tuple[Total, bool]] = {}
    for place, total in totals.items():
        row = known.get(place)
        if row is None:
            written[place] = (total, False)
            continue
        whole = total_of(row)
        if row.folded:
            _add_to(longer, _next(place), replace(total))
        whole.add(total)
        written[place] = (whole, row.folded)
    _write(session, written)
    if longer:
        _add(session, longer)
    begun = {place.agent_id for place in totals if place not in known}
    if begun and span_s in LONGER:
        _fold(session, _closed(session, begun, span_s))


def _next(place: Place) -> Place:
    span_s = LONGER[place.span_s]
    return place._replace(span_s=span_s, start=start_of(place.start, span_s))


def _closed(session: Session, agents: Iterable[str], span_s: int) -> Iterator[tuple[Place, Total]]:
    """Yields the open rows of these agents but for those of each agent's newest span."""
    ids = sorted(agents)
    for start in range(0, len(ids), _AT_ONCE):
        query = select(*_columns(*_KEY, "payload", "windows", "left_out", "by_arrival", "first_at", "last_at"))
        query = query.where(
            col(Rollup.agent_id).in_(ids[start : start + _AT_ONCE]),
            Rollup.span_s == span_s,
            ~col(Rollup.folded),
        )
        rows = session.connection().execute(query).all()
        newest: dict[str, datetime] = {}
        for row in rows:
            newest[row.agent_id] = max(row.start, newest.get(row.agent_id, row.start))
        for row in rows:
            if row.start < newest[row.agent_id]:
                yield Place(*row[: len(_KEY)]), total_of(row)


def _fold(session: Session, rows: Iterable[tuple[Place, Total]]) -> None:
    """Adds these rows to the next longer span, and marks them as folded."""
    longer: dict[Place, Total] = {}
    marked = []
    for place, total in rows:
        marked.append({f"of_{name}": value for name, value in zip(_KEY, place, strict=True)} | {"to": _packed(total)})
        _add_to(longer, _next(place), total)
    if not marked:
        return
    statement = update(_TABLE).where(*(_TABLE.c[name] == bindparam(f"of_{name}") for name in _KEY))
    session.connection().execute(statement.values(folded=True, payload=bindparam("to")), marked)
    _add(session, longer)


def _columns(*names: str) -> list[Any]:
    return [getattr(Rollup, name) for name in names]


def _rows(session: Session, places: Iterable[Place]) -> Iterator[tuple[Place, Any]]:
    """Yields the rows of these places that are there."""
    wanted = set(places)
    starts: dict[tuple[str, int], set[datetime]] = defaultdict(set)
    for place in wanted:
        starts[place.agent_id, place.span_s].add(place.start)
    # Agents that need the same spans share a statement: usually all of them do.
    alike: dict[tuple[int, tuple[datetime, ...]], list[str]] = defaultdict(list)
    for (agent_id, span_s), found in starts.items():
        ordered = sorted(found)
        for first in range(0, len(ordered), _AT_ONCE):
            alike[span_s, tuple(ordered[first : first + _AT_ONCE])].append(agent_id)
    for (span_s, of_spans), ids in alike.items():
        for first in range(0, len(ids), _AT_ONCE):
            chosen = {"agents": ids[first : first + _AT_ONCE], "span": span_s, "starts": of_spans}
            for row in session.connection().execute(_rows_query(), chosen):
                place = Place(*row[: len(_KEY)])
                if place in wanted:
                    yield place, row


@cache
def _rows_query() -> Any:
    """Returns the statement of `_rows`: to build it costs more than to run it."""
    return select(*_columns(*_KEY, *_VALUES)).where(
        col(Rollup.agent_id).in_(bindparam("agents", expanding=True)),
        Rollup.span_s == bindparam("span"),
        col(Rollup.start).in_(bindparam("starts", expanding=True)),
    )


def total_of(row: Any) -> Total:
    """Returns the sum that a row of `rollup` holds; of a damaged one, and of one beyond the format, all is left out."""
    window, left_out = None, row.left_out
    if row.payload:
        try:
            window = decode_packed(unpack_window(row.payload), Window)
        except MessageError:
            left_out = row.windows
    return Total(window, row.windows, left_out, row.by_arrival, row.first_at, row.last_at)


def _packed(total: Total) -> bytes:
    return pack_window(_encoded(total))


def _encoded(total: Total) -> bytes:
    return b"" if total.window is None else msgspec.msgpack.encode(total.window)


def _write(session: Session, totals: Mapping[Place, tuple[Total, bool]]) -> None:
    """Writes whole rows in the order of their keys, so that replicas rarely wait in a circle."""
    rows = []
    for place in sorted(totals):
        total, folded = totals[place]
        closed = folded or place.span_s == DAY
        rows.append(
            {
                **place._asdict(),
                "windows": total.windows,
                "left_out": total.left_out,
                "by_arrival": total.by_arrival,
                "items": total.items,
                "first_at": total.first_at,
                "last_at": total.last_at,
                "folded": folded,
                "payload": _packed(total) if closed else _encoded(total),
            }
        )
    session.connection().execute(_write_statement(session.get_bind().dialect.name), rows)


@cache
def _write_statement(dialect: str) -> Any:
    insert: Any = postgresql_insert if dialect == "postgresql" else sqlite_insert
    statement = insert(_TABLE)
    return statement.on_conflict_do_update(
        index_elements=list(_KEY), set_={name: statement.excluded[name] for name in _VALUES}
    )
