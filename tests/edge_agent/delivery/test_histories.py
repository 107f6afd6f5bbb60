"""Random histories of one agent: whatever is asked, aborted, tested, cut off or lost, only what is proven judges."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.config import DeliveryConfig
from edge_agent.delivery import state_file
from edge_agent.delivery import updater as module
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import champion_file
from edge_agent.line_protocol import Beat, LoadFailed, ModelFailed
from models.errors import SortlineError
from models.messages import Desired, Fault, Live, Mode, Phase, SafeState
from tests.edge_agent.delivery.test_power import Host

BUNDLES = tuple(digit * 64 for digit in "abcd")
ITEMS = 5


class Wire:
    """A transfer that is whole at the second look."""

    def __init__(self) -> None:
        self.looks: Counter[str] = Counter()

    @property
    def progress(self) -> float:
        return 0.0

    def tick(self, digest: str) -> bool:
        self.looks[digest] += 1
        return self.looks[digest] % 2 == 0

    def take(self, _topic: str, _payload: bytes) -> SortlineError | None:
        return None

    def drop(self) -> None:
        return


class Disk:
    """The state file; now and then it refuses."""

    def __init__(self, root: Path) -> None:
        self.file, self.full = champion_file(root), False

    def load(self):
        return self.file.load()

    def save(self, state) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.file.save(state)


class Box:
    """The real updater on a real state file; the model beside it keeps what was proven here and what was called off."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generation = 0
        self.tested: set[str] = set()
        self.proven: set[str] = set()
        self.failed: set[str] = set()
        self.aborted: set[str] = set()
        """Bundles that a later desired state has called off since they were asked for last."""
        self.waiting: Desired | None = None
        self.safe = SafeState.NONE
        self.disk = Disk(self.root)
        self.start()

    def start(self) -> None:
        self.host = Host()
        self.wire = Wire()
        self.updater = module.Updater(self.root, DeliveryConfig(), self.disk, self.wire, self.host, self.host)
        self.host.updater = self.updater
        try:
            self.updater.recover()
        except OSError:
            assert self.disk.full
        self.note_failures()

    def note_failures(self) -> None:
        self.failed |= set(self.updater.state.blocked)

    def act(self, step) -> None:
        """Runs a step as the supervisor's loop does: a disk error ends the step, and the next turn tries again."""
        before = self.updater.state
        try:
            step()
        except OSError:
            assert self.disk.full
        after = self.updater.state
        if before.phase is Phase.TRIAL and after.phase is Phase.COMMITTED and after.active == before.active:
            assert before.active not in self.aborted, "a trial that was called off was committed"
            self.proven.add(after.active)
            self.safe = SafeState.NONE
        self.note_failures()

    def desire(self, **wanted: object) -> None:
        self.generation += 1
        self.waiting = Desired(generation=self.generation, trial_items=ITEMS, **wanted)
        if self.waiting.mode is Mode.LIVE:
            self.aborted |= {self.updater.state.target, *self.on_trial}
            self.aborted.discard(self.waiting.bundle)
        self.take_up()

    def take_up(self) -> None:
        wanted = self.waiting
        if wanted is None:
            return
        committed = self.updater.state.committed
        self.act(lambda: self.updater.desire(wanted))
        if self.updater.state.generation >= wanted.generation:
            self.waiting = None
            if wanted.mode is Mode.LIVE and wanted.bundle not in self.failed and wanted.bundle in {"", committed}:
                self.safe = wanted.safe_state

    @property
    def on_trial(self) -> set[str]:
        state = self.updater.state
        return {state.active} if state.phase is Phase.TRIAL else set()

    # -- what happens -----------------------------------------------------------------------------------------

    def a_bundle_is_assigned(self, bundle: str) -> None:
        self.desire(bundle=bundle)

    def a_challenger_is_assigned(self, bundle: str) -> None:
        self.desire(bundle=bundle, mode=Mode.SHADOW)

    def everything_is_recalled(self, safe_state: SafeState) -> None:
        self.desire(bundle="", safe_state=safe_state)

    def an_update_gets_far(self, bundle: str, until: str) -> None:
        """One long step, so that short histories reach the deep states, too: the way of a bundle to some end."""
        self.desire(bundle=bundle)
        for _ in range(6):
            phase = self.updater.state.phase
            if phase is Phase.SELF_TEST and self.updater.state.target == bundle:
                if until == "self-test":
                    return
                self.a_self_test_ends(until != "test-fails", bundle)
            elif phase is Phase.TRIAL and self.updater.judging == bundle and until in {"trial", "trial-fails"}:
                if until == "trial-fails":
                    self.the_bundle_breaks(ModelFailed)
                return
            self.time_passes(1, ITEMS if until == "" else 0)

    def time_passes(self, turns: int, items: int) -> None:
        for _ in range(turns):
            self.take_up()
            judging = self.updater.judging
            live = Live(boot_id="0" * 16, at_ms=0)
            beat = Beat(digest=judging, items_on_bundle=items, belt_running=True, camera_fault="", live=live)
            self.act(lambda beat=beat: self.updater.tick(30.0, beat))

    def a_self_test_ends(self, passed: bool, digest: str) -> None:
        digest = digest or self.updater.state.target
        if digest == self.updater.state.target:
            (self.tested if passed else self.failed).add(digest)
        fault = None if passed else Fault(code="selftest.too_slow", message="")
        self.act(lambda: self.updater.tested(SelfTestDone(digest, fault)))

    def the_line_dies(self) -> None:
        self.act(lambda: self.updater.line_died("exit status -9"))
        self.host.load_judging()  # the next line process is started with what it has to judge with (`LineKeeper.tick`)

    def the_bundle_breaks(self, kind: type) -> None:
        message = kind(digest=self.updater.judging, fault=Fault(code="model.failed", message=""))
        self.act(lambda: self.updater.bundle_failed(message))

    def the_standby_comes_or_goes(self, covered: bool) -> None:
        self.host.covered = covered

    def the_disk_fills_or_empties(self, full: bool) -> None:
        self.disk.full = full

    def the_power_fails(self) -> None:
        """The agent begins again from its disk; a desired state that was not taken up is retained and comes again."""
        self.start()
        self.take_up()

    # -- what must hold ---------------------------------------------------------------------------------------

    def only_what_is_proven_is_committed(self) -> None:
        state = self.updater.state
        assert state.committed in self.proven | {""}
        assert state.previous in self.proven | {""}

    def nothing_blocked_judges_or_is_a_way_back(self) -> None:
        state = self.updater.state
        assert not {state.active, state.previous, state.target} & set(state.blocked)

    def what_judges_passed_its_self_test(self) -> None:
        assert self.updater.judging in self.tested | {""}

    def in_a_safe_state_no_committed_bundle_judges(self) -> None:
        if self.updater.safe_state:
            assert self.updater.judging == ""
        if self.safe and self.updater.judging:
            assert self.updater.state.phase is Phase.TRIAL
            assert self.updater.judging == self.updater.state.active

    def the_line_has_what_it_has_to_judge_with(self) -> None:
        if self.host.loads:
            assert self.host.loads[-1] == self.updater.judging or self.updater.state.phase is Phase.TRIAL

    def check(self) -> None:
        self.only_what_is_proven_is_committed()
        self.nothing_blocked_judges_or_is_a_way_back()
        self.what_judges_passed_its_self_test()
        self.in_a_safe_state_no_committed_bundle_judges()
        self.the_line_has_what_it_has_to_judge_with()


def a_step(box: Box, rng: random.Random) -> tuple[str, tuple[object, ...]]:
    """The next thing that happens, and with what: long steps often, so that short histories get deep."""
    ends = ("self-test", "test-fails", "trial", "trial", "trial-fails", "", "", "")
    bundle = rng.choice(BUNDLES)
    steps: list[tuple[int, str, tuple[object, ...]]] = [
        (6, "an_update_gets_far", (bundle, rng.choice(ends))),
        (4, "a_bundle_is_assigned", (bundle,)),
        (1, "a_challenger_is_assigned", (bundle,)),
        (2, "everything_is_recalled", (rng.choice(list(SafeState)),)),
        (4, "time_passes", (rng.randint(1, 4), rng.randint(0, ITEMS))),
        (2, "the_line_dies", ()),
        (1, "the_bundle_breaks", (rng.choice((LoadFailed, ModelFailed)),)),
        (1, "the_standby_comes_or_goes", (rng.random() < 0.5,)),
        (1, "the_disk_fills_or_empties", (rng.random() < 0.3,)),
        (2, "the_power_fails", ()),
    ]
    if box.updater.state.phase is Phase.SELF_TEST:
        steps.append((3, "a_self_test_ends", (rng.random() < 0.7, rng.choice((*BUNDLES, "", "")))))
    _, name, arguments = rng.choices(steps, weights=[weight for weight, _, _ in steps])[0]
    return name, arguments


@pytest.fixture
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "start_selftest", lambda *_: None)
    monkeypatch.setattr(module, "collect_garbage", lambda *_: [])
    monkeypatch.setattr(module.Updater, "_usable", lambda _self, digest: bool(digest))
    # Power cuts inside a write are `test_power`'s; here a thousand histories shall not wait for a disk.
    monkeypatch.setattr(state_file, "write_atomically", lambda path, data, **_: path.write_bytes(data))


def run(root: Path, seeds: range, steps: int) -> Counter[str]:
    reached: Counter[str] = Counter()
    for seed in seeds:
        place = root / str(seed)
        place.mkdir()
        rng, box, history = random.Random(seed), Box(place), []
        for _ in range(steps):
            name, arguments = a_step(box, rng)
            history.append((name, *arguments))
            try:
                getattr(box, name)(*arguments)
                box.check()
            except AssertionError as error:
                error.add_note(f"seed {seed}: " + "\n".join(map(str, history)))
                raise
        reached.update(committed=len(box.proven) > 1, blocked=bool(box.failed), safe=bool(box.safe))
        shutil.rmtree(place)
    return reached


@pytest.mark.usefixtures("_no_processes")
def test_no_history_leaves_a_blocked_or_unproven_bundle_committed(tmp_path: Path) -> None:
    reached = run(tmp_path, range(30), steps=25)
    assert min(reached.values()) > 5, f"the histories are too shallow to prove anything: {reached}"


@pytest.mark.slow
@pytest.mark.usefixtures("_no_processes")
def test_no_long_history_leaves_a_blocked_or_unproven_bundle_committed(tmp_path: Path) -> None:
    run(tmp_path, range(1000, 2000), steps=40)
