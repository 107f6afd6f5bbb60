"""Table of requests that may be repeated."""

from datetime import datetime
from typing import Any

from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import json_column, time_column


class AnsweredRequest(SQLModel, table=True):
    """What a request with an idempotency key was answered; the same request gets the same answer again."""

    __tablename__ = "answered_request"
    key: str = Field(primary_key=True, max_length=128)
    digest: str = Field(max_length=64)
    """SHA-256 of what was asked: a key must not be used for something else."""
    answer: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    answered_at: datetime = Field(sa_column=time_column(index=True))
