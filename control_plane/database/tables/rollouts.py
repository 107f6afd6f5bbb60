"""Tables of rollouts."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Column, Text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import EnumText, json_column, time_column, utc_now


class RolloutState(StrEnum):
    """States of a rollout."""

    AWAITING_APPROVAL = "awaiting-approval"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTED = "aborted"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"


class Rollout(SQLModel, table=True):
    """A bundle on its way to the agents of a selector, wave by wave."""

    id: int | None = Field(default=None, primary_key=True)
    bundle: str = Field(max_length=64)
    model: str = ""
    version: int = 0
    selector: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """`labels`: the selector in its normal form; `agents`: the names, where agents were named."""
    waves: list[Any] = Field(default_factory=list, sa_column=json_column())
    """Sizes as given: numbers of agents, percent, or lists of names."""
    policy: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    """Rates, abort criteria, time-outs, schedule, thresholds: see `control_plane.rollouts.policy`."""
    state: RolloutState = Field(
        default=RolloutState.RUNNING, sa_column=Column(EnumText(RolloutState), nullable=False, index=True)
    )
    wave: int = 0
    cleared_wave: int = -1
    """The rollout paused itself at this wave; a resume goes on in spite of that wave's thresholds."""
    reason: str = ""
    mode: str = "live"
    min_items: int = 1
    """Items an agent must have judged with the bundle before it counts as succeeded."""
    dynamic: bool = False
    exclude: list[str] = Field(default_factory=list, sa_column=json_column())
    """Agents that take no part, although the selector matches them."""
    safe_state: str = ""
    """What agents without a way back do after an abort or a rollback: see `models.messages.SafeState`."""
    trial_items: int = 50
    trial_s: float = 60.0
    swap: str = "belt-gap"
    swap_within_s: float | None = None
    created_by: str = "unknown"
    approved_by: str = ""
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
    updated_at: datetime = Field(default_factory=utc_now, sa_column=time_column())


class RolloutAgent(SQLModel, table=True):
    """One agent's part in a rollout; wave sizes are frozen when the rollout is made."""

    __tablename__ = "rollout_agent"
    rollout_id: int = Field(foreign_key="rollout.id", primary_key=True)
    agent_id: str = Field(primary_key=True)
    """No foreign key: the history of a rollout outlives an agent that was forgotten."""
    wave: int
    place: int = 0
    """In the order in which agents get the bundle."""
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Desired generation that this rollout gave the agent; 0 = its turn has not come."""
    attempt: int = 0
    outcome: str = Field(default="QUEUED", sa_column=Column(Text, nullable=False, index=True))
    """As concluded: see `control_plane.rollouts.policy.Outcome`."""
    reason: str = Field(default="", sa_type=Text)
    tried: bool = False
    assigned_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    started_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    concluded_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    previous_bundle: str = ""
    """What the agent reported as committed when it was given the bundle; a candidate for its way back."""
    returned_generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Desired generation that sent the agent back; 0 = it was not sent back."""
    return_bundle: str = ""
    """Where the agent was sent back to; empty = it was recalled, because there was no way back."""
    return_safe_state: str = ""
    """The safe state that the recall asked for."""
    returned_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    returned: str = Field(default="", sa_column=Column(Text, nullable=False, index=True))
    """What became of it: see `control_plane.rollouts.views.Return`."""
    return_reason: str = Field(default="", sa_type=Text)
