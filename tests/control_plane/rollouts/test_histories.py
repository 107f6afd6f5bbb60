"""Random histories of a fleet against a small model of what has been proven where.

Rollouts, failures, overlaps, withdrawals, boxes that vanish, lost reports, power cuts and restarts, in any order. The
oracle: after a rollback or an abort no box ends on a bundle that is blocked or unproven there, an abort leaves no
trial behind, everything ends, and no sentence about a way back is false.
"""

import re
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from control_plane.database.engine import open_database
from control_plane.database.migrate import migrate
from control_plane.database.tables.rollouts import RolloutState
from control_plane.rollouts.views import Return
from edge_agent.delivery import updater as updating
from models.messages import Phase, SafeState
from tests.simulators.rollout_history import Box, History
from tests.simulators.tiny_bundle import tiny_bundle

BOXES = 3
LENIENT = [{"failureType": "ALL", "thresholdPercentage": 100, "minNumberOfExecutedThings": 9}]
POLICIES = ({}, {"abortConfig": {"criteriaList": LENIENT}}, {"budgetConfig": {"maximumInChange": 1}})
SUBSETS = (("box-0", "box-1", "box-2"), ("box-0",), ("box-1", "box-2"))
OUTCOMES = ("well", "well", "well", "fails", "refuses", "waits")
WHICH = st.integers(0, BOXES - 1)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A migrated database and four bundles, made once."""
    root = tmp_path_factory.mktemp("ground")
    migrate(f"sqlite:///{root / 'empty.db'}")
    bundles = {}
    for number in range(4):
        directory = root / f"bundle-{number}"
        bundles[tiny_bundle(directory, view_px=16, bias=0.1 * number).digest] = directory
    return root / "empty.db", bundles


def machine(database: Path, bundles: dict[str, Path]) -> type[RuleBasedStateMachine]:
    class Histories(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.root = Path(tempfile.mkdtemp(prefix="history-"))
            shutil.copy(database, self.root / "plane.db")
            self.engine = open_database(f"sqlite:///{self.root / 'plane.db'}")
            self.history = History(self.engine, self.root, bundles, BOXES)

        def box(self, which: int) -> Box:
            return self.history.boxes[f"box-{which}"]

        @rule(
            bundle=st.integers(0, 3),
            agents=st.sampled_from(SUBSETS),
            policy=st.sampled_from(POLICIES),
            twice=st.booleans(),
        )
        def create(self, bundle: int, agents: tuple[str, ...], policy: dict[str, object], twice: bool) -> None:
            """A lost answer: the same rollout is made a second time."""
            for _ in range(1 + twice):
                self.history.create(self.history.digests[bundle], agents, policy)
            self.history.turn()

        @rule(
            action=st.sampled_from(("abort", "rollback", "rollback", "pause", "resume", "finish")),
            which=st.integers(0, 9),
            safe_state=st.sampled_from((SafeState.NONE, SafeState.NONE, SafeState.EJECT_ALL)),
        )
        def act(self, action: str, which: int, safe_state: SafeState) -> None:
            if self.history.act(action, which, safe_state):
                self.history.turn()

        @rule(bundle=st.integers(0, 3))
        def withdraw_or_release(self, bundle: int) -> None:
            self.history.release(self.history.released ^ {self.history.digests[bundle]})

        @rule(which=WHICH, outcome=st.sampled_from(OUTCOMES), steps=st.integers(1, 5), reports=st.booleans())
        def work(self, which: int, outcome: str, steps: int, reports: bool) -> None:
            box = self.box(which)
            box.hear(self.history.released)
            for _ in range(steps):
                box.work(outcome)
            if reports:  # else the report is lost
                self.history.report(box)
                self.history.turn()

        @rule()
        def everybody_works(self) -> None:
            for _ in range(2):
                for box in self.history.boxes.values():
                    box.hear(self.history.released)
                    for _ in range(4):
                        box.work("well")
                    self.history.report(box)
                self.history.turn(timedelta(seconds=11))

        @rule(which=WHICH)
        def power_cut(self, which: int) -> None:
            self.box(which).power_cut()

        @rule(which=WHICH)
        def vanish_or_return(self, which: int) -> None:
            self.box(which).connected = not self.box(which).connected

        @rule(minutes=st.sampled_from((1, 30, 61)))
        def time_passes(self, minutes: int) -> None:
            self.history.turn(timedelta(minutes=minutes))

        @rule()
        def restart(self) -> None:
            self.history.restart()
            self.history.turn()

        @invariant()
        def boxes_judge_with_what_they_have_proven(self) -> None:
            for box in self.history.boxes.values():
                if box.state.phase is not Phase.TRIAL:
                    assert box.state.active in box.proven | {""}
                    assert box.state.active not in box.state.blocked

        @invariant()
        def ways_back_lead_to_what_was_proven(self) -> None:
            for rollout, part, _ in self.history.parts():
                if part.returned_generation:
                    assert part.return_bundle in self.history.boxes[part.agent_id].proven | {""}
                    assert part.return_bundle != rollout.bundle

        def teardown(self) -> None:
            try:
                self.history.settle()
                self.look()
            finally:
                self.engine.dispose()
                shutil.rmtree(self.root)

        def look(self) -> None:
            """Everything has had its time: what is said must be so."""
            self.boxes_judge_with_what_they_have_proven()
            counted: dict[int, dict[str, int]] = {}
            for rollout, part, agent in self.history.parts():
                box = self.history.boxes[part.agent_id]
                assert rollout.state is not RolloutState.ROLLING_BACK, rollout.reason
                assert part.returned != Return.PENDING
                counts = counted.setdefault(rollout.id, {})
                counts[part.returned] = counts.get(part.returned, 0) + 1
                newest = part.returned_generation and not self.history.moved(agent, part)
                if newest:
                    assert box.state.settled
                    assert (
                        box.state.generation >= part.returned_generation
                        or part.return_bundle not in self.history.released
                    )
                if newest and part.returned == Return.BACK:
                    assert box.state.committed == part.return_bundle
                    assert box.state.committed in box.proven - {rollout.bundle}
                if newest and part.returned == Return.SAFE:
                    assert box.safe_state is SafeState.EJECT_ALL
                if part.returned in {Return.NO_WAY_BACK, Return.REFUSED, Return.TIMED_OUT}:
                    assert part.return_reason
            for rollout, _, _ in self.history.parts():
                said = re.search(r"(\d+) of (\d+) agents report a bundle", rollout.reason)
                if said:
                    assert int(said[1]) == counted[rollout.id].get(Return.BACK, 0)

    return Histories


def run(ground: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch, examples: int, steps: int) -> None:
    monkeypatch.setattr(updating, "start_selftest", lambda *_, **__: None)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    profile = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(machine(*ground), settings=profile)


def test_no_history_leaves_a_box_on_what_it_has_not_proven(
    ground: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ground, monkeypatch, examples=3, steps=15)


@pytest.mark.slow
def test_no_long_history_leaves_a_box_on_what_it_has_not_proven(
    ground: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ground, monkeypatch, examples=120, steps=40)
