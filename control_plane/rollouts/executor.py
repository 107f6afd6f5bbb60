"""Carries out what the planner says: idempotent, under a lease, every second.

Rules: every turn is one transaction that first proves, by the fencing number, that we still lead; a process that was
stopped beyond its lease therefore writes nothing. The desired state is in the database before anybody hears of it.
What was committed but not published (a crash in between) is published by the next leader when it takes over, and
again whenever an agent reports an older generation.
"""

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Final, Protocol

from sqlalchemy import Engine
from sqlmodel import Session, col, or_, select

from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.leases import holds_lease, take_lease
from control_plane.database.lookup import get_agent
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.fleet.desired_state import DesiredChange, assign
from control_plane.rollouts.planner import (
    MOVING,
    Assign,
    ChangeState,
    Conclude,
    Enrol,
    Finding,
    OpenWave,
    RecordProgress,
    Revert,
    Step,
    plan,
)
from control_plane.rollouts.policy import DONE, Outcome
from control_plane.rollouts.records import course_of, members_of, newcomers, parts_of
from models.errors import SortlineError
from models.messages import Mode, Swap

log = logging.getLogger("sortline.rollout")
_LEASE: Final = "rollouts"


class Publisher(Protocol):
    """The part of the fleet link that is needed."""

    def publish_bundle(self, digest: str) -> None:
        """Has the blobs of a bundle published, as far as the broker does not hold them."""

    def publish_desired(self, *agents: Agent) -> None:
        """Publishes what agents shall run."""


class RolloutExecutor:
    """Moves rollouts forward while it holds the lease.

    Args:
        engine: Database.
        fleet: Publishes chunks and desired states.
        holder: Who we are in the lease; two processes must never share it.
        period_s: Between two turns.
        lease_s: Without a turn for so long, another may lead.
        findings: What the quality gates say of a rollout now; none by default.
        seal: Signs what changed, in the transaction that changes it.
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
        self._seal = sign_changes
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._fence: int | None = None
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
        """Ends it within a second or two."""
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
            fence = take_lease(session, _LEASE, self._holder, seconds=self._lease_s, now=now)
            session.commit()
        taken_over, self._fence = fence != self._fence, fence
        if fence is None:
            return 0
        if taken_over:
            log.info("%s leads the rollouts with fence %s", self._holder, fence)
            self._publish_unheard()
        with reading(self._engine) as session:
            unsettled = select(RolloutAgent.rollout_id).where(col(RolloutAgent.outcome).notin_([str(o) for o in DONE]))
            ended = col(Rollout.state).in_([RolloutState.ABORTED, RolloutState.COMPLETED])
            query = select(Rollout.id).where(
                or_(col(Rollout.state).in_(sorted(MOVING)), ended & col(Rollout.id).in_(unsettled))
            )
            ids = [found for found in session.exec(query.order_by(col(Rollout.id))) if found is not None]
        taken = 0
        for rollout_id in ids:
            try:
                taken += self._advance(rollout_id, fence, now)
            except SortlineError:
                # One rollout that cannot be carried out does not hold up the others.
                self.failures += 1
                log.exception("rollout %s did not move", rollout_id)
        return taken

    def _advance(self, rollout_id: int, fence: int, now: datetime) -> int:
        with writing(self._engine) as session:
            if not holds_lease(session, _LEASE, self._holder, fence):
                log.warning("fence %s is no longer ours; nothing was written", fence)
                return 0
            rollout = session.get(Rollout, rollout_id, with_for_update=True)
            if rollout is None:
                return 0
            parts = {agent.id: (part, agent) for part, agent in parts_of(session, rollout_id)}
            steps = plan(
                course_of(rollout),
                members_of(session, rollout, list(parts.values())),
                now,
                newcomers=newcomers(session, rollout, list(parts)),
                findings=self._findings(session, rollout),
            )
            changed = self.carry_out(session, rollout, {k: part for k, (part, _) in parts.items()}, steps, now)
            if steps:
                rollout.updated_at = now
                session.add(rollout)
            if changed:
                self._seal(session, now)
            session.commit()
        self.publish(changed)
        return len(steps)

    def carry_out(
        self, session: Session, rollout: Rollout, parts: dict[str, RolloutAgent], steps: list[Step], now: datetime
    ) -> list[str]:
        """Writes the steps, in the caller's transaction; returns the agents whose desired state changed."""
        changed: list[str] = []
        for step in steps:
            match step:
                case Assign():
                    _assign(session, rollout, parts[step.agent_id], step.attempt, now)
                    changed.append(step.agent_id)
                case Revert():
                    _return(session, rollout, parts[step.agent_id])
                    changed.append(step.agent_id)
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
                    place = len(parts)
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
        """Tells the agents, as the database has it now: a slow process never publishes what is already overtaken."""
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
        """After taking the lead: whatever the one before may have written and not told."""
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.generation) > 0)).all()
        self.publish([a.id for a in agents if int(a.reported.get("generation", 0)) < a.generation])


def _assign(session: Session, rollout: Rollout, part: RolloutAgent, attempt: int, now: datetime) -> None:
    agent = get_agent(session, part.agent_id)
    if attempt == 1:
        # The way back leads to what judges now; a challenger in the shadow is not part of it.
        live = agent.desired_bundle if agent.mode == Mode.LIVE else ""
        part.previous_bundle = live or str(agent.reported.get("active", ""))
    wish = DesiredChange(
        bundle=rollout.bundle,
        mode=Mode(rollout.mode),
        rollout_id=rollout.id,
        trial_items=rollout.trial_items,
        trial_s=rollout.trial_s,
        swap=Swap(rollout.swap),
        swap_within_s=rollout.swap_within_s,
    )
    part.generation = assign(session, part.agent_id, wish)
    part.attempt, part.assigned_at, part.started_at, part.tried = attempt, now, None, False
    part.outcome = str(Outcome.QUEUED)
    session.add(part)


def _return(session: Session, rollout: Rollout, part: RolloutAgent) -> None:
    """Gives an agent its former wish again; without one, nothing is desired any more."""
    wish = DesiredChange(bundle=part.previous_bundle, trial_items=0, trial_s=rollout.trial_s)
    part.returned_generation = assign(session, part.agent_id, wish)
    session.add(part)


def _move(session: Session, rollout: Rollout, move: ChangeState, now: datetime) -> None:
    rollout.state, rollout.reason = move.state, move.reason
    if move.state is RolloutState.PAUSED:
        rollout.cleared_wave = rollout.wave
    log.info("rollout %s is %s: %s", rollout.id, move.state, move.reason)
    audit(session, "sortline", f"rollout.{move.state}", str(rollout.id), {"reason": move.reason}, now)


def _generation(part: RolloutAgent) -> int:
    return part.returned_generation or part.generation
