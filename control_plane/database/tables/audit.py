"""Table of the audit trail."""

from datetime import datetime
from typing import Any

from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import json_column, time_column


class Audit(SQLModel, table=True):
    """A change and the person who made it. Append only; each entry carries the hash of the one before."""

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(sa_column=time_column())
    actor: str
    action: str
    object: str
    details: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    previous: str = Field(max_length=64)
    hash: str = Field(max_length=64)
