"""The outcome of one agent in a rollout follows from its reports and their times."""

from dataclasses import replace
from datetime import timedelta

import pytest

from control_plane.rollouts.observation import observe
from control_plane.rollouts.planner import plan
from control_plane.rollouts.policy import Outcome, parse_policy
from control_plane.rollouts.views import Assign
from models.messages import Mode
from tests.simulators.rollout_world import OLD, T0, A, given_bundle, member, report, rollout


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
    assert observe(given_bundle(**facts), rollout(), T0)[0] is outcome


def test_a_fault_with_a_bundle_that_was_in_its_trial_is_a_failure() -> None:
    refused = given_bundle(phase="rolled-back", blocked=[A], fault={"code": "bundle.wrong_digest", "message": "x"})
    assert observe(refused, rollout(), T0) == (Outcome.REJECTED, "bundle.wrong_digest: x")
    assert observe(replace(refused, tried=True), rollout(), T0)[0] is Outcome.FAILED


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
    assert observe(challenger, rollout(mode=Mode.SHADOW, min_items=5), T0)[0] is outcome


def test_an_agent_times_out_from_when_it_took_the_bundle_up() -> None:
    policy = parse_policy({"timeoutConfig": {"inProgressTimeoutInMinutes": 5}})
    working = given_bundle(phase="fetching")
    for minutes, outcome in ((4.9, Outcome.IN_PROGRESS), (5, Outcome.TIMED_OUT)):
        assert observe(working, rollout(policy=policy), T0 + timedelta(minutes=minutes))[0] is outcome
    offline = replace(working, reported=report(generation=1), started_at=None)
    assert observe(offline, rollout(policy=policy), T0 + timedelta(days=9))[0] is Outcome.QUEUED


def test_an_agent_without_proof_for_long_has_rejected_the_assignment() -> None:
    doubting = given_bundle(generation=2, fault={"code": "trust.not_released", "message": "unknown"})
    assert observe(doubting, rollout(), T0 + timedelta(seconds=59))[0] is Outcome.QUEUED
    found = observe(doubting, rollout(), T0 + timedelta(seconds=60))
    assert found == (Outcome.REJECTED, "trust.not_released: unknown")
    elsewhere = given_bundle(generation=2, fault={"code": "camera.gone", "message": "x"})
    assert observe(elsewhere, rollout(), T0 + timedelta(days=1))[0] is Outcome.QUEUED


def test_a_newer_assignment_takes_an_agent_over_and_concluded_results_stay() -> None:
    working = replace(given_bundle(phase="fetching"), desired_generation=4)
    assert observe(working, rollout(), T0)[0] is Outcome.CANCELED
    done = replace(working, outcome=Outcome.SUCCEEDED)
    assert observe(done, rollout(), T0)[0] is Outcome.SUCCEEDED
    waiting = member(desired_generation=7, desired_rollout=6)
    assert observe(waiting, rollout(), T0)[0] is Outcome.CANCELED
    assert observe(replace(waiting, desired_rollout=4), rollout(), T0)[0] is Outcome.QUEUED
    assert Assign("a0", 1) not in plan(rollout(), [waiting], T0), "an older rollout must not undo a newer one"
