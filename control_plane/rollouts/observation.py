"""What became of one agent in a rollout, by what it reports and when it was heard. Pure.

"Installed" is only what an agent reports that it has committed, plus items it judged. What was concluded about an
agent stays concluded, whatever it reports later.
"""

from datetime import datetime, timedelta
from typing import Final

from control_plane.rollouts.policy import DONE, Outcome
from control_plane.rollouts.views import AgentView, RolloutView
from control_plane.rollouts.way_back import distrust_of
from models.messages import Mode, Phase, ShadowPhase

_BEFORE_TRIAL: Final = frozenset({"selftest", "bundle", "delivery", "trust", "agent"})
"""First words of the fault codes of an agent that refused a bundle without ever letting it judge."""


def observe(member: AgentView, rollout: RolloutView, now: datetime) -> tuple[Outcome, str]:
    """Judges one agent by its report; a conclusion that was drawn before stays.

    Returns:
        The outcome, and a reason where it is one that needs one.
    """
    if member.outcome in DONE:
        return member.outcome, ""
    if member.gone:
        return Outcome.REMOVED, member.gone
    if member.overtaken_by(rollout.rollout_id):
        return Outcome.CANCELED, "a newer desired state has taken the agent over"
    if member.generation == 0 or member.reported.generation < member.generation:
        return _waiting(member, rollout, now)
    return _working(member, rollout, now)


def _working(member: AgentView, rollout: RolloutView, now: datetime) -> tuple[Outcome, str]:
    """Returns an agent that has taken the bundle up."""
    challenger_failed = rollout.mode is Mode.SHADOW and member.reported.shadow_phase is ShadowPhase.FAILED
    refused = challenger_failed and member.reported.shadow == rollout.bundle
    if rollout.bundle in member.reported.blocked or refused:
        return _why_not(member)
    if _runs(member, rollout):
        return Outcome.SUCCEEDED, ""
    late = _overdue(member, rollout, now)
    return (Outcome.TIMED_OUT, late) if late else (Outcome.IN_PROGRESS, "")


def judges(member: AgentView, rollout: RolloutView) -> bool:
    """Returns whether the bundle has been let near items: from here on a refusal is a failure."""
    if rollout.mode is Mode.SHADOW:
        return member.reported.shadow_phase is ShadowPhase.SHADOW
    return member.reported.phase is Phase.TRIAL


def silent_for(member: AgentView, rollout: RolloutView, now: datetime) -> timedelta:
    """Returns how long an agent has been silent since it was given the bundle, as far as it could be heard."""
    if member.assigned_at is None or rollout.watched_since is None:
        return timedelta(0)
    return now - max(member.assigned_at, member.seen_at or member.assigned_at, rollout.watched_since)


def _waiting(member: AgentView, rollout: RolloutView, now: datetime) -> tuple[Outcome, str]:
    """Returns an agent that has not taken the bundle up: it may refuse it, be silent, or be connected and late."""
    distrust = distrust_of(member, member.assigned_at, now)
    if distrust:
        return Outcome.REJECTED, distrust
    if member.generation == 0 or member.assigned_at is None or rollout.watched_since is None:
        return Outcome.QUEUED, ""
    timeouts = rollout.policy.timeouts
    if silent_for(member, rollout, now) >= timedelta(minutes=timeouts.silent_timeout_in_minutes):
        return Outcome.REMOVED, f"it was not heard from {_since(member)}"
    heard = member.seen_at is not None and member.seen_at > member.assigned_at
    minutes = timeouts.queued_timeout_in_minutes
    if heard and now - max(member.assigned_at, rollout.watched_since) >= timedelta(minutes=minutes):
        return Outcome.TIMED_OUT, f"it is connected and has not taken the bundle up for {minutes} min"
    return Outcome.QUEUED, ""


def _since(member: AgentView) -> str:
    return f"since {member.seen_at:%Y-%m-%d %H:%M} UTC" if member.seen_at else "at all"


def _why_not(member: AgentView) -> tuple[Outcome, str]:
    """Rejected before it judged anything, or failed while it did."""
    fault = member.reported.fault
    if fault is None:
        return Outcome.FAILED, "the agent does not take the bundle"
    before = fault.code.partition(".")[0] in _BEFORE_TRIAL and not member.tried
    return (Outcome.REJECTED if before else Outcome.FAILED), f"{fault.code}: {fault.message}"


def _overdue(member: AgentView, rollout: RolloutView, now: datetime) -> str:
    """Why an agent that has taken the bundle up is out of time; empty when it is not."""
    timeouts = rollout.policy.timeouts
    if silent_for(member, rollout, now) >= timedelta(minutes=timeouts.silent_timeout_in_minutes):
        return f"it took the bundle up and was not heard from {_since(member)}"
    minutes = timeouts.in_progress_timeout_in_minutes
    if minutes is None or member.started_at is None or now - member.started_at < timedelta(minutes=minutes):
        return ""
    return f"{member.reported.phase} for {minutes} min"


def _runs(member: AgentView, rollout: RolloutView) -> bool:
    reported = member.reported
    if rollout.mode is Mode.SHADOW:
        return reported.shadow == rollout.bundle and reported.shadow_running and member.compared >= rollout.min_items
    committed = reported.active == rollout.bundle and reported.phase is Phase.COMMITTED
    return committed and reported.items_on_active >= rollout.min_items
