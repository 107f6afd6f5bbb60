"""Selectors, schedules, policies and waves: what a person may ask for, and what it means."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.rollouts.blast_radius import AgentLoad, blast_radius
from control_plane.rollouts.policy import DONE, JobExecutionsRolloutConfig, Outcome, parse_policy, policy_dict
from control_plane.rollouts.schedule import MaintenanceSlot, parse_cron, parse_time
from control_plane.rollouts.selector import parse_selector
from control_plane.rollouts.waves import divide
from models.errors import InputError

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
    window = MaintenanceSlot(parse_cron("cron(30 22 ? * MON-FRI *)"), 120)
    monday = datetime(2026, 3, 2, tzinfo=UTC)
    for hours, is_open in ((22.4, False), (22.5, True), (24.4, True), (24.51, False)):
        assert window.open_at(monday + timedelta(hours=hours)) is is_open, hours
    assert not window.open_at(monday + timedelta(days=5, hours=23))
    assert MaintenanceSlot(parse_cron("cron(0/20 * ? * * *)"), 1).open_at(monday.replace(minute=40))
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
def test_a_value_out_of_bounds_is_refused_with_its_place(path: str, value: object) -> None:
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


# -- waves ------------------------------------------------------------------------------------------------------------


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


def test_the_blast_radius_is_given_in_lanes_and_items() -> None:
    loads = {"a": AgentLoad(2, 10.0), "b": AgentLoad(2, 20.0), "c": AgentLoad(4, None)}
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
