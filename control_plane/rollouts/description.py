"""A rollout as the API and the pages show it: waves, agents, rates, limits, ways back, and what it waits for."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlmodel import Session, col

from control_plane.database.tables.agents import Agent
from control_plane.database.tables.rollouts import Rollout, RolloutAgent, RolloutState
from control_plane.rollouts.observation import observe
from control_plane.rollouts.policy import EXECUTED, FAILURES, RATE_PERIOD_S, Outcome, RolloutPolicy, parse_policy
from control_plane.rollouts.records import members_of, view_of
from control_plane.rollouts.views import AgentView, Return, RolloutView
from control_plane.rollouts.waiting import waiting_for
from control_plane.rollouts.way_back import observe_return, way_back
from control_plane.trust.online_signer import released_digests

_MOST_WRONG = 100
"""So many agents that went wrong are listed of a rollout that has ended; the API has all of them."""
_NOT_BEGUN = frozenset({RolloutState.AWAITING_APPROVAL, RolloutState.SCHEDULED})


def describe(session: Session, rollout: Rollout, now: datetime) -> dict[str, Any]:
    """Returns a rollout in full: every wave, every agent, rates, and how near it is to the limits."""
    view = view_of(rollout, released_digests(session))
    part, online = RolloutAgent, col(Agent.online)
    query = select(col(part.agent_id), col(part.reason), col(part.return_reason), col(part.concluded_at), online)
    query = query.join(Agent, col(Agent.id) == col(part.agent_id), isouter=True)
    words = {row[0]: row[1:] for row in session.execute(query.where(col(part.rollout_id) == rollout.id))}
    members = members_of(session, rollout)
    observed = {member.agent_id: observe(member, view, now) for member in members}
    outcomes = {agent_id: outcome for agent_id, (outcome, _) in observed.items()}
    assigned = [member.assigned_at for member in members if member.assigned_at]
    agents = [_describe_agent(m, view, observed[m.agent_id], words[m.agent_id], now) for m in members]
    return rollout.model_dump(mode="json") | {
        "agents": agents,
        "returns": dict(Counter(a["returned_outcome"] for a in agents if a["returned_outcome"])),
        "without_way_back": _without_way_back(agents),
        "waiting": waiting_for(rollout, view, members, outcomes, now),
        "counts": {str(o): n for o in Outcome if (n := sum(v is o for v in outcomes.values()))},
        "wave_progress": _describe_waves(view, Counter((a["wave"], a["outcome"]) for a in agents)),
        "rate": _describe_rate(view, assigned, outcomes, now),
        "aborts": _describe_aborts(view.policy, outcomes),
    }


def summarise(session: Session, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Returns rollouts for a list: counts and waves as concluded so far, without the agents one by one."""
    part = RolloutAgent
    counts: dict[int, Counter[tuple[int, str]]] = {}
    returns: dict[int, Counter[str]] = {}
    columns = [col(c) for c in (part.rollout_id, part.wave, part.outcome, part.returned)]
    query = select(*columns, func.count()).where(columns[0].in_([rollout.id for rollout in rollouts]))
    for rollout_id, wave, outcome, returned, number in session.execute(query.group_by(*columns)):
        counts.setdefault(rollout_id, Counter())[wave, outcome] += number
        if returned:
            returns.setdefault(rollout_id, Counter())[returned] += number
    found = []
    for rollout in rollouts:
        by_wave = counts.get(rollout.id or 0, Counter())
        total: Counter[str] = Counter()
        for (_, outcome), number in by_wave.items():
            total[outcome] += number
        found.append(
            rollout.model_dump(mode="json")
            | {
                "counts": {str(o): total[str(o)] for o in Outcome if total[str(o)]},
                "returns": dict(returns.get(rollout.id or 0, Counter())),
                "wave_progress": _describe_waves(view_of(rollout), by_wave),
            }
        )
    return found


def outline(session: Session, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Returns ended rollouts as `describe` does, by what was concluded: of the agents only those that went wrong.

    Reads no report of an agent, so a list of rollouts with thousands of agents costs a few milliseconds.
    """
    ids = [rollout.id for rollout in rollouts]
    part = RolloutAgent
    wrong = col(part.outcome).in_([str(o) for o in FAILURES]) | col(part.returned).notin_(["", str(Return.BACK)])
    rows = select(part).where(col(part.rollout_id).in_(ids), wrong).order_by(col(part.rollout_id), col(part.place))
    agents: dict[int, list[dict[str, Any]]] = {}
    for row in session.execute(rows.limit(_MOST_WRONG * max(len(ids), 1))).scalars():
        agents.setdefault(row.rollout_id, []).append(_describe_concluded(row))
    notified = select(col(part.rollout_id), func.count()).where(col(part.rollout_id).in_(ids), col(part.generation) > 0)
    counts = {row[0]: row[1] for row in session.execute(notified.group_by(col(part.rollout_id)))}
    found = []
    for facts in summarise(session, rollouts):
        policy = parse_policy(facts["policy"])
        outcomes = [Outcome(name) for name, number in facts["counts"].items() for _ in range(number)]
        rate = policy.job_executions_rollout_config
        succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes)
        given = counts.get(facts["id"], 0)
        facts["rate"] = {
            "per_minute": rate.per_minute(given, succeeded),
            "last_minute": 0,
            "maximum_per_minute": rate.maximum_per_minute,
            "notified": given,
        }
        facts["aborts"] = _describe_aborts(policy, {str(k): outcome for k, outcome in enumerate(outcomes)})
        facts |= {"agents": agents.get(facts["id"], [])[:_MOST_WRONG], "without_way_back": [], "waiting": None}
        found.append(facts)
    return found


def _describe_concluded(part: RolloutAgent) -> dict[str, Any]:
    """Returns a member by what was concluded of it, without its present report."""
    return {
        "agent": part.agent_id,
        "wave": part.wave,
        "outcome": part.outcome,
        "reason": part.reason,
        "attempt": part.attempt,
        "returned": part.returned_generation > 0,
        "returned_outcome": part.returned,
        "return_reason": part.return_reason,
        "online": True,
        "phase": "",
        "share": 0.0,
        "active": "",
        "assigned_at": part.assigned_at.isoformat() if part.assigned_at else None,
        "concluded_at": part.concluded_at.isoformat() if part.concluded_at else None,
    }


def _describe_agent(
    member: AgentView, view: RolloutView, observed: tuple[Outcome, str], words: Sequence[Any], now: datetime
) -> dict[str, Any]:
    reason, return_reason, concluded_at, online = words
    outcome, found = observed
    reported = member.reported
    busy = outcome is Outcome.IN_PROGRESS
    returned, returned_why = observe_return(member, view, now)
    way = way_back(member, view) if member.generation and not member.returned_generation else None
    return {
        "agent": member.agent_id,
        "wave": member.wave,
        "outcome": str(outcome),
        "reason": reason or found,
        "attempt": member.attempt,
        "notified": member.generation > 0,
        "returned": member.returned_generation > 0,
        "returned_outcome": str(returned),
        "return_reason": return_reason or returned_why,
        "return_bundle": member.return_bundle,
        "way_back": way.bundle if way else "",
        "no_way_back": way.missing if way else "",
        "online": bool(online),
        "phase": str(reported.phase) if busy else "",
        "share": reported.progress if busy else 0.0,
        "active": reported.active,
        "previous_bundle": member.previous_bundle,
        "assigned_at": member.assigned_at.isoformat() if member.assigned_at else None,
        "concluded_at": concluded_at.isoformat() if concluded_at else None,
        "seen_at": member.seen_at.isoformat() if member.seen_at else None,
        "lanes": reported.lanes,
    }


def _without_way_back(agents: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns the agents for which an abort or a rollback would find no bundle, and why; said before anybody acts."""
    return [{"agent": a["agent"], "reason": a["no_way_back"]} for a in agents if a["no_way_back"]]


def _describe_waves(view: RolloutView, counts: Counter[tuple[int, str]]) -> list[dict[str, Any]]:
    found = []
    for number in range(max((wave for wave, _ in counts), default=0) + 1):
        of_wave = {outcome: count for (wave, outcome), count in counts.items() if wave == number}
        opened = number <= view.wave and view.state not in _NOT_BEGUN
        found.append({"wave": number, "size": sum(of_wave.values()), "open": opened, "counts": of_wave})
    return found


def _describe_rate(
    view: RolloutView, assigned: list[datetime], outcomes: dict[str, Outcome], now: datetime
) -> dict[str, Any]:
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    config = view.policy.job_executions_rollout_config
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
