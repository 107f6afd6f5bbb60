"""Tables of agents and of what they send."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import json_column, time_column, utc_now


class Agent(SQLModel, table=True):
    """One box: what it shall run and what it says it runs."""

    id: str = Field(primary_key=True, max_length=63)
    labels: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """The labels that hold, see `fleet.labels`: what the agent reports, under what a person assigned."""
    labels_assigned: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    generation_floor: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """New generations are above this one. After a restore: the agent may have taken up some that are not known here."""
    desired_bundle: str = ""
    """Digest; empty with a generation above 0 = a recall, with generation 0 = nothing was ever desired."""
    rollout_id: int | None = None
    mode: str = "live"
    trial_items: int = 50
    trial_s: float = 60.0
    swap: str = "belt-gap"
    """When the line changes over: see `models.messages.Swap`."""
    swap_within_s: float | None = None
    safe_state: str = ""
    """What the line does instead of judging, with an empty `desired_bundle`: see `models.messages.SafeState`."""
    online: bool = False
    boot_id: str = ""
    seen_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    """When a message that was not a retained one last arrived here, by this clock."""
    stored_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    """When a record of it was last stored: the newest `received_at` of its windows and events."""
    window_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    """When a window of it was last stored."""
    twins: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """Two boxes that spoke under this identity in turn, see `fleet.twins`."""
    reported: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    reported_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    setup_digest: str = Field(default="", max_length=64)
    """Digest of the set-up that `agent_history` holds as its newest: see `fleet.history`."""
    lot_asked: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """The lot that was named to it last and what it answered: see `fleet.lot_commands`."""
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())


class WindowRow(SQLModel, table=True):
    """Ten seconds of one line, stored once."""

    __tablename__ = "window"
    __table_args__ = (
        Index("ix_window_agent_received", "agent_id", "received_at"),
        Index("ix_window_bundle_received", "bundle", "received_at"),
    )
    agent_id: str = Field(primary_key=True, max_length=63)
    boot_id: str = Field(primary_key=True, max_length=16)
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    started_at: datetime = Field(sa_column=time_column())
    received_at: datetime = Field(sa_column=time_column(index=True))
    bundle: str = Field(max_length=64)
    items: int = Field(sa_column=Column(BigInteger().with_variant(Integer, "sqlite"), nullable=False))
    refused: str = ""
    """Error code when the window contradicts itself: kept, not used."""
    payload: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """The window's MessagePack as `fleet.window_payload` stores it."""


class EventRow(SQLModel, table=True):
    """Something that happened on an agent, stored once."""

    __tablename__ = "event"
    __table_args__ = (
        Index("ix_event_agent_received", "agent_id", "received_at"),
        Index("ix_event_received", "received_at"),
    )
    agent_id: str = Field(primary_key=True, max_length=63)
    boot_id: str = Field(primary_key=True, max_length=16)
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    at: datetime = Field(sa_column=time_column())
    received_at: datetime = Field(sa_column=time_column())
    code: str
    message: str = Field(default="", sa_type=Text)
    facts: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
