"""Agents go back only to a bundle they reported as committed, and "back" is only what they report."""

from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest

from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.observation import observe
from control_plane.rollouts.policy import DONE, Outcome, parse_policy
from control_plane.rollouts.views import Return, Revert
from control_plane.rollouts.way_back import observe_return, tally, way_back
from models.messages import Mode, Phase, SafeState
from tests.simulators.rollout_world import OLD, T0, A, given_bundle, member, report, rollout, world

OLDER = "c" * 64
TRIAL = {"phase": "trial", "active": A, "previous": OLD}
COMMITTED = {"phase": "committed", "active": A, "previous": OLD}


@pytest.mark.parametrize(
    ("facts", "previous", "found"),
    [
        (COMMITTED, "", OLD),
        (TRIAL, "", OLD),
        ({"phase": "fetching", "active": OLD, "target": A}, "", OLD),
        ({"phase": "committed", "active": A}, OLD, OLD),
        (COMMITTED | {"blocked": [OLD]}, OLDER, OLDER),
        ({"phase": "committed", "active": A}, "", ""),
        ({"phase": "committed", "active": A, "previous": A}, A, ""),
        ({"phase": "trial", "active": A}, "", ""),
        (COMMITTED | {"blocked": [OLD]}, "", ""),
        ({}, "", ""),
    ],
)
def test_the_way_back_is_what_the_agent_committed(facts: dict[str, object], previous: str, found: str) -> None:
    way = way_back(replace(given_bundle(**facts), previous_bundle=previous), rollout())
    assert way.bundle == found
    assert bool(way.missing) is not bool(found), "where there is none, that is said"


def test_a_withdrawn_bundle_is_no_way_back() -> None:
    way = way_back(given_bundle(**COMMITTED), rollout(released=frozenset({A})))
    assert (way.bundle, "withdrawn" in way.missing) == ("", True)
    older = replace(given_bundle(**COMMITTED), previous_bundle=OLDER)
    assert way_back(older, rollout(released=frozenset({A, OLDER}))).bundle == OLDER


def test_a_challenger_goes_and_the_champion_stays() -> None:
    shadowed = given_bundle(phase="committed", active=OLD, previous=OLDER, shadow=A, shadow_running=True)
    assert way_back(shadowed, rollout(mode=Mode.SHADOW)).bundle == OLD


def test_an_abort_recalls_a_trial_that_has_nothing_to_go_back_to() -> None:
    w = world([1])
    w.change("a0-0", reported=report())
    w.turn()
    w.report("a0-0", "tries")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ABORTED)
    assert [(s.bundle, s.safe_state) for s in w.turn() if isinstance(s, Revert)] == [("", "")]
    w.change("a0-0", reported=report(generation=w.members["a0-0"].returned_generation))
    w.turn()
    assert w.members["a0-0"].returned is Return.NO_WAY_BACK


def test_a_fresh_box_that_has_committed_goes_on_and_that_is_said() -> None:
    w = world([1])
    w.change("a0-0", reported=report())
    w.turn()
    w.report("a0-0", "commits")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    w.turn()
    m = w.members["a0-0"]
    w.change("a0-0", reported=report(**(COMMITTED | {"previous": ""}), generation=m.returned_generation))
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.ROLLED_BACK
    assert w.reasons[-1] == "0 of 1 agents report a bundle they had committed before; 1 without a way back"


def test_a_requested_safe_state_goes_to_the_agents_without_a_way_back_alone() -> None:
    w = world([2])
    w.change("a0-0", reported=report())
    w.turn()
    for agent_id in ("a0-0", "a0-1"):
        w.report(agent_id, "commits")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK, safe_state=SafeState.EJECT_ALL)
    reverts = {s.agent_id: (s.bundle, s.safe_state) for s in w.turn() if isinstance(s, Revert)}
    assert reverts == {"a0-0": ("", SafeState.EJECT_ALL), "a0-1": (OLD, SafeState.NONE)}
    m = w.members["a0-0"]
    heard = report(**(COMMITTED | {"previous": ""}), generation=m.returned_generation)
    w.change("a0-0", reported=heard)
    w.turn()
    assert w.members["a0-0"].returned is Return.PENDING, "it has heard, and does not report the safe state yet"
    w.change("a0-0", reported=msgspec.structs.replace(heard, safe_state=SafeState.EJECT_ALL))
    w.report("a0-1", "returns")
    w.turn()
    w.turn()
    expected = "1 of 2 agents report a bundle they had committed before; 1 in the requested safe state"
    assert w.reasons[-1] == expected


def test_a_stale_report_is_made_good_when_the_agent_is_heard() -> None:
    """Recalled as if nothing was committed; then it reports that it had committed something before after all."""
    w = world([1])
    w.change("a0-0", reported=report())
    w.turn()
    w.course = replace(w.course, state=RolloutState.ABORTED)
    assert [s.bundle for s in w.turn() if isinstance(s, Revert)] == [""]
    w.change("a0-0", reported=report(**COMMITTED, generation=w.members["a0-0"].returned_generation))
    assert [s.bundle for s in w.turn() if isinstance(s, Revert)] == [OLD]
    w.report("a0-0", "returns")
    w.turn()
    assert w.members["a0-0"].returned is Return.BACK


def test_a_way_back_that_is_withdrawn_before_it_is_heard_becomes_a_recall() -> None:
    w = world([1])
    w.turn()
    w.report("a0-0", "commits")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    assert [s.bundle for s in w.turn() if isinstance(s, Revert)] == [OLD]
    w.course = replace(w.course, released=frozenset({A}))
    assert [s.bundle for s in w.turn() if isinstance(s, Revert)] == [""]
    assert w.turn() == []
    w.change("a0-0", reported=report(**COMMITTED, generation=w.members["a0-0"].returned_generation))
    w.turn()
    w.turn()
    assert w.course.state is RolloutState.ROLLED_BACK
    assert "0 of 1" in w.reasons[-1]


def test_a_way_back_that_fails_there_ends_the_rollback_and_claims_nothing() -> None:
    w = world([1])
    w.turn()
    w.report("a0-0", "commits")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK)
    w.turn()
    failed = COMMITTED | {"blocked": [OLD], "phase": "rolled-back", "previous": ""}
    w.change("a0-0", reported=report(**failed, generation=w.members["a0-0"].returned_generation))
    w.turn()
    w.turn()
    assert w.reasons[-1] == "0 of 1 agents report a bundle they had committed before; 1 could not go back"


def test_a_rollback_with_a_dead_member_ends_and_says_so() -> None:
    w = world([2])
    w.turn()
    for agent_id in w.members:
        w.report(agent_id, "commits")
    w.turn()
    w.course = replace(w.course, state=RolloutState.ROLLING_BACK, watched_since=T0)
    w.turn()
    w.report("a0-0", "returns")
    w.now += timedelta(minutes=59)
    w.turn()
    assert w.course.state is RolloutState.ROLLING_BACK
    w.now += timedelta(minutes=2)
    w.turn()
    w.turn()
    assert w.reasons[-1] == "1 of 2 agents report a bundle they had committed before; 1 did not answer"


def test_an_agent_that_was_revoked_or_forgotten_is_not_waited_for() -> None:
    w = world([2])
    w.turn()
    w.report("a0-0", "commits")
    w.change("a0-1", gone="its identity was revoked")
    w.turn()
    w.turn()
    assert w.members["a0-1"].outcome is Outcome.REMOVED
    assert w.course.state is RolloutState.COMPLETED
    assert w.reasons[-1] == "1 of 2 agents took the bundle; 1 left by rule"


def test_silence_counts_only_while_agents_can_be_heard() -> None:
    silent = replace(given_bundle(generation=1), started_at=None, seen_at=T0 - timedelta(days=3))
    hour = timedelta(minutes=61)
    assert observe(silent, rollout(), T0 + hour)[0] is Outcome.QUEUED
    assert observe(silent, rollout(watched_since=T0 + hour), T0 + hour)[0] is Outcome.QUEUED
    found = observe(silent, rollout(watched_since=T0), T0 + hour)
    assert found == (Outcome.REMOVED, "it was not heard from since 2026-02-27 08:00 UTC")
    taken = replace(given_bundle(phase="fetching"), seen_at=T0)
    assert observe(taken, rollout(watched_since=T0), T0 + hour)[0] is Outcome.TIMED_OUT
    connected = replace(silent, seen_at=T0 + hour)
    assert observe(connected, rollout(watched_since=T0), T0 + hour)[0] is Outcome.TIMED_OUT


def test_a_box_that_is_off_does_not_hold_up_its_wave_for_ever() -> None:
    w = world([2, 1])
    w.course = replace(w.course, watched_since=T0)
    w.turn()
    w.report("a0-0", "commits")
    w.now += timedelta(minutes=61)
    w.change("a0-0", seen_at=w.now)
    w.turn()
    w.turn()
    assert w.opened == [0, 1]
    assert w.members["a0-1"].outcome is Outcome.REMOVED


def test_a_wave_without_any_agent_left_proves_nothing() -> None:
    w = world([1, 1])
    w.turn()
    w.change("a0-0", gone="it was forgotten")
    w.turn()
    w.turn()
    assert (w.course.state, w.opened) == (RolloutState.PAUSED, [0])


def test_an_abort_recalls_an_agent_that_timed_out_in_its_trial() -> None:
    w = world([1], policy={"timeoutConfig": {"inProgressTimeoutInMinutes": 1}})
    w.turn()
    w.report("a0-0", "tries")
    w.turn()
    w.now += timedelta(minutes=2)
    w.turn()
    assert (w.members["a0-0"].outcome, w.course.state) == (Outcome.TIMED_OUT, RolloutState.ABORTED)
    assert [s.bundle for s in w.turn() if isinstance(s, Revert)] == [OLD]


def test_a_rollout_of_a_withdrawn_bundle_ends_and_recalls() -> None:
    w = world([2])
    w.turn()
    w.report("a0-0", "commits")
    w.turn()
    w.course = replace(w.course, released=frozenset({OLD}))
    w.turn()
    assert (w.course.state, w.reasons[-1]) == (RolloutState.ABORTED, "the bundle is not released any more")
    assert [s.agent_id for s in w.turn() if isinstance(s, Revert)] == ["a0-1"]


def test_a_budget_bounds_how_many_agents_of_a_site_are_in_change_at_once() -> None:
    budget = {"maximumPerLabel": {"site": 1}, "maximumInChange": 2}
    w = world([6], policy={"budgetConfig": budget})
    for number, agent_id in enumerate(list(w.members)):
        w.change(agent_id, labels={"site": "abc"[number // 2]})
    largest = 0
    for _ in range(12):
        w.turn()
        busy = [m for m in w.members.values() if m.generation and m.outcome not in DONE]
        largest = max(largest, len(busy))
        assert len(busy) <= 2
        assert len({m.labels["site"] for m in busy}) == len(busy)
        for m in busy[:1]:
            w.report(m.agent_id, "commits")
    assert (len(w.given), largest) == (6, 2)
    assert w.course.state is RolloutState.COMPLETED
    assert w.course.policy == parse_policy({"budgetConfig": budget})


def test_a_report_of_the_wrong_agent_state_never_counts_as_back() -> None:
    sent = replace(given_bundle(**COMMITTED), returned_generation=4, return_bundle=OLD, desired_generation=4)
    for facts in (COMMITTED, {"phase": "fetching", "active": A, "target": OLD}, {"active": OLD, "generation": 3}):
        reported = report(**({"generation": 4} | facts))
        assert observe_return(replace(sent, reported=reported), rollout(), T0)[0] is Return.PENDING
    assert "0 of 1" in tally([sent], rollout())
    assert member().committed == "" == replace(member(), reported=report(phase=Phase.TRIAL, active=A)).committed
