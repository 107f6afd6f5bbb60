"""Finds rows of agents by the names people use, with the error they get when there is none."""

from collections.abc import Sequence

from sqlmodel import Session, desc, select

from control_plane.database.tables.agents import Agent, EventRow
from models.errors import InputError


def get_agent(session: Session, agent_id: str, *, lock: bool = False) -> Agent:
    """Returns an agent's row.

    Args:
        session: The caller's.
        agent_id: As a person or an agent wrote it.
        lock: Holds the row until the end of the transaction, so that two writers do not overwrite each other.

    Raises:
        InputError: `agent.unknown`.
    """
    agent = session.get(Agent, agent_id, with_for_update=lock)
    if agent is None:
        raise unknown_agent(agent_id)
    return agent


def events_of(session: Session, agent_id: str, limit: int) -> Sequence[EventRow]:
    """Returns the newest events of an agent, newest first."""
    query = select(EventRow).where(EventRow.agent_id == agent_id)
    return session.exec(query.order_by(desc(EventRow.received_at), desc(EventRow.seq)).limit(limit)).all()


def unknown_agent(agent_id: str) -> InputError:
    """Returns the error for an id that belongs to no agent."""
    return InputError("agent.unknown", "There is no such agent.", expected="an agent id", got=agent_id[:80])
