"""Jobs: long work in a table, claimed by worker processes under a lease.

A worker that dies loses its lease and the job is claimed by another, at most `max_attempts` times. Every claim raises
the job's fence; a worker writes only while its fence is the job's, so one that lost its lease changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Engine
from sqlmodel import Session, col, desc, select

from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.leases import CLOCK_SLACK
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.jobs import Job, JobKind, JobState
from models.errors import ConflictError, InputError

MAX_LOG_CHARS: Final = 200_000
OPEN: Final = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's claim on a job."""

    job_id: int
    fence: int
    kind: JobKind
    params: dict[str, Any]


def submit(session: Session, kind: JobKind, params: dict[str, Any], *, actor: str, now: datetime) -> Job:
    """Queues a job, in the caller's transaction."""
    job = Job(kind=kind, params=params, created_by=actor, created_at=now)
    session.add(job)
    session.flush()
    audit(session, actor, f"job.{kind}", str(job.id), params, now)
    return job


def claim(engine: Engine, worker: str, *, lease_s: float, max_attempts: int, now: datetime) -> Claim | None:
    """Claims the oldest job that waits, or one whose worker is gone; returns None when there is none."""
    with writing(engine) as session:
        # A lease further ahead than the longest possible one is void: the clock was set back since.
        longest = now + timedelta(seconds=lease_s) + CLOCK_SLACK
        until = col(Job.lease_until)
        stale = (col(Job.state) == JobState.RUNNING) & ((until < now) | (until > longest))
        query = select(Job).where((col(Job.state) == JobState.QUEUED) | stale).order_by(col(Job.id)).limit(1)
        if engine.dialect.name == "postgresql":
            query = query.with_for_update(skip_locked=True)
        job = session.exec(query).first()
        if job is None:
            return None
        if job.cancel_requested or job.attempts >= max_attempts:
            cancelled = job.cancel_requested
            job.state = JobState.CANCELLED if cancelled else JobState.FAILED
            if not cancelled:
                job.error = {"code": "job.too_many_attempts", "message": f"{job.attempts} workers died on this job."}
            job.finished_at = now
            session.add(job)
            session.commit()
            return None
        job.state, job.worker = JobState.RUNNING, worker
        job.attempts, job.fence = job.attempts + 1, job.fence + 1
        job.started_at, job.lease_until = now, now + timedelta(seconds=lease_s)
        session.add(job)
        session.commit()
        return Claim(job.id or 0, job.fence, JobKind(job.kind), dict(job.params))


def heartbeat(
    engine: Engine, held: Claim, *, stage: str, progress: float, lines: Sequence[str], lease_s: float
) -> bool:
    """Renews the lease and records the progress.

    Returns:
        True while the work shall go on; False when it was cancelled or belongs to another worker now.
    """
    with writing(engine) as session:
        job = session.get(Job, held.job_id)
        if job is None or job.fence != held.fence or job.state != JobState.RUNNING:
            return False
        job.stage, job.progress = stage, round(progress, 4)
        if lines:
            job.log = (job.log + "".join(f"{line}\n" for line in lines))[-MAX_LOG_CHARS:]
        job.lease_until = utc_now() + timedelta(seconds=lease_s)
        going_on = not job.cancel_requested
        session.add(job)
        session.commit()
        return going_on


def finish(
    engine: Engine,
    held: Claim,
    state: JobState,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bool:
    """Ends a job; False when the claim is no longer good and nothing was written."""
    with writing(engine) as session:
        job = session.get(Job, held.job_id)
        if job is None or job.fence != held.fence or job.state != JobState.RUNNING:
            return False
        job.state, job.result, job.error = state, result or {}, error or {}
        job.finished_at, job.lease_until = utc_now(), None
        if state is JobState.SUCCEEDED:
            job.progress = 1.0
        session.add(job)
        session.commit()
        return True


def cancel(session: Session, job_id: int, *, actor: str, now: datetime) -> Job:
    """Asks for the end of a job; a waiting one ends at once.

    Raises:
        InputError: `job.unknown`.
        ConflictError: `job.already_ended`.
    """
    job = session.get(Job, job_id)
    if job is None:
        raise InputError("job.unknown", "There is no such job.", expected="a job id", got=job_id)
    if job.state not in OPEN:
        raise ConflictError("job.already_ended", "The job has ended.", expected="queued or running", got=job.state)
    job.cancel_requested = True
    if job.state == JobState.QUEUED:
        job.state, job.finished_at = JobState.CANCELLED, now
    session.add(job)
    audit(session, actor, "job.cancel", str(job_id), {}, now)
    return job


def list_jobs(session: Session, kind: JobKind | None, limit: int) -> Sequence[Job]:
    """Returns jobs of one kind, or of every kind, newest first."""
    query = select(Job).order_by(desc(Job.id)).limit(limit)
    return session.exec(query if kind is None else query.where(Job.kind == kind)).all()


def get_job(engine: Engine, job_id: int) -> Job:
    """Returns one job.

    Raises:
        InputError: `job.unknown`.
    """
    with reading(engine) as session:
        job = session.get(Job, job_id)
        if job is None:
            raise InputError("job.unknown", "There is no such job.", expected="a job id", got=job_id)
        return job
