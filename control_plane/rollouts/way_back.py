"""The way back of an agent: which bundle an abort or a rollback may lead to, and whether it got there. Pure.

Rules: the way back is a bundle that the agent itself reported as committed, so it passed its trial there. It is never
the rollout's own bundle, never one the agent has blocked, never one that is not released, and never what the control
plane merely desired. Where there is none, that is said, and the agent is recalled: a trial ends in every case. That
an agent runs what it ran before is claimed of its own report alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from control_plane.rollouts.views import RETURNED, AgentView, ConcludeReturn, Return, Revert, RolloutView, Step
from models.messages import Mode, Phase, SafeState

PROOF_S: Final = 60.0
"""An agent that reports a fault of trust this long after its assignment has rejected it: metadata and assignment may
arrive apart, and the agent looks again by itself."""
_SETTLED: Final = frozenset({Phase.IDLE, Phase.COMMITTED, Phase.ROLLED_BACK})
"""Phases in which nothing is under way on the agent."""


@dataclass(frozen=True, slots=True)
class WayBack:
    """Where an agent can go back to."""

    bundle: str
    """Digest; empty = there is no way back."""
    missing: str = ""
    """Why there is none."""


def way_back(member: AgentView, rollout: RolloutView) -> WayBack:
    """Returns the bundle this agent would go back to if the rollout were aborted or rolled back now."""
    if rollout.mode is Mode.SHADOW:
        # The champion was never replaced; only the challenger beside it goes.
        return _admit(member.committed, member, rollout, "")
    reported = member.reported
    candidates = [member.committed]
    if reported.phase is not Phase.TRIAL:
        candidates.append(reported.previous)
    candidates.append(member.previous_bundle)
    missing = ""
    for digest in dict.fromkeys(candidates):
        if digest and digest != rollout.bundle:
            found = _admit(digest, member, rollout, missing)
            if found.bundle:
                return found
            missing = found.missing
    return WayBack("", missing or "it has reported no other bundle as committed")


def _admit(digest: str, member: AgentView, rollout: RolloutView, missing: str) -> WayBack:
    if not digest:
        return WayBack("", missing or "it has committed no bundle")
    if digest in member.reported.blocked:
        return WayBack("", missing or f"{digest[:12]}, which it ran before, failed there since")
    if rollout.released is not None and digest not in rollout.released:
        return WayBack("", missing or f"{digest[:12]}, which it ran before, was withdrawn")
    return WayBack(digest)


def plan_returns(rollout: RolloutView, members: Sequence[AgentView], now: datetime) -> tuple[list[Step], int]:
    """Sends back the agents that were given the bundle, and concludes what became of it.

    Returns:
        The steps, and how many agents have yet to report.
    """
    steps: list[Step] = []
    pending = 0
    for member in members:
        if member.generation == 0 or member.returned in RETURNED:
            continue
        if member.returned_generation == 0:
            if not member.gone and not member.overtaken_by(rollout.rollout_id):
                steps.append(_revert(member, rollout))
            continue
        again = _again(member, rollout)
        if again is not None:
            steps.append(again)
            continue
        found, reason = observe_return(member, rollout, now)
        if found in RETURNED:
            steps.append(ConcludeReturn(member.agent_id, found, reason))
        else:
            pending += 1
    return steps, pending


def _revert(member: AgentView, rollout: RolloutView) -> Revert:
    way = way_back(member, rollout)
    safe = SafeState.NONE if way.bundle or rollout.mode is Mode.SHADOW else rollout.safe_state
    return Revert(member.agent_id, way.bundle, safe)


def _again(member: AgentView, rollout: RolloutView) -> Revert | None:
    """Returns another revert where the first rests on what has changed since; None = the first one holds."""
    if member.gone or member.overtaken_by(rollout.rollout_id) or rollout.mode is Mode.SHADOW:
        return None
    target = member.return_bundle
    withdrawn = bool(target) and rollout.released is not None and target not in rollout.released
    failed = bool(target) and target in member.reported.blocked and member.committed != target
    recalled = not target and _heard(member) and not member.return_safe_state
    if not (withdrawn and not _heard(member)) and not (failed and rollout.safe_state) and not recalled:
        return None
    if failed:
        return Revert(member.agent_id, "", rollout.safe_state)
    following = _revert(member, rollout)
    same = (following.bundle, following.safe_state) == (target, member.return_safe_state)
    # A recall that was heard is enough where the agent runs nothing of this rollout, or nothing better is known.
    return None if same else following


def _heard(member: AgentView) -> bool:
    return member.reported.generation >= member.returned_generation > 0


def observe_return(member: AgentView, rollout: RolloutView, now: datetime) -> tuple[Return, str]:
    """Returns what became of an agent that was sent back, by its report alone, and the reason in words."""
    if member.returned_generation == 0 or member.returned in RETURNED:
        return member.returned, ""
    if member.gone:
        return Return.GONE, member.gone
    if member.overtaken_by(rollout.rollout_id):
        return Return.OVERTAKEN, "a newer desired state has taken the agent over"
    if _heard(member):
        return _answered(member, rollout) or _late(member, rollout, now)
    distrust = distrust_of(member, member.returned_at, now)
    return (Return.REFUSED, distrust) if distrust else _late(member, rollout, now)


def _answered(member: AgentView, rollout: RolloutView) -> tuple[Return, str] | None:
    """The conclusion of an agent that has taken the desired state up; None while something is under way there."""
    if rollout.mode is Mode.SHADOW:
        return None if member.reported.shadow_running else (Return.BACK, "the champion judges alone")
    if member.return_safe_state:
        if member.reported.safe_state is not member.return_safe_state:
            return None
        return Return.SAFE, f"it has no way back and is in the safe state {member.return_safe_state}"
    return _where_it_settled(member, rollout) if member.reported.phase in _SETTLED else None


def _where_it_settled(member: AgentView, rollout: RolloutView) -> tuple[Return, str] | None:
    committed, target = member.committed, member.return_bundle
    if target and committed == target:
        return Return.BACK, f"it runs {target[:12]}, which it had committed before"
    goes_on = f"it goes on with {committed[:12]}" if committed else "it judges nothing"
    if target and target in member.reported.blocked:
        return Return.REFUSED, f"{target[:12]} failed there; {goes_on}"
    if not target:
        return Return.NO_WAY_BACK, f"{way_back(member, rollout).missing or 'it was recalled'}; {goes_on}"
    return None


def _late(member: AgentView, rollout: RolloutView, now: datetime) -> tuple[Return, str]:
    if member.returned_at is None or rollout.watched_since is None:
        return Return.PENDING, ""
    minutes = rollout.policy.timeouts.return_timeout_in_minutes
    if now - max(member.returned_at, rollout.watched_since) < timedelta(minutes=minutes):
        return Return.PENDING, ""
    if _heard(member):
        return Return.TIMED_OUT, f"it is in the phase {member.reported.phase} after {minutes} min"
    runs = f"it ran {member.reported.active[:12]}" if member.reported.active else "it judged nothing"
    return Return.TIMED_OUT, f"it has not answered for {minutes} min; when last heard from, {runs}"


def distrust_of(member: AgentView, since: datetime | None, now: datetime) -> str:
    """Returns why an agent does not believe its desired state; empty while the proof may still arrive."""
    fault = member.reported.fault
    if fault is None or since is None or now - since < timedelta(seconds=PROOF_S):
        return ""
    return f"{fault.code}: {fault.message}" if fault.code.startswith("trust.") else ""


def tally(members: Sequence[AgentView], rollout: RolloutView) -> str:
    """Returns what a finished rollback came to, as one sentence that the agents' reports support."""
    given = [m for m in members if m.generation]
    if not given:
        return "no agent had been given the bundle"
    counts = {kind: sum(m.returned is kind for m in given) for kind in Return}
    taken = counts[Return.OVERTAKEN] + sum(
        m.returned is Return.NONE and m.overtaken_by(rollout.rollout_id) for m in given
    )
    found = [f"{counts[Return.BACK]} of {len(given)} agents report a bundle they had committed before"]
    words = (
        (counts[Return.SAFE], "in the requested safe state"),
        (counts[Return.NO_WAY_BACK], "without a way back"),
        (counts[Return.REFUSED], "could not go back"),
        (counts[Return.TIMED_OUT], "did not answer"),
        (taken, "taken over by a newer desired state"),
        (counts[Return.GONE] + sum(m.returned is Return.NONE and bool(m.gone) for m in given), "left by rule"),
    )
    return "; ".join(found + [f"{count} {text}" for count, text in words if count])
