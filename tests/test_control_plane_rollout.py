"""Selectors, schedules, policies and the planner: pure, so their laws are tested on whole invented rollouts."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.blast import Load, blast_radius
from control_plane.rollout import (
    TRANSITIONS,
    Assign,
    Conclude,
    Course,
    Finding,
    Join,
    Member,
    Move,
    Note,
    OpenWave,
    Return,
    next_state,
    observe,
    plan,
)
from control_plane.rollout_policy import DONE, JobExecutionsRolloutConfig, Outcome, parse_policy, policy_dict
from control_plane.schedule import Window, parse_cron, parse_time
from control_plane.selector import parse_selector
from control_plane.tables import RolloutState
from control_plane.waves import divide
from models.errors import ConflictError, InputError
from models.messages import Mode, Phase

A, OLD = "a" * 64, "b" * 64
LENIENT = [{"failureType": "ALL", "thresholdPercentage": 100, "minNumberOfExecutedThings": 9}]
T0 = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)  # a Monday


# -- selectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "matches", "differs"),
    [
        ("", {}, None),
        ("site=north", {"site": "north"}, {"site": "south"}),
        ("site!=north", {}, {"site": "north"}),
        ("line in (1, 2)", {"line": "2"}, {"line": "3"}),
        ("line notin (1,2)", {}, {"line": "1"}),
        ("canary", {"canary": ""}, {}),
        ("!canary", {}, {"canary": "no"}),
        ("site=wenatchee,line in (1,2),!canary", {"site": "wenatchee", "line": 1}, {"site": "wenatchee", "line": "3"}),
        ("id=line-1", {}, None),
    ],
)
def test_a_selector_means_what_it_says(
    text: str, matches: dict[str, object], differs: dict[str, object] | None
) -> None:
    selector = parse_selector(text)
    assert selector.matches("line-1", matches)
    assert differs is None or not selector.matches("line-1", differs)
    assert parse_selector(str(selector)) == selector


@pytest.mark.parametrize(
    "text", ["a=", "a=b,", "a in", "a in ()", "=b", "a b", "!a=b", ",", "a in (1", "a=b)", "x" * 2000]
)
def test_a_selector_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_selector(text)
    assert caught.value.code == "rollout.bad_selector"


@given(st.text(max_size=60))
def test_no_text_breaks_the_selector_language(text: str) -> None:
    try:
        selector = parse_selector(text)
    except InputError:
        return
    assert parse_selector(str(selector)) == selector


# -- schedules --------------------------------------------------------------------------------------------------------


def test_a_window_opens_by_its_cron_expression_and_closes_after_its_minutes() -> None:
    window = Window(parse_cron("cron(30 22 ? * MON-FRI *)"), 120)
    monday = datetime(2026, 3, 2, tzinfo=UTC)
    for hours, is_open in ((22.4, False), (22.5, True), (24.4, True), (24.51, False)):
        assert window.open_at(monday + timedelta(hours=hours)) is is_open, hours
    assert not window.open_at(monday + timedelta(days=5, hours=23))
    assert Window(parse_cron("cron(0/20 * ? * * *)"), 1).open_at(monday.replace(minute=40))
    assert parse_time("2026-05-01 04:30") == parse_time("2026-05-01T06:30+02:00")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30 22 * * *",
        "cron(30 22 ? * MON)",
        "cron(60 * ? * * *)",
        "cron(0 0 ? * XYZ *)",
        "cron(5-1 * ? * * *)",
        "cron(0/0 * ? * * *)",
        "cron(- * ? * * *)",
    ],
)
def test_a_cron_expression_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cron(text)
    assert caught.value.code == "rollout.bad_cron"


# -- policies ---------------------------------------------------------------------------------------------------------

# As the public documentation of AWS IoT Jobs has it.
AWS = {
    "jobExecutionsRolloutConfig": {
        "exponentialRate": {
            "baseRatePerMinute": 50,
            "incrementFactor": 2,
            "rateIncreaseCriteria": {"numberOfNotifiedThings": 1000},
        },
        "maximumPerMinute": 1000,
    },
    "abortConfig": {
        "criteriaList": [
            {"action": "CANCEL", "failureType": "FAILED", "minNumberOfExecutedThings": 100, "thresholdPercentage": 20},
            {
                "action": "CANCEL",
                "failureType": "TIMED_OUT",
                "minNumberOfExecutedThings": 200,
                "thresholdPercentage": 50,
            },
        ]
    },
    "timeoutConfig": {"inProgressTimeoutInMinutes": 100},
    "jobExecutionsRetryConfig": {"criteriaList": [{"failureType": "TIMED_OUT", "numberOfRetries": 2}]},
    "schedulingConfig": {
        "startTime": "2026-05-01T04:30",
        "endTime": "2026-05-08T04:30",
        "endBehavior": "CANCEL",
        "maintenanceWindows": [{"startTime": "cron(30 22 ? * MON-FRI *)", "durationInMinutes": 60}],
    },
}


def test_the_parameters_of_aws_iot_jobs_are_taken_verbatim() -> None:
    policy = parse_policy(AWS)
    assert parse_policy(policy_dict(policy)) == policy
    rates = [policy.job_executions_rollout_config.per_minute(n, 0) for n in (0, 999, 1000, 2000, 3000, 10_000)]
    assert rates == [50, 50, 100, 200, 400, 1000]
    by_success = parse_policy(
        {
            "jobExecutionsRolloutConfig": {
                "exponentialRate": {
                    "baseRatePerMinute": 10,
                    "incrementFactor": 1.5,
                    "rateIncreaseCriteria": {"numberOfSucceededThings": 4},
                }
            }
        }
    )
    assert by_success.job_executions_rollout_config.per_minute(100, 9) == 22


def _changed(path: str, value: object) -> dict[str, object]:
    import copy

    found = copy.deepcopy(AWS)
    *parents, last = path.split(".")
    at = found
    for name in parents:
        at = at[int(name)] if name.isdecimal() else at[name]
    at[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("jobExecutionsRolloutConfig.maximumPerMinute", 0),
        ("jobExecutionsRolloutConfig.maximumPerMinute", 1001),
        ("jobExecutionsRolloutConfig.exponentialRate.baseRatePerMinute", 0),
        ("jobExecutionsRolloutConfig.exponentialRate.incrementFactor", 1.0),
        ("jobExecutionsRolloutConfig.exponentialRate.incrementFactor", 5.1),
        ("jobExecutionsRolloutConfig.exponentialRate.incrementFactor", 1.25),
        ("jobExecutionsRolloutConfig.exponentialRate.rateIncreaseCriteria", {}),
        (
            "jobExecutionsRolloutConfig.exponentialRate.rateIncreaseCriteria",
            {"numberOfNotifiedThings": 1, "numberOfSucceededThings": 1},
        ),
        ("abortConfig.criteriaList", []),
        ("abortConfig.criteriaList.0.failureType", "BROKEN"),
        ("abortConfig.criteriaList.0.action", "PAUSE"),
        ("abortConfig.criteriaList.0.thresholdPercentage", 101),
        ("abortConfig.criteriaList.0.minNumberOfExecutedThings", 0),
        ("timeoutConfig.inProgressTimeoutInMinutes", 10_081),
        ("jobExecutionsRetryConfig.criteriaList.0.numberOfRetries", 11),
        ("jobExecutionsRetryConfig.criteriaList.0.failureType", "REJECTED"),
        ("schedulingConfig.endBehavior", "EXPLODE"),
        ("schedulingConfig.maintenanceWindows.0.durationInMinutes", 1431),
        ("schedulingConfig.startTime", "soon"),
        ("schedulingConfig.endTime", "2026-04-01T00:00"),
        ("schedulingConfig.maintenanceWindows.0.startTime", "daily"),
        ("waveConfig", {"errorThreshold": {"count": 1, "percentage": 5}}),
        ("jobExecutionRolloutConfig", {}),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_its_place(path: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        parse_policy(_changed(path, value))
    assert caught.value.code in {"rollout.bad_policy", "rollout.bad_time", "rollout.bad_cron"}


@given(st.integers(1, 1000), st.integers(11, 50), st.integers(1, 100), st.integers(1, 1000), st.integers(0, 10**7))
def test_the_rate_stays_between_one_and_its_maximum(base: int, factor: int, every: int, top: int, done: int) -> None:
    config = parse_policy(
        {
            "jobExecutionsRolloutConfig": {
                "maximumPerMinute": top,
                "exponentialRate": {
                    "baseRatePerMinute": base,
                    "incrementFactor": factor / 10,
                    "rateIncreaseCriteria": {"numberOfNotifiedThings": every},
                },
            }
        }
    ).job_executions_rollout_config
    assert 1 <= config.per_minute(done, 0) <= top
    assert config.per_minute(done, 0) <= config.per_minute(done + every, 0)


# -- one agent --------------------------------------------------------------------------------------------------------


def course(**changes: object) -> Course:
    values = {"rollout_id": 5, "state": RolloutState.RUNNING, "bundle": A, "wave": 0, "policy": parse_policy({})}
    return Course(**(values | changes))


def member(agent_id: str = "a0", wave: int = 0, **changes: object) -> Member:
    return Member(**({"agent_id": agent_id, "wave": wave, "reported": {}} | changes))


def given_bundle(**reported: object) -> Member:
    facts = {"generation": 3} | reported
    return member(reported=facts, generation=3, attempt=1, assigned_at=T0, started_at=T0, desired_generation=3)


@pytest.mark.parametrize(
    ("facts", "outcome"),
    [
        ({"generation": 2, "active": A, "phase": "committed", "items_on_active": 9}, Outcome.QUEUED),
        ({"phase": "fetching"}, Outcome.IN_PROGRESS),
        ({"phase": "trial", "active": A}, Outcome.IN_PROGRESS),
        ({"phase": "committed", "active": A, "items_on_active": 0}, Outcome.IN_PROGRESS),
        ({"phase": "committed", "active": A, "items_on_active": 1}, Outcome.SUCCEEDED),
        ({"phase": "committed", "active": OLD, "items_on_active": 9}, Outcome.IN_PROGRESS),
        ({"phase": "rolled-back", "blocked": [A], "fault": {"code": "trial.line_died"}}, Outcome.FAILED),
        ({"phase": "rolled-back", "blocked": [A], "fault": {"code": "model.not_finite"}}, Outcome.FAILED),
        ({"phase": "rolled-back", "blocked": [A]}, Outcome.FAILED),
        ({"phase": "rolled-back", "blocked": [A], "fault": {"code": "selftest.too_slow"}}, Outcome.REJECTED),
        ({"phase": "rolled-back", "blocked": [A], "fault": {"code": "trust.not_released"}}, Outcome.REJECTED),
        ({"phase": "committed", "blocked": [A], "fault": {"code": "agent.digest_blocked"}}, Outcome.REJECTED),
    ],
)
def test_the_outcome_is_what_the_agent_reports(facts: dict[str, object], outcome: Outcome) -> None:
    assert observe(given_bundle(**facts), course(), T0)[0] is outcome


def test_a_fault_with_a_bundle_that_was_in_its_trial_is_a_failure() -> None:
    refused = given_bundle(phase="rolled-back", blocked=[A], fault={"code": "bundle.wrong_digest", "message": "x"})
    assert observe(refused, course(), T0) == (Outcome.REJECTED, "bundle.wrong_digest: x")
    assert observe(replace(refused, tried=True), course(), T0)[0] is Outcome.FAILED


@pytest.mark.parametrize(
    ("facts", "compared", "outcome"),
    [
        ({"shadow_phase": "fetching", "shadow": A}, 0, Outcome.IN_PROGRESS),
        ({"shadow_phase": "shadow", "shadow": A, "shadow_running": False}, 99, Outcome.IN_PROGRESS),
        ({"shadow_phase": "shadow", "shadow": A, "shadow_running": True}, 4, Outcome.IN_PROGRESS),
        ({"shadow_phase": "shadow", "shadow": OLD, "shadow_running": True}, 99, Outcome.IN_PROGRESS),
        ({"shadow_phase": "shadow", "shadow": A, "shadow_running": True}, 5, Outcome.SUCCEEDED),
        ({"shadow_phase": "failed", "shadow": A, "fault": {"code": "selftest.too_slow"}}, 0, Outcome.REJECTED),
        ({"shadow_phase": "failed", "shadow": A, "fault": {"code": "challenger.line_died"}}, 0, Outcome.FAILED),
        ({"active": A, "phase": "committed", "items_on_active": 9}, 0, Outcome.IN_PROGRESS),
    ],
)
def test_a_challenger_has_succeeded_when_it_runs_and_items_were_compared(
    facts: dict[str, object], compared: int, outcome: Outcome
) -> None:
    challenger = replace(given_bundle(**facts), compared=compared)
    assert observe(challenger, course(mode=Mode.SHADOW, min_items=5), T0)[0] is outcome


def test_an_agent_times_out_from_when_it_took_the_bundle_up() -> None:
    policy = parse_policy({"timeoutConfig": {"inProgressTimeoutInMinutes": 5}})
    working = given_bundle(phase="fetching")
    for minutes, outcome in ((4.9, Outcome.IN_PROGRESS), (5, Outcome.TIMED_OUT)):
        assert observe(working, course(policy=policy), T0 + timedelta(minutes=minutes))[0] is outcome
    offline = replace(working, reported={"generation": 1}, started_at=None)
    assert observe(offline, course(policy=policy), T0 + timedelta(days=9))[0] is Outcome.QUEUED


def test_an_agent_that_finds_no_proof_for_long_has_rejected_the_wish() -> None:
    doubting = given_bundle(generation=2, fault={"code": "trust.not_released", "message": "unknown"})
    assert observe(doubting, course(), T0 + timedelta(seconds=59))[0] is Outcome.QUEUED
    found = observe(doubting, course(), T0 + timedelta(seconds=60))
    assert found == (Outcome.REJECTED, "trust.not_released: unknown")
    elsewhere = given_bundle(generation=2, fault={"code": "camera.gone", "message": "x"})
    assert observe(elsewhere, course(), T0 + timedelta(days=1))[0] is Outcome.QUEUED


def test_a_newer_wish_takes_an_agent_over_and_what_was_concluded_stays() -> None:
    working = replace(given_bundle(phase="fetching"), desired_generation=4)
    assert observe(working, course(), T0)[0] is Outcome.CANCELED
    done = replace(working, outcome=Outcome.SUCCEEDED)
    assert observe(done, course(), T0)[0] is Outcome.SUCCEEDED
    waiting = member(desired_generation=7, desired_rollout=6)
    assert observe(waiting, course(), T0)[0] is Outcome.CANCELED
    assert observe(replace(waiting, desired_rollout=4), course(), T0)[0] is Outcome.QUEUED
    assert Assign("a0", 1) not in plan(course(), [waiting], T0), "an older rollout must not undo a newer one"


# -- whole rollouts ---------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A rollout and its agents; carries steps out as the executor does, and remembers them."""

    course: Course
    members: dict[str, Member]
    now: datetime = T0
    given: list[tuple[datetime, str, int]] = field(default_factory=list)
    opened: list[int] = field(default_factory=lambda: [0])
    moves: list[RolloutState] = field(default_factory=list)

    def turn(self, **options: object) -> list[object]:
        steps = plan(self.course, list(self.members.values()), self.now, **options)
        for step in steps:
            self.carry_out(step)
        return steps

    def change(self, agent_id: str, **facts: object) -> None:
        self.members[agent_id] = replace(self.members[agent_id], **facts)

    def carry_out(self, step: object) -> None:
        match step:
            case Assign():
                generation = self.members[step.agent_id].desired_generation + 1
                self.given.append((self.now, step.agent_id, step.attempt))
                self.change(
                    step.agent_id,
                    generation=generation,
                    desired_generation=generation,
                    desired_rollout=self.course.rollout_id,
                    attempt=step.attempt,
                    assigned_at=self.now,
                    started_at=None,
                    tried=False,
                    outcome=Outcome.QUEUED,
                )
            case Return():
                generation = self.members[step.agent_id].desired_generation + 1
                self.change(step.agent_id, returned_generation=generation, desired_generation=generation)
            case Note():
                m = self.members[step.agent_id]
                self.change(
                    step.agent_id, outcome=Outcome.IN_PROGRESS, tried=step.tried, started_at=m.started_at or self.now
                )
            case Conclude():
                self.change(step.agent_id, outcome=step.outcome)
            case Join():
                self.members[step.agent_id] = member(step.agent_id, step.wave)
            case OpenWave():
                self.opened.append(step.wave)
                self.course = replace(self.course, wave=step.wave)
            case Move():
                self.moves.append(step.state)
                cleared = self.course.wave if step.state is RolloutState.PAUSED else self.course.cleared_wave
                self.course = replace(self.course, state=step.state, cleared_wave=cleared)

    def report(self, agent_id: str, what: str) -> None:
        """The agent says something about the newest wish it could have heard of."""
        m = self.members[agent_id]
        facts = {
            "takes": {"phase": Phase.FETCHING},
            "tries": {"phase": Phase.TRIAL, "active": A},
            "commits": {"phase": Phase.COMMITTED, "active": A, "items_on_active": 60},
            "fails": {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "trial.timeout"}},
            "rejects": {"phase": Phase.ROLLED_BACK, "blocked": [A], "fault": {"code": "selftest.timeout"}},
            "returns": {"phase": Phase.COMMITTED, "active": m.previous_bundle},
        }[what]
        self.change(agent_id, reported={"generation": m.desired_generation} | facts)

    def resume(self) -> None:
        assert self.course.state is RolloutState.PAUSED
        self.course = replace(self.course, state=RolloutState.RUNNING)


def world(sizes: list[int], **changes: object) -> World:
    names = [(f"a{wave}-{k}", wave) for wave, size in enumerate(sizes) for k in range(size)]
    policy = parse_policy(changes.pop("policy", {}))
    members = {name: member(name, wave, previous_bundle=OLD) for name, wave in names}
    return World(course(policy=policy, **changes), members)


SAYINGS = ("takes", "tries", "commits", "commits", "fails", "rejects")
EVENT = st.tuples(st.sampled_from(SAYINGS), st.integers(0, 40), st.sampled_from((0.0, 1.0, 7.0, 61.0)))
POLICIES = st.fixed_dictionaries(
    {
        "jobExecutionsRolloutConfig": st.fixed_dictionaries(
            {
                "maximumPerMinute": st.integers(1, 8),
                "exponentialRate": st.fixed_dictionaries(
                    {
                        "baseRatePerMinute": st.integers(1, 4),
                        "incrementFactor": st.sampled_from((1.1, 2.0, 5.0)),
                        "rateIncreaseCriteria": st.sampled_from(
                            ({"numberOfNotifiedThings": 2}, {"numberOfSucceededThings": 1})
                        ),
                    }
                ),
            }
        ),
        "abortConfig": st.fixed_dictionaries(
            {
                "criteriaList": st.lists(
                    st.fixed_dictionaries(
                        {
                            "failureType": st.sampled_from(("FAILED", "REJECTED", "TIMED_OUT", "ALL")),
                            "thresholdPercentage": st.sampled_from((10, 50, 100)),
                            "minNumberOfExecutedThings": st.integers(1, 5),
                        }
                    ),
                    min_size=1,
                    max_size=2,
                )
            }
        ),
        "timeoutConfig": st.sampled_from((None, {"inProgressTimeoutInMinutes": 1})),
        "jobExecutionsRetryConfig": st.sampled_from(
            (None, {"criteriaList": [{"failureType": "ALL", "numberOfRetries": 2}]})
        ),
        "waveConfig": st.sampled_from(
            (
                {},
                {"successThresholdPercentage": 50},
                {"successThresholdPercentage": 100, "successAction": "PAUSE"},
                {"errorThreshold": {"count": 1}, "errorAction": "PAUSE"},
                {"errorThreshold": {"percentage": 50}, "errorAction": "ROLLBACK"},
            )
        ),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), POLICIES, st.lists(EVENT, max_size=60), st.booleans())
def test_the_laws_of_the_planner_hold_on_any_rollout(
    sizes: list[int], policy: dict[str, object], events: list[tuple[str, int, float]], resumes: bool
) -> None:
    w = world(sizes, policy=policy)
    names = list(w.members)
    for what, whom, seconds in events:
        agent_id = names[whom % len(names)]
        if w.members[agent_id].generation:
            w.report(agent_id, what)
        w.now += timedelta(seconds=seconds)
        steps = w.turn()
        again = plan(w.course, list(w.members.values()), w.now)
        assert not set(map(repr, steps)) & set(map(repr, again)), "a step that was carried out is not planned again"
        for step in steps:
            if isinstance(step, Assign):
                assert w.members[step.agent_id].wave <= w.course.wave
        if resumes and w.course.state is RolloutState.PAUSED:
            w.resume()
    # No agent twice by one attempt, and never another attempt without a reason.
    assert len({(agent, attempt) for _, agent, attempt in w.given}) == len(w.given)
    assert all(attempt <= 3 for _, _, attempt in w.given)
    if policy["jobExecutionsRetryConfig"] is None:
        assert all(attempt == 1 for _, _, attempt in w.given)
    # No wave skipped, none opened twice.
    assert w.opened == list(range(len(w.opened)))
    # Never faster than the maximum in any 60 seconds.
    limit = policy["jobExecutionsRolloutConfig"]["maximumPerMinute"]
    times = [at for at, _, _ in w.given]
    for at in times:
        assert sum(at - timedelta(seconds=60) < other <= at for other in times) <= limit
    # Once ended, nobody is given the bundle.
    if w.course.state in {RolloutState.ABORTED, RolloutState.ROLLING_BACK, RolloutState.COMPLETED}:
        before = len(w.given)
        for _ in range(3):
            w.now += timedelta(seconds=61)
            w.turn()
        assert len(w.given) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_healthy_rollout_always_ends_with_everybody_on_the_bundle(sizes: list[int], rate: int, rng: object) -> None:
    w = world(sizes, policy={"jobExecutionsRolloutConfig": {"maximumPerMinute": rate}})
    for _ in range(400):
        if w.course.state is not RolloutState.RUNNING:
            break
        w.now += timedelta(seconds=10)
        w.turn()
        for agent_id, m in w.members.items():
            if m.generation and rng.random() < 0.5:
                w.report(agent_id, "commits")
    assert w.course.state is RolloutState.COMPLETED
    assert {m.outcome for m in w.members.values()} == {Outcome.SUCCEEDED}
    assert w.opened == list(range(len(sizes)))


@pytest.mark.parametrize("state", [s for s in RolloutState if s is not RolloutState.RUNNING])
def test_a_rollout_that_does_not_run_gives_the_bundle_to_nobody(state: RolloutState) -> None:
    w = world([2], state=state, policy={"schedulingConfig": {"startTime": "2030-01-01T00:00"}})
    assert not [step for step in w.turn() if isinstance(step, Assign | OpenWave)]


def test_too_many_failures_stop_the_rollout_and_recall_who_is_not_done() -> None:
    w = world([3, 2])
    w.turn()
    w.report("a0-0", "commits")
    w.report("a0-1", "rejects")
    w.report("a0-2", "takes")
    w.turn()
    assert w.moves == [RolloutState.ABORTED]
    steps = w.turn()
    assert [s.agent_id for s in steps if isinstance(s, Return)] == ["a0-2"]
    outcomes = [str(m.outcome) for m in w.members.values()]
    assert outcomes == ["SUCCEEDED", "REJECTED", "CANCELED", "CANCELED", "CANCELED"]
    assert w.turn() == []


def test_abort_criteria_count_their_own_failure_type_only() -> None:
    criteria = {
        "failureType": "REJECTED",
        "action": "CANCEL",
        "thresholdPercentage": 50,
        "minNumberOfExecutedThings": 3,
    }
    w = world([4], policy={"abortConfig": {"criteriaList": [criteria]}})
    w.turn()
    for agent_id, what in (("a0-0", "fails"), ("a0-1", "fails"), ("a0-2", "rejects")):
        w.report(agent_id, what)
        w.turn()
    assert w.moves == []
    w.report("a0-3", "rejects")
    w.turn()
    assert w.moves == [RolloutState.ABORTED]


def test_a_rollback_is_over_when_every_agent_says_it_is_back() -> None:
    w = world([2])
    w.turn()
    w.report("a0-0", "commits")
    w.report("a0-1", "takes")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    assert {s.agent_id for s in w.turn() if isinstance(s, Return)} == {"a0-0", "a0-1"}
    w.report("a0-0", "returns")
    assert w.turn() == []
    w.report("a0-1", "returns")
    w.turn()
    assert w.course.state is RolloutState.ROLLED_BACK


def test_a_rollback_leaves_alone_whom_a_newer_rollout_has_taken_over() -> None:
    w = world([2])
    w.turn()
    for agent_id in w.members:
        w.report(agent_id, "commits")
    w.turn()
    w.change("a0-0", desired_generation=9, desired_rollout=6)
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    assert [s.agent_id for s in w.turn() if isinstance(s, Return)] == ["a0-1"]


def test_a_success_threshold_opens_the_next_wave_without_waiting_for_the_last_agent() -> None:
    w = world([4, 1], policy={"waveConfig": {"successThresholdPercentage": 75}})
    w.turn()
    for agent_id in ("a0-0", "a0-1", "a0-2"):
        w.report(agent_id, "commits")
    w.turn()
    w.turn()
    assert w.opened == [0, 1]
    assert w.course.state is RolloutState.RUNNING


def test_a_wave_that_misses_its_success_threshold_pauses_and_a_person_may_go_on() -> None:
    policy = {"waveConfig": {"successThresholdPercentage": 100}, "abortConfig": {"criteriaList": LENIENT}}
    w = world([2, 1], policy=policy)
    w.turn()
    w.report("a0-0", "commits")
    w.report("a0-1", "fails")
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.PAUSED
    w.resume()
    w.turn()
    assert w.opened == [0, 1]
    w.turn()
    w.report("a1-0", "commits")
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.COMPLETED


def test_an_error_threshold_pauses_once_and_not_again_after_a_person_went_on() -> None:
    policy = {"waveConfig": {"errorThreshold": {"count": 1}}, "abortConfig": {"criteriaList": LENIENT}}
    w = world([3], policy=policy)
    w.turn()
    w.report("a0-0", "fails")
    w.turn()
    assert w.course.state is RolloutState.PAUSED
    w.resume()
    w.report("a0-1", "commits")
    w.turn()
    assert w.course.state is RolloutState.RUNNING


def test_a_rollout_waits_for_its_start_and_its_windows_and_ends_in_time() -> None:
    schedule = {
        "startTime": "2026-03-02T22:00",
        "endTime": "2026-03-04T00:00",
        "maintenanceWindows": [{"startTime": "cron(30 22 ? * * *)", "durationInMinutes": 60}],
    }
    w = world([1, 1], state=RolloutState.SCHEDULED, policy={"schedulingConfig": schedule})
    assert w.turn() == []
    w.now = datetime(2026, 3, 2, 22, 0, tzinfo=UTC)
    w.turn()
    assert w.course.state is RolloutState.RUNNING
    assert w.turn() == []
    w.now = datetime(2026, 3, 2, 22, 31, tzinfo=UTC)
    w.turn()
    assert [agent for _, agent, _ in w.given] == ["a0-0"]
    w.report("a0-0", "commits")
    w.now = datetime(2026, 3, 3, 1, 0, tzinfo=UTC)
    for _ in range(3):
        w.turn()
    assert len(w.given) == 1, "outside the windows nobody is given anything"
    w.now = datetime(2026, 3, 4, 0, 0, tzinfo=UTC)
    w.turn()
    assert w.course.state is RolloutState.COMPLETED
    w.turn()
    assert w.members["a1-0"].outcome is Outcome.CANCELED


def test_after_its_end_a_rollout_waits_for_who_has_begun_and_tells_nobody_further() -> None:
    policy = {
        "jobExecutionsRolloutConfig": {"maximumPerMinute": 1},
        "schedulingConfig": {"endTime": "2026-03-02T09:00"},
    }
    w = world([2], policy=policy)
    w.turn()
    w.report("a0-0", "takes")
    w.now += timedelta(hours=2)
    w.turn()
    assert (len(w.given), w.course.state) == (1, RolloutState.RUNNING)
    w.report("a0-0", "commits")
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.COMPLETED
    assert w.members["a0-1"].outcome is Outcome.CANCELED


def test_a_rollout_that_is_cut_off_at_its_end_recalls_who_is_not_done() -> None:
    schedule = {"endTime": "2026-03-02T09:00", "endBehavior": "FORCE_CANCEL"}
    w = world([1], policy={"schedulingConfig": schedule})
    w.turn()
    w.report("a0-0", "takes")
    w.now += timedelta(hours=2)
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.ABORTED
    assert w.members["a0-0"].returned_generation


def test_what_timed_out_is_tried_again_and_what_the_agent_blocked_is_not() -> None:
    policy = {
        "timeoutConfig": {"inProgressTimeoutInMinutes": 1},
        "jobExecutionsRetryConfig": {"criteriaList": [{"failureType": "ALL", "numberOfRetries": 1}]},
        "abortConfig": {
            "criteriaList": [{"failureType": "ALL", "thresholdPercentage": 100, "minNumberOfExecutedThings": 9}]
        },
    }
    w = world([2], policy=policy)
    w.turn()
    w.report("a0-0", "takes")
    w.report("a0-1", "fails")
    w.turn()
    assert w.members["a0-1"].outcome is Outcome.FAILED
    for attempt in (2, 2):
        w.now += timedelta(seconds=61)
        w.turn()
        assert w.members["a0-0"].attempt == attempt
        w.report("a0-0", "takes")
        w.turn()
    assert w.members["a0-0"].outcome is Outcome.TIMED_OUT


def test_a_dynamic_rollout_takes_later_agents_into_its_last_wave_and_stays_open() -> None:
    w = world([1, 1], dynamic=True, wave=1)
    w.turn()
    for agent_id in list(w.members):
        w.report(agent_id, "commits")
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.RUNNING
    w.turn(newcomers=["late"])
    assert w.members["late"].wave == 1
    w.turn()
    assert w.given[-1][1] == "late"


def test_a_finding_of_a_gate_stops_the_rollout_with_its_words() -> None:
    w = world([2, 1])
    w.turn()
    finding = Finding("shadow", RolloutState.ROLLING_BACK, "12 % of the verdicts differ")
    steps = w.turn(findings=[Finding("p99", RolloutState.PAUSED, "late"), finding])
    assert steps[-1] == Move(RolloutState.ROLLING_BACK, "shadow: 12 % of the verdicts differ")


def test_what_a_person_may_do_is_a_table() -> None:
    assert next_state(RolloutState.RUNNING, "pause") is RolloutState.PAUSED
    with pytest.raises(ConflictError) as caught:
        next_state(RolloutState.COMPLETED, "resume")
    assert caught.value.expected == "rollback"
    # Whatever gives agents the bundle can be stopped, and whatever gave it can be undone.
    for state in (RolloutState.RUNNING, RolloutState.PAUSED):
        assert {(state, "abort"), (state, "rollback")} <= set(TRANSITIONS)


@given(st.integers(1, 300), st.lists(st.integers(1, 100), max_size=5), st.sets(st.integers(0, 299), max_size=5))
def test_every_agent_is_in_one_wave_and_waves_have_no_holes(total: int, percents: list[int], named: set[int]) -> None:
    agents = [f"a{k:03d}" for k in range(total)]
    first = [agents[k] for k in sorted(named) if k < total]
    waves = ([first] if first else []) + [f"{p}%" for p in sorted(percents)]
    try:
        found = divide(agents, waves)
    except InputError:
        assert first, "only names can make a later size too small"
        return
    assert sorted(found) == agents
    assert set(found.values()) == set(range(max(found.values()) + 1))
    assert list(found.values()) == sorted(found.values())
    assert all(found[agent] == 0 for agent in first)


@pytest.mark.parametrize("waves", [["0"], ["-1"], ["101%"], [5, 2], ["x"], [["stranger"]]])
def test_waves_that_are_none_are_refused(waves: list[object]) -> None:
    with pytest.raises(InputError) as caught:
        divide([f"a{k}" for k in range(9)], waves)
    assert caught.value.code == "rollout.bad_waves"


def test_the_blast_radius_is_told_in_lanes_and_items() -> None:
    loads = {"a": Load(2, 10.0), "b": Load(2, 20.0), "c": Load(4, None)}
    criteria = [{"failureType": "ALL", "thresholdPercentage": 50, "minNumberOfExecutedThings": 2}]
    policy = parse_policy({"abortConfig": {"criteriaList": criteria}})
    found = blast_radius([["a"], ["b", "c"]], loads, policy, trial_items=500, trial_s=30.0)
    assert found["waves"][0] == {"agents": 1, "lanes": 2, "items_per_h": 36_000, "unknown": 0}
    assert found["waves"][1] == {"agents": 2, "lanes": 6, "items_per_h": 72_000, "unknown": 1}
    assert (found["worst_case"]["agents"], found["worst_case"]["items"]) == (3, 300 + 500 + 500)
    alone = blast_radius([["a"]], loads, policy, trial_items=500, trial_s=30.0)
    assert not alone["worst_case"]["stops_itself"]


def test_the_default_rate_is_the_default_of_aws() -> None:
    assert JobExecutionsRolloutConfig().per_minute(0, 0) == 1000
    assert {Outcome.SUCCEEDED, Outcome.CANCELED} < DONE
