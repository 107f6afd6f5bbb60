"""What a rollout would touch before it is started: lanes, items per hour, and the agents without a way back.

The figures come from what the agents counted in the last minutes. The worst case is an upper bound: every agent that
can be notified before any abort criterion may act, each with all the items its trial may take.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlmodel import Session

from control_plane.database.tables.rollouts import RolloutState
from control_plane.fleet.reports import report_of
from control_plane.monitoring.windows import items_per_s
from control_plane.rollouts.policy import RolloutPolicy
from control_plane.rollouts.records import Order, resolve
from control_plane.rollouts.views import AgentView, RolloutView
from control_plane.rollouts.way_back import way_back
from control_plane.trust.online_signer import released_digests


@dataclass(frozen=True, slots=True)
class AgentLoad:
    """What runs through one agent, by its last windows."""

    lanes: int
    items_per_s: float | None
    """None = the agent sent no window in the last minutes."""


def blast_radius(
    waves: Sequence[Sequence[str]],
    loads: Mapping[str, AgentLoad],
    policy: RolloutPolicy,
    *,
    trial_items: int,
    trial_s: float,
) -> dict[str, Any]:
    """Returns what each wave touches, and the worst case until an abort criterion can act.

    Args:
        waves: Agent ids by wave.
        loads: By agent.
        policy: Says from how many executed agents the rollout can stop itself.
        trial_items: Items a bundle judges on an agent before it is committed.
        trial_s: Longest trial.

    Returns:
        `waves` (agents, lanes, items_per_h, unknown: agents without figures) and `worst_case` (agents, items, reason).
    """
    found = []
    for members in waves:
        known = [loads[a] for a in members]
        found.append(
            {
                "agents": len(members),
                "lanes": sum(load.lanes for load in known),
                "items_per_h": round(sum(load.items_per_s or 0.0 for load in known) * 3600.0),
                "unknown": sum(load.items_per_s is None for load in known),
            }
        )
    needed = min(c.min_number_of_executed_things for c in policy.abort_config.criteria_list)
    exposed: list[str] = []
    for members in waves:
        exposed += members
        if len(exposed) >= needed:
            break
    items = 0.0
    for agent_id in exposed:
        rate = loads[agent_id].items_per_s
        # An agent without figures is taken to fill its trial.
        items += trial_items if rate is None else min(float(trial_items), rate * trial_s)
    stops = len(exposed) >= needed
    reason = (
        f"the rollout can stop itself once {needed} of these agents are done"
        if stops
        else f"no criterion can act: it needs {needed} executed agents, there are {len(exposed)}"
    )
    worst = {"agents": len(exposed), "items": round(items), "stops_itself": stops, "reason": reason}
    return {"waves": found, "worst_case": worst}


def preview(session: Session, order: Order, now: datetime) -> dict[str, Any]:
    """Returns the order looked up, with its blast radius; changes nothing.

    Raises:
        InputError: See `control_plane.rollouts.records.resolve`.
    """
    drawn = resolve(session, order, now)
    rates = items_per_s(session, list(drawn.agents), now)
    loads = {agent.id: AgentLoad(report_of(agent).lanes, rates.get(agent.id)) for agent in drawn.agents.values()}
    count = max(drawn.waves.values(), default=0) + 1
    waves = [[a for a, wave in drawn.waves.items() if wave == number] for number in range(count)]
    radius = blast_radius(waves, loads, drawn.policy, trial_items=order.trial_items, trial_s=order.trial_s)
    for number, members in enumerate(waves):
        radius["waves"][number]["names"] = members
    view = RolloutView(0, RolloutState.RUNNING, drawn.version.bundle, 0, drawn.policy, order.mode)
    view = replace(view, released=released_digests(session))
    ways = {agent.id: way_back(AgentView(agent.id, 0, report_of(agent)), view) for agent in drawn.agents.values()}
    return {
        "model": drawn.model.name,
        "version": drawn.version.number,
        "bundle": drawn.version.bundle,
        "selector": drawn.selector,
        "without_way_back": [{"agent": a, "reason": way.missing} for a, way in ways.items() if not way.bundle],
        **radius,
    }
