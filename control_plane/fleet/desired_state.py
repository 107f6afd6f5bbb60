"""The one door through which an agent's desired state changes. Whoever wants an agent to run something calls `assign`.

It writes the database in the caller's transaction and nothing else; publishing follows the commit. The generation
grows with every change and is above whatever the agent itself reports, so the newest wish always wins.
"""

from dataclasses import dataclass

from sqlmodel import Session

from control_plane.database.lookup import get_agent
from control_plane.fleet.reports import report_of
from models.messages import Mode, Swap


@dataclass(frozen=True, slots=True)
class DesiredChange:
    """What an agent shall run, and how it shall change over."""

    bundle: str
    """Digest; empty = nothing is desired any more (the retained message is cleared)."""
    mode: Mode = Mode.LIVE
    rollout_id: int | None = None
    """On whose behalf; None = to go back."""
    trial_items: int = 50
    trial_s: float = 60.0
    swap: Swap = Swap.BELT_GAP
    swap_within_s: float | None = None
    """Deadline of the changeover; None = the line's own."""


def assign(session: Session, agent_id: str, wish: DesiredChange) -> int:
    """Makes this the agent's newest wish.

    Returns:
        Its generation.

    Raises:
        InputError: `agent.unknown`.
    """
    # The row is locked: two replicas, or an operator and a rollout, never give out one generation twice.
    agent = get_agent(session, agent_id, lock=True)
    agent.generation = max(agent.generation, report_of(agent).generation) + 1
    agent.desired_bundle, agent.mode, agent.rollout_id = wish.bundle, str(wish.mode), wish.rollout_id
    agent.trial_items, agent.trial_s = wish.trial_items, wish.trial_s
    agent.swap, agent.swap_within_s = str(wish.swap), wish.swap_within_s
    session.add(agent)
    return agent.generation
