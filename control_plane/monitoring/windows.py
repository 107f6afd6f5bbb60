"""The one reader of stored windows and their sums: board, figures, rollouts, detection, pages and API ask here.

Rules: what contradicts itself is kept in the database and never used for a figure; a page of rows is continued by a
cursor, which neither repeats nor leaves out a row while new ones arrive; no question reads the whole history of an
agent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, or_
from sqlmodel import Session, col, desc, func, select

from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.database.tables.windows import Rollup
from control_plane.fleet.window_payload import unpack_window
from control_plane.monitoring.rollups import DAY, HOUR, MINUTE, Place, Total, start_of, total_of
from models.errors import InputError, MessageError
from models.messages import decode_packed
from models.windows import Window, merge

RECENT_S: Final = 300.0
"""Windows of so many seconds make the figures of an agent."""
_AGENTS_AT_ONCE: Final = 400
"""Parameters of one statement: SQLite takes no more than some thousand."""
_OVERLAP: Final = timedelta(seconds=5)
"""Rows are read again for so long before the newest known one: replicas' clocks differ, and commits are not instant."""
_COMPARED_WINDOWS: Final = 60
_LONGEST_LOT: Final = timedelta(days=1)
"""A lot that began earlier than this before the time asked for is read from there on."""
_SAME_LOT: Final = timedelta(hours=6)
_HANDOVER: Final = timedelta(minutes=2)
"""Within an hour, rows do not say whether a lot went on beside another one; a row that begins so soon does."""

SPANS: Final = {"minute": MINUTE, "hour": HOUR, "day": DAY}
"""Names of spans -> seconds."""
Key = tuple[str, int]
"""Boot and number of a record."""


@dataclass(frozen=True, slots=True)
class StoredWindow:
    """One window as it is stored."""

    agent_id: str
    boot_id: str
    seq: int
    started_at: datetime
    received_at: datetime
    bundle: str
    items: int
    refused: str
    """Error code when the counts contradict each other; such a window is shown and never used."""
    window: Window | None
    """None where it is refused or damaged."""

    @property
    def cursor(self) -> str:
        """Names the place of this row in a list that is ordered newest first."""
        return f"{int(self.received_at.timestamp() * 1_000_000)}.{self.agent_id}.{self.boot_id}.{self.seq}"


def windows_of(
    session: Session,
    *,
    agent_id: str = "",
    bundle: str = "",
    before: str = "",
    since: datetime | None = None,
    usable: bool = False,
    limit: int = 60,
) -> list[StoredWindow]:
    """Returns windows, newest first.

    Args:
        session: Reads.
        agent_id: Only of this agent; empty = of all.
        bundle: Only those this bundle judged; empty = of all.
        before: Cursor of the last row of the page before; empty = from the newest on.
        since: Only those received later.
        usable: Leaves out those that contradict themselves.
        limit: Most rows.

    Raises:
        InputError: `windows.bad_cursor`.
    """
    query = select(WindowRow)
    if agent_id:
        query = query.where(WindowRow.agent_id == agent_id)
    if bundle:
        query = query.where(WindowRow.bundle == bundle)
    if since is not None:
        query = query.where(WindowRow.received_at > since)
    if usable:
        query = query.where(WindowRow.refused == "")
    if before:
        query = query.where(_older_than(before))
    query = query.order_by(desc(WindowRow.received_at))
    if not agent_id:
        query = query.order_by(desc(WindowRow.agent_id))
    found = session.exec(query.order_by(desc(col(WindowRow.seq)), desc(WindowRow.boot_id)).limit(limit))
    return [_stored(*_values(row)) for row in found]


def _older_than(cursor: str) -> Any:
    try:
        at_us, agent_id, boot_id, seq = cursor.split(".")
        at, number = datetime.fromtimestamp(int(at_us) / 1_000_000, UTC), int(seq)
    except (ValueError, OverflowError, OSError) as error:
        raise InputError(
            "windows.bad_cursor",
            "This is no cursor of a list of windows.",
            expected="the `cursor` of a row",
            got=cursor[:80],
        ) from error
    later = (
        and_(col(WindowRow.agent_id) == agent_id, col(WindowRow.seq) < number),
        and_(col(WindowRow.agent_id) == agent_id, col(WindowRow.seq) == number, col(WindowRow.boot_id) < boot_id),
        col(WindowRow.agent_id) < agent_id,
    )
    return and_(col(WindowRow.received_at) <= at, or_(col(WindowRow.received_at) < at, *later))


_COLUMNS: Final = ("agent_id", "boot_id", "seq", "started_at", "received_at", "bundle", "items", "refused", "payload")


def _values(row: WindowRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in _COLUMNS)


def _stored(*values: Any) -> StoredWindow:
    agent_id, boot_id, seq, started_at, received_at, bundle, items, refused, payload = values
    window: Window | None = None
    if not refused:
        try:
            window = decode_packed(unpack_window(payload), Window)
        except MessageError as error:
            refused = error.code
    return StoredWindow(agent_id, boot_id, seq, started_at, received_at, bundle, items, refused, window)


def arrived(
    session: Session, watermarks: Mapping[str, datetime]
) -> tuple[list[StoredWindow], list[tuple[str, Key, datetime]]]:
    """Returns what was stored of these agents since then, oldest first, some rows before it once more.

    Args:
        session: Reads.
        watermarks: Agent -> `received_at` of the newest record of it that is known already.

    Returns:
        Windows; and of events (agent, key, received_at): windows and events share one sequence of numbers, so a gap in
        it is a record that is missing.
    """
    windows: list[StoredWindow] = []
    events: list[tuple[str, Key, datetime]] = []
    for part in _parts(sorted(watermarks, key=lambda agent_id: watermarks[agent_id])):
        since = min(watermarks[agent_id] for agent_id in part) - _OVERLAP
        columns = [getattr(WindowRow, name) for name in _COLUMNS]
        rows = session.connection().execute(
            select(*columns)
            .where(col(WindowRow.agent_id).in_(part), col(WindowRow.received_at) > since)
            .order_by(col(WindowRow.received_at), col(WindowRow.seq))
        )
        # What is known already is not decoded once more.
        windows += [_stored(*row) for row in rows if row.received_at > watermarks[row.agent_id] - _OVERLAP]
        keys = session.connection().execute(
            select(EventRow.agent_id, EventRow.boot_id, EventRow.seq, EventRow.received_at).where(
                col(EventRow.agent_id).in_(part), col(EventRow.received_at) > since
            )
        )
        events += [(agent_id, (boot_id, seq), at) for agent_id, boot_id, seq, at in keys]
    return windows, events


def _parts(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + _AGENTS_AT_ONCE] for start in range(0, len(ids), _AGENTS_AT_ONCE))


def windows_around(session: Session, agent_id: str, at: datetime) -> list[StoredWindow]:
    """Returns the usable window of an agent that holds this moment by its own clock; empty when there is none.

    Windows that arrived within an hour are looked at; older ones that were sent later are in the sums alone.
    """
    query = select(WindowRow).where(
        WindowRow.agent_id == agent_id,
        WindowRow.refused == "",
        col(WindowRow.received_at) > at - timedelta(minutes=2),
        col(WindowRow.received_at) < at + timedelta(hours=1),
        col(WindowRow.started_at) <= at,
        col(WindowRow.started_at) > at - timedelta(minutes=1),
    )
    rows = session.exec(query.order_by(desc(WindowRow.started_at)).limit(6))
    found = [_stored(*_values(row)) for row in rows]
    return [
        stored
        for stored in found
        if stored.window is not None and at < stored.started_at + timedelta(milliseconds=stored.window.duration_ms)
    ][:1]


def items_per_s(session: Session, agents: Sequence[str], now: datetime) -> dict[str, float]:
    """Returns the judged items per second of these agents in the last minutes; none without windows."""
    items: dict[str, int] = {}
    milliseconds: dict[str, int] = {}
    found, _ = arrived(session, dict.fromkeys(agents, now - timedelta(seconds=RECENT_S)))
    for stored in found:
        if stored.window is not None:
            items[stored.agent_id] = items.get(stored.agent_id, 0) + stored.window.items
            milliseconds[stored.agent_id] = milliseconds.get(stored.agent_id, 0) + stored.window.duration_ms
    return {agent: 1000.0 * items[agent] / ms for agent, ms in milliseconds.items() if ms > 0}


def items_compared(session: Session, agent_id: str, challenger: str, since: datetime) -> int:
    """Returns the items that champion and this challenger both judged, in the newest 60 windows since then."""
    found = windows_of(session, agent_id=agent_id, since=since, usable=True, limit=_COMPARED_WINDOWS)
    windows = [stored.window for stored in found if stored.window is not None]
    return sum(window.shadow_compared for window in windows if window.shadow_bundle == challenger)


class RollingSum:
    """The sum of the windows of the last minutes, kept by two merges a window instead of thirty.

    Two stacks make a queue: sums from each old window to the end of the older half, and one sum of the newer half.
    Law: `total()` has the counts of all windows added and not expired; windows that do not add are left out.
    """

    def __init__(self) -> None:
        self._old: list[tuple[datetime, Window]] = []
        """Newest first: each with the sum of itself and all newer ones of this half."""
        self._new: list[tuple[datetime, Window]] = []
        self._sum: Window | None = None

    def add(self, at: datetime, window: Window) -> None:
        """Adds the newest window."""
        self._new.append((at, window))
        self._sum = _sum(self._sum, window)

    def expire(self, until: datetime) -> bool:
        """Leaves out the windows received then or earlier; returns whether there were any."""
        expired = False
        while self._old or (self._new and self._new[0][0] <= until):
            if not self._old:
                whole: Window | None = None
                for at, window in reversed(self._new):
                    whole = _sum(window, whole) if whole is not None else window
                    self._old.append((at, whole))
                self._new, self._sum = [], None
            if self._old[-1][0] > until:
                break
            self._old.pop()
            expired = True
        return expired

    def total(self) -> Window | None:
        """Returns the sum; None when there is no window."""
        if not self._old:
            return self._sum
        return self._old[-1][1] if self._sum is None else _sum(self._old[-1][1], self._sum)


def _sum(a: Window | None, b: Window) -> Window:
    if a is None:
        return b
    try:
        return merge(a, b)
    except MessageError:
        return a


def merged_window(windows: Iterable[Window], bundle: str) -> Window | None:
    """Returns all windows of one bundle as one; None when there is none."""
    whole: Window | None = None
    for window in windows:
        if window.bundle == bundle:
            whole = _sum(whole, window)
    return whole


@dataclass(frozen=True, slots=True)
class SpanSum:
    """The sum of an agent's windows of one span that one bundle judged in one lot, beside one challenger or none.

    Attributes:
        agent_id: Whose.
        span_s: Length of the span: 60, 3600 or 86400.
        start: When the span begins, a multiple of its length.
        bundle: Which bundle judged.
        lot: Of which lot; empty = not known.
        variety: Of which variety; empty = not known.
        challenger: Which bundle judged beside; empty = none.
        windows: Number of windows.
        left_out: Windows of those that could not be added and are in no count.
        by_arrival: Windows of those whose clock was implausible, placed by their arrival.
        first_at: Start of the earliest window.
        last_at: End of the latest window.
        window: The sum; None when every window was left out.
    """

    agent_id: str
    span_s: int
    start: datetime
    bundle: str
    lot: str
    variety: str
    challenger: str
    windows: int
    left_out: int
    by_arrival: int
    first_at: datetime
    last_at: datetime
    window: Window | None


@dataclass(frozen=True, slots=True)
class LotSum:
    """The sum of an agent's windows of one run of a lot that one bundle judged; fields as in `SpanSum`."""

    agent_id: str
    bundle: str
    lot: str
    variety: str
    challenger: str
    windows: int
    left_out: int
    by_arrival: int
    first_at: datetime
    last_at: datetime
    window: Window | None


def spans_of(session: Session, agent_id: str, span_s: int, since: datetime, until: datetime) -> list[SpanSum]:
    """Returns the sums of the windows of one agent by span, oldest first, then by lot.

    What arrived up to now is in them, also where the row of a span is still open.

    Args:
        session: Reads.
        agent_id: Whose; empty = of all agents.
        span_s: 60, 3600 or 86400.
        since: Begin of the first span; an earlier span that holds this moment is included.
        until: Spans that begin before this.
    """
    totals: dict[Place, Total] = {}
    for place, total in _places(session, agent_id, span_s, start_of(since, span_s), until):
        known = totals.get(place)
        if known is None:
            totals[place] = total
        else:
            known.add(total)
    ordered = sorted(totals.items(), key=lambda pair: (pair[0].start, pair[0].agent_id, pair[1].first_at, pair[0]))
    return [_span_sum(place, total) for place, total in ordered]


def _span_sum(place: Place, total: Total) -> SpanSum:
    return SpanSum(**place._asdict(), **_counts(total))


def _counts(total: Total) -> dict[str, Any]:
    names = ("windows", "left_out", "by_arrival", "first_at", "last_at", "window")
    return {name: getattr(total, name) for name in names}


def _places(
    session: Session, agent_id: str, span_s: int, since: datetime, until: datetime
) -> Iterable[tuple[Place, Total]]:
    """Yields the rows of a span, and the open rows of shorter spans as parts of it."""
    names = ("agent_id", "span_s", "start", "bundle", "lot", "variety", "challenger")
    values = ("payload", "windows", "left_out", "by_arrival", "first_at", "last_at")
    end = start_of(until - timedelta(microseconds=1), span_s) + timedelta(seconds=span_s)
    for shorter in (s for s in (DAY, HOUR, MINUTE) if s <= span_s):
        query = select(*(getattr(Rollup, name) for name in (*names, *values))).where(
            Rollup.span_s == shorter, col(Rollup.start) >= since, col(Rollup.start) < end
        )
        if shorter < span_s:
            query = query.where(~col(Rollup.folded))
        if agent_id:
            query = query.where(Rollup.agent_id == agent_id)
        for row in session.connection().execute(query):
            place = Place(*row[: len(names)])
            yield place._replace(span_s=span_s, start=start_of(place.start, span_s)), total_of(row)


def page_of_spans(
    session: Session, agent_id: str, span_s: int, since: datetime, until: datetime, limit: int
) -> tuple[list[SpanSum], datetime | None]:
    """Returns the sums of whole spans from `since` on, about `limit` of them, and where the next page begins.

    Returns:
        Sums as `spans_of`; and the begin of the next page, None when nothing follows.
    """
    found: list[SpanSum] = []
    first = _next_span(session, agent_id, span_s, since, until)
    while first is not None and len(found) < limit:
        end = min(until, first + timedelta(seconds=span_s * max(1, limit - len(found))))
        found += spans_of(session, agent_id, span_s, first, end)
        first = _next_span(session, agent_id, span_s, end, until)
    return found, first


def _next_span(session: Session, agent_id: str, span_s: int, since: datetime, until: datetime) -> datetime | None:
    """Returns when the next span begins for which there is a row; None when there is none before `until`."""
    starts = []
    for shorter in (s for s in SPANS.values() if s <= span_s):
        query = select(func.min(Rollup.start)).where(
            Rollup.agent_id == agent_id,
            Rollup.span_s == shorter,
            col(Rollup.start) >= start_of(since, span_s),
            col(Rollup.start) < until,
        )
        starts.append(session.exec(query).one())
    first = min((start for start in starts if start is not None), default=None)
    return None if first is None else start_of(first, span_s)


def lots_of(session: Session, agent_id: str, since: datetime, until: datetime | None = None) -> list[LotSum]:
    """Returns the sums of the windows of one agent by lot, in the order in which the lots began.

    A name that comes again after another one, or after six hours without a window, is another lot. What ran without a
    name counts as a lot with an empty one.

    Args:
        session: Reads.
        agent_id: Whose.
        since: Lots that ended before this are left out.
        until: Lots that began then or later are left out; None = none.
    """
    last = until or datetime(2200, 1, 1, tzinfo=UTC)
    pieces = spans_of(session, agent_id, HOUR, since - _LONGEST_LOT, last)
    pieces.sort(key=lambda piece: piece.first_at)
    runs: list[tuple[SpanSum, Total]] = []
    newest: dict[tuple[str, ...], Total] = {}
    lot_before: tuple[str, str] | None = None
    for piece in pieces:
        lot, key = (piece.lot, piece.variety), (piece.bundle, piece.lot, piece.variety, piece.challenger)
        total = Total(piece.window, piece.windows, piece.left_out, piece.by_arrival, piece.first_at, piece.last_at)
        run = newest.get(key)
        if run is not None and piece.first_at - run.last_at <= (_SAME_LOT if lot == lot_before else _HANDOVER):
            run.add(total)
        else:
            newest[key] = total
            runs.append((piece, total))
        lot_before = lot
    return [
        LotSum(
            agent_id=piece.agent_id,
            bundle=piece.bundle,
            lot=piece.lot,
            variety=piece.variety,
            challenger=piece.challenger,
            **_counts(total),
        )
        for piece, total in runs
        if total.last_at >= since
    ]
