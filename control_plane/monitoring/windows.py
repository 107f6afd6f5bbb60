"""The one reader of stored windows: board, figures, rollouts, pages and API ask here, and nothing else decodes a row.

Rules: what contradicts itself is kept in the database and never used for a figure; a page of rows is continued by a
cursor, which neither repeats nor leaves out a row while new ones arrive; no question reads the whole history of an
agent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, or_
from sqlmodel import Session, col, desc, select

from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.fleet.window_payload import unpack_window
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
