"""Deletes what is past its time, by the policy of the configuration, in small steps.

Rules: each step is a transaction of its own and deletes the oldest rows first, so that a stop at any moment leaves
nothing to repair and the next step goes on; windows are deleted only after they were added up, which happens in the
transaction that stores them; sums are deleted only after they went into the next longer span; before windows of a boot
are deleted, the highest number among them is kept, so that none of them is counted again when its agent repeats it. The
newest set-up of every agent stays, and so does the audit trail.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine, delete, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session, SQLModel, case, col, func, select

from control_plane.config import RetentionConfig
from control_plane.database.tables.agents import EventRow, WindowRow
from control_plane.database.tables.windows import AgentHistory, FidelityHour, Rollup, WindowHorizon
from control_plane.monitoring.rollups import DAY, HOUR, MINUTE, start_of

ROWS_AT_ONCE: Final = 2000
"""So many rows take some 30 ms in SQLite, for which other writers wait."""
_HORIZON: Final[Any] = SQLModel.metadata.tables[str(WindowHorizon.__tablename__)]
_HORIZON_KEPT: Final = timedelta(days=3650)
Step = Callable[[Session, datetime, int], int]
"""(session, now, most rows) -> rows deleted; fewer than asked for when nothing is left."""


def steps_of(policy: RetentionConfig, kept_minutes: Callable[[Session], datetime | None]) -> Mapping[str, Step]:
    """Returns what is to be done, by the name of what is deleted.

    Args:
        policy: How long each kind is kept.
        kept_minutes: Returns from when on sums over minutes must stay whatever their age, because they are not in the
            archive yet; None = there is no such time.
    """

    def minutes(session: Session, now: datetime, most: int) -> int:
        end, first_kept = now - timedelta(days=policy.minutes_days), kept_minutes(session)
        return _sums(session, MINUTE, end if first_kept is None else min(end, first_kept), most)

    return {
        "windows": lambda session, now, most: _windows(session, now - timedelta(days=policy.windows_days), now, most),
        "minutes": minutes,
        "hours": lambda session, now, most: _sums(session, HOUR, now - timedelta(days=policy.hours_days), most),
        "days": lambda session, now, most: _sums(session, DAY, now - timedelta(days=policy.days_days), most),
        "events": lambda session, now, most: _oldest(
            session, EventRow, EventRow.received_at, now - timedelta(days=policy.events_days), most
        ),
        "fidelity": lambda session, now, most: _oldest(
            session, FidelityHour, FidelityHour.hour, now - timedelta(days=policy.hours_days), most
        ),
        "history": lambda session, now, most: _history(session, now - timedelta(days=policy.history_days), most),
    }


def _cut(session: Session, time: Any, end: datetime, most: int, *conditions: Any) -> datetime | None:
    """Returns the time through which `most` rows or few more are past their time; None when there are none."""
    oldest = select(time).where(time < end, *conditions).order_by(time)
    last: datetime | None = session.exec(oldest.offset(most - 1).limit(1)).first()
    if last is None:
        last = session.exec(select(func.max(time)).where(time < end, *conditions)).one()
    return last


def _oldest(session: Session, table: type[SQLModel], time: Any, end: datetime, most: int, *conditions: Any) -> int:
    time = col(time)
    last = _cut(session, time, end, most, *conditions)
    if last is None:
        return 0
    return int(session.connection().execute(delete(table).where(time <= last, *conditions)).rowcount)


def _windows(session: Session, end: datetime, now: datetime, most: int) -> int:
    received = col(WindowRow.received_at)
    last = _cut(session, received, end, most)
    if last is None:
        return 0
    boots = select(WindowRow.agent_id, WindowRow.boot_id, func.max(WindowRow.seq)).where(received <= last)
    found = session.exec(boots.group_by(col(WindowRow.agent_id), col(WindowRow.boot_id))).all()
    insert: Any = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
    statement = insert(_HORIZON)
    new, old = statement.excluded, _HORIZON.c
    larger = case((new.through_seq > old.through_seq, new.through_seq), else_=old.through_seq)
    statement = statement.on_conflict_do_update(
        index_elements=["agent_id", "boot_id"], set_={"through_seq": larger, "at": new.at}
    )
    rows = [{"agent_id": agent, "boot_id": boot, "through_seq": seq, "at": now} for agent, boot, seq in found]
    session.connection().execute(statement, rows)
    session.connection().execute(delete(WindowHorizon).where(col(WindowHorizon.at) < now - _HORIZON_KEPT))
    return int(session.connection().execute(delete(WindowRow).where(received <= last)).rowcount)


def _sums(session: Session, span_s: int, end: datetime, most: int) -> int:
    mine = (col(Rollup.span_s) == span_s, *(() if span_s == DAY else (col(Rollup.folded),)))
    return _oldest(session, Rollup, Rollup.start, start_of(end, DAY), most, *mine)


def _history(session: Session, end: datetime, most: int) -> int:
    newest = select(func.max(AgentHistory.id)).group_by(col(AgentHistory.agent_id))
    old = select(AgentHistory.id).where(col(AgentHistory.at) < end, col(AgentHistory.id).not_in(newest)).limit(most)
    ids = session.exec(old).all()
    if ids:
        session.connection().execute(delete(AgentHistory).where(col(AgentHistory.id).in_(ids)))
    return len(ids)


def database_bytes(engine: Engine) -> int:
    """Returns the size of the database, in bytes: what is deleted is room for new rows, the file does not shrink."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())
        pages = int(connection.execute(text("PRAGMA page_count")).scalar_one())
        return pages * int(connection.execute(text("PRAGMA page_size")).scalar_one())
