"""Rollouts: which agent gets which bundle next. A pure planner and the table of what may happen to a rollout.

`plan` looks at a rollout, its agents and what they report, and says what to do; doing it twice changes nothing. A
wave opens when every agent of the wave before has committed the bundle and judged items with it: "installed" is only
what an agent says it runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from control_plane.tables import RolloutState
from models.errors import ConflictError, InputError
from models.messages import Phase

# What a person may do, and where it leads.
TRANSITIONS: Final[dict[tuple[RolloutState, str], RolloutState]] = {
    (RolloutState.RUNNING, "pause"): RolloutState.PAUSED,
    (RolloutState.PAUSED, "resume"): RolloutState.RUNNING,
    (RolloutState.RUNNING, "abort"): RolloutState.ABORTED,
    (RolloutState.PAUSED, "abort"): RolloutState.ABORTED,
    (RolloutState.RUNNING, "rollback"): RolloutState.ROLLED_BACK,
    (RolloutState.PAUSED, "rollback"): RolloutState.ROLLED_BACK,
    (RolloutState.ABORTED, "rollback"): RolloutState.ROLLED_BACK,
    (RolloutState.COMPLETED, "rollback"): RolloutState.ROLLED_BACK,
}


class Progress(StrEnum):
    """How far one agent is with the rollout's bundle."""

    WAITING = "waiting"
    ASSIGNED = "assigned"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Member:
    """One agent's part and what it reports."""

    agent_id: str
    wave: int
    generation: int
    """Given by this rollout; 0 = not yet."""
    desired_generation: int
    """What the agent is desired to run now; newer than `generation` when another rollout took over."""
    reported: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Assign:
    """Step: give this agent the bundle."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class OpenWave:
    """Step: the next wave begins."""

    wave: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Step: the rollout ends in this state, and why."""

    state: RolloutState
    reason: str


Step = Assign | OpenWave | Finish


def progress_of(member: Member, bundle: str) -> Progress:
    """Judges one member by what it reports, nothing else."""
    if member.generation == 0:
        return Progress.WAITING
    reported = member.reported
    if bundle in reported.get("blocked", ()):
        return Progress.FAILED
    if int(reported.get("generation", 0)) < member.generation:
        return Progress.ASSIGNED
    runs_it = reported.get("active") == bundle and reported.get("phase") == Phase.COMMITTED
    if runs_it and int(reported.get("items_on_active", 0)) > 0:
        return Progress.COMMITTED
    return Progress.ASSIGNED


def plan(
    *,
    state: RolloutState,
    bundle: str,
    wave: int,
    members: Sequence[Member],
    abort_share: float,
    min_executed: int,
) -> list[Step]:
    """What to do next.

    Args:
        state: Of the rollout; only a running one moves.
        bundle: Digest.
        wave: The open wave.
        members: All agents of the rollout.
        abort_share: Share of failed agents among those that are done from which the rollout stops.
        min_executed: So many must be done before that share means anything.

    Returns:
        Steps in order; empty when there is nothing to do.
    """
    if state is not RolloutState.RUNNING:
        return []
    # An agent another rollout has taken over no longer belongs to this one.
    mine = [m for m in members if m.generation == 0 or m.desired_generation <= m.generation]
    judged = {m.agent_id: progress_of(m, bundle) for m in mine}
    failed = sum(p is Progress.FAILED for p in judged.values())
    done = failed + sum(p is Progress.COMMITTED for p in judged.values())
    if failed and done >= min_executed and failed / done >= abort_share:
        return [Finish(RolloutState.ABORTED, f"{failed} of {done} agents failed; the limit is {abort_share:.0%}.")]
    current = [m for m in mine if m.wave <= wave]
    steps: list[Step] = [Assign(m.agent_id) for m in current if m.generation == 0]
    if steps or any(judged[m.agent_id] is Progress.ASSIGNED for m in current):
        return steps
    later = [m.wave for m in mine if m.wave > wave]
    if later:
        return [OpenWave(min(later))]
    return [Finish(RolloutState.COMPLETED, f"{done - failed} of {len(members)} agents committed the bundle.")]


def next_state(state: RolloutState, action: str) -> RolloutState:
    """Where a person's action leads.

    Raises:
        ConflictError: `rollout.not_allowed`.
    """
    following = TRANSITIONS.get((state, action))
    if following is None:
        allowed = sorted(a for s, a in TRANSITIONS if s is state)
        raise ConflictError("rollout.not_allowed", f"A {state} rollout cannot {action}.", expected=allowed, got=action)
    return following


def divide(agents: Sequence[str], waves: Sequence[int | str]) -> dict[str, int]:
    """Puts agents into waves.

    Args:
        agents: Ids, in the order in which they get the bundle.
        waves: Cumulative sizes: numbers of agents or percent (`"50%"`), growing; the rest is a last wave.

    Returns:
        Wave (from 0) by agent.

    Raises:
        InputError: `rollout.bad_waves`.
    """
    bounds = [_bound(wave, len(agents)) for wave in waves] or [len(agents)]
    if bounds != sorted(bounds):
        raise InputError("rollout.bad_waves", "Waves grow.", expected="such as 1, 50%, 100%", got=list(waves))
    if bounds[-1] < len(agents):
        bounds.append(len(agents))
    return {agent: next(k for k, bound in enumerate(bounds) if at < bound) for at, agent in enumerate(agents)}


def _bound(wave: int | str, total: int) -> int:
    text = str(wave)
    number = text.removesuffix("%")
    if not number.isdigit() or int(number) == 0 or (text.endswith("%") and int(number) > 100):
        raise InputError("rollout.bad_waves", "This is no size of a wave.", expected="3 or 50%", got=wave)
    return min(total, math.ceil(total * int(number) / 100) if text.endswith("%") else int(number))
