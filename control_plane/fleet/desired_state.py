"""The one place where an agent's desired state changes: everything that gives an agent a bundle calls `assign`.

It writes the database in the caller's transaction and nothing else; publishing follows the commit. The generation
grows with every change and is above the one that the agent itself reports, so the newest change always wins.
"""

from dataclasses import dataclass

from sqlmodel import Session

from control_plane.database.lookup import get_agent
from control_plane.fleet.reports import report_of
from models.messages import Mode, SafeState, Swap


@dataclass(frozen=True, slots=True)
class DesiredChange:
    """What an agent shall run, and how it shall change over."""

    bundle: str
    """Digest; empty = a recall: the agent ends what is under way and goes on with what it has committed."""
    safe_state: SafeState = SafeState.NONE
    """Only with a recall: what the line does instead of judging."""
    mode: Mode = Mode.LIVE
    rollout_id: int | None = None
    """The rollout that asks for it; None = the agent is sent back, or a person asked."""
    trial_items: int = 50
    trial_s: float = 60.0
    swap: Swap = Swap.BELT_GAP
    swap_within_s: float | None = None
    """Deadline of the changeover in seconds; None = the line's own."""


def assign(session: Session, agent_id: str, change: DesiredChange) -> int:
    """Makes this the agent's newest desired state.

    Returns:
        Its generation.

    Raises:
        InputError: `agent.unknown`.
    """
    # The row is locked: two replicas, or an operator and a rollout, never give out one generation twice.
    agent = get_agent(session, agent_id, lock=True)
    agent.generation = max(agent.generation, report_of(agent).generation, agent.generation_floor) + 1
    agent.desired_bundle, agent.mode, agent.rollout_id = change.bundle, str(change.mode), change.rollout_id
    agent.trial_items, agent.trial_s = change.trial_items, change.trial_s
    agent.swap, agent.swap_within_s = str(change.swap), change.swap_within_s
    agent.safe_state = "" if change.bundle else str(change.safe_state)
    session.add(agent)
    return agent.generation
