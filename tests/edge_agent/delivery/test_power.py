"""Power cuts during an update: every state a disk may be left in runs the old bundle or the new one."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.config import DeliveryConfig
from edge_agent.delivery import updater as updating
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import Framing, StateFile, champion_file
from edge_agent.delivery.transfer import Transfer
from edge_agent.delivery.updater import Updater
from edge_agent.line_protocol import Beat
from models.bundle import read_bundle
from models.errors import InputError, SortlineError
from models.messages import Desired, Fault, Live, Phase
from tests.edge_agent.delivery.test_fetch import Blobs
from tests.edge_agent.delivery.test_transfer import Broker
from tests.simulators.power import Recorder, states
from tests.simulators.tiny_bundle import tiny_bundle

ORDER = [Phase.IDLE, Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST, Phase.TRIAL, Phase.COMMITTED]


class Host:
    """A supervisor without processes."""

    fault: Fault | None = None
    covered = True
    outlets = ("reject",)

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.loads: list[str] = []
        self.codes: list[str] = []
        self.reports: list[str] = []
        self.updater: Updater | None = None

    def event(self, code: str, message: str, **facts: str) -> None:
        self.codes.append(code)

    def report_error(self, error: SortlineError) -> None:
        self.codes.append(error.code)

    def set_fault(self, fault: Fault) -> None:
        self.codes.append(fault.code)
        self.fault = fault

    def report(self) -> None:
        self.reports.append(self.fault.code if self.fault else "")

    def enqueue(self, event: object) -> bool:
        return True

    def load_judging(self) -> None:
        self.loads.append(self.updater.judging)


class Agent:
    """The life cycle on a folder, its broker, no processes: the self-test is answered, the line is played."""

    def __init__(self, root: Path, blobs: Blobs) -> None:
        self.broker, self.host = Broker(blobs), Host()
        self.quarantined: list[str] = []
        config = DeliveryConfig(reserve_bytes=0)
        transfer = Transfer(root, "line-1", config, self.broker, Counter(), lambda: 0.0)
        file = champion_file(root, lambda _path, why: self.quarantined.append(why))
        self.updater = Updater(root, config, file, transfer, self.host, self.host)
        self.host.updater = self.updater

    def run(self, digest: str, generation: int = 2) -> None:
        self.updater.recover()
        self.updater.desire(Desired(generation=generation, bundle=digest, trial_items=5))
        for _ in range(200):
            state = self.updater.state
            if state.phase is Phase.COMMITTED and state.active == digest:
                return
            while self.broker.deliveries:
                self.updater.chunk(*self.broker.deliveries.pop(0))
            if state.phase is Phase.SELF_TEST:
                self.updater.tested(SelfTestDone(digest, None))
            self.updater.tick(0.25, beat(state))
        pytest.fail(f"stuck in {self.updater.state}")


def beat(state: SlotState) -> Beat:
    live = Live(boot_id="0" * 16, at_ms=0)
    return Beat(digest=state.active, items_on_bundle=10, belt_running=True, camera_fault="", live=live)


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updating, "start_selftest", lambda *_, **__: None)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    directory = tmp_path_factory.mktemp("old") / "bundle"
    tiny_bundle(directory, view_px=16)
    return Blobs(directory)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    directory = tmp_path_factory.mktemp("new") / "bundle"
    tiny_bundle(directory, view_px=16, bias=0.5, seed=3)
    return Blobs(directory)


@pytest.fixture
def recorded(tmp_path: Path, old: Blobs, new: Blobs, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An update from the old bundle to the new one; whatever was saved must survive from then on."""
    root = tmp_path / "agent"
    root.mkdir()
    Agent(root, old).run(old.bundle.digest, 1)
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        agent = Agent(root, new)
        save = agent.updater._file.save

        def saved(state: SlotState) -> None:
            save(state)
            recorder.mark(state)

        agent.updater._file.save = saved
        agent.run(new.bundle.digest)
    assert {op.kind for op in recorder.ops} >= {"create", "write", "rename", "fsync", "link", "mkdir", "remove"}
    return recorder


def fault_of(place: Path, marked: SlotState | None, old: Blobs, new: Blobs) -> str:
    """Returns what is wrong with a disk after a power cut; empty = nothing."""
    broken: list[str] = []
    state = champion_file(place, lambda _path, why: broken.append(why)).load() or SlotState()
    if broken or any(_broken(place / name) for name in ("state.json", "state.json.bak")):
        return "a state file is broken"
    if state.active not in {old.bundle.digest, new.bundle.digest}:
        return f"runs {state.active or 'nothing'}"
    needed = {state.active, *([state.previous] if state.phase is Phase.TRIAL else [])}
    if ORDER.index(state.phase) in {2, 3}:
        needed.add(state.target)
    for digest in needed:
        try:
            read_bundle(place / "slots" / digest, digest=digest)
        except SortlineError as error:
            return f"{state.phase}: {digest[:8]}: {error.code}"
    if marked is not None:
        reached = (state.generation, ORDER.index(state.phase), state.tries)
        if reached < (marked.generation, ORDER.index(marked.phase), marked.tries):
            return f"{marked.phase} was saved, {state.phase} is left"
    return ""


def _broken(path: Path) -> bool:
    try:
        StateFile(path, SlotState, framing=Framing.OBJECT).read()
    except InputError:
        return True
    return False


def faults(recorder: Recorder, scratch: Path, old: Blobs, new: Blobs, without: int | None = None) -> list[str]:
    found: list[str] = []
    seen: set[object] = set()
    # Leaving out an fsync can only hurt after it.
    for cut, disk in states(recorder.begin, recorder.ops, without, lambda cut: without is None or cut > without):
        marked = [fact for index, fact in recorder.marks if index <= cut]
        key = (len(marked), disk.key(but="fetch"))  # half-fetched files decide nothing
        if key in seen:
            continue
        seen.add(key)
        place = scratch / str(len(seen))
        disk.write_to(place)
        fault = fault_of(place, marked[-1] if marked else None, old, new)
        if fault:
            found.append(f"cut after {cut} of {len(recorder.ops)}: {fault}")
            if without is not None:
                return found
        shutil.rmtree(place)
    assert without is not None or len(seen) > 100
    return found


def test_no_power_cut_leaves_anything_but_the_old_or_the_new_bundle(
    recorded: Recorder, tmp_path: Path, old: Blobs, new: Blobs
) -> None:
    assert faults(recorded, tmp_path / "cuts", old, new) == []


@pytest.mark.slow
def test_leaving_out_any_fsync_is_found_out(recorded: Recorder, tmp_path: Path, old: Blobs, new: Blobs) -> None:
    """The proof that the test above can fail, and that no fsync is there for nothing."""
    syncs = [index for index, op in enumerate(recorded.ops) if op.kind == "fsync"]
    assert len(syncs) > 15
    idle = [i for i in syncs if not faults(recorded, tmp_path / f"without-{i}", old, new, without=i)]
    assert not idle, [(i, recorded.ops[i - 3 : i + 2]) for i in idle]


@pytest.mark.slow
def test_after_a_power_cut_the_update_is_finished(recorded: Recorder, tmp_path: Path, old: Blobs, new: Blobs) -> None:
    cuts = random.Random(4).sample(range(len(recorded.ops)), 12)
    tried = 0
    for _, disk in states(recorded.begin, recorded.ops, every=lambda cut: cut in cuts):
        tried += 1
        if tried % 10:
            continue
        place = tmp_path / "cuts" / str(tried)
        disk.write_to(place)
        agent = Agent(place, new)
        agent.run(new.bundle.digest, 3)
        assert agent.quarantined == []
        assert agent.updater.state.tries <= 2
        read_bundle(place / "slots" / new.bundle.digest, digest=new.bundle.digest)
    assert tried > 100
