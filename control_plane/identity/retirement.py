"""Finds the agents that the retirement of replaced authorities would cut off."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine
from sqlmodel import col, select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.identities import Certificate, Identity, IdentityState
from control_plane.identity.authority import Authority
from control_plane.identity.certificates import read_certificate


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """An enrolled agent without a certificate of the current authority."""

    agent_id: str
    until: datetime | None
    """End of its newest certificate; None = it has none that is not revoked."""
    seen_at: datetime | None
    """When it was last heard; None = never."""


def left_behind(engine: Engine, authority: Authority) -> list[LeftBehind]:
    """Returns the enrolled agents that could not connect any more if every other generation were retired.

    They have not renewed since the authority was replaced. An agent that connects does so at its next look, six hours
    at most; one that is off does when it comes back, unless the old authorities are retired before.

    Args:
        engine: Database of the enrolments.
        authority: As it is before the retirement.
    """
    with reading(engine) as session:
        rows = session.exec(
            select(Identity.agent_id, Certificate, Agent.seen_at)
            .outerjoin(
                Certificate,
                (col(Certificate.agent_id) == col(Identity.agent_id)) & col(Certificate.revoked_at).is_(None),
            )
            .outerjoin(Agent, col(Agent.id) == col(Identity.agent_id))
            .where(col(Identity.state) == IdentityState.ENROLLED)
            .order_by(col(Identity.agent_id), col(Certificate.issued_at))
        ).all()
    newest = {agent_id: (row, seen_at) for agent_id, row, seen_at in rows}
    return [
        LeftBehind(agent_id, row.not_after if row else None, seen_at)
        for agent_id, (row, seen_at) in newest.items()
        if row is None or not authority.is_current(read_certificate(row.pem)[0])
    ]
