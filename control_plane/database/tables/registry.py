"""Tables of models and their versions."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, UniqueConstraint
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import EnumText, json_column, time_column, utc_now


class Stage(StrEnum):
    """The stages of a model version."""

    NONE = "none"
    STAGING = "staging"
    PRODUCTION = "production"
    ARCHIVED = "archived"


class Model(SQLModel, table=True):
    """A name under which versions are kept."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=64, unique=True)
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())


class ModelVersion(SQLModel, table=True):
    """One bundle under a model's name."""

    __tablename__ = "model_version"
    __table_args__ = (UniqueConstraint("model_id", "number"), UniqueConstraint("model_id", "bundle"))
    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id", index=True)
    number: int
    bundle: str = Field(max_length=64, index=True)
    stage: Stage = Field(default=Stage.NONE, sa_column=Column(EnumText(Stage), nullable=False))
    size_bytes: int = 0
    metrics: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    lineage: dict[str, Any] = Field(default_factory=dict, sa_column=json_column())
    job_id: int | None = Field(default=None, foreign_key="job.id")
    created_by: str = "unknown"
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
