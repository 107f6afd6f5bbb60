"""Tables of signed metadata."""

from datetime import datetime

from sqlalchemy import BigInteger, Column, LargeBinary
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import time_column, utc_now


class TrustMetadata(SQLModel, table=True):
    """Signed metadata, every version once: (role, version) is the key, so no version is signed twice."""

    __tablename__ = "trust_metadata"
    role: str = Field(primary_key=True, max_length=16)
    version: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(sa_column=time_column())


class AssignmentRow(SQLModel, table=True):
    """The desired state of one agent, exactly as it was signed."""

    __tablename__ = "assignment"
    agent_id: str = Field(primary_key=True, max_length=63)
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    document: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    updated_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
