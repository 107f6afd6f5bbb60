"""Carries out what the planner says: idempotent, under a lease, every second.

Rules: what changes a rollout is one transaction that first proves, by the fencing number, that this process still
leads; a process that was stopped beyond its lease therefore writes nothing. The desired state is in the database
before it is published. What was committed but not published (a crash in between) is published by the next leader when
it takes over, and again whenever an agent reports an older generation. A rollout is planned when something changed
that concerns it, and every ten seconds; a turn without news costs two short queries and takes no lock.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final, Protocol

from sqlalchemy import Engine
from sqlmodel import Session, col, or_, select
from sqlmodel.sql.expression import SelectOfScalar

from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.leases import holds_lease, take_lease
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.fleet.desired_state import DesiredChange, assign
from control_plane.fleet.reports import report_of
from control_plane.rollouts.changes import ReportChanges
from control_plane.rollouts.planner import MOVING, plan
from control_plane.rollouts.policy import DONE, Outcome
from control_plane.rollouts.records import members_of, newcomers, view_of
from control_plane.rollouts.views import (
    AgentView,
    Assign,
    ChangeState,
    Conclude,
    ConcludeReturn,
    Enrol,
    Finding,
    OpenWave,
    RecordProgress,
    Return,
    Revert,
    Step,
)
from control_plane.trust.online_signer import released_digests
from models.errors import SortlineError
from models.messages import Mode, SafeState, Swap

log = logging.getLogger("sortline.rollout")
LEASE: Final = "rollouts"
_ROWS_AT_A_TIME: Final = 500
"""SQLite takes a limited number of variables in one statement."""
_PLAN_AGAIN_S: Final = 10.0
"""Time-outs, rates and maintenance windows are looked at this often without other news; a minute is their unit."""


class Publisher(Protocol):
    """The part of the fleet link that the executor needs."""

    @property
    def connected(self) -> bool:
        """Whether agents can be heard: while they cannot, their silence proves nothing."""

    def publish_bundle(self, digest: str) -> None:
        """Has the blobs of a bundle published, as far as the broker does not hold them."""

    def publish_desired(self, *agents: Agent) -> None:
        """Publishes the desired states of agents."""


class RolloutExecutor:
    """Moves rollouts forward while it holds the lease.

    Args:
        engine: Database.
        fleet: Publishes chunks and desired states.
        holder: This process's name in the lease; two processes must never share it.
        period_s: Seconds between two turns.
        lease_s: After so many seconds without a turn another process may lead.
        findings: Returns what the quality gates find in a rollout now; none by default.
        sign_changes: Signs what changed, in the transaction that changes it.
    """

    def __init__(
        self,
        engine: Engine,
        fleet: Publisher,
        holder: str,
        *,
        period_s: float = 1.0,
        lease_s: float = 10.0,
        findings: Callable[[Session, Rollout], list[Finding]] = lambda _session, _rollout: [],
        sign_changes: Callable[[Session, datetime], object] = lambda _session, _now: None,
    ) -> None:
        self._engine, self._fleet, self._holder, self._findings = engine, fleet, holder, findings
        self._period_s, self._lease_s = period_s, lease_s
        self._sign = sign_changes
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._fence: int | None = None
        self._watched_since: datetime | None = None
        self._changes = ReportChanges()
        self._planned: dict[int, tuple[datetime, datetime, bool]] = {}
        """By rollout: its `updated_at` and the time when it was planned last, and whether that gave steps."""
        self.failures = 0
        """Turns that failed, mostly because the database was away."""

    @property
    def leading(self) -> bool:
        """Whether the last turn held the lease."""
        return self._fence is not None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within a few seconds."""
        self._stop.set()
        self._wake.set()
        self._thread.join(3.0)

    def wake(self) -> None:
        """Takes the next turn now: a person has acted."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._period_s)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self.step(utc_now())
            except Exception:
                self.failures += 1
                log.exception("a rollout turn failed; it is tried again")

    def step(self, now: datetime) -> int:
        """One turn for every rollout that may move; returns the number of steps taken."""
        with writing(self._engine) as session:
            fence = take_lease(session, LEASE, self._holder, seconds=self._lease_s, now=now)
            session.commit()
        taken_over, self._fence = fence != self._fence, fence
        if fence is None:
            self._watched_since = None
            return 0
        if taken_over:
            log.info("%s leads the rollouts with fence %s", self._holder, fence)
            self._planned.clear()
            self._publish_unheard()
        self._watched_since = (self._watched_since or now) if self._fleet.connected else None
        taken = 0
        for rollout_id in self._due(now):
            try:
                taken += self._advance(rollout_id, fence, now)
            except SortlineError:
                # One rollout that cannot be carried out does not hold up the others.
                self.failures += 1
                log.exception("rollout %s did not move", rollout_id)
        return taken

    def _due(self, now: datetime) -> list[int]:
        """Returns the rollouts that must be planned now, oldest first."""
        with reading(self._engine) as session:
            moving = [(r.id or 0, r.updated_at, r.mode) for r in session.exec(_moving())]
            news = self._changes.look(session, now) if moving else False
        known, self._planned = self._planned, {}
        due = []
        # What one rollout does to an agent concerns every other rollout of that agent.
        news = news or any(steps for _, _, steps in known.values())
        for rollout_id, updated_at, mode in moving:
            last = known.get(rollout_id)
            quiet = last is not None and not news and last[0] == updated_at and mode != Mode.SHADOW
            if quiet and last is not None and timedelta(0) <= now - last[1] < timedelta(seconds=_PLAN_AGAIN_S):
                self._planned[rollout_id] = last
            else:
                due.append(rollout_id)
        return due

    def _advance(self, rollout_id: int, fence: int, now: datetime) -> int:
        """Plans one rollout; only what gives steps is planned again, in the transaction that carries them out."""
        with reading(self._engine) as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None:
                return 0
            steps = self._plan(session, rollout, now)[0]
            self._planned[rollout_id] = (rollout.updated_at, now, False)
        if not steps:
            return 0
        with writing(self._engine) as session:
            if not holds_lease(session, LEASE, self._holder, fence):
                log.warning("fence %s is no longer ours; nothing was written", fence)
                return 0
            rollout = session.get(Rollout, rollout_id, with_for_update=True)
            if rollout is None:
                return 0
            steps, members = self._plan(session, rollout, now)
            changed = self.carry_out(session, rollout, members, steps, now)
            if steps:
                rollout.updated_at = now
                session.add(rollout)
            if changed:
                self._sign(session, now)
            session.commit()
            self._planned[rollout_id] = (rollout.updated_at, now, bool(steps))
        self.publish(changed)
        return len(steps)

    def _plan(self, session: Session, rollout: Rollout, now: datetime) -> tuple[list[Step], list[AgentView]]:
        members = members_of(session, rollout)
        view = replace(view_of(rollout, released_digests(session)), watched_since=self._watched_since)
        strangers = newcomers(session, rollout, [member.agent_id for member in members])
        return plan(view, members, now, newcomers=strangers, findings=self._findings(session, rollout)), members

    def carry_out(
        self, session: Session, rollout: Rollout, members: list[AgentView], steps: list[Step], now: datetime
    ) -> list[str]:
        """Writes the steps, in the caller's transaction; returns the agents whose desired state changed."""
        changed: list[str] = []
        views = {member.agent_id: member for member in members}
        parts = _parts_of(session, rollout, steps)
        for step in steps:
            match step:
                case Assign():
                    committed = views[step.agent_id].committed if step.agent_id in views else ""
                    _assign(session, rollout, parts[step.agent_id], step.attempt, committed, now)
                    changed.append(step.agent_id)
                case Revert():
                    _revert(session, rollout, parts[step.agent_id], step, now)
                    changed.append(step.agent_id)
                case ConcludeReturn():
                    part = parts[step.agent_id]
                    part.returned, part.return_reason = str(step.returned), step.reason
                    session.add(part)
                case RecordProgress():
                    part = parts[step.agent_id]
                    part.outcome, part.tried = str(Outcome.IN_PROGRESS), step.tried
                    part.started_at = part.started_at or now
                    session.add(part)
                case Conclude():
                    part = parts[step.agent_id]
                    part.outcome, part.reason, part.concluded_at = str(step.outcome), step.reason, now
                    session.add(part)
                case Enrol():
                    place = len(views) + len(changed)
                    part = RolloutAgent(rollout_id=rollout.id or 0, agent_id=step.agent_id, wave=step.wave, place=place)
                    parts[step.agent_id] = part
                    session.add(part)
                case OpenWave():
                    rollout.wave, rollout.reason = step.wave, step.reason
                    details = {"wave": step.wave, "reason": step.reason}
                    audit(session, "sortline", "rollout.wave", str(rollout.id), details, now)
                case ChangeState():
                    _move(session, rollout, step, now)
        if changed:
            details = {"agents": {agent_id: _generation(parts[agent_id]) for agent_id in changed}}
            audit(session, "sortline", "rollout.assign", str(rollout.id), details, now)
        return changed

    def publish(self, agent_ids: list[str]) -> None:
        """Publishes desired states as the database has them now, so a slow process publishes nothing overtaken."""
        if not agent_ids:
            return
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.id).in_(agent_ids))).all()
        try:
            for digest in sorted({agent.desired_bundle for agent in agents} - {""}):
                self._fleet.publish_bundle(digest)
            self._fleet.publish_desired(*agents)
        except SortlineError:
            log.exception("publishing failed; agents that report an old generation get it again")

    def _publish_unheard(self) -> None:
        """After taking the lead, publishes what the leader before may have written and not published."""
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.generation) > 0)).all()
        self.publish([agent.id for agent in agents if report_of(agent).generation < agent.generation])


def _moving() -> SelectOfScalar[Rollout]:
    """Selects the rollouts in which something may still happen, oldest first."""
    unsettled = select(RolloutAgent.rollout_id).where(
        or_(
            col(RolloutAgent.outcome).notin_([str(o) for o in DONE]),
            col(RolloutAgent.returned) == str(Return.PENDING),
        )
    )
    ended = col(Rollout.state).in_([RolloutState.ABORTED, RolloutState.COMPLETED])
    moving = or_(col(Rollout.state).in_(sorted(MOVING)), ended & col(Rollout.id).in_(unsettled))
    return select(Rollout).where(moving).order_by(col(Rollout.id))


def _parts_of(session: Session, rollout: Rollout, steps: list[Step]) -> dict[str, RolloutAgent]:
    """Returns the rows that the steps change, by agent."""
    wanted = [step.agent_id for step in steps if not isinstance(step, Enrol | OpenWave | ChangeState)]
    found: dict[str, RolloutAgent] = {}
    for start in range(0, len(wanted), _ROWS_AT_A_TIME):
        query = select(RolloutAgent).where(
            RolloutAgent.rollout_id == rollout.id,
            col(RolloutAgent.agent_id).in_(wanted[start : start + _ROWS_AT_A_TIME]),
        )
        found |= {part.agent_id: part for part in session.exec(query)}
    return found


def _assign(
    session: Session, rollout: Rollout, part: RolloutAgent, attempt: int, committed: str, now: datetime
) -> None:
    """Gives an agent the bundle; `committed` is what it reports to have committed, a candidate for its way back."""
    if attempt == 1:
        part.previous_bundle = committed
    change = DesiredChange(
        bundle=rollout.bundle,
        mode=Mode(rollout.mode),
        rollout_id=rollout.id,
        trial_items=rollout.trial_items,
        trial_s=rollout.trial_s,
        swap=Swap(rollout.swap),
        swap_within_s=rollout.swap_within_s,
    )
    part.generation = assign(session, part.agent_id, change)
    part.attempt, part.assigned_at, part.started_at, part.tried = attempt, now, None, False
    part.outcome = str(Outcome.QUEUED)
    session.add(part)


def _revert(session: Session, rollout: Rollout, part: RolloutAgent, step: Revert, now: datetime) -> None:
    """Sends an agent back; it has proven the bundle before, so the trial there is over with the first item."""
    change = DesiredChange(
        bundle=step.bundle, safe_state=SafeState(step.safe_state), trial_items=0, trial_s=rollout.trial_s
    )
    part.returned_generation = assign(session, part.agent_id, change)
    part.return_bundle, part.return_safe_state, part.returned_at = step.bundle, str(step.safe_state), now
    part.returned, part.return_reason = str(Return.PENDING), ""
    session.add(part)


def _move(session: Session, rollout: Rollout, move: ChangeState, now: datetime) -> None:
    rollout.state, rollout.reason = move.state, move.reason
    if move.state is RolloutState.PAUSED:
        rollout.cleared_wave = rollout.wave
    log.info("rollout %s is %s: %s", rollout.id, move.state, move.reason)
    audit(session, "sortline", f"rollout.{move.state}", str(rollout.id), {"reason": move.reason}, now)


def _generation(part: RolloutAgent) -> int:
    return part.returned_generation or part.generation
