"""Trials with a standby: a try begins when one waits, the old bundle judges until then, and deaths are counted."""

import errno
import shutil
from pathlib import Path

import msgspec
import pytest

from edge_agent.delivery import updater as updating
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import champion_file
from edge_agent.line_protocol import Beat, LoadFailed, ModelFailed
from models.messages import Desired, Fault, Live, Phase, Swap
from tests.edge_agent.delivery.test_fetch import Blobs
from tests.edge_agent.delivery.test_power import Agent
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Blobs, Blobs]:
    found = []
    for bias in (0.0, 0.5):
        directory = tmp_path_factory.mktemp("bundle") / "tiny"
        tiny_bundle(directory, view_px=16, bias=bias)
        found.append(Blobs(directory))
    return found[0], found[1]


class Trial:
    """An agent with an old bundle whose new one has just passed its self-test."""

    def __init__(self, root: Path, bundles: tuple[Blobs, Blobs]) -> None:
        self.root, (old, self.blobs) = root, bundles
        self.old, self.new = old.bundle.digest, self.blobs.bundle.digest
        root.mkdir()
        Agent(root, old).run(self.old, 1)
        self.agent = Agent(root, self.blobs)
        self.host.covered = False
        self.updater.recover()
        self.updater.desire(Desired(generation=2, bundle=self.new, trial_items=5, trial_s=60.0))
        while self.state.phase is not Phase.SELF_TEST:
            self.updater.tick(0.25, None)
            while self.agent.broker.deliveries:
                self.updater.chunk(*self.agent.broker.deliveries.pop(0))
        self.testing = self.state
        self.updater.tested(SelfTestDone(self.new, None))

    @property
    def updater(self) -> updating.Updater:
        return self.agent.updater

    @property
    def host(self):
        return self.agent.host

    @property
    def state(self) -> SlotState:
        return self.updater.state

    @property
    def on_disk(self) -> SlotState:
        return champion_file(self.root).load()

    def begin(self) -> None:
        self.host.covered = True
        self.updater.tick(0.25, None)
        self.host.covered = False
        assert self.updater.judging == self.new

    def power_cut(self) -> None:
        self.agent = Agent(self.root, self.blobs)
        self.host.covered = False
        self.updater.recover()


@pytest.fixture
def trial(tmp_path: Path, bundles: tuple[Blobs, Blobs], monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr(updating, "start_selftest", lambda *_, **__: None)
    return Trial(tmp_path / "agent", bundles)


def beat(digest: str, items: int) -> Beat:
    live = Live(boot_id="0" * 16, at_ms=0)
    return Beat(digest=digest, items_on_bundle=items, belt_running=True, camera_fault="", live=live)


def test_a_try_begins_when_the_standby_waits_and_is_counted_then(trial: Trial) -> None:
    for _ in range(100):
        trial.updater.tick(0.25, beat(trial.old, 1000))
    assert (trial.state.phase, trial.state.tries, trial.updater.judging) == (Phase.TRIAL, 0, trial.old)
    assert trial.host.loads == []
    assert trial.updater.progress(beat(trial.old, 1000)) == 0.0
    trial.begin()
    assert trial.on_disk.tries == 1
    assert trial.host.loads == [trial.new]


def test_a_box_that_is_too_small_for_a_standby_still_gets_its_trial(trial: Trial) -> None:
    for _ in range(29):
        trial.updater.tick(1.0, None)
    assert trial.state.tries == 0
    trial.updater.tick(1.0, None)
    assert trial.state.tries == 1
    trial.updater.tick(0.25, beat(trial.new, 5))
    assert trial.state.phase is Phase.COMMITTED


def test_the_old_bundle_judges_between_two_tries_and_after_the_last(trial: Trial) -> None:
    trial.begin()
    trial.updater.line_died("exit status -9")
    assert (trial.updater.judging, trial.on_disk.tries, trial.on_disk.phase) == (trial.old, 1, Phase.TRIAL)
    trial.updater.tick(0.25, beat(trial.old, 1000))
    assert trial.state.phase is Phase.TRIAL, "the items of the old bundle prove nothing"
    trial.begin()
    assert trial.on_disk.tries == 2
    trial.updater.line_died("exit status -9")
    assert (trial.updater.judging, trial.on_disk.phase) == (trial.old, Phase.ROLLED_BACK)
    assert trial.on_disk.blocked == (trial.new,)
    assert trial.host.codes.count("trial.line_died") == 2, "reported, and an event"


def test_a_line_that_dies_while_the_old_bundle_judges_is_no_fault_of_the_new_one(trial: Trial) -> None:
    for _ in range(4):
        trial.updater.line_died("exit status -9")
        trial.updater.tick(6.0, None)
    assert (trial.state.tries, trial.state.phase, trial.updater.judging) == (0, Phase.TRIAL, trial.old)
    trial.updater.line_died("exit status -9")
    trial.updater.tick(6.0, None)
    assert trial.state.tries == 1, "nor does it make the trial wait for ever"


def test_after_a_power_cut_the_tries_are_known_and_the_old_bundle_judges_until_the_next(trial: Trial) -> None:
    trial.power_cut()
    assert (trial.state.tries, trial.updater.judging) == (0, trial.old)
    for tries in (1, 2):
        trial.begin()
        trial.power_cut()
        if tries == 1:
            assert (trial.state.phase, trial.state.tries, trial.updater.judging) == (Phase.TRIAL, tries, trial.old)
    assert (trial.on_disk.phase, trial.on_disk.active, trial.on_disk.blocked) == (
        Phase.ROLLED_BACK,
        trial.old,
        (trial.new,),
    )


def test_without_a_usable_bundle_before_a_trial_goes_on_at_once_after_a_power_cut(trial: Trial) -> None:
    shutil.rmtree(trial.root / "slots" / trial.old)
    trial.power_cut()
    assert (trial.state.tries, trial.updater.judging) == (1, trial.new)


def test_a_newer_assignment_ends_the_waiting(trial: Trial) -> None:
    trial.updater.desire(Desired(generation=3, bundle="33" * 32, trial_items=5))
    assert (trial.state.phase, trial.updater.judging) == (Phase.FETCHING, trial.old)
    assert trial.host.loads == [], "the line has the old bundle"
    trial.updater.line_died("exit status -9")
    assert trial.state.blocked == ()


@pytest.mark.parametrize("running", [False, True])
def test_a_desired_state_that_is_refused_ends_the_trial_all_the_same(trial: Trial, running: bool) -> None:
    """An abort names what ran before; where that is blocked here, the trial must not be committed in its place."""
    blocked = "44" * 32
    trial.updater.state = msgspec.structs.replace(trial.state, blocked=(blocked,))
    if running:
        trial.begin()
    trial.host.loads.clear()
    trial.updater.desire(Desired(generation=3, bundle=blocked))
    for _ in range(10):
        trial.updater.tick(1.0, beat(trial.new, 1000))
    assert (trial.on_disk.phase, trial.on_disk.active, trial.on_disk.generation) == (Phase.COMMITTED, trial.old, 3)
    assert trial.host.loads == ([trial.old] if running else [])
    assert trial.on_disk.blocked == (blocked,), "an abort is no fault of the bundle on trial"
    assert "agent.digest_blocked" in trial.host.codes


def test_a_desired_state_that_names_the_bundle_before_ends_the_trial_at_once(trial: Trial) -> None:
    trial.begin()
    trial.updater.desire(Desired(generation=3, bundle=trial.old))
    assert (trial.on_disk.phase, trial.on_disk.active) == (Phase.COMMITTED, trial.old), "it needs no second trial"
    assert trial.host.loads[-1] == trial.old


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST])
def test_a_desired_state_that_is_refused_ends_what_is_fetched_or_tested(trial: Trial, phase: Phase) -> None:
    blocked = "44" * 32
    trial.updater.state = msgspec.structs.replace(trial.testing, phase=phase, blocked=(blocked,))
    trial.updater.desire(Desired(generation=3, bundle=blocked))
    trial.updater.tested(SelfTestDone(trial.new, None))
    for _ in range(3):
        trial.updater.tick(1.0, beat(trial.old, 1000))
    assert (trial.on_disk.phase, trial.on_disk.active, trial.on_disk.target) == (Phase.COMMITTED, trial.old, "")


def test_an_abort_that_a_full_disk_refuses_keeps_the_trial_from_being_committed(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.begin()

    def full(_state: SlotState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trial.updater._file, "save", full)
        with pytest.raises(OSError, match="No space"):
            trial.updater.desire(Desired(generation=3, bundle=trial.old))
    trial.updater.tick(1.0, beat(trial.new, 1000))
    assert trial.state.phase is Phase.TRIAL, "there is room again, but the abort has not been written yet"
    trial.updater.desire(Desired(generation=3, bundle=trial.old))
    assert (trial.on_disk.phase, trial.on_disk.active) == (Phase.COMMITTED, trial.old)


def test_a_lot_that_begins_while_a_try_waits_for_its_standby_is_not_waited_for_again(trial: Trial) -> None:
    trial.updater.lot_began()
    assert trial.updater.swap is Swap.BELT_GAP, "this bundle waits for no lot"
    trial.updater.state = msgspec.structs.replace(trial.state, swap=Swap.LOT_CHANGE)
    assert trial.updater.swap is Swap.LOT_CHANGE
    trial.updater.lot_began()
    trial.begin()
    assert trial.updater.swap is Swap.BELT_GAP
    trial.updater.line_died("exit status -9")
    assert trial.updater.swap is Swap.LOT_CHANGE, "the next try is for the next lot"


def test_an_old_model_that_breaks_while_a_try_waits_is_loaded_again(trial: Trial) -> None:
    trial.updater.bundle_failed(ModelFailed(digest=trial.old, fault=Fault(code="model.failed", message="It broke.")))
    assert trial.state.phase is Phase.TRIAL
    assert trial.host.loads == [trial.old]


@pytest.mark.parametrize("tries", [1, 2])
def test_a_death_that_cannot_be_written_down_is_written_later(
    trial: Trial, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.begin()
    if tries == 2:
        trial.updater.line_died("exit status -9")
        trial.begin()

    def full(_state: SlotState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trial.host.covered = True
    with monkeypatch.context() as patch:
        patch.setattr(trial.updater._file, "save", full)
        with pytest.raises(OSError, match="No space"):
            trial.updater.line_died("exit status -9")
        assert trial.updater.judging == trial.old
        with pytest.raises(OSError, match="No space"):
            trial.updater.tick(0.25, beat(trial.new, 1000))
    assert trial.on_disk.tries == tries
    trial.updater.tick(0.25, None)
    if tries == 1:
        assert (trial.on_disk.tries, trial.updater.judging) == (2, trial.new)
    else:
        assert (trial.on_disk.phase, trial.updater.judging) == (Phase.ROLLED_BACK, trial.old)


@pytest.mark.parametrize("passed", [True, False])
def test_the_result_of_the_self_test_waits_for_a_full_disk(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    trial.updater.state = trial.testing
    before = len(trial.host.codes)

    def full(_state: SlotState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trial.updater._file, "save", full)
        fault = None if passed else Fault(code="selftest.too_slow", message="")
        with pytest.raises(OSError, match="No space"):
            trial.updater.tested(SelfTestDone(trial.new, fault))
        with pytest.raises(OSError, match="No space"):
            trial.updater.tick(0.25, None)
        assert trial.host.codes[before:] == []
    trial.updater.tick(0.25, None)
    assert trial.on_disk.phase is (Phase.TRIAL if passed else Phase.ROLLED_BACK)
    assert "selftest.passed" in trial.host.codes[before:] or not passed
    trial.updater.tick(0.25, None)
    assert trial.host.codes[before:].count("selftest.passed") == passed


@pytest.mark.parametrize("kind", [ModelFailed, LoadFailed])
def test_a_bundle_that_breaks_while_the_disk_is_full_is_taken_back_all_the_same(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, kind: type[ModelFailed | LoadFailed]
) -> None:
    trial.begin()

    def full(_state: SlotState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(trial.host.codes)
    with monkeypatch.context() as patch:
        patch.setattr(trial.updater._file, "save", full)
        with pytest.raises(OSError, match="No space"):
            trial.updater.bundle_failed(kind(digest=trial.new, fault=Fault(code="model.broken", message="")))
        assert (trial.updater.judging, trial.host.loads[-1]) == (trial.old, trial.old)
        for _ in range(5):
            with pytest.raises(OSError, match="No space"):
                trial.updater.tick(0.25, None)
    assert len(trial.host.codes) == before + 1, "said once, not at every try"
    trial.host.reports.clear()
    trial.updater.tick(0.25, None)
    assert (trial.on_disk.phase, trial.on_disk.active) == (Phase.ROLLED_BACK, trial.old)
    assert trial.new in trial.on_disk.blocked
    assert trial.host.reports[0] == "model.broken", "no report says that it was taken back and not why"


def test_an_agent_that_restarts_on_a_full_disk_starts(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    champion_file(trial.root).save(trial.testing)

    def full(_state: SlotState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    agent = Agent(trial.root, trial.blobs)
    monkeypatch.setattr(agent.updater._file, "save", full)
    agent.updater.recover()
    assert (agent.updater.state.phase, agent.updater.judging) == (Phase.FETCHING, trial.old)
