"""Tables of datasets."""

from datetime import datetime
from typing import Any

from sqlalchemy import UniqueConstraint
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import json_column, time_column, utc_now


class Dataset(SQLModel, table=True):
    """A named collection of labelled photographs."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=64, unique=True)
    root: str
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())


class DatasetVersion(SQLModel, table=True):
    """What the collection held when it was looked at."""

    __tablename__ = "dataset_version"
    __table_args__ = (UniqueConstraint("dataset_id", "digest"),)
    id: int | None = Field(default=None, primary_key=True)
    dataset_id: int = Field(foreign_key="dataset.id", index=True)
    number: int
    digest: str = Field(max_length=64)
    report: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
