"""A challenger comes, is tested, judges in the shadow, and goes; the champion notices nothing."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.config import DeliveryConfig
from edge_agent.delivery import challenger as module
from edge_agent.delivery.challenger import Challenger
from edge_agent.delivery.lifecycle import CHALLENGER, ChallengerState, Trigger, advance_challenger
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import challenger_file
from edge_agent.line_protocol import ShadowChanged, ShadowFailed
from models.errors import BundleError, ConflictError, SortlineError
from models.messages import Desired, Fault, Mode, ShadowPhase

ONE, TWO = "11" * 32, "22" * 32


class Wire:
    """A transfer that is whole when a test says so."""

    whole = False
    dropped = 0
    refuses = ""

    def tick(self, _digest: str) -> bool:
        return self.whole

    def take(self, _topic: str, _payload: bytes) -> SortlineError | None:
        if self.refuses:
            raise BundleError(self.refuses, "No bundle.")
        return None

    def drop(self) -> None:
        self.dropped += 1


class Site:
    """The supervisor's part, remembered; and the state file read back as after a power cut at every load."""

    fault: Fault | None = None
    outlets = ("reject",)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counters: Counter[str] = Counter()
        self.line_ready = True
        self.loads: list[str] = []
        self.events: list[str] = []
        self.faults: list[str] = []
        self.tries_on_disk: list[int] = []

    def event(self, code: str, _message: str, **_facts: str) -> None:
        self.events.append(code)

    def report_error(self, error: SortlineError) -> None:
        self.faults.append(error.code)

    def set_fault(self, fault: Fault) -> None:
        self.faults.append(fault.code)

    def report(self) -> None:
        return

    def enqueue(self, _event: object) -> bool:
        return True

    def load_shadow(self, digest: str) -> None:
        self.loads.append(digest)
        self.tries_on_disk.append(challenger_file(self.root).read().tries)


class Bench:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.now_s, self.wire, self.site, self.root = 0.0, Wire(), Site(root), root
        self.tests: list[str] = []
        if monkeypatch is not None:
            monkeypatch.setattr(module, "start_selftest", lambda _path, digest, *_: self.tests.append(digest))
        self.found = self.restarted()

    def restarted(self) -> Challenger:
        self.found = Challenger(
            self.root,
            challenger_file(self.root),
            DeliveryConfig(),
            self.wire,  # type: ignore[arg-type]
            self.site,
            self.site,
            lambda: self.now_s,
        )
        return self.found

    def desire(
        self, generation: int, digest: str = ONE, mode: Mode = Mode.SHADOW, blocked: tuple[str, ...] = ()
    ) -> None:
        self.found.desire(Desired(generation=generation, bundle=digest, mode=mode), blocked)

    def until_shadow(self, digest: str = ONE, generation: int = 1) -> None:
        self.desire(generation, digest)
        self.wire.whole = True
        self.found.tick(settled=True)
        self.found.tick(settled=True)
        self.found.tested(SelfTestDone(digest, None))
        self.found.tick(settled=True)
        self.found.changed(ShadowChanged(digest=digest))

    @property
    def phase(self) -> ShadowPhase:
        return self.found.state.phase


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_it_is_fetched_tested_and_loaded_once(bench: Bench) -> None:
    bench.until_shadow()
    for _ in range(5):
        bench.found.tick(settled=True)
    assert bench.phase is ShadowPhase.SHADOW
    assert bench.tests == [ONE]
    assert bench.site.loads == [ONE]
    assert bench.found.running == ONE
    assert bench.site.events == ["selftest.passed", "shadow.started"]


def test_it_waits_while_the_champion_is_fetched_tested_or_tried(bench: Bench) -> None:
    bench.desire(1)
    bench.wire.whole = True
    for _ in range(3):
        bench.found.tick(settled=False)
    assert bench.phase is ShadowPhase.FETCHING


def test_a_live_assignment_ends_it_and_an_older_one_changes_nothing(bench: Bench) -> None:
    bench.until_shadow(generation=5)
    bench.desire(4, TWO)
    assert bench.found.state.digest == ONE
    bench.desire(6, ONE, Mode.LIVE)
    assert bench.phase is ShadowPhase.IDLE
    assert bench.site.loads == [ONE, ""]
    assert not bench.found.running


def test_a_newer_generation_of_the_same_challenger_goes_on_without_a_break(bench: Bench) -> None:
    bench.until_shadow()
    bench.desire(2)
    assert bench.found.running == ONE
    assert bench.site.loads == [ONE]
    assert bench.found.state.generation == 2


def test_a_bundle_that_failed_as_a_champion_is_refused(bench: Bench) -> None:
    bench.desire(1, blocked=(ONE,))
    assert bench.phase is ShadowPhase.IDLE
    assert bench.site.faults == ["agent.digest_blocked"]


def test_a_failed_self_test_ends_it_until_a_newer_assignment(bench: Bench) -> None:
    bench.desire(1)
    bench.wire.whole = True
    bench.found.tick(settled=True)
    bench.found.tick(settled=True)
    assert bench.found.tested(SelfTestDone(ONE, Fault(code="selftest.golden", message="")))
    bench.found.tick(settled=True)
    assert bench.phase is ShadowPhase.FAILED
    assert not bench.site.loads
    bench.desire(2)
    assert bench.phase is ShadowPhase.FETCHING


def test_a_self_test_of_the_champion_is_not_taken(bench: Bench) -> None:
    assert not bench.found.tested(SelfTestDone(ONE, None))


def test_a_self_test_overtaken_by_a_newer_assignment_is_dropped_and_the_new_one_tested(bench: Bench) -> None:
    bench.desire(1)
    bench.wire.whole = True
    bench.found.tick(settled=True)
    bench.found.tick(settled=True)
    bench.desire(2, TWO)
    bench.found.tick(settled=True)
    bench.found.tick(settled=True)
    assert bench.tests == [ONE]
    assert bench.found.tested(SelfTestDone(ONE, None))
    assert bench.phase is ShadowPhase.SELF_TEST
    bench.found.tick(settled=True)
    assert bench.tests == [ONE, TWO]


def test_a_challenger_is_withdrawn_after_the_line_died_twice_soon_after_taking_it(bench: Bench) -> None:
    bench.until_shadow()
    for _ in range(4):
        bench.found.line_gone()
        bench.found.tick(settled=True)
    assert bench.site.loads == [ONE, ONE]
    assert bench.site.tries_on_disk == [1, 2]  # counted before the line could die of it
    assert bench.phase is ShadowPhase.FAILED
    assert bench.site.faults == ["shadow.line_died"]


def test_a_death_of_the_line_after_a_minute_does_not_count_against_the_challenger(bench: Bench) -> None:
    bench.until_shadow()
    for _ in range(5):
        bench.now_s += 61.0
        bench.found.tick(settled=True)
        bench.found.line_gone()
        bench.found.tick(settled=True)
        bench.found.changed(ShadowChanged(digest=ONE))
    assert bench.phase is ShadowPhase.SHADOW


def test_a_line_that_refuses_it_is_not_asked_again(bench: Bench) -> None:
    bench.until_shadow()
    bench.found.failed(ShadowFailed(digest=ONE, fault=Fault(code="shadow.other_views", message="")))
    bench.found.tick(settled=True)
    assert bench.phase is ShadowPhase.FAILED
    assert bench.site.loads == [ONE]


def test_no_line_no_load(bench: Bench) -> None:
    bench.site.line_ready = False
    bench.until_shadow()
    assert bench.site.loads == []
    bench.site.line_ready = True
    bench.found.tick(settled=True)


def test_bytes_of_no_bundle_end_it(bench: Bench) -> None:
    bench.desire(1)
    bench.wire.refuses = "bundle.malformed"
    bench.found.chunk("topic", b"nonsense")
    assert bench.phase is ShadowPhase.FAILED
    assert bench.site.faults == ["bundle.malformed"]
    assert bench.wire.dropped == 1


@pytest.mark.parametrize("cut", range(5))
def test_a_power_cut_after_any_step_goes_on_with_the_same_challenger(bench: Bench, cut: int) -> None:
    steps = [
        lambda: bench.desire(1),
        lambda: bench.found.tick(settled=True),
        lambda: bench.found.tick(settled=True),
        lambda: bench.found.tested(SelfTestDone(ONE, None)),
        lambda: bench.found.tick(settled=True),
    ]
    bench.wire.whole = True
    for step in steps[: cut + 1]:
        step()
    bench.restarted()
    bench.desire(1)  # retained: it comes again, and is not newer
    for _ in range(4):
        bench.found.tick(settled=True)
        bench.found.tested(SelfTestDone(ONE, None))
    bench.found.changed(ShadowChanged(digest=ONE))
    assert bench.found.running == ONE


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 40, b'[{"schema_version":1},"00"]', b"x" * 20_000])
def test_a_broken_state_file_is_replaced_and_the_retained_assignment_restores_it(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "challenger.json").write_bytes(data)
    bench = Bench(tmp_path)
    assert bench.phase is ShadowPhase.IDLE
    bench.desire(7)
    assert bench.phase is ShadowPhase.FETCHING


@given(st.lists(st.sampled_from(Trigger), max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_way_leads_into_the_shadow_without_a_self_test(steps: list[Trigger]) -> None:
    state, tested = ChallengerState(), False
    ends = {Trigger.DESIRED, Trigger.DROPPED, Trigger.TEST_FAILED, Trigger.TRIAL_FAILED}
    for step in steps:
        try:
            state = advance_challenger(state, step)
        except ConflictError as error:
            assert error.code == "challenger.not_allowed"  # noqa: PT017  the law is about both ways
            continue
        tested = step is Trigger.TEST_PASSED or (tested and step not in ends)
        assert (state.phase is ShadowPhase.SHADOW) == tested
    assert set(CHALLENGER.values()) == set(ShadowPhase)
