"""What happens next to a rollout: a pure planner, and the table of what people may do.

`plan` looks at a rollout, its agents and what they report, and returns steps; it reads no clock, no database, no
network. Laws (property-tested): a step that was carried out is not planned again; no agent is given the bundle
twice by one attempt; no wave is skipped; in any 60 seconds no more agents are notified than the rate allows; never
more agents are in change at once than the budget allows; a paused, ended or unapproved rollout gives the bundle to
no agent; an abort or a rollback ends what is under way on every agent, and leads it only to a bundle it has proven.
"""

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.observation import judges, observe
from control_plane.rollouts.policy import DONE, EXECUTED, FAILURES, LEFT, RATE_PERIOD_S, Outcome
from control_plane.rollouts.schedule import may_assign
from control_plane.rollouts.views import (
    AgentView,
    Assign,
    ChangeState,
    Conclude,
    Enrol,
    Finding,
    OpenWave,
    RecordProgress,
    RolloutView,
    Step,
)
from control_plane.rollouts.way_back import plan_returns, tally
from models.errors import ConflictError
from models.text import counted

_S: Final = RolloutState
# What a person may do, and where it leads. Everything that is not here is refused.
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
    (_S.ROLLING_BACK, "finish"): _S.ROLLED_BACK,
    (_S.COMPLETED, "rollback"): _S.ROLLING_BACK,
}
MOVING: Final = frozenset({_S.SCHEDULED, _S.RUNNING, _S.PAUSED, _S.ROLLING_BACK})
"""States in which a rollout is looked at each turn; in the others only while an agent is not done."""


def plan(
    rollout: RolloutView,
    members: Sequence[AgentView],
    now: datetime,
    *,
    newcomers: Sequence[str] = (),
    findings: Sequence[Finding] = (),
) -> list[Step]:
    """Returns what to do next.

    Args:
        rollout: The rollout.
        members: All its agents, in the order in which they get the bundle.
        now: Aware time.
        newcomers: Agents that match the selector now and are no members.
        findings: What the quality gates found.

    Returns:
        Steps in order; empty when there is nothing to do.
    """
    steps: list[Step] = []
    match rollout.state:
        case _S.SCHEDULED:
            starts = rollout.policy.scheduling_config.starts_at
            if starts is None or now >= starts:
                steps = [ChangeState(_S.RUNNING, "the start time has come")]
        case _S.RUNNING:
            steps = _plan_running(rollout, members, now, newcomers, findings)
        case _S.PAUSED:
            steps = _record(rollout, members, now)[0]
        case _S.COMPLETED:
            steps = _plan_rest(rollout, members, now)
        case _S.ABORTED:
            steps = _plan_abort(rollout, members, now)
        case _S.ROLLING_BACK:
            steps = _plan_rollback(rollout, members, now)
    return steps


def _record(
    rollout: RolloutView, members: Sequence[AgentView], now: datetime
) -> tuple[list[Step], dict[str, Outcome], list[Assign]]:
    """Returns what is to be written down, the outcome of every agent, and which agents get the bundle again."""
    steps: list[Step] = []
    outcomes: dict[str, Outcome] = {}
    again: list[Assign] = []
    retry = rollout.policy.job_executions_retry_config
    for member in members:
        outcome, reason = observe(member, rollout, now)
        if outcome in DONE and member.outcome not in DONE:
            blocked = rollout.bundle in member.reported.blocked
            if retry and not blocked and member.attempt <= retry.retries(outcome):
                again.append(Assign(member.agent_id, member.attempt + 1))
                outcome = Outcome.IN_PROGRESS
            else:
                steps.append(Conclude(member.agent_id, outcome, reason))
        elif outcome is Outcome.IN_PROGRESS:
            tried = judges(member, rollout)
            if member.outcome is not Outcome.IN_PROGRESS or (tried and not member.tried):
                steps.append(RecordProgress(member.agent_id, tried))
        outcomes[member.agent_id] = outcome
    return steps, outcomes, again


def _plan_running(
    rollout: RolloutView,
    members: Sequence[AgentView],
    now: datetime,
    newcomers: Sequence[str],
    findings: Sequence[Finding],
) -> list[Step]:
    steps, outcomes, again = _record(rollout, members, now)
    move = _reason_to_stop(rollout, members, outcomes, now, findings)
    if move is not None:
        return [*steps, move]
    schedule = rollout.policy.scheduling_config
    ended = schedule.ends_at is not None and now >= schedule.ends_at
    if rollout.dynamic and not ended:
        last = max((m.wave for m in members), default=0)
        steps += [Enrol(agent_id, last) for agent_id in newcomers]
    due = [Assign(m.agent_id, 1) for m in members if _is_due(m, rollout, outcomes)]
    if due or again:
        if may_assign(schedule.windows(), now) and not ended:
            free = _allowance(rollout, members, outcomes, now)
            steps += _within_budget(rollout, members, outcomes, [*again, *due])[:free]
        return steps
    if not steps:
        following = _next_wave(rollout, members, outcomes)
        return [following] if following else []
    return steps


def _is_due(member: AgentView, rollout: RolloutView, outcomes: dict[str, Outcome]) -> bool:
    return member.generation == 0 and member.wave <= rollout.wave and outcomes[member.agent_id] not in DONE


def _allowance(rollout: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome], now: datetime) -> int:
    """Returns how many agents may be notified at this moment."""
    notified = sum(m.generation > 0 for m in members)
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    rate = rollout.policy.job_executions_rollout_config.per_minute(notified, succeeded)
    since = now - timedelta(seconds=RATE_PERIOD_S)
    recent = sum(m.assigned_at is not None and m.assigned_at > since for m in members)
    return max(0, rate - recent)


def _within_budget(
    rollout: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome], wanted: list[Assign]
) -> list[Assign]:
    """Leaves out what would put too many agents into change at once, in all or with one value of a label."""
    budget = rollout.policy.budget_config
    by_id = {m.agent_id: m for m in members}
    busy = [m for m in members if m.generation and outcomes[m.agent_id] not in DONE]
    in_change = {m.agent_id for m in busy}
    count = len(busy)
    used = Counter(key for m in busy for key in budget.keys_of(m.labels))
    found = []
    for step in wanted:
        if step.agent_id not in in_change:
            keys = budget.keys_of(by_id[step.agent_id].labels)
            full = budget.maximum_in_change is not None and count >= budget.maximum_in_change
            if full or any(used[key] >= budget.maximum_per_label[key[0]] for key in keys):
                continue
            count += 1
            used.update(keys)
        found.append(step)
    return found


def _reason_to_stop(
    rollout: RolloutView,
    members: Sequence[AgentView],
    outcomes: dict[str, Outcome],
    now: datetime,
    findings: Sequence[Finding],
) -> ChangeState | None:
    """Returns the first reason to leave the running state, the gravest kind first; None = go on."""
    if rollout.released is not None and rollout.bundle not in rollout.released:
        return ChangeState(_S.ABORTED, "the bundle is not released any more")
    for finding in sorted(findings, key=lambda f: f.state is not _S.ROLLING_BACK):
        return ChangeState(finding.state, f"{finding.gate}: {finding.reason}")
    executed = sum(outcome in EXECUTED for outcome in outcomes.values())
    for criteria in rollout.policy.abort_config.criteria_list:
        if criteria.reached(outcomes):
            kind = "failed, were rejected or timed out" if criteria.failure_type == "ALL" else criteria.failure_type
            found = f"{criteria.failures(outcomes)} of {executed} executed agents {kind}"
            return ChangeState(_S.ABORTED, f"{found}; the limit is {criteria.threshold_percentage:g} %")
    wave = rollout.policy.wave_config
    if wave.error_threshold is not None:
        for number in range(rollout.cleared_wave + 1, rollout.wave + 1):
            of_wave = [outcomes[m.agent_id] for m in members if m.wave == number]
            failed = sum(outcome in FAILURES for outcome in of_wave)
            if wave.error_threshold.reached(failed, max(len(of_wave), 1)):
                state = {"PAUSE": _S.PAUSED, "ABORT": _S.ABORTED, "ROLLBACK": _S.ROLLING_BACK}[wave.error_action]
                return ChangeState(
                    state, f"{failed} of {counted(len(of_wave), 'agent')} of wave {number + 1} failed: error threshold"
                )
    return _reason_to_end(rollout, members, outcomes, now)


def _reason_to_end(
    rollout: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome], now: datetime
) -> ChangeState | None:
    """Returns what the end time asks for; None before it, and while agents that have begun are to finish."""
    schedule = rollout.policy.scheduling_config
    if schedule.ends_at is not None and now >= schedule.ends_at:
        unfinished = sum(outcome not in DONE for outcome in outcomes.values())
        if unfinished and schedule.end_behavior != "STOP_ROLLOUT":
            return ChangeState(_S.ABORTED, f"the end time has come; not finished: {counted(unfinished, 'agent')}")
        begun = any(m.generation and outcomes[m.agent_id] not in DONE for m in members)
        if not begun:
            return ChangeState(_S.COMPLETED, f"the end time has come; {_tally(outcomes)}")
    return None


def _next_wave(rollout: RolloutView, members: Sequence[AgentView], outcomes: dict[str, Outcome]) -> Step | None:
    """Opens the next wave, completes the rollout, or pauses at a wave that is not good enough; None = wait."""
    wave = rollout.policy.wave_config
    current = [outcomes[m.agent_id] for m in members if m.wave == rollout.wave]
    staying = [outcome for outcome in current if outcome not in LEFT]
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in staying)
    done = all(outcome in DONE for outcome in staying)
    wanted = wave.success_threshold_percentage
    cleared = rollout.cleared_wave >= rollout.wave
    good = done if wanted is None else succeeded >= math.ceil(len(staying) * wanted / 100.0)
    found = f"{succeeded} of {counted(len(staying), 'agent')} of wave {rollout.wave + 1} succeeded"
    later = [m.wave for m in members if m.wave > rollout.wave]
    if not later:
        if not all(outcome in DONE for outcome in outcomes.values()):
            return None
        if wanted is not None and not good and not cleared:
            return ChangeState(_S.PAUSED, f"{found}; {wanted:g} % are needed")
        return None if rollout.dynamic else ChangeState(_S.COMPLETED, _tally(outcomes))
    if not staying and Outcome.REMOVED in current and not cleared:  # nothing is proven
        return ChangeState(_S.PAUSED, f"every agent of wave {rollout.wave + 1} left by rule; nothing is proven")
    if good or (cleared and done):
        ask = wave.success_action == "PAUSE" and not cleared
        pause = ChangeState(_S.PAUSED, f"{found}; the next wave waits for a person")
        return pause if ask else OpenWave(min(later), found)
    return ChangeState(_S.PAUSED, f"{found}; {wanted:g} % are needed for the next wave") if done else None


def _tally(outcomes: dict[str, Outcome]) -> str:
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    left = sum(outcome is Outcome.REMOVED for outcome in outcomes.values())
    members = counted(len(outcomes), "agent")
    return f"{succeeded} of {members} took the bundle" + (f"; {left} left by rule" if left else "")


def _plan_rest(rollout: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """After an early end: agents that were not given the bundle will not get it; the rest is still written down."""
    late = [m for m in members if m.generation == 0 and m.outcome not in DONE]
    missed: list[Step] = [Conclude(m.agent_id, Outcome.CANCELED, "the rollout ended before its turn") for m in late]
    return missed + _record(rollout, [m for m in members if m not in late], now)[0]


_RECALLED_BY_ABORT: Final = frozenset({Outcome.CANCELED, Outcome.TIMED_OUT, Outcome.REMOVED})
"""Outcomes of agents that may still take the bundle up or have it in a trial. The ones that succeeded keep it, the
ones that failed or rejected it have blocked it by themselves."""


def _plan_abort(rollout: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """Recalls every agent that has not settled: one that comes back later must not take up a suspect bundle."""
    steps, outcomes = _conclude(rollout, members, now, "the rollout was aborted")
    recalled = [m for m in members if outcomes[m.agent_id] in _RECALLED_BY_ABORT]
    return steps + plan_returns(rollout, recalled, now)[0]


def _plan_rollback(rollout: RolloutView, members: Sequence[AgentView], now: datetime) -> list[Step]:
    """Sends every agent back that was given the bundle and is still under this rollout; ends when all have settled."""
    steps, _ = _conclude(rollout, members, now, "the rollout was rolled back")
    returns, pending = plan_returns(rollout, members, now)
    steps += returns
    if steps or pending:
        return steps
    return [ChangeState(_S.ROLLED_BACK, tally(members, rollout))]


def _conclude(
    rollout: RolloutView, members: Sequence[AgentView], now: datetime, reason: str
) -> tuple[list[Step], dict[str, Outcome]]:
    """Concludes every agent that is not done as cancelled for this reason."""
    steps: list[Step] = []
    outcomes: dict[str, Outcome] = {}
    for member in members:
        outcome, why = observe(member, rollout, now)
        if outcome not in DONE:
            outcome, why = Outcome.CANCELED, reason
        if outcome is not member.outcome:
            steps.append(Conclude(member.agent_id, outcome, why))
        outcomes[member.agent_id] = outcome
    return steps, outcomes


def next_state(state: RolloutState, action: str) -> RolloutState:
    """Returns the state that a person's action leads to.

    Raises:
        ConflictError: `rollout.not_allowed`.
    """
    following = TRANSITIONS.get((state, action))
    if following is None:
        allowed = ", ".join(sorted(a for s, a in TRANSITIONS if s is state)) or "nothing"
        raise ConflictError("rollout.not_allowed", f"A {state} rollout cannot {action}.", expected=allowed, got=action)
    return following
