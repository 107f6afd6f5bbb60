"""Rollouts: which agent gets which bundle next. A pure planner, and the table of what may happen to a rollout.

`plan` looks at a rollout, its agents and what they report, and says what to do next; it reads no clock, no database,
no network. Laws (property-tested): a step that was carried out is not planned again; no agent is given the bundle
twice by one attempt; no wave is skipped; in any 60 seconds no more agents are notified than the rate allows; a paused,
ended or unapproved rollout gives the bundle to nobody.

"Installed" is only what an agent says it runs, plus items it judged. What was concluded about an agent stays
concluded, whatever it reports later.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.policy import DONE, EXECUTED, FAILURES, RATE_PERIOD_S, Outcome, RolloutPolicy
from control_plane.rollouts.schedule import may_assign
from models.errors import ConflictError
from models.messages import Mode, Phase, ShadowPhase

_S: Final = RolloutState
# What a person may do, and where it leads. Whatever is not here is refused.
TRANSITIONS: Final[dict[tuple[RolloutState, str], RolloutState]] = {
    (_S.AWAITING_APPROVAL, "approve"): _S.RUNNING,
    (_S.AWAITING_APPROVAL, "abort"): _S.ABORTED,
    (_S.SCHEDULED, "pause"): _S.PAUSED,
    (_S.SCHEDULED, "abort"): _S.ABORTED,
    (_S.RUNNING, "pause"): _S.PAUSED,
    (_S.RUNNING, "abort"): _S.ABORTED,
    (_S.RUNNING, "finish"): _S.COMPLETED,
    (_S.RUNNING, "rollback"): _S.ROLLING_BACK,
    (_S.PAUSED, "resume"): _S.RUNNING,
    (_S.PAUSED, "abort"): _S.ABORTED,
    (_S.PAUSED, "finish"): _S.COMPLETED,
    (_S.PAUSED, "rollback"): _S.ROLLING_BACK,
    (_S.ABORTED, "rollback"): _S.ROLLING_BACK,
    (_S.COMPLETED, "rollback"): _S.ROLLING_BACK,
}
MOVING: Final = frozenset({_S.SCHEDULED, _S.RUNNING, _S.PAUSED, _S.ROLLING_BACK})
"""States in which there is always something to look at; in the others only while an agent is not done."""
_PROOF_S: Final = 60.0
"""An agent that still says so long after it was told that the wish is not proven has rejected it: metadata and wish may
arrive apart, and an agent looks again by itself."""
_BEFORE_TRIAL: Final = frozenset({"selftest", "bundle", "delivery", "trust", "agent"})
"""First words of the fault codes of an agent that refused a bundle without ever letting it judge."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    """The rollout, as far as planning needs it."""

    rollout_id: int
    state: RolloutState
    bundle: str
    wave: int
    """The last open one."""
    policy: RolloutPolicy
    mode: Mode = Mode.LIVE
    min_items: int = 1
    """Items an agent must have judged with the bundle before it counts."""
    dynamic: bool = False
    """Agents that appear later join the last wave; the rollout stays open for them."""
    cleared_wave: int = -1
    """A person went on in spite of this wave's thresholds."""


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent's part, and what it reports."""

    agent_id: str
    wave: int
    reported: dict[str, Any]
    generation: int = 0
    """Given by this rollout; 0 = not yet."""
    attempt: int = 0
    outcome: Outcome = Outcome.QUEUED
    """As concluded so far."""
    assigned_at: datetime | None = None
    started_at: datetime | None = None
    """When the agent was first heard to have taken it up."""
    tried: bool = False
    """It was seen in its trial."""
    previous_bundle: str = ""
    returned_generation: int = 0
    """Given when it was sent back; 0 = it was not."""
    compared: int = 0
    """Items that champion and challenger both judged; of a rollout in mode shadow."""
    desired_generation: int = 0
    """What the agent is desired to run now."""
    desired_rollout: int = 0
    """Whose wish that is; 0 = nobody's."""

    def overtaken_by(self, rollout_id: int) -> bool:
        """Whether a newer wish has taken the agent over: this rollout has no say any more."""
        latest = self.returned_generation or self.generation
        return self.desired_generation > latest if latest else self.desired_rollout > rollout_id


@dataclass(frozen=True, slots=True)
class Finding:
    """What a quality gate found: a reason to act, from outside the planner."""

    gate: str
    state: RolloutState
    """PAUSED, ABORTED or ROLLING_BACK."""
    reason: str


@dataclass(frozen=True, slots=True)
class RecordProgress:
    """Step: this agent has taken the bundle up; `tried` when it is in its trial."""

    agent_id: str
    tried: bool


@dataclass(frozen=True, slots=True)
class Conclude:
    """Step: this agent is done, and why."""

    agent_id: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Step: give this agent the bundle."""

    agent_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Revert:
    """Step: give this agent back what it ran before."""

    agent_id: str


@dataclass(frozen=True, slots=True)
class Enrol:
    """Step: this agent takes part from now on."""

    agent_id: str
    wave: int


@dataclass(frozen=True, slots=True)
class OpenWave:
    """Step: the next wave begins."""

    wave: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChangeState:
    """Step: the rollout changes its state, and why. A pause clears the thresholds of its wave: who resumes goes on."""

    state: RolloutState
    reason: str


Step = RecordProgress | Conclude | Assign | Revert | Enrol | OpenWave | ChangeState


def observe(member: AgentView, course: RolloutView, now: datetime) -> tuple[Outcome, str]:
    """Judges one agent by what it reports, nothing else; what was concluded stays.

    Returns:
        The outcome, and a reason where it is one that needs one.
    """
    if member.outcome in DONE:
        return member.outcome, ""
    if member.overtaken_by(course.rollout_id):
        return Outcome.CANCELED, "a newer wish has taken the agent over"
    reported = member.reported
    if member.generation == 0 or int(reported.get("generation", 0)) < member.generation:
        distrust = _distrusts(member, now)
        return (Outcome.REJECTED, distrust) if distrust else (Outcome.QUEUED, "")
    challenger_failed = course.mode is Mode.SHADOW and reported.get("shadow_phase") == ShadowPhase.FAILED
    if course.bundle in reported.get("blocked", ()) or (challenger_failed and reported.get("shadow") == course.bundle):
        return _why_not(member)
    if _runs(member, course):
        return Outcome.SUCCEEDED, ""
    late = _overdue(member, course, now)
    return (Outcome.TIMED_OUT, late) if late else (Outcome.IN_PROGRESS, "")


def _distrusts(member: AgentView, now: datetime) -> str:
    """Why an agent does not take the wish up for want of proof; empty while that may still arrive."""
    fault = member.reported.get("fault") or {}
    code = str(fault.get("code", ""))
    waited = member.assigned_at is not None and now - member.assigned_at >= timedelta(seconds=_PROOF_S)
    return f"{code}: {fault.get('message', '')}" if waited and code.startswith("trust.") else ""


def _why_not(member: AgentView) -> tuple[Outcome, str]:
    """Rejected before it judged anything, or failed while it did."""
    fault = member.reported.get("fault") or {}
    code, message = str(fault.get("code", "")), str(fault.get("message", ""))
    before = code.partition(".")[0] in _BEFORE_TRIAL and not member.tried
    reason = f"{code}: {message}" if code else "the agent does not take the bundle"
    return (Outcome.REJECTED if before else Outcome.FAILED), reason


def _judges(member: AgentView, course: RolloutView) -> bool:
    """Whether the bundle has been let near items: from here on a refusal is a failure."""
    if course.mode is Mode.SHADOW:
        return bool(member.reported.get("shadow_phase") == ShadowPhase.SHADOW)
    return bool(member.reported.get("phase") == Phase.TRIAL)


def _overdue(member: AgentView, course: RolloutView, now: datetime) -> str:
    """Why this agent is out of time; empty when it is not."""
    timeout = course.policy.timeout_config
    if timeout is None or member.started_at is None:
        return ""
    minutes = timeout.in_progress_timeout_in_minutes
    late = now - member.started_at >= timedelta(minutes=minutes)
    return f"{member.reported.get('phase', 'working on it')} for {minutes} min" if late else ""


def _runs(member: AgentView, course: RolloutView) -> bool:
    reported = member.reported
    if course.mode is Mode.SHADOW:
        running = reported.get("shadow") == course.bundle and bool(reported.get("shadow_running"))
        return running and member.compared >= course.min_items
    committed = reported.get("active") == course.bundle and reported.get("phase") == Phase.COMMITTED
    return committed and int(reported.get("items_on_active", 0)) >= course.min_items


def plan(
    course: RolloutView,
    members: Sequence[AgentView],
    now: datetime,
    *,
    newcomers: Sequence[str] = (),
    findings: Sequence[Finding] = (),
) -> list[Step]:
    """What to do next.

    Args:
        course: The rollout.
        members: All its agents, in the order in which they get the bundle.
        now: Aware time.
        newcomers: Agents that match the selector now and are no members.
        findings: Of the quality gates.

    Returns:
        Steps in order; empty when there is nothing to do.
    """
    steps: list[Step] = []
    match course.state:
        case _S.SCHEDULED:
            starts = course.policy.scheduling_config.starts_at
            if starts is None or now >= starts:
                steps = [ChangeState(_S.RUNNING, "the start time has come")]
        case _S.RUNNING:
            steps = _plan_running(course, members, now, newcomers, findings)
        case _S.PAUSED:
            steps = _record(course, members, now)[0]
        case _S.COMPLETED:
            steps = _plan_rest(course, members, now)
        case _S.ABORTED:
            steps = _plan_abort(course, members, now)
        case _S.ROLLING_BACK:
            steps = _plan_rollback(course, members, now)
    return steps


def _record(
    course: RolloutView, members: Sequence[AgentView], now: datetime
) -> tuple[list[Step], dict[str, Outcome], list[Assign]]:
    """What is to be written down, the outcome of every agent, and who is to be given the bundle again."""
    steps: list[Step] = []
    outcomes: dict[str, Outcome] = {}
    again: list[Assign] = []
    retry = course.policy.job_executions_retry_config
    for member in members:
        outcome, reason = observe(member, course, now)
        if outcome in DONE and member.outcome not in DONE:
            blocked = course.bundle in member.reported.get("blocked", ())
            if retry and not blocked and member.attempt <= retry.retries(outcome):
                again.append(Assign(member.agent_id, member.attempt + 1))
                outcome = Outcome.IN_PROGRESS
            else:
                steps.append(Conclude(member.agent_id, outcome, reason))
        elif outcome is Outcome.IN_PROGRESS:
            tried = _judges(member, course)
            if member.outcome is not Outcome.IN_PROGRESS or (tried and not member.tried):
                steps.append(RecordProgress(member.agent_id, tried))
        outcomes[member.agent_id] = outcome
    return steps, outcomes, again


def _plan_running(
    course: RolloutView,
    members: Sequence[AgentView],
    now: datetime,
    newcomers: Sequence[str],
    findings: Sequence[Finding],
) -> list[Step]:
    steps, outcomes, again = _record(course, members, now)
    move = _reason_to_stop(course, members, outcomes, now, findings)
    if move is not None:
        return [*steps, move]
    schedule = course.policy.scheduling_config
    ended = schedule.ends_at is not None and now >= schedule.ends_at
    if course.dynamic and not ended:
        last = max((m.wave for m in members), default=0)
        steps += [Enrol(agent_id, last) for agent_id in newcomers]
    due = [Assign(m.agent_id, 1) for m in members if _is_due(m, course, outcomes)]
    if due or again:
        free = _allowance(course, members, outcomes, now) if may_assign(schedule.windows(), now) and not ended else 0
        return steps + [*again, *due][:free]
    if not steps:
        following = _next_wave(course, members, outcomes)
        return [following] if following else []
    return steps


def _is_due(member: AgentView, course: RolloutView, outcomes: dict[str, Outcome]) -> bool:
    return member.generation == 0 and member.wave <= course.wave and outcomes[member.agent_id] not in DONE


def _allowance(course: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome], now: datetime) -> int:
    """How many agents may be notified at this moment."""
    notified = sum(m.generation > 0 for m in members)
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    rate = course.policy.job_executions_rollout_config.per_minute(notified, succeeded)
    since = now - timedelta(seconds=RATE_PERIOD_S)
    recent = sum(m.assigned_at is not None and m.assigned_at > since for m in members)
    return max(0, rate - recent)


def _reason_to_stop(
    course: RolloutView,
    members: Sequence[AgentView],
    outcomes: dict[str, Outcome],
    now: datetime,
    findings: Sequence[Finding],
) -> ChangeState | None:
    """The first reason to leave the running state, the gravest kind first."""
    for finding in sorted(findings, key=lambda f: f.state is not _S.ROLLING_BACK):
        return ChangeState(finding.state, f"{finding.gate}: {finding.reason}")
    executed = sum(outcome in EXECUTED for outcome in outcomes.values())
    for criteria in course.policy.abort_config.criteria_list:
        if criteria.reached(outcomes):
            kind = "failed, were rejected or timed out" if criteria.failure_type == "ALL" else criteria.failure_type
            found = f"{criteria.failures(outcomes)} of {executed} executed agents {kind}"
            return ChangeState(_S.ABORTED, f"{found}; the limit is {criteria.threshold_percentage:g} %")
    wave = course.policy.wave_config
    if wave.error_threshold is not None:
        for number in range(course.cleared_wave + 1, course.wave + 1):
            of_wave = [outcomes[m.agent_id] for m in members if m.wave == number]
            failed = sum(outcome in FAILURES for outcome in of_wave)
            if wave.error_threshold.reached(failed, max(len(of_wave), 1)):
                state = {"PAUSE": _S.PAUSED, "ABORT": _S.ABORTED, "ROLLBACK": _S.ROLLING_BACK}[wave.error_action]
                return ChangeState(
                    state, f"{failed} of {len(of_wave)} agents of wave {number + 1} failed: error threshold"
                )
    schedule = course.policy.scheduling_config
    if schedule.ends_at is not None and now >= schedule.ends_at:
        unfinished = sum(outcome not in DONE for outcome in outcomes.values())
        if unfinished and schedule.end_behavior != "STOP_ROLLOUT":
            return ChangeState(_S.ABORTED, f"the end time has come; {unfinished} agents were not done")
        begun = any(m.generation and outcomes[m.agent_id] not in DONE for m in members)
        if not begun:
            return ChangeState(_S.COMPLETED, f"the end time has come; {_tally(outcomes)}")
    return None


def _next_wave(course: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome]) -> Step | None:
    """Opens the next wave, completes the rollout, or pauses at a wave that is not good enough; None = wait."""
    wave = course.policy.wave_config
    current = [outcomes[m.agent_id] for m in members if m.wave == course.wave]
    counted = [outcome for outcome in current if outcome is not Outcome.CANCELED]
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in counted)
    done = all(outcome in DONE for outcome in counted)
    wanted = wave.success_threshold_percentage
    cleared = course.cleared_wave >= course.wave
    good = done if wanted is None else succeeded >= math.ceil(len(counted) * wanted / 100.0)
    told = f"{succeeded} of {len(counted)} agents of wave {course.wave + 1} succeeded"
    later = [m.wave for m in members if m.wave > course.wave]
    if not later:
        finished = all(outcome in DONE for outcome in outcomes.values())
        if finished and wanted is not None and not good and not cleared:
            return ChangeState(_S.PAUSED, f"{told}; {wanted:g} % are needed")
        return ChangeState(_S.COMPLETED, _tally(outcomes)) if finished and not course.dynamic else None
    if good or (cleared and done):
        if wave.success_action == "PAUSE" and not cleared:
            return ChangeState(_S.PAUSED, f"{told}; the next wave waits for a person")
        return OpenWave(min(later), told)
    if done:
        return ChangeState(_S.PAUSED, f"{told}; {wanted:g} % are needed for the next wave")
    return None


def _tally(outcomes: dict[str, Outcome]) -> str:
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    return f"{succeeded} of {len(outcomes)} agents run the bundle"


def _plan_rest(course: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """After an early end: whoever was not given the bundle will not get it; the rest is still written down."""
    late = [m for m in members if m.generation == 0 and m.outcome not in DONE]
    missed: list[Step] = [Conclude(m.agent_id, Outcome.CANCELED, "the rollout ended before its turn") for m in late]
    return missed + _record(course, [m for m in members if m not in late], now)[0]


def _plan_abort(course: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """Recalls everyone who is not done: an agent that comes back later must not take up a suspect bundle."""
    steps: list[Step] = []
    for member in members:
        outcome, reason = observe(member, course, now)
        if outcome not in DONE:
            if member.generation:
                steps.append(Revert(member.agent_id))
            outcome, reason = Outcome.CANCELED, "the rollout was aborted"
        if outcome is not member.outcome:
            steps.append(Conclude(member.agent_id, outcome, reason))
    return steps


def _plan_rollback(course: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """Sends everyone back who was given the bundle and still is under this rollout; done when they say they are."""
    steps: list[Step] = []
    pending = 0
    for member in members:
        outcome, reason = observe(member, course, now)
        if outcome not in DONE:
            outcome, reason = Outcome.CANCELED, "the rollout was rolled back"
        if outcome is not member.outcome:
            steps.append(Conclude(member.agent_id, outcome, reason))
        if member.generation == 0 or member.overtaken_by(course.rollout_id):
            continue
        if member.returned_generation == 0:
            steps.append(Revert(member.agent_id))
        elif not _is_back(member):
            pending += 1
    if steps or pending:
        return steps
    back = sum(m.returned_generation > 0 for m in members)
    return [ChangeState(_S.ROLLED_BACK, f"{back} of {len(members)} agents run what they ran before")]


def _is_back(member: AgentView) -> bool:
    reported = member.reported
    heard = int(reported.get("generation", 0)) >= member.returned_generation
    return not member.previous_bundle or (heard and reported.get("active") == member.previous_bundle)


def next_state(state: RolloutState, action: str) -> RolloutState:
    """Where a person's action leads.

    Raises:
        ConflictError: `rollout.not_allowed`.
    """
    following = TRANSITIONS.get((state, action))
    if following is None:
        allowed = ", ".join(sorted(a for s, a in TRANSITIONS if s is state)) or "nothing"
        raise ConflictError("rollout.not_allowed", f"A {state} rollout cannot {action}.", expected=allowed, got=action)
    return following
