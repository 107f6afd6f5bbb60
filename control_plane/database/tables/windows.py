"""Tables of what is made of windows and reports as they arrive: sums, fidelity by hour, history, archived days."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import Utc, json_column, time_column


def _count(*, nullable: bool = False) -> Any:
    """Returns a column of counts and milliseconds up to 2**63."""
    return Column(BigInteger().with_variant(Integer, "sqlite"), nullable=nullable)


def _time_key() -> Any:
    return Column(Utc(), primary_key=True, nullable=False)


class Rollup(SQLModel, table=True):
    """The sum of an agent's windows of one span that belong to one series; see `monitoring.rollups`."""

    __table_args__ = (
        Index("ix_rollup_span_start", "span_s", "start"),
        Index(
            "ix_rollup_open", "agent_id", "span_s", sqlite_where=text("folded = 0"), postgresql_where=text("NOT folded")
        ),
    )
    agent_id: str = Field(primary_key=True, max_length=63)
    span_s: int = Field(primary_key=True)
    """60, 3600 or 86400."""
    start: datetime = Field(sa_column=_time_key())
    bundle: str = Field(primary_key=True, max_length=64)
    lot: str = Field(primary_key=True, max_length=64)
    variety: str = Field(primary_key=True, max_length=64)
    challenger: str = Field(primary_key=True, max_length=64)
    """Digest of the bundle that judged beside; empty = none did."""
    windows: int = 0
    left_out: int = 0
    """Windows that count more than fits or do not add to the others: counted here, in no other figure."""
    by_arrival: int = 0
    """Windows whose clock was implausible, placed by the time of their arrival."""
    items: int = Field(default=0, sa_column=_count())
    first_at: datetime = Field(sa_column=time_column())
    """Start of the earliest window."""
    last_at: datetime = Field(sa_column=time_column())
    """End of the latest window."""
    folded: bool = False
    """Whether this row is part of the row of the next longer span."""
    payload: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """The sum as the MessagePack of a window: as it is while the span is open, compressed once it is folded."""


class FidelityHour(SQLModel, table=True):
    """What one boot of an agent sent for one hour, counted as it arrived; see `monitoring.fidelity`."""

    __tablename__ = "fidelity_hour"
    __table_args__ = (Index("ix_fidelity_hour_hour", "hour"),)
    agent_id: str = Field(primary_key=True, max_length=63)
    hour: datetime = Field(sa_column=_time_key())
    boot_id: str = Field(primary_key=True, max_length=16)
    first_seq: int | None = Field(default=None, sa_column=_count(nullable=True))
    last_seq: int | None = Field(default=None, sa_column=_count(nullable=True))
    records: int = 0
    """Windows and events that were new; they share one sequence of numbers."""
    duplicates: int = 0
    windows: int = 0
    late: int = 0
    """Windows that arrived more than 15 s after their end; `backfilled` ones more than 120 s."""
    backfilled: int = 0
    refused: int = 0
    """Windows whose counts contradict each other."""
    impossible: int = 0
    """Windows with values no line can have."""
    by_arrival: int = 0
    items: int = Field(default=0, sa_column=_count())
    unjudged: int = Field(default=0, sa_column=_count())
    counted_items: int = Field(default=0, sa_column=_count())
    """Items of the windows that state the agent's lifetime count; `lifetime_low` to `lifetime_high` covers them."""
    lifetime_low: int | None = Field(default=None, sa_column=_count(nullable=True))
    lifetime_high: int | None = Field(default=None, sa_column=_count(nullable=True))
    cells: int = Field(default=0, sa_column=_count())
    """Items times features; `nulls` of them have no value."""
    nulls: int = Field(default=0, sa_column=_count())
    report_lag_ms: int | None = Field(default=None, sa_column=_count(nullable=True))
    """Least time from the making of a report, by the agent's clock, to its arrival, by this one."""
    window_lag_ms: int | None = Field(default=None, sa_column=_count(nullable=True))
    """Least time from the end of a window to its arrival."""


class AgentHistory(SQLModel, table=True):
    """What an agent reported about its set-up from a time on; a row is written when that changes."""

    __tablename__ = "agent_history"
    __table_args__ = (Index("ix_agent_history_agent_at", "agent_id", "at"),)
    id: int | None = Field(default=None, primary_key=True)
    agent_id: str = Field(max_length=63)
    at: datetime = Field(sa_column=time_column())
    """When the report arrived."""
    agent_at: datetime = Field(sa_column=time_column())
    """When it was made, by the agent's clock."""
    facts: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """See `fleet.history`."""


class WindowHorizon(SQLModel, table=True):
    """Up to which number the windows of one boot were deleted: what comes again from below is not counted again."""

    __tablename__ = "window_horizon"
    agent_id: str = Field(primary_key=True, max_length=63)
    boot_id: str = Field(primary_key=True, max_length=16)
    through_seq: int = Field(sa_column=_count())
    at: datetime = Field(sa_column=time_column())


class ArchivedDay(SQLModel, table=True):
    """A day whose sums stand in a file of the archive."""

    __tablename__ = "archived_day"
    day: str = Field(primary_key=True, max_length=10)
    """Such as `2026-03-14`, UTC."""
    file: str
    sha256: str = Field(max_length=64)
    rows: int = 0
    windows: int = Field(default=0, sa_column=_count())
    """Windows in them: when a late one arrives, the day is archived again."""
    size_bytes: int = Field(default=0, sa_column=_count())
    at: datetime = Field(sa_column=time_column())
