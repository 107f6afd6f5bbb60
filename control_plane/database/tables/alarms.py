"""Tables of alarms: what was found, what people did about it, whom it was sent to, what it asked for."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Column, Index, LargeBinary, Text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import EnumText, json_column, time_column


class AlarmState(StrEnum):
    """States of an alarm: see `alarms.lifecycle` for the transitions."""

    OPEN = "open"
    ACKNOWLEDGED = "acknowledged"
    SILENCED = "silenced"
    RESOLVED = "resolved"


class DeliveryState(StrEnum):
    """States of one message to one receiver."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given-up"


class DecisionState(StrEnum):
    """States of a request that an alarm made by policy."""

    AWAITING_CONFIRMATION = "awaiting-confirmation"
    REQUESTED = "requested"
    DECLINED = "declined"
    WITHHELD = "withheld"
    """The budget was used up, or the cool-down was not over; kept, so that a person sees what did not happen."""


class Alarm(SQLModel, table=True):
    """One condition from its first finding to its end; `active_key` keeps it the only one of its key."""

    __table_args__ = (
        Index("ix_alarm_state_severity", "state", "severity"),
        Index("ix_alarm_line_state", "line", "state"),
    )
    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(max_length=300, index=True)
    """`Finding.key`: level, subject, cause."""
    active_key: str | None = Field(default=None, max_length=300, unique=True)
    """`key` until it is resolved, then null: two replicas cannot raise the same condition twice."""
    grouping: str = Field(max_length=300, index=True)
    """Alarms of one cause that a person meets as one: see `alarms.grouping`."""
    leader_id: int | None = Field(default=None, index=True)
    """The alarm that speaks for the group; null = this one does."""
    state: AlarmState = Field(
        default=AlarmState.OPEN, sa_column=Column(EnumText(AlarmState), nullable=False, index=True)
    )
    severity: str = Field(max_length=16)
    """`detection.finding.Severity`; grows while it lasts and never shrinks."""
    detector: str = Field(max_length=16)
    cause: str = Field(max_length=32)
    level: str = Field(max_length=8)
    site: str = Field(default="", max_length=128)
    line: str = Field(default="", max_length=63)
    lane: int | None = None
    lots: list[str] = Field(default_factory=list, sa_column=json_column())
    """Lots that passed while it was present, oldest first."""
    effect: float = 0.0
    effect_unit: str = ""
    interval: list[float] = Field(default_factory=list, sa_column=json_column())
    """95 % interval of the effect, low and high; empty where the method has none."""
    items: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    delay_items: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    delay_s: float = 0.0
    evidence: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    action: str = Field(default="", sa_type=Text)
    cost: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """Cost of waiting: `per_h` in the plant's currency and `basis` in words; empty = not known."""
    owner: str = ""
    seen: int = 1
    """Looks in which the finding was present."""
    escalation: int = 0
    """Times it was escalated."""
    raised_at: datetime = Field(sa_column=time_column(index=True))
    seen_at: datetime = Field(sa_column=time_column())
    """When the finding was present last."""
    absent_since: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    """The first look in a row in which the finding was absent; null = present, or nothing was heard of the line."""
    waiting_since: datetime = Field(sa_column=time_column())
    """Since when nobody has answered for it: raised, worsened, or back from silence. Escalation counts from here."""
    silenced_until: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    acknowledged_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    resolved_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    resolved_by: str = ""
    reason: str = Field(default="", sa_type=Text)
    """Of the last transition."""
    updated_at: datetime = Field(sa_column=time_column())


class AlarmComment(SQLModel, table=True):
    """What a person wrote on an alarm."""

    __tablename__ = "alarm_comment"
    id: int | None = Field(default=None, primary_key=True)
    alarm_id: int = Field(foreign_key="alarm.id", index=True)
    at: datetime = Field(sa_column=time_column())
    actor: str
    text: str = Field(sa_type=Text)


class AlarmDelivery(SQLModel, table=True):
    """One message to one receiver, stored in the transaction of what it reports: a crash loses none."""

    __tablename__ = "alarm_delivery"
    __table_args__ = (Index("ix_alarm_delivery_due", "state", "next_at"),)
    id: int | None = Field(default=None, primary_key=True)
    alarm_id: int = Field(foreign_key="alarm.id", index=True)
    key: str = Field(max_length=64, unique=True)
    """The idempotency key that the receiver gets with every attempt."""
    receiver: str = Field(max_length=64)
    event: str = Field(max_length=16)
    payload: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    state: DeliveryState = Field(
        default=DeliveryState.WAITING, sa_column=Column(EnumText(DeliveryState), nullable=False)
    )
    attempts: int = 0
    created_at: datetime = Field(sa_column=time_column())
    next_at: datetime = Field(sa_column=time_column())
    ended_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    error: str = Field(default="", sa_type=Text)
    """Why the last attempt failed."""


class AlarmDecision(SQLModel, table=True):
    """What a policy let an alarm ask for, or withheld, and why."""

    __tablename__ = "alarm_decision"
    __table_args__ = (Index("ix_alarm_decision_request_at", "request", "at"),)
    id: int | None = Field(default=None, primary_key=True)
    alarm_id: int = Field(foreign_key="alarm.id", index=True)
    request: str = Field(max_length=32)
    """review-queue, samples, retraining-proposal."""
    state: DecisionState = Field(sa_column=Column(EnumText(DecisionState), nullable=False, index=True))
    details: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """What is asked for: line, lane, lots, number of items."""
    reason: str = Field(default="", sa_type=Text)
    at: datetime = Field(sa_column=time_column())
    decided_by: str = ""
    decided_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))


class AlarmWatch(SQLModel, table=True):
    """State of the loop that looks for findings, so that a restart goes on where it was."""

    __tablename__ = "alarm_state"
    name: str = Field(primary_key=True, max_length=32)
    state: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    updated_at: datetime = Field(sa_column=time_column())
