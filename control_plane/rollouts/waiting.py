"""What a rollout waits for, and since when: every state that waits says so in one sentence. Pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from control_plane.database.tables.rollouts import Rollout, RolloutState
from control_plane.rollouts.policy import DONE, Outcome
from control_plane.rollouts.schedule import may_assign, next_opening
from control_plane.rollouts.views import RETURNED, AgentView, RolloutView
from models.text import counted

_NAMED: Final = 5
"""So many agents are named; of more only the number is said."""


def waiting_for(
    rollout: Rollout, view: RolloutView, members: Sequence[AgentView], outcomes: Mapping[str, Outcome], now: datetime
) -> dict[str, Any] | None:
    """Returns `{"for": sentence, "since": ISO time}`; None where the rollout has ended or needs nothing."""
    match view.state:
        case RolloutState.AWAITING_APPROVAL:
            return _wait(f"the approval of somebody else than {rollout.created_by}", rollout.created_at)
        case RolloutState.SCHEDULED:
            starts = view.policy.scheduling_config.starts_at
            return _wait(f"its start at {starts:%Y-%m-%d %H:%M} UTC" if starts else "its start", rollout.updated_at)
        case RolloutState.PAUSED:
            return _wait(f"a person to resume it ({rollout.reason})", rollout.updated_at)
        case RolloutState.RUNNING:
            return _running(rollout, view, members, outcomes, now)
        case RolloutState.ROLLING_BACK | RolloutState.ABORTED:
            late = [m for m in members if m.returned_generation and m.returned not in RETURNED]
            return _agents("to report that they are back", late, [m.returned_at for m in late]) if late else None
    return None


def _running(
    rollout: Rollout, view: RolloutView, members: Sequence[AgentView], outcomes: Mapping[str, Outcome], now: datetime
) -> dict[str, Any] | None:
    busy = [m for m in members if m.generation and outcomes[m.agent_id] not in DONE]
    due = [m for m in members if not m.generation and m.wave <= view.wave and outcomes[m.agent_id] not in DONE]
    windows = view.policy.scheduling_config.windows()
    if due and not may_assign(windows, now):
        opening = next_opening(windows, now)
        when = f"opens at {opening:%Y-%m-%d %H:%M} UTC" if opening else "never opens again"
        return _wait(f"a maintenance window, which {when}", rollout.updated_at)
    if busy:
        queued = [m for m in busy if outcomes[m.agent_id] is Outcome.QUEUED]
        what = "to take the bundle up" if len(queued) == len(busy) else "to commit the bundle and judge items with it"
        return _agents(what, busy, [m.assigned_at for m in busy])
    if due:
        return _agents("to be notified, within the rate and the budget", due, [rollout.updated_at])
    return _wait("agents that match its selector later", rollout.updated_at) if view.dynamic else None


def _agents(what: str, agents: Sequence[AgentView], times: Sequence[datetime | None]) -> dict[str, Any]:
    names = ", ".join(m.agent_id for m in agents[:_NAMED]) + (" ..." if len(agents) > _NAMED else "")
    return _wait(f"{counted(len(agents), 'agent')} {what}: {names}", min((at for at in times if at), default=None))


def _wait(what: str, since: datetime | None) -> dict[str, Any]:
    return {"for": what, "since": since.isoformat() if since else None}
