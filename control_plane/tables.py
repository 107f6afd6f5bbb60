"""The tables. Enums are strings, times are aware UTC, what travels as a message is kept as it came."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, DateTime, LargeBinary, Text, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel


class JobState(StrEnum):
    """Of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    """What a job does."""

    TRAIN = "train"
    IMPORT_ONNX = "import-onnx"


class Stage(StrEnum):
    """Of a model version."""

    NONE = "none"
    STAGING = "staging"
    PRODUCTION = "production"
    ARCHIVED = "archived"


class RolloutState(StrEnum):
    """Of a rollout."""

    AWAITING_APPROVAL = "awaiting-approval"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTED = "aborted"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"


class Utc(TypeDecorator[datetime]):
    """Aware UTC in, aware UTC out, also where the database forgets the zone (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses naive times: they mean nothing."""
        del dialect
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Puts the zone back."""
        del dialect
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


class EnumText(TypeDecorator[StrEnum]):
    """A string enum as text: readable in the database, an enum in the program.

    Args:
        kind: The enum.
    """

    impl = Text
    cache_ok = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: StrEnum | str | None, dialect: Dialect) -> str | None:
        """Refuses what the enum does not know."""
        del dialect
        return None if value is None else str(self.kind(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        """The enum again."""
        del dialect
        return None if value is None else self.kind(value)


def utc_now() -> datetime:
    """Now, aware."""
    return datetime.now(UTC)


def _time(*, nullable: bool = False, index: bool = False) -> Any:
    return Column(Utc(), nullable=nullable, index=index)


def _json() -> Any:
    return Column(JSON, nullable=False)


class Dataset(SQLModel, table=True):
    """A named collection of labelled photographs."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=64, unique=True)
    root: str
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class DatasetVersion(SQLModel, table=True):
    """What the collection held when it was looked at."""

    __tablename__ = "dataset_version"
    __table_args__ = (UniqueConstraint("dataset_id", "digest"),)
    id: int | None = Field(default=None, primary_key=True)
    dataset_id: int = Field(foreign_key="dataset.id", index=True)
    number: int
    digest: str = Field(max_length=64)
    report: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class Job(SQLModel, table=True):
    """Long work, claimed by worker processes."""

    id: int | None = Field(default=None, primary_key=True)
    kind: JobKind = Field(sa_column=Column(EnumText(JobKind), nullable=False))
    state: JobState = Field(default=JobState.QUEUED, sa_column=Column(EnumText(JobState), nullable=False, index=True))
    params: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    stage: str = ""
    progress: float = 0.0
    log: str = Field(default="", sa_type=Text)
    result: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    error: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    cancel_requested: bool = False
    attempts: int = 0
    fence: int = 0
    """Grows with every claim: a worker that lost its lease cannot write any more."""
    worker: str = ""
    lease_until: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    created_by: str = "unknown"
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())
    started_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    finished_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))


class Model(SQLModel, table=True):
    """A name under which versions are kept."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=64, unique=True)
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


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
    metrics: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    lineage: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    job_id: int | None = Field(default=None, foreign_key="job.id")
    created_by: str = "unknown"
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class Agent(SQLModel, table=True):
    """One box: what it shall run and what it says it runs."""

    id: str = Field(primary_key=True, max_length=63)
    labels: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    desired_bundle: str = ""
    rollout_id: int | None = None
    mode: str = "live"
    trial_items: int = 50
    trial_s: float = 60.0
    swap: str = "belt-gap"
    """When the line changes over: see `models.messages.Swap`."""
    swap_within_s: float | None = None
    online: bool = False
    boot_id: str = ""
    seen_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    """When anything of it last arrived here, by this clock."""
    reported: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    reported_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    lot_asked: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    """The lot that was named to it last and what it answered: see `lots`."""
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class Rollout(SQLModel, table=True):
    """A bundle on its way to the agents of a selector, wave by wave."""

    id: int | None = Field(default=None, primary_key=True)
    bundle: str = Field(max_length=64)
    model: str = ""
    version: int = 0
    selector: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    """`labels`: the selector in its normal form; `agents`: the names, where agents were named."""
    waves: list[Any] = Field(default_factory=list, sa_column=_json())
    """Sizes as given: numbers of agents, percent, or lists of names."""
    policy: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    """Rates, aborts, timeouts, schedule, thresholds: see `rollout_policy`."""
    state: RolloutState = Field(
        default=RolloutState.RUNNING, sa_column=Column(EnumText(RolloutState), nullable=False, index=True)
    )
    wave: int = 0
    cleared_wave: int = -1
    """The rollout paused itself at this wave; whoever resumes it goes on in spite of that wave's thresholds."""
    reason: str = ""
    mode: str = "live"
    min_items: int = 1
    """Items an agent must have judged with the bundle before it counts as succeeded."""
    dynamic: bool = False
    trial_items: int = 50
    trial_s: float = 60.0
    swap: str = "belt-gap"
    swap_within_s: float | None = None
    created_by: str = "unknown"
    approved_by: str = ""
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())
    updated_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class RolloutAgent(SQLModel, table=True):
    """One agent's part in a rollout; wave sizes are frozen when the rollout is made."""

    __tablename__ = "rollout_agent"
    rollout_id: int = Field(foreign_key="rollout.id", primary_key=True)
    agent_id: str = Field(foreign_key="agent.id", primary_key=True)
    wave: int
    place: int = 0
    """In the order in which agents get the bundle."""
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Desired generation this rollout gave the agent; 0 = its turn has not come."""
    attempt: int = 0
    outcome: str = Field(default="QUEUED", sa_column=Column(Text, nullable=False, index=True))
    """As concluded: see `rollout_policy.Outcome`."""
    reason: str = Field(default="", sa_type=Text)
    tried: bool = False
    assigned_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    started_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    concluded_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    previous_bundle: str = ""
    """What the agent should run before; a rollback goes back to it."""
    returned_generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Desired generation that sent the agent back; 0 = it was not."""


class WindowRow(SQLModel, table=True):
    """Ten seconds of one line, stored once."""

    __tablename__ = "window"
    agent_id: str = Field(primary_key=True, max_length=63)
    boot_id: str = Field(primary_key=True, max_length=16)
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    started_at: datetime = Field(sa_column=_time())
    received_at: datetime = Field(sa_column=_time(index=True))
    bundle: str = Field(max_length=64)
    items: int
    refused: str = ""
    """Error code when the window contradicts itself: kept, not used."""
    payload: bytes = Field(sa_column=Column(LargeBinary, nullable=False))


class EventRow(SQLModel, table=True):
    """Something that happened on an agent, stored once."""

    __tablename__ = "event"
    agent_id: str = Field(primary_key=True, max_length=63)
    boot_id: str = Field(primary_key=True, max_length=16)
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    at: datetime = Field(sa_column=_time())
    received_at: datetime = Field(sa_column=_time(index=True))
    code: str
    message: str = Field(default="", sa_type=Text)
    facts: dict[str, Any] = Field(default_factory=dict, sa_column=_json())


class Audit(SQLModel, table=True):
    """Who changed what. Append only; each entry carries the hash of the one before."""

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(sa_column=_time())
    actor: str
    action: str
    object: str
    details: dict[str, Any] = Field(default_factory=dict, sa_column=_json())
    previous: str = Field(max_length=64)
    hash: str = Field(max_length=64)


class Lease(SQLModel, table=True):
    """Who may act as the one leader for something, until when, with a fencing number."""

    name: str = Field(primary_key=True)
    holder: str
    fence: int = 0
    until: datetime = Field(sa_column=_time())


class TrustMetadata(SQLModel, table=True):
    """Signed metadata, every version once: (role, version) is the key, so nobody signs two things under one."""

    __tablename__ = "trust_metadata"
    role: str = Field(primary_key=True, max_length=16)
    version: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    data: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(sa_column=_time())


class AssignmentRow(SQLModel, table=True):
    """What one agent shall run, exactly as it was signed."""

    __tablename__ = "assignment"
    agent_id: str = Field(primary_key=True, max_length=63)
    generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    document: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    updated_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class IdentityState(StrEnum):
    """Of an agent's identity."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"


class Identity(SQLModel, table=True):
    """Whether an agent may have certificates."""

    agent_id: str = Field(primary_key=True, max_length=63)
    state: IdentityState = Field(
        default=IdentityState.INVITED, sa_column=Column(EnumText(IdentityState), nullable=False, index=True)
    )
    renewal_asked_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    """Its certificate was past its time when it asked for a new one: somebody must approve."""
    renewal_approved_until: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())


class EnrolmentToken(SQLModel, table=True):
    """A one-time permission to enrol; the secret itself is not kept."""

    __tablename__ = "enrolment_token"
    secret_sha256: str = Field(primary_key=True, max_length=64)
    agent_id: str = Field(foreign_key="identity.agent_id", index=True, max_length=63)
    created_at: datetime = Field(default_factory=utc_now, sa_column=_time())
    created_by: str = "unknown"
    expires_at: datetime = Field(sa_column=_time())
    used_at: datetime | None = Field(default=None, sa_column=_time(nullable=True))
    key_sha256: str = Field(default="", max_length=64)
    """The public key that used it: an answer that was lost is given again to this key alone."""


class Certificate(SQLModel, table=True):
    """A certificate that was issued to an agent."""

    serial: str = Field(primary_key=True, max_length=40)
    """Hexadecimal, upper case."""
    agent_id: str = Field(foreign_key="identity.agent_id", index=True, max_length=63)
    key_sha256: str = Field(index=True, unique=True, max_length=64)
    """A key is certified once."""
    issued_at: datetime = Field(sa_column=_time())
    not_after: datetime = Field(sa_column=_time())
    renewed: bool = False
    """By renewal, not by a token."""
    revoked_at: datetime | None = Field(default=None, sa_column=_time(nullable=True, index=True))
    revoked_because: str = ""
    pem: str = Field(sa_type=Text)
    """The whole answer's chain, to be given again."""


class RetainedBlob(SQLModel, table=True):
    """A manifest or chunk the broker holds: written before it is sent, confirmed when the broker has it."""

    __tablename__ = "retained_blob"
    digest: str = Field(primary_key=True, max_length=64)
    size_bytes: int
    confirmed: bool = False
