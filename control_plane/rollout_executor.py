"""Carries out what the planner says: idempotent, under a lease, every second. Also starts rollouts and acts on them."""

import logging
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from control_plane.database import audit, reading, take_lease, writing
from control_plane.fleet import FleetLink
from control_plane.registry import find_version
from control_plane.rollout import Assign, Finish, Member, OpenWave, Progress, divide, next_state, plan, progress_of
from control_plane.tables import Agent, Rollout, RolloutAgent, RolloutState, utc_now
from models.errors import InputError, SortlineError

log = logging.getLogger("sortline.rollout")
_PERIOD_S: Final = 1.0
_LEASE_S: Final = 10.0


def create_rollout(
    session: Session,
    *,
    reference: str,
    selector: dict[str, str],
    waves: Sequence[int | str],
    trial_items: int,
    trial_s: float,
    abort_share: float,
    min_executed: int,
    actor: str,
    now: datetime,
) -> Rollout:
    """Makes a rollout for the agents whose labels match the selector now.

    Raises:
        InputError: `registry.unknown_version`, `rollout.no_agents`, `rollout.bad_waves`.
    """
    model, version = find_version(session, reference)
    agents = [
        agent
        for agent in session.exec(select(Agent).order_by(col(Agent.id)))
        if all(
            str(agent.labels.get(key)) == value or (key == "id" and agent.id == value)
            for key, value in selector.items()
        )
    ]
    if not agents:
        raise InputError(
            "rollout.no_agents", "No agent matches the selector.", expected="labels of agents", got=selector
        )
    members = divide([agent.id for agent in agents], waves)
    rollout = Rollout(
        bundle=version.bundle,
        model=model.name,
        version=version.number,
        selector=dict(selector),
        waves=list(waves),
        abort_share=abort_share,
        min_executed=min_executed,
        trial_items=trial_items,
        trial_s=trial_s,
        created_by=actor,
        created_at=now,
        updated_at=now,
    )
    session.add(rollout)
    session.flush()
    for agent in agents:
        session.add(RolloutAgent(rollout_id=rollout.id or 0, agent_id=agent.id, wave=members[agent.id]))
    details = {"bundle": version.bundle, "selector": dict(selector), "waves": list(waves), "agents": len(agents)}
    audit(session, actor, "rollout.create", str(rollout.id), details, now)
    return rollout


def members_of(session: Session, rollout: Rollout) -> list[Member]:
    """The rollout's agents with what they report."""
    query = (
        select(RolloutAgent, Agent)
        .where(col(RolloutAgent.agent_id) == col(Agent.id), RolloutAgent.rollout_id == rollout.id)
        .order_by(col(RolloutAgent.wave), col(RolloutAgent.agent_id))
    )
    return [
        Member(agent.id, part.wave, part.generation, agent.generation, agent.reported)
        for part, agent in session.exec(query)
    ]


def act(session: Session, rollout_id: int, action: str, *, actor: str, reason: str, now: datetime) -> Rollout:
    """A person pauses, resumes, aborts or rolls back.

    Raises:
        InputError: `rollout.unknown`.
        ConflictError: `rollout.not_allowed`.
    """
    rollout = session.get(Rollout, rollout_id)
    if rollout is None:
        raise InputError("rollout.unknown", "There is no such rollout.", expected="a rollout id", got=rollout_id)
    rollout.state = next_state(RolloutState(rollout.state), action)
    rollout.reason, rollout.updated_at = reason or f"{action} by {actor}", now
    session.add(rollout)
    if action == "rollback":
        for part in session.exec(select(RolloutAgent).where(RolloutAgent.rollout_id == rollout_id)):
            agent = session.get(Agent, part.agent_id)
            if agent and part.generation and agent.generation == part.generation and part.previous_bundle:
                agent.generation += 1
                agent.desired_bundle, agent.rollout_id = part.previous_bundle, None
                session.add(agent)
    audit(session, actor, f"rollout.{action}", str(rollout_id), {"reason": reason}, now)
    return rollout


def describe(session: Session, rollout: Rollout) -> dict[str, Any]:
    """A rollout with the progress of each agent."""
    members = members_of(session, rollout)
    judged = {m.agent_id: progress_of(m, rollout.bundle) for m in members}
    agents = [
        {
            "agent": m.agent_id,
            "wave": m.wave,
            "progress": str(judged[m.agent_id]),
            "phase": m.reported.get("phase", ""),
            "share": m.reported.get("progress", 0.0) if judged[m.agent_id] is Progress.ASSIGNED else 0.0,
            "fault": m.reported.get("fault"),
        }
        for m in members
    ]
    counts = {str(p): sum(v is p for v in judged.values()) for p in Progress}
    return rollout.model_dump(mode="json") | {"agents": agents, "counts": counts}


class RolloutExecutor:
    """Moves running rollouts forward while it holds the lease.

    Args:
        engine: Database.
        fleet: Publishes chunks and desired states.
        holder: Who we are in the lease.
    """

    def __init__(self, engine: Engine, fleet: FleetLink, holder: str) -> None:
        self._engine, self._fleet, self._holder = engine, fleet, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._refresh: set[str] = set()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it within a second or two."""
        self._stop.set()
        self._thread.join(3.0)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self.step(utc_now())
            except Exception:
                self._fleet.counters["rollout_step_failed"] += 1
                log.exception("a rollout step failed; it is tried again")

    def step(self, now: datetime) -> int:
        """One turn for every running rollout; returns the number of steps taken."""
        with writing(self._engine) as session:
            leading = take_lease(session, "rollouts", self._holder, seconds=_LEASE_S, now=now)
            session.commit()
        if leading is None:
            return 0
        with reading(self._engine) as session:
            ids = list(session.exec(select(Rollout.id).where(Rollout.state == RolloutState.RUNNING)))
        return sum(self._advance(rollout_id or 0, now) for rollout_id in ids)

    def _advance(self, rollout_id: int, now: datetime) -> int:
        changed: list[Agent] = []
        with writing(self._engine) as session:
            rollout = session.get(Rollout, rollout_id)
            if rollout is None:
                return 0
            steps = plan(
                state=RolloutState(rollout.state),
                bundle=rollout.bundle,
                wave=rollout.wave,
                members=members_of(session, rollout),
                abort_share=rollout.abort_share,
                min_executed=rollout.min_executed,
            )
            for step in steps:
                match step:
                    case Assign():
                        changed.append(_assign(session, rollout, step.agent_id))
                    case OpenWave():
                        rollout.wave = step.wave
                        audit(session, "sortline", "rollout.wave", str(rollout.id), {"wave": step.wave}, now)
                    case Finish():
                        rollout.state, rollout.reason = step.state, step.reason
                        audit(
                            session, "sortline", f"rollout.{step.state}", str(rollout.id), {"reason": step.reason}, now
                        )
            if steps:
                rollout.updated_at = now
                session.add(rollout)
            # The desired state is in the database before anybody hears of it; what is not heard is published again
            # when the agent reports an older generation.
            session.commit()
        try:
            if changed:
                self._fleet.publish_bundle(rollout.bundle)
            for agent in changed:
                self._fleet.publish_desired(agent)
        except SortlineError:
            log.exception("publishing failed; agents that report an old generation get it again")
        return len(steps)


def _assign(session: Session, rollout: Rollout, agent_id: str) -> Agent:
    part = session.get(RolloutAgent, (rollout.id, agent_id))
    agent = session.get(Agent, agent_id)
    if part is None or agent is None:
        raise InputError("rollout.unknown_agent", "The agent is no longer known.", expected="an agent", got=agent_id)
    part.previous_bundle = agent.desired_bundle or str(agent.reported.get("active", ""))
    agent.generation = max(agent.generation, int(agent.reported.get("generation", 0))) + 1
    agent.desired_bundle, agent.rollout_id = rollout.bundle, rollout.id
    agent.trial_items, agent.trial_s = rollout.trial_items, rollout.trial_s
    part.generation = agent.generation
    session.add(part)
    session.add(agent)
    return agent
