"""The planner: pure, so its laws are tested on whole invented rollouts."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.planner import TRANSITIONS, next_state, plan
from control_plane.rollouts.policy import Outcome
from control_plane.rollouts.views import Assign, ChangeState, Finding, OpenWave, Return, Revert
from models.errors import ConflictError
from tests.simulators.rollout_world import LENIENT, world

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
    # Once it has ended, no agent is given the bundle.
    if w.course.state in {RolloutState.ABORTED, RolloutState.ROLLING_BACK, RolloutState.COMPLETED}:
        before = len(w.given)
        for _ in range(3):
            w.now += timedelta(seconds=61)
            w.turn()
        assert len(w.given) == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_healthy_rollout_always_ends_with_every_agent_on_the_bundle(sizes: list[int], rate: int, rng: object) -> None:
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
def test_a_rollout_that_is_not_in_progress_gives_the_bundle_to_no_agent(state: RolloutState) -> None:
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
    assert [s.agent_id for s in steps if isinstance(s, Revert)] == ["a0-2"]
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
    assert {s.agent_id for s in w.turn() if isinstance(s, Revert)} == {"a0-0", "a0-1"}
    w.report("a0-0", "returns")
    assert [(s.agent_id, s.returned) for s in w.turn()] == [("a0-0", Return.BACK)]
    assert w.turn() == []
    w.report("a0-1", "returns")
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.ROLLED_BACK
    assert w.reasons[-1] == "2 of 2 agents report a bundle they had committed before"


def test_a_rollback_leaves_alone_whom_a_newer_rollout_has_taken_over() -> None:
    w = world([2])
    w.turn()
    for agent_id in w.members:
        w.report(agent_id, "commits")
    w.turn()
    w.change("a0-0", desired_generation=9, desired_rollout=6)
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    assert [s.agent_id for s in w.turn() if isinstance(s, Revert)] == ["a0-1"]


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
    assert len(w.given) == 1, "outside the windows no agent is given the bundle"
    w.now = datetime(2026, 3, 4, 0, 0, tzinfo=UTC)
    w.turn()
    assert w.course.state is RolloutState.COMPLETED
    w.turn()
    assert w.members["a1-0"].outcome is Outcome.CANCELED


def test_after_its_end_a_rollout_waits_for_agents_that_have_begun_and_asks_no_others() -> None:
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


def test_a_timed_out_agent_is_tried_again_and_one_that_blocked_the_bundle_is_not() -> None:
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
    assert steps[-1] == ChangeState(RolloutState.ROLLING_BACK, "shadow: 12 % of the verdicts differ")


def test_the_actions_of_a_person_are_a_table() -> None:
    assert next_state(RolloutState.RUNNING, "pause") is RolloutState.PAUSED
    with pytest.raises(ConflictError) as caught:
        next_state(RolloutState.COMPLETED, "resume")
    assert caught.value.expected == "rollback"
    # Whatever gives agents the bundle can be stopped, and whatever gave it can be undone.
    for state in (RolloutState.RUNNING, RolloutState.PAUSED):
        assert {(state, "abort"), (state, "rollback")} <= set(TRANSITIONS)
