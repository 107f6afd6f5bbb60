"""How fast a rollout goes, when it stops, when it may move: AWS IoT Jobs' parameters by their own names.

The JSON that CreateJob takes (`jobExecutionsRolloutConfig`, `abortConfig`, `timeoutConfig`,
`jobExecutionsRetryConfig`, `schedulingConfig`) is accepted as it is, with the same bounds. `waveConfig` adds what
hawkBit's rollout groups have: a success threshold that opens the next wave, and an error threshold. `budgetConfig`
bounds how many agents are in change at once. `timeoutConfig` covers every state in which an agent can wait. Unknown
names are refused. Everything here is pure.

What the words mean here: a *thing* is an agent; it is *notified* when its desired state was written; it is *executed*
when it succeeded, failed, was rejected or timed out. An agent that leaves by rule is none of these and counts for no
threshold. Retries never repeat a bundle that the agent has blocked.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import msgspec

from control_plane.rollouts.schedule import MaintenanceSlot, parse_cron, parse_time
from models.errors import InputError

Percentage = Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]
PerMinute = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Things = Annotated[int, msgspec.Meta(ge=1)]
RATE_PERIOD_S: Final = 60.0


class Outcome(StrEnum):
    """How far one agent is; the names of AWS IoT Jobs' executions."""

    QUEUED = "QUEUED"
    """It has not been given the bundle, or has not reported that it has taken it up."""
    IN_PROGRESS = "IN_PROGRESS"
    """The agent reports that it works on it."""
    SUCCEEDED = "SUCCEEDED"
    """It runs the bundle, has committed it and judged items with it."""
    FAILED = "FAILED"
    """It was rolled back in its trial."""
    REJECTED = "REJECTED"
    """The agent refused it before any trial: trust, self-test, or blocked before."""
    TIMED_OUT = "TIMED_OUT"
    """It was connected and did not take the bundle up, or took it up and did not finish, within the time-out."""
    CANCELED = "CANCELED"
    """The rollout was aborted, or a newer desired state took the agent over, before it was done."""
    REMOVED = "REMOVED"
    """It left by rule before it took the bundle up: revoked, forgotten, excluded, or not heard from for long."""


EXECUTED: Final = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.REJECTED, Outcome.TIMED_OUT})
FAILURES: Final = frozenset({Outcome.FAILED, Outcome.REJECTED, Outcome.TIMED_OUT})
LEFT: Final = frozenset({Outcome.CANCELED, Outcome.REMOVED})
"""Outcomes that say nothing about the bundle."""
DONE: Final = EXECUTED | LEFT


class _Strict(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    pass


class RateIncreaseCriteria(_Strict, frozen=True, kw_only=True):
    """When the rate grows: after so many notified or so many succeeded agents, exactly one of the two."""

    number_of_notified_things: Things | None = None
    number_of_succeeded_things: Things | None = None

    def __post_init__(self) -> None:
        """Refuses none and both of the two."""
        if (self.number_of_notified_things is None) == (self.number_of_succeeded_things is None):
            raise ValueError("rateIncreaseCriteria needs numberOfNotifiedThings or numberOfSucceededThings, not both")


class ExponentialRate(_Strict, frozen=True, kw_only=True):
    """Starts slowly and multiplies."""

    base_rate_per_minute: PerMinute
    increment_factor: Annotated[float, msgspec.Meta(ge=1.1, le=5.0)]
    rate_increase_criteria: RateIncreaseCriteria

    def __post_init__(self) -> None:
        """Refuses more than one decimal of the factor, as AWS does."""
        if round(self.increment_factor, 1) != self.increment_factor:
            raise ValueError("incrementFactor has at most one decimal")


class JobExecutionsRolloutConfig(_Strict, frozen=True, kw_only=True):
    """How many agents are notified in any 60 seconds, at most."""

    maximum_per_minute: PerMinute = 1000
    exponential_rate: ExponentialRate | None = None

    def per_minute(self, notified: int, succeeded: int) -> int:
        """Returns the present rate: base times factor for every full criterion; between 1 and `maximumPerMinute`."""
        rate = self.exponential_rate
        if rate is None:
            return self.maximum_per_minute
        criteria = rate.rate_increase_criteria
        if criteria.number_of_notified_things:
            steps = notified // criteria.number_of_notified_things
        else:
            steps = succeeded // (criteria.number_of_succeeded_things or 1)
        # Beyond 73 steps even the smallest factor has passed every maximum; the bound keeps the power finite.
        return int(min(self.maximum_per_minute, rate.base_rate_per_minute * rate.increment_factor ** min(steps, 100)))


class AbortCriteria(_Strict, frozen=True, kw_only=True):
    """Stops the rollout when this share of the executed agents failed in this way, once enough have executed."""

    failure_type: Literal["FAILED", "REJECTED", "TIMED_OUT", "ALL"]
    action: Literal["CANCEL"] = "CANCEL"
    threshold_percentage: Percentage
    min_number_of_executed_things: Things

    def failures(self, outcomes: Mapping[str, Outcome]) -> int:
        """Returns how many agents count as failed by this criterion."""
        kinds = FAILURES if self.failure_type == "ALL" else {Outcome(self.failure_type)}
        return sum(outcome in kinds for outcome in outcomes.values())

    def reached(self, outcomes: Mapping[str, Outcome]) -> bool:
        """Returns whether the rollout must stop."""
        executed = sum(outcome in EXECUTED for outcome in outcomes.values())
        failed = self.failures(outcomes)
        enough = executed >= self.min_number_of_executed_things
        return bool(failed) and enough and 100.0 * failed / executed >= self.threshold_percentage


def _default_abort() -> tuple[AbortCriteria, ...]:
    return (AbortCriteria(failure_type="ALL", threshold_percentage=20.0, min_number_of_executed_things=1),)


class AbortConfig(_Strict, frozen=True, kw_only=True):
    """Any of these criteria stops the rollout."""

    criteria_list: Annotated[tuple[AbortCriteria, ...], msgspec.Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=_default_abort
    )


Minutes = Annotated[int, msgspec.Meta(ge=1, le=10_080)]
_HOUR: Final = 60


class TimeoutConfig(_Strict, frozen=True, kw_only=True):
    """How long an agent may wait in each state, in minutes (1 to 10,080).

    An hour bridges a restart, a network outage of a shift change and a broker that is being updated; a box that is
    away for longer is off, and must not hold up the others.
    """

    in_progress_timeout_in_minutes: Minutes | None = None
    """An agent that works on the bundle for longer counts as TIMED_OUT; None = no limit, since a belt may stand still
    over a weekend."""
    queued_timeout_in_minutes: Minutes = _HOUR
    """An agent that is connected and does not take the bundle up for longer counts as TIMED_OUT."""
    silent_timeout_in_minutes: Minutes = _HOUR
    """An agent that is silent for longer leaves the rollout: REMOVED before it took the bundle up, TIMED_OUT after."""
    return_timeout_in_minutes: Minutes = _HOUR
    """An agent that was sent back and has not settled for longer is no longer waited for."""


class RetryCriteria(_Strict, frozen=True, kw_only=True):
    """How often an agent that failed in this way is given the bundle again."""

    failure_type: Literal["FAILED", "TIMED_OUT", "ALL"]
    number_of_retries: Annotated[int, msgspec.Meta(ge=0, le=10)]


class JobExecutionsRetryConfig(_Strict, frozen=True, kw_only=True):
    """At most one entry per failure type."""

    criteria_list: Annotated[tuple[RetryCriteria, ...], msgspec.Meta(min_length=1, max_length=2)]

    def retries(self, outcome: Outcome) -> int:
        """Returns how many further attempts an agent with this outcome has."""
        if outcome not in {Outcome.FAILED, Outcome.TIMED_OUT}:
            return 0
        return max((c.number_of_retries for c in self.criteria_list if c.failure_type in {outcome, "ALL"}), default=0)


class MaintenanceWindow(_Strict, frozen=True, kw_only=True):
    """A recurring time in which agents may be notified: a cron expression (UTC) and a length."""

    start_time: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    duration_in_minutes: Annotated[int, msgspec.Meta(ge=1, le=1430)]


class SchedulingConfig(_Strict, frozen=True, kw_only=True):
    """From when to when, and in which recurring windows, agents are notified."""

    start_time: Annotated[str, msgspec.Meta(max_length=64)] = ""
    end_time: Annotated[str, msgspec.Meta(max_length=64)] = ""
    end_behavior: Literal["STOP_ROLLOUT", "CANCEL", "FORCE_CANCEL"] = "STOP_ROLLOUT"
    """STOP_ROLLOUT lets the agents that have begun finish; the other two abort, which recalls the unfinished ones."""
    maintenance_windows: Annotated[tuple[MaintenanceWindow, ...], msgspec.Meta(max_length=16)] = ()

    @property
    def starts_at(self) -> datetime | None:
        """When the rollout begins; None = at once."""
        return parse_time(self.start_time) if self.start_time else None

    @property
    def ends_at(self) -> datetime | None:
        """When the rollout ends; None = when it is done."""
        return parse_time(self.end_time) if self.end_time else None

    def windows(self) -> tuple[MaintenanceSlot, ...]:
        """Returns the maintenance windows, parsed."""
        return tuple(MaintenanceSlot(parse_cron(w.start_time), w.duration_in_minutes) for w in self.maintenance_windows)


class ErrorThreshold(_Strict, frozen=True, kw_only=True):
    """Failed agents of one wave, as a number or a share of the wave: exactly one of the two."""

    count: Things | None = None
    percentage: Percentage | None = None

    def __post_init__(self) -> None:
        """Refuses none and both of the two."""
        if (self.count is None) == (self.percentage is None):
            raise ValueError("errorThreshold needs count or percentage, not both")

    def reached(self, failed: int, size: int) -> bool:
        """Returns whether so many failures are too many for a wave of this size."""
        if self.count is not None:
            return failed >= self.count
        return bool(failed) and 100.0 * failed / size >= (self.percentage or 0.0)


class WaveConfig(_Strict, frozen=True, kw_only=True):
    """When a wave is good enough for the next, and when it is bad enough to act."""

    success_threshold_percentage: Percentage | None = None
    """Share of the wave that must have succeeded; None = every agent of it must be done, in whatever way."""
    success_action: Literal["NEXTGROUP", "PAUSE"] = "NEXTGROUP"
    """PAUSE waits for a person after every wave."""
    error_threshold: ErrorThreshold | None = None
    error_action: Literal["PAUSE", "ABORT", "ROLLBACK"] = "PAUSE"


class BudgetConfig(_Strict, frozen=True, kw_only=True):
    """How many agents may be in change at once: given the bundle and not done."""

    maximum_in_change: Things | None = None
    """In the whole rollout; None = no limit."""
    maximum_per_label: Annotated[dict[str, Things], msgspec.Meta(max_length=16)] = {}
    """By label name, among the agents that share one value of it: `{"site": 2}` = two agents of each site."""

    def keys_of(self, labels: Mapping[str, object]) -> list[tuple[str, str]]:
        """Returns the (label, value) pairs by which an agent counts; an absent label is a value of its own."""
        return [(name, str(labels.get(name, ""))) for name in self.maximum_per_label]


class RolloutPolicy(_Strict, frozen=True, kw_only=True):
    """Everything that paces and stops a rollout."""

    job_executions_rollout_config: JobExecutionsRolloutConfig = JobExecutionsRolloutConfig()
    abort_config: AbortConfig = msgspec.field(default_factory=AbortConfig)
    timeout_config: TimeoutConfig | None = None
    job_executions_retry_config: JobExecutionsRetryConfig | None = None
    scheduling_config: SchedulingConfig = SchedulingConfig()
    wave_config: WaveConfig = WaveConfig()
    budget_config: BudgetConfig = BudgetConfig()

    @property
    def timeouts(self) -> TimeoutConfig:
        """The time-outs; the defaults where none were given."""
        return self.timeout_config or TimeoutConfig()


def parse_policy(given: Mapping[str, Any]) -> RolloutPolicy:
    """Reads and checks a policy; law: `parse_policy(policy_dict(p)) == p`.

    Raises:
        InputError: `rollout.bad_policy` with the path of what is wrong, `rollout.bad_cron`, `rollout.bad_time`.
    """
    try:
        policy = msgspec.convert(dict(given), type=RolloutPolicy)
    except msgspec.ValidationError as error:
        raise InputError(
            "rollout.bad_policy", "The parameters of the rollout cannot be used.", expected="see the API", got=error
        ) from error
    schedule = policy.scheduling_config
    schedule.windows()
    start, end = schedule.starts_at, schedule.ends_at
    if start and end and end <= start:
        raise InputError("rollout.bad_time", "A rollout ends after it starts.", expected=f"after {start}", got=str(end))
    return policy


def policy_dict(policy: RolloutPolicy) -> dict[str, Any]:
    """Returns the policy as JSON takes it, by the names it came with."""
    found: dict[str, Any] = msgspec.to_builtins(policy)
    return found
