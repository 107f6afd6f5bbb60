"""An agent's status: the worst axis decides, ages grow, and figures mean what the bundle's recipe says."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from control_plane.database.tables.columns import utc_now
from control_plane.fleet.reports import connection_of
from control_plane.monitoring.figures import completeness_of, drift_of, figures_of
from control_plane.monitoring.sorting import sorting_of
from control_plane.monitoring.status import AgentStatus, Facts, State, agent_status
from control_plane.monitoring.windows import merged_window
from control_plane.services import Services
from models.histogram import Histogram
from models.messages import Fault, Live, Mode, Phase, Presence, ShadowPhase, encode
from models.profile import FeatureCounter
from models.recipe import Grade, Recipe
from models.topics import Channel, agent_topic
from models.windows import Window
from tests.control_plane.fleet.test_fleet import BOOT, A, B, reported, say, window
from tests.simulators.tiny_bundle import tiny_bundle

RECIPE = Recipe(
    classes=("rot", "export quality"),
    good_class="export quality",
    grades={
        "premium": Grade(outlet="belt 2", classes=("export quality",)),
        "juice": Grade(outlet="pass", classes=("rot",)),
    },
    unsure_outlet="again",
    late_outlet="belt 2",
)
"""A customer's own names: `pass` is where the rot goes."""


def status(**changes: object) -> AgentStatus:
    now = utc_now()
    facts = Facts(
        agent_id="line-1",
        now=now,
        online=True,
        seen_at=now - timedelta(seconds=3),
        reported=reported(active=A, phase=Phase.COMMITTED, generation=2),
        reported_at=now,
        desired_bundle=A,
        generation=2,
        figures=figures_of(window(), None),
        window_at=now,
    )
    return agent_status(replace(facts, **changes))


def test_no_status_is_good_without_a_fresh_sign_of_life() -> None:
    assert status().state is State.GOOD
    old = utc_now() - timedelta(seconds=60)
    assert status(seen_at=old).state is State.OFFLINE
    assert status(seen_at=None).state is State.OFFLINE
    assert status(online=False).state is State.OFFLINE
    assert status(seen_at=utc_now() - timedelta(seconds=35)).state is State.MAINTENANCE
    assert connection_of(None, online=True) == "never"


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"camera_fault": "camera.frozen"}, State.FAILURE),
        ({"line_running": False, "camera": "", "counters": {"line_starts": 1}}, State.CHECK),
        ({"line_running": False, "camera": "", "counters": {"line_starts": 2}}, State.FAILURE),
        ({"line_running": False, "camera": "simulated", "counters": {"line_starts": 1}}, State.FAILURE),
        ({"phase": Phase.ROLLED_BACK}, State.CHECK),
        ({"phase": Phase.TRIAL}, State.CHECK),
        ({"active": B}, State.CHECK),
        ({"active": ""}, State.CHECK),
        ({"generation": 1}, State.CHECK),
        ({"fault": Fault(code="x.y", message="z")}, State.CHECK),
        ({"spool_records": 100}, State.MAINTENANCE),
    ],
)
def test_the_worst_axis_decides(facts: dict[str, object], state: State) -> None:
    base = reported(active=A, phase=Phase.COMMITTED, generation=2)
    found = status(reported=msgspec.structs.replace(base, **facts))
    assert found.state is state
    assert found.reason


def test_a_challenger_in_the_shadow_is_no_fault_until_it_fails() -> None:
    def shadowed(phase: ShadowPhase) -> AgentStatus:
        said = reported(active=A, phase=Phase.COMMITTED, generation=3, shadow=B, shadow_phase=phase)
        return status(reported=said, desired_bundle=B, mode=Mode.SHADOW, generation=3)

    judging = shadowed(ShadowPhase.SHADOW)
    assert (judging.state, judging.runs.in_sync, judging.runs.shadow) == (State.GOOD, True, B)
    assert shadowed(ShadowPhase.FETCHING).state is State.GOOD
    failed = shadowed(ShadowPhase.FAILED)
    assert (failed.state, failed.reason, failed.runs.in_sync) == (State.CHECK, "the challenger failed", False)


def test_two_boxes_under_one_identity_are_named_with_both_boots() -> None:
    twins = [{"boot_id": BOOT, "box": "address 10.0.0.7"}, {"boot_id": "f" * 16, "box": ""}]
    found = status(twins=twins)
    assert found.state is State.FAILURE
    assert all(part in found.reason for part in ("identity.twins", BOOT[:8], "10.0.0.7", "ffffffff"))


def test_ages_grow_and_never_is_shown_only_where_nothing_ever_came() -> None:
    now = utc_now()
    old = status(window_at=now - timedelta(days=3), seen_at=now - timedelta(days=2))
    assert (old.link.window_age_s, old.link.seen_age_s) == pytest.approx((259_200, 172_800), abs=60)
    assert status(window_at=None).link.window_age_s is None


@pytest.mark.parametrize(("slow", "state"), [(15, State.GOOD), (25, State.OUT_OF_SPEC)])
def test_a_few_items_that_lose_their_last_view_are_no_alarm(slow: int, state: State) -> None:
    latency = Histogram()
    latency.add(5.0, 1000 - slow)
    latency.add(105.0, slow)
    found = status(figures=figures_of(window(latency_ms=latency), None))
    assert (found.state, found.figures.p99_ms > 50.0) == (state, True)
    assert ("2.5%" in found.reason) is (state is State.OUT_OF_SPEC)


def test_drift_is_shown_with_enough_items_and_is_no_alarm_by_itself(tmp_path: Path) -> None:
    profile = tiny_bundle(tmp_path / "b").profile
    rng = np.random.default_rng(3)

    def drifted(items: int, shift: float) -> Window:
        counter = FeatureCounter(profile)
        for row in rng.normal(shift, 1.0, (items, len(profile.features))).astype(np.float32):
            counter.add(row)
        features, nulls, _ = counter.take()
        return window(items, features=features.astype("<u4").tobytes(), nulls=nulls)

    assert drift_of(drifted(400, 0.0), profile).drift == "calm"
    both = merged_window([drifted(200, 1.0), drifted(200, 1.0)], A)
    moved = status(drift=drift_of(both, profile), figures=figures_of(both, None))
    assert (moved.state, moved.drift.drift, moved.figures.items) == (State.GOOD, "drifting", 400)
    assert moved.drift.drift_value > 0.25
    assert drift_of(drifted(50, 1.0), profile).drift == "learning"
    assert drift_of(None, profile).drift == drift_of(drifted(400, 0.0), None).drift == "unknown"


def test_rates_ask_the_recipe_which_class_is_good_and_which_outlet_lets_through() -> None:
    sorting = sorting_of(RECIPE)
    truth = {
        "export quality>belt 2": 8,
        "export quality>pass": 1,
        "export quality>again": 1,
        "rot>pass": 3,
        "rot>belt 2": 1,
        "sound>pass": 4,
    }
    # A kind the recipe does not know is no good one; `pass` lets nothing through here.
    assert sorting.rates(truth) == (1 / 8, 0.2)
    assert sorting.reject_share({"belt 2": 6, "pass": 3, "again": 1}) == pytest.approx(0.4)
    assert sorting.rates({}) == (None, None)
    assert sorting.reject_share({}) is None
    assert sorting.classes == ("export quality", "rot")


def test_a_recipe_without_grades_lets_its_good_class_pass() -> None:
    sorting = sorting_of(Recipe(classes=("rot", "sound"), good_class="sound"))
    truth = {"sound>pass": 9, "sound>reject": 1, "rot>pass": 1, "rot>reject": 3}
    assert sorting.rates(truth) == (0.25, 0.1)


def test_a_bundle_that_is_not_known_here_shows_no_figure_instead_of_a_wrong_one() -> None:
    counted = window(
        classes={"export quality": 7, "rot": 3},
        outlets={"belt 2": 7, "pass": 3},
        truth={"export quality>belt 2": 7, "rot>pass": 3},
    )
    unknown = figures_of(counted, None)
    assert (unknown.reject_share, unknown.escape_rate, unknown.false_reject_rate) == (None, None, None)
    known = figures_of(counted, sorting_of(RECIPE))
    assert (known.reject_share, known.escape_rate, known.false_reject_rate) == (0.3, 0.0, 0.0)
    assert known.class_order == ("export quality", "rot")


def test_completeness_is_empty_without_any_record() -> None:
    assert completeness_of([]) is None
    assert completeness_of([(BOOT, 1), (BOOT, 4), ("x", 0)]) == pytest.approx(3 / 5)


def test_live_figures_are_shown_while_they_are_fresh(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT)))
    say(services, Channel.REPORTED, encode(reported(active=A, phase=Phase.COMMITTED)))
    clock = [100.0]
    monkeypatch.setattr(services.live, "_clock", lambda: clock[0])
    services.intake.put(agent_topic("line-1", Channel.LIVE), encode(Live(boot_id=BOOT, at_ms=1, items_per_s=17.0)))
    assert services.board.all()[0].live.items_per_s == 17.0
    clock[0] += 60.0
    assert services.board.all()[0].live is None
    services.intake.put(agent_topic("line-1", Channel.LIVE), b"[1]")
    assert services.board.all()[0].live is None
    assert services.counters["refused_message.malformed"] == 1
