"""Tables of background work."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, Text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import EnumText, json_column, time_column, utc_now


class JobState(StrEnum):
    """The states of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    """What a job does."""

    TRAIN = "train"
    IMPORT_ONNX = "import-onnx"


class Job(SQLModel, table=True):
    """A piece of long work that worker processes claim."""

    id: int | None = Field(default=None, primary_key=True)
    kind: JobKind = Field(sa_column=Column(EnumText(JobKind), nullable=False))
    state: JobState = Field(default=JobState.QUEUED, sa_column=Column(EnumText(JobState), nullable=False, index=True))
    params: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    stage: str = ""
    progress: float = 0.0
    log: str = Field(default="", sa_type=Text)
    result: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    error: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    cancel_requested: bool = False
    attempts: int = 0
    fence: int = 0
    """Grows with every claim: a worker that lost its lease cannot write any more."""
    worker: str = ""
    lease_until: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    created_by: str = "unknown"
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
    started_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    finished_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
