"""Tables of identities and certificates."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import Column, Text
from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import EnumText, time_column, utc_now


class IdentityState(StrEnum):
    """The states of an agent's identity."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"


class Identity(SQLModel, table=True):
    """Whether an agent may have certificates."""

    agent_id: str = Field(primary_key=True, max_length=63)
    state: IdentityState = Field(
        default=IdentityState.INVITED, sa_column=Column(EnumText(IdentityState), nullable=False, index=True)
    )
    renewal_asked_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    """When it asked for a new certificate after the old one had run out; a person must approve that."""
    renewal_approved_until: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())


class EnrolmentToken(SQLModel, table=True):
    """A one-time permission to enrol; the secret itself is not kept."""

    __tablename__ = "enrolment_token"
    secret_sha256: str = Field(primary_key=True, max_length=64)
    agent_id: str = Field(foreign_key="identity.agent_id", index=True, max_length=63)
    created_at: datetime = Field(default_factory=utc_now, sa_column=time_column())
    created_by: str = "unknown"
    expires_at: datetime = Field(sa_column=time_column())
    used_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True))
    key_sha256: str = Field(default="", max_length=64)
    """The public key that used it: an answer that was lost is given again to this key alone."""


class Certificate(SQLModel, table=True):
    """A certificate that was issued to an agent."""

    serial: str = Field(primary_key=True, max_length=40)
    """Hexadecimal, upper case."""
    agent_id: str = Field(foreign_key="identity.agent_id", index=True, max_length=63)
    key_sha256: str = Field(index=True, unique=True, max_length=64)
    """A key is certified once."""
    issued_at: datetime = Field(sa_column=time_column())
    not_after: datetime = Field(sa_column=time_column())
    renewed: bool = False
    """By renewal, not by a token."""
    revoked_at: datetime | None = Field(default=None, sa_column=time_column(nullable=True, index=True))
    revoked_because: str = ""
    pem: str = Field(sa_type=Text)
    """The whole answer's chain, to be given again."""
