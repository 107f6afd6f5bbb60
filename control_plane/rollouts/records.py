"""Rollouts in the database: they are made, people act on them, and planning reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Text, cast
from sqlmodel import Session, col, desc, select

from control_plane.database.audit import audit, same_actor
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.identities import Identity, IdentityState
from control_plane.database.tables.registry import Model, ModelVersion
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.fleet.reports import parse_report_text
from control_plane.monitoring.windows import items_compared
from control_plane.registry.versions import find_version
from control_plane.rollouts.planner import next_state
from control_plane.rollouts.policy import DONE, Outcome, RolloutPolicy, parse_policy, policy_dict
from control_plane.rollouts.schedule import check_schedule
from control_plane.rollouts.selector import parse_selector
from control_plane.rollouts.views import AgentView, Return, RolloutView
from control_plane.rollouts.waves import Wave, divide
from control_plane.rollouts.way_back import tally, way_back
from control_plane.trust.online_signer import released_digests
from models.errors import ConflictError, InputError
from models.messages import Mode, Phase, SafeState, Swap


@dataclass(frozen=True, slots=True)
class Order:
    """What a person orders."""

    reference: str
    """NAME, NAME:VERSION or a bundle digest."""
    selector: str = ""
    agents: tuple[str, ...] = ()
    """Exactly these, instead of a selector."""
    exclude: tuple[str, ...] = ()
    """These take no part, although they are selected: a box that is known to be off, say."""
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
    """An order with everything looked up, as a rollout made now would have it."""

    model: Model
    version: ModelVersion
    selector: str
    policy: RolloutPolicy
    agents: dict[str, Agent]
    waves: dict[str, int]
    """Wave by agent, in the order in which they get the bundle."""


def resolve(session: Session, order: Order, now: datetime) -> ResolvedOrder:
    """Looks up what the order means now; changes nothing.

    Raises:
        InputError: `registry.unknown_version`, `rollout.no_agents`, `rollout.bad_waves`, `rollout.bad_selector`,
            `rollout.bad_policy`, `rollout.bad_cron`, `rollout.bad_time`, `rollout.never_opens`.
    """
    model, version = find_version(session, order.reference)
    selector = parse_selector(order.selector)
    policy = parse_policy(order.policy)
    schedule = policy.scheduling_config
    check_schedule(schedule.starts_at, schedule.ends_at, schedule.windows(), now)
    if order.agents and (order.selector or order.dynamic):
        raise InputError(
            "rollout.bad_selector",
            "Name agents, or select them by labels: not both.",
            expected="agents, or a selector",
            got=[order.selector, *order.agents][:5],
        )
    everyone = {agent.id: agent for agent in session.exec(select(Agent).order_by(col(Agent.id)))}
    unknown = sorted({*order.agents, *order.exclude} - set(everyone))
    if unknown:
        raise InputError("rollout.no_agents", "Some agents are not known.", expected="agent ids", got=unknown[:5])
    selected = list(dict.fromkeys(order.agents)) or [
        agent.id for agent in everyone.values() if selector.matches(agent.id, agent.labels)
    ]
    chosen = [agent_id for agent_id in selected if agent_id not in order.exclude]
    if not chosen:
        raise InputError(
            "rollout.no_agents", "No agent matches the selector.", expected="labels of agents", got=str(selector)
        )
    waves = divide(chosen, order.waves)
    return ResolvedOrder(
        model, version, str(selector), policy, {agent_id: everyone[agent_id] for agent_id in waves}, waves
    )


def create_rollout(session: Session, order: Order, *, actor: str, now: datetime) -> Rollout:
    """Makes a rollout; which agents take part, and in which wave, is settled now.

    Raises:
        InputError: See `resolve`.
    """
    drawn = resolve(session, order, now)
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
        exclude=list(order.exclude),
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


def act(
    session: Session,
    rollout_id: int,
    action: str,
    *,
    actor: str,
    reason: str,
    now: datetime,
    safe_state: SafeState = SafeState.NONE,
) -> Rollout:
    """Changes a rollout as a person asks: approve, pause, resume, finish, abort or roll back.

    The executor carries it out.

    Args:
        session: Writing; the caller commits.
        rollout_id: The rollout.
        action: One of the actions of `planner.TRANSITIONS`.
        actor: The person.
        reason: The person's words.
        now: Aware time.
        safe_state: With `abort` and `rollback`: what agents do that have no way back; by default they are recalled
            and go on with what they have committed.

    Raises:
        InputError: `rollout.unknown`.
        ConflictError: `rollout.not_allowed`, `rollout.self_approval`, `rollout.no_way_back`.
    """
    rollout = get_rollout(session, rollout_id, lock=True)
    state = next_state(RolloutState(rollout.state), action)
    if action in {"abort", "rollback"}:
        rollout.safe_state = str(safe_state)
    if action == "rollback" and not safe_state:
        _check_way_back(session, rollout)
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
    if state is RolloutState.ROLLED_BACK:
        _end_returns(session, rollout, actor)
    details = {"reason": reason, "state": str(state)} | ({"safe_state": str(safe_state)} if safe_state else {})
    audit(session, actor, f"rollout.{action}", str(rollout_id), details, now)
    return rollout


def _end_returns(session: Session, rollout: Rollout, actor: str) -> None:
    """A person ends a rollback: agents that have not settled are no longer waited for, and that is said of them."""
    query = select(RolloutAgent).where(
        RolloutAgent.rollout_id == rollout.id, RolloutAgent.returned == str(Return.PENDING)
    )
    for part in session.exec(query):
        part.returned, part.return_reason = str(Return.TIMED_OUT), f"{actor} ended the rollback before it had settled"
        session.add(part)
    session.flush()
    rollout.reason += f"; {tally(members_of(session, rollout), view_of(rollout))}"


def _check_way_back(session: Session, rollout: Rollout) -> None:
    """Refuses a rollback that would change nothing: every agent has committed the bundle and none has a way back."""
    view = view_of(rollout, released_digests(session))
    given = [m for m in members_of(session, rollout) if m.generation and not m.overtaken_by(view.rollout_id)]
    stuck = [m for m in given if m.committed == rollout.bundle and m.reported.phase is Phase.COMMITTED]
    reasons = {m.agent_id: way.missing for m in stuck if not (way := way_back(m, view)).bundle}
    if given and len(reasons) == len(given):
        agent_id, missing = next(iter(reasons.items()))
        raise ConflictError(
            "rollout.no_way_back",
            "No agent of this rollout has a bundle to go back to. Roll out another bundle, or roll back with a "
            "safe state (eject-all, pass-all, stop).",
            expected="an agent with a way back, or a safe state",
            got=f"{agent_id}: {missing}" + (f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""),
        )


def exclude(
    session: Session, rollout_id: int, agent_ids: Sequence[str], *, actor: str, reason: str, now: datetime
) -> Rollout:
    """Takes agents out of a rollout that has not ended: they no longer hold it up, and get nothing more of it.

    An agent that was given the bundle already keeps its desired state; an abort or a rollback still recalls it.

    Raises:
        InputError: `rollout.unknown`, `rollout.no_agents`.
    """
    rollout = get_rollout(session, rollout_id, lock=True)
    query = select(RolloutAgent).where(
        RolloutAgent.rollout_id == rollout_id, col(RolloutAgent.agent_id).in_(list(agent_ids))
    )
    parts = {part.agent_id: part for part in session.exec(query)}
    unknown = sorted(set(agent_ids) - set(parts))
    if unknown or not agent_ids:
        raise InputError("rollout.no_agents", "Some agents take no part.", expected="members", got=unknown[:5])
    for part in parts.values():
        if part.outcome not in set(DONE):
            part.outcome, part.concluded_at = str(Outcome.REMOVED), now
            part.reason = f"excluded by {actor}" + (f": {reason}" if reason else "")
            session.add(part)
    rollout.exclude, rollout.updated_at = sorted({*rollout.exclude, *agent_ids}), now
    session.add(rollout)
    audit(session, actor, "rollout.exclude", str(rollout_id), {"agents": sorted(parts), "reason": reason}, now)
    return rollout


def get_rollout(session: Session, rollout_id: int, *, lock: bool = False) -> Rollout:
    """Returns one rollout.

    Raises:
        InputError: `rollout.unknown`.
    """
    rollout = session.get(Rollout, rollout_id, with_for_update=lock)
    if rollout is None:
        raise InputError("rollout.unknown", "There is no such rollout.", expected="a rollout id", got=rollout_id)
    return rollout


def newest_rollouts(session: Session, limit: int) -> Sequence[Rollout]:
    """Returns the newest rollouts, newest first."""
    return session.exec(select(Rollout).order_by(desc(Rollout.id)).limit(limit)).all()


def view_of(rollout: Rollout, released: frozenset[str] | None = None) -> RolloutView:
    """Returns a rollout as planning sees it.

    Args:
        rollout: The row.
        released: Digests that the release key lists; None = nothing is excluded.
    """
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
        safe_state=SafeState(rollout.safe_state),
        released=released,
    )


_OF_AGENT: Final = (
    Agent.generation,
    Agent.rollout_id,
    Agent.seen_at,
    Agent.labels,
    cast(col(Agent.reported), Text),
    Identity.state,
)


def members_of(session: Session, rollout: Rollout) -> list[AgentView]:
    """Returns the agents of a rollout as planning sees them, in the order in which they get the bundle.

    Reads columns instead of rows with an identity: a rollout may have thousands of agents.
    """
    part = RolloutAgent.__table__.c  # type: ignore[attr-defined]
    query = (
        select(*part, Agent.id.label("known"), *_OF_AGENT)  # type: ignore[call-overload,attr-defined]
        .select_from(RolloutAgent)
        .join(Agent, col(Agent.id) == col(RolloutAgent.agent_id), isouter=True)
        .join(Identity, col(Identity.agent_id) == col(RolloutAgent.agent_id), isouter=True)
        .where(RolloutAgent.rollout_id == rollout.id)
        .order_by(col(RolloutAgent.wave), col(RolloutAgent.place), col(RolloutAgent.agent_id))
    )
    found = [_member(row) for row in session.execute(query)]
    if rollout.mode == Mode.SHADOW:
        return [replace(member, compared=_compared(session, rollout, member)) for member in found]
    return found


def _member(row: Any) -> AgentView:
    *_, known, generation, rollout_id, seen_at, labels, reported, identity = row
    gone = "it was forgotten" if known is None else ""
    if identity is IdentityState.REVOKED:
        gone = "its identity was revoked"
    return AgentView(
        agent_id=row.agent_id,
        wave=row.wave,
        reported=parse_report_text(reported),
        labels=labels or {},
        seen_at=seen_at,
        gone=gone,
        generation=row[_PART["generation"]],
        attempt=row.attempt,
        outcome=Outcome(row.outcome),
        assigned_at=row.assigned_at,
        started_at=row.started_at,
        tried=row.tried,
        previous_bundle=row.previous_bundle,
        returned_generation=row.returned_generation,
        return_bundle=row.return_bundle,
        return_safe_state=SafeState(row.return_safe_state),
        returned_at=row.returned_at,
        returned=Return(row.returned),
        desired_generation=generation or 0,
        desired_rollout=rollout_id or 0,
    )


_PART: Final = {name: place for place, name in enumerate(RolloutAgent.__table__.c.keys())}  # type: ignore[attr-defined]
"""Place of each column of a member's part in a row of `members_of`: `generation` stands there twice."""


def _compared(session: Session, rollout: Rollout, member: AgentView) -> int:
    """Items that champion and challenger both judged since the agent was given the bundle, in its last windows."""
    if member.assigned_at is None or member.outcome in DONE:
        return 0
    return items_compared(session, member.agent_id, rollout.bundle, member.assigned_at)


def newcomers(session: Session, rollout: Rollout, known: Sequence[str]) -> list[str]:
    """Returns the agents that match the selector now, are no members, and were not taken by a newer rollout."""
    if not rollout.dynamic:
        return []
    selector = parse_selector(str(rollout.selector.get("labels", "")))
    have = {*known, *rollout.exclude}
    return [
        agent.id
        for agent in session.exec(select(Agent).order_by(col(Agent.id)))
        if agent.id not in have
        and selector.matches(agent.id, agent.labels)
        and (agent.rollout_id or 0) <= (rollout.id or 0)
    ]
