"""Rollouts in the database: made, acted upon by people, and told. What happens next is planned elsewhere."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from sqlmodel import Session, col, desc, select

from control_plane.database.audit import audit, same_actor
from control_plane.database.tables.agents import Agent, WindowRow
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.registry.versions import find_version
from control_plane.rollouts.planner import AgentView, RolloutView, next_state, observe
from control_plane.rollouts.policy import (
    DONE,
    EXECUTED,
    RATE_PERIOD_S,
    Outcome,
    RolloutPolicy,
    parse_policy,
    policy_dict,
)
from control_plane.rollouts.selector import parse_selector
from control_plane.rollouts.waves import Wave, divide
from models.errors import ConflictError, InputError
from models.messages import Mode, Swap, decode_packed
from models.windows import Window

_SHADOW_WINDOWS: Final = 60


@dataclass(frozen=True, slots=True)
class Order:
    """What a person asks for."""

    reference: str
    """NAME, NAME:VERSION or a bundle digest."""
    selector: str = ""
    agents: tuple[str, ...] = ()
    """Exactly these, instead of a selector."""
    waves: tuple[Wave, ...] = ("100%",)
    policy: dict[str, Any] = field(default_factory=dict)
    mode: Mode = Mode.LIVE
    min_items: int = 1
    trial_items: int = 50
    trial_s: float = 60.0
    swap: Swap = Swap.BELT_GAP
    swap_within_s: float | None = None
    dynamic: bool = False
    needs_approval: bool = False


@dataclass(frozen=True, slots=True)
class ResolvedOrder:
    """An order with everything looked up: what would be made of it now."""

    model: Model
    version: ModelVersion
    selector: str
    policy: RolloutPolicy
    agents: dict[str, Agent]
    waves: dict[str, int]
    """Wave by agent, in the order in which they get the bundle."""


def resolve(session: Session, order: Order) -> ResolvedOrder:
    """Looks up what the order means now; changes nothing.

    Raises:
        InputError: `registry.unknown_version`, `rollout.no_agents`, `rollout.bad_waves`, `rollout.bad_selector`,
            `rollout.bad_policy`, `rollout.bad_cron`, `rollout.bad_time`.
    """
    model, version = find_version(session, order.reference)
    selector = parse_selector(order.selector)
    policy = parse_policy(order.policy)
    if order.agents and (order.selector or order.dynamic):
        raise InputError(
            "rollout.bad_selector",
            "Name agents, or select them by labels: not both.",
            expected="agents, or a selector",
            got=[order.selector, *order.agents][:5],
        )
    everyone = {agent.id: agent for agent in session.exec(select(Agent).order_by(col(Agent.id)))}
    unknown = sorted(set(order.agents) - set(everyone))
    if unknown:
        raise InputError("rollout.no_agents", "Some agents are not known.", expected="agent ids", got=unknown[:5])
    chosen = list(dict.fromkeys(order.agents)) or [a.id for a in everyone.values() if selector.matches(a.id, a.labels)]
    if not chosen:
        raise InputError(
            "rollout.no_agents", "No agent matches the selector.", expected="labels of agents", got=str(selector)
        )
    waves = divide(chosen, order.waves)
    return ResolvedOrder(
        model, version, str(selector), policy, {agent_id: everyone[agent_id] for agent_id in waves}, waves
    )


def create_rollout(session: Session, order: Order, *, actor: str, now: datetime) -> Rollout:
    """Makes a rollout; who takes part, and in which wave, is settled now.

    Raises:
        InputError: See `resolve`.
    """
    drawn = resolve(session, order)
    starts = drawn.policy.scheduling_config.starts_at
    waiting = RolloutState.SCHEDULED if starts and starts > now else RolloutState.RUNNING
    rollout = Rollout(
        bundle=drawn.version.bundle,
        model=drawn.model.name,
        version=drawn.version.number,
        selector={"labels": drawn.selector, "agents": list(order.agents)},
        waves=list(order.waves),
        policy=policy_dict(drawn.policy),
        state=RolloutState.AWAITING_APPROVAL if order.needs_approval else waiting,
        mode=str(order.mode),
        min_items=order.min_items,
        dynamic=order.dynamic,
        trial_items=order.trial_items,
        trial_s=order.trial_s,
        swap=str(order.swap),
        swap_within_s=order.swap_within_s,
        created_by=actor,
        created_at=now,
        updated_at=now,
    )
    session.add(rollout)
    session.flush()
    for place, (agent_id, wave) in enumerate(drawn.waves.items()):
        session.add(RolloutAgent(rollout_id=rollout.id or 0, agent_id=agent_id, wave=wave, place=place))
    details = {
        "bundle": rollout.bundle,
        "selector": rollout.selector,
        "waves": [list(w) if isinstance(w, tuple) else w for w in order.waves],
        "agents": len(drawn.waves),
        "policy": rollout.policy,
    }
    audit(session, actor, "rollout.create", str(rollout.id), details, now)
    return rollout


def act(session: Session, rollout_id: int, action: str, *, actor: str, reason: str, now: datetime) -> Rollout:
    """A person approves, pauses, resumes, finishes, aborts or rolls back; the executor carries it out.

    Raises:
        InputError: `rollout.unknown`.
        ConflictError: `rollout.not_allowed`, `rollout.self_approval`.
    """
    rollout = get_rollout(session, rollout_id, lock=True)
    state = next_state(RolloutState(rollout.state), action)
    if action == "approve":
        if same_actor(actor, rollout.created_by):
            raise ConflictError(
                "rollout.self_approval",
                "A second person must approve this rollout.",
                expected=f"anybody but {rollout.created_by}",
                got=actor,
            )
        rollout.approved_by = actor
    starts = parse_policy(rollout.policy).scheduling_config.starts_at
    if state is RolloutState.RUNNING and starts and starts > now:
        state = RolloutState.SCHEDULED
    rollout.state = state
    rollout.reason, rollout.updated_at = f"{action} by {actor}" + (f": {reason}" if reason else ""), now
    session.add(rollout)
    audit(session, actor, f"rollout.{action}", str(rollout_id), {"reason": reason, "state": str(state)}, now)
    return rollout


def get_rollout(session: Session, rollout_id: int, *, lock: bool = False) -> Rollout:
    """One rollout.

    Raises:
        InputError: `rollout.unknown`.
    """
    rollout = session.get(Rollout, rollout_id, with_for_update=lock)
    if rollout is None:
        raise InputError("rollout.unknown", "There is no such rollout.", expected="a rollout id", got=rollout_id)
    return rollout


def course_of(rollout: Rollout) -> RolloutView:
    """What planning needs to know of a rollout."""
    return RolloutView(
        rollout_id=rollout.id or 0,
        state=RolloutState(rollout.state),
        bundle=rollout.bundle,
        wave=rollout.wave,
        policy=parse_policy(rollout.policy),
        mode=Mode(rollout.mode),
        min_items=rollout.min_items,
        dynamic=rollout.dynamic,
        cleared_wave=rollout.cleared_wave,
    )


def parts_of(session: Session, rollout_id: int) -> list[tuple[RolloutAgent, Agent]]:
    """The agents of a rollout, in the order in which they get the bundle."""
    query = (
        select(RolloutAgent, Agent)
        .where(col(RolloutAgent.agent_id) == col(Agent.id), RolloutAgent.rollout_id == rollout_id)
        .order_by(col(RolloutAgent.wave), col(RolloutAgent.place), col(RolloutAgent.agent_id))
    )
    return [(part, agent) for part, agent in session.exec(query)]


def members_of(session: Session, rollout: Rollout, parts: Sequence[tuple[RolloutAgent, Agent]]) -> list[AgentView]:
    """The agents as planning sees them."""
    shadow = rollout.mode == Mode.SHADOW
    return [_member(p, a, _compared(session, rollout, p) if shadow else 0) for p, a in parts]


def _compared(session: Session, rollout: Rollout, part: RolloutAgent) -> int:
    """Items that champion and challenger both judged on this agent since it was asked to, in its last windows."""
    if part.assigned_at is None or part.outcome in set(DONE):
        return 0
    query = select(WindowRow).where(
        WindowRow.agent_id == part.agent_id, WindowRow.received_at > part.assigned_at, WindowRow.refused == ""
    )
    windows = [
        decode_packed(row.payload, Window)
        for row in session.exec(query.order_by(desc(WindowRow.received_at)).limit(_SHADOW_WINDOWS))
    ]
    return sum(window.shadow_compared for window in windows if window.shadow_bundle == rollout.bundle)


def _member(part: RolloutAgent, agent: Agent, compared: int) -> AgentView:
    return AgentView(
        agent_id=agent.id,
        wave=part.wave,
        reported=agent.reported,
        generation=part.generation,
        attempt=part.attempt,
        outcome=Outcome(part.outcome),
        assigned_at=part.assigned_at,
        started_at=part.started_at,
        tried=part.tried,
        previous_bundle=part.previous_bundle,
        returned_generation=part.returned_generation,
        compared=compared,
        desired_generation=agent.generation,
        desired_rollout=agent.rollout_id or 0,
    )


def newcomers(session: Session, rollout: Rollout, known: Sequence[str]) -> list[str]:
    """Agents that match the selector now, are no members, and no newer rollout has taken."""
    if not rollout.dynamic:
        return []
    selector = parse_selector(str(rollout.selector.get("labels", "")))
    have = set(known)
    return [
        agent.id
        for agent in session.exec(select(Agent).order_by(col(Agent.id)))
        if agent.id not in have
        and selector.matches(agent.id, agent.labels)
        and (agent.rollout_id or 0) <= (rollout.id or 0)
    ]


def describe(session: Session, rollout: Rollout, now: datetime) -> dict[str, Any]:
    """A rollout as API and pages tell it: every wave, every agent, rates and limits with how near they are."""
    course = course_of(rollout)
    agents, outcomes = [], {}
    assigned: list[datetime] = []
    parts = parts_of(session, rollout.id or 0)
    for (part, agent), member in zip(parts, members_of(session, rollout, parts), strict=True):
        outcome, reason = observe(member, course, now)
        outcomes[agent.id] = outcome
        if part.assigned_at:
            assigned.append(part.assigned_at)
        agents.append(_describe_agent(part, agent, outcome, part.reason or reason))
    return rollout.model_dump(mode="json") | {
        "agents": agents,
        "counts": {str(o): n for o in Outcome if (n := sum(v is o for v in outcomes.values()))},
        "wave_progress": _describe_waves(course, agents),
        "rate": _describe_rate(course, assigned, outcomes, now),
        "aborts": _describe_aborts(course.policy, outcomes),
    }


def _describe_agent(part: RolloutAgent, agent: Agent, outcome: Outcome, reason: str) -> dict[str, Any]:
    reported = agent.reported
    busy = outcome is Outcome.IN_PROGRESS
    return {
        "agent": agent.id,
        "wave": part.wave,
        "outcome": str(outcome),
        "reason": reason,
        "attempt": part.attempt,
        "notified": part.generation > 0,
        "returned": part.returned_generation > 0,
        "online": agent.online,
        "phase": reported.get("phase", "") if busy else "",
        "share": reported.get("progress", 0.0) if busy else 0.0,
        "active": reported.get("active", ""),
        "previous_bundle": part.previous_bundle,
        "assigned_at": part.assigned_at.isoformat() if part.assigned_at else None,
        "concluded_at": part.concluded_at.isoformat() if part.concluded_at else None,
        "seen_at": agent.seen_at.isoformat() if agent.seen_at else None,
        "lanes": int(reported.get("lanes", 0)),
    }


def _describe_waves(course: RolloutView, agents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for number in range(max((a["wave"] for a in agents), default=0) + 1):
        members = [a for a in agents if a["wave"] == number]
        counts = Counter(a["outcome"] for a in members)
        opened = number <= course.wave and course.state not in {RolloutState.AWAITING_APPROVAL, RolloutState.SCHEDULED}
        found.append({"wave": number, "size": len(members), "open": opened, "counts": dict(counts)})
    return found


def _describe_rate(
    course: RolloutView, assigned: list[datetime], outcomes: dict[str, Outcome], now: datetime
) -> dict[str, Any]:
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    config = course.policy.job_executions_rollout_config
    return {
        "per_minute": config.per_minute(len(assigned), succeeded),
        "last_minute": sum(at > now - timedelta(seconds=RATE_PERIOD_S) for at in assigned),
        "maximum_per_minute": config.maximum_per_minute,
        "notified": len(assigned),
    }


def _describe_aborts(policy: RolloutPolicy, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    executed = sum(outcome in EXECUTED for outcome in outcomes.values())
    return [
        {
            "failure_type": criteria.failure_type,
            "threshold_percentage": criteria.threshold_percentage,
            "min_executed": criteria.min_number_of_executed_things,
            "failed": criteria.failures(outcomes),
            "executed": executed,
            "percentage": round(100.0 * criteria.failures(outcomes) / executed, 2) if executed else 0.0,
            "reached": criteria.reached(outcomes),
        }
        for criteria in policy.abort_config.criteria_list
    ]
