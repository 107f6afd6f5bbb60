"""Forgets an agent that is gone for good, so that no selector, wave or page waits for it.

What goes: the agent's row, its signed assignment, and what the broker retains of it. What stays: the audit entry with
what was last known of it, its part in every rollout, and its windows and events until their own retention ends. The
identity is not touched: `revoke` ends it. A box that comes back later is a new agent.
"""

from datetime import datetime
from typing import Any

from sqlmodel import Session, col, delete

from control_plane.database.audit import audit
from control_plane.database.lookup import get_agent
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.trust import AssignmentRow
from control_plane.fleet.reports import age_s, connection_of, report_of
from models.errors import ConflictError


def forget(session: Session, agent_id: str, *, actor: str, reason: str, now: datetime) -> dict[str, Any]:
    """Deletes an agent, in the caller's transaction; returns what was last known of it, as the audit trail keeps it.

    Raises:
        InputError: `agent.unknown`.
        ConflictError: `agent.still_connected`: it was heard within minutes; switch it off or revoke it first.
    """
    agent = get_agent(session, agent_id, lock=True)
    connection = connection_of(age_s(agent.seen_at, now), online=agent.online)
    if connection not in {"offline", "never"}:
        raise ConflictError(
            "agent.still_connected",
            "The agent is connected, so it would be known again at once; switch it off or revoke it first.",
            expected="an agent that is offline",
            got=connection,
        )
    reported = report_of(agent)
    facts = {
        "reason": reason,
        "labels": agent.labels,
        "seen_at": agent.seen_at.isoformat() if agent.seen_at else None,
        "generation": agent.generation,
        "desired_bundle": agent.desired_bundle,
        "active": reported.active,
        "versions": reported.versions,
    }
    session.exec(delete(AssignmentRow).where(col(AssignmentRow.agent_id) == agent_id))
    session.exec(delete(Agent).where(col(Agent.id) == agent_id))
    audit(session, actor, "agent.forget", agent_id, facts, now)
    return facts
