"""The life cycle of bundles: nothing is forgotten by a crash, nothing bad is tried twice, a commit is final."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.delivery.lifecycle import CHAMPION, ChallengerState, SlotState, Trigger, advance
from edge_agent.delivery.state_file import challenger_file, champion_file
from edge_agent.supervisor.lots import lot_file
from models.errors import ConflictError, InputError
from models.messages import LotSource, Phase, ShadowPhase, Swap

A, B, C = "a" * 64, "b" * 64, "c" * 64


def desired(state: SlotState, target: str, generation: int = 1) -> SlotState:
    return advance(state, Trigger.DESIRED, target=target, generation=generation)


def committed(digest: str) -> SlotState:
    state = desired(SlotState(), digest)
    for trigger in (
        Trigger.FETCHED,
        Trigger.TEST_STARTED,
        Trigger.TEST_PASSED,
        Trigger.TRIAL_STARTED,
        Trigger.TRIAL_PASSED,
    ):
        state = advance(state, trigger)
    return state


def test_the_way_of_a_good_bundle() -> None:
    state = committed(A)
    assert (state.phase, state.active, state.previous, state.tries) == (Phase.COMMITTED, A, "", 1)


def test_a_failed_trial_goes_back_and_blocks() -> None:
    state = desired(committed(A), B, 2)
    for trigger in (Trigger.FETCHED, Trigger.TEST_STARTED, Trigger.TEST_PASSED, Trigger.TRIAL_STARTED):
        state = advance(state, trigger)
    assert (state.active, state.previous) == (B, A)
    state = advance(state, Trigger.TRIAL_FAILED)
    assert (state.phase, state.active, state.blocked) == (Phase.ROLLED_BACK, A, (B,))


def test_a_failed_self_test_never_touches_what_runs() -> None:
    state = advance(desired(committed(A), B, 2), Trigger.FETCHED)
    state = advance(advance(state, Trigger.TEST_STARTED), Trigger.TEST_FAILED)
    assert (state.active, state.blocked, state.target) == (A, (B,), "")


def test_an_overtaken_trial_goes_back_without_blocking_its_bundle() -> None:
    state = desired(committed(A), B, 2)
    for trigger in (Trigger.FETCHED, Trigger.TEST_STARTED, Trigger.TEST_PASSED, Trigger.TRIAL_STARTED):
        state = advance(state, trigger)
    state = desired(state, C, 3)
    assert (state.phase, state.active, state.target, state.blocked) == (Phase.FETCHING, A, C, ())


def test_a_bundle_that_runs_already_only_moves_the_generation() -> None:
    state = advance(committed(A), Trigger.DROPPED, generation=9)
    assert (state.phase, state.active, state.generation) == (Phase.COMMITTED, A, 9)


def on_trial(before: SlotState, digest: str, generation: int = 2) -> SlotState:
    state = desired(before, digest, generation)
    for trigger in (Trigger.FETCHED, Trigger.TEST_STARTED, Trigger.TEST_PASSED, Trigger.TRIAL_STARTED):
        state = advance(state, trigger)
    return state


def test_the_committed_bundle_survives_a_failed_trial() -> None:
    state = advance(on_trial(committed(A), B), Trigger.TRIAL_PASSED)
    assert (state.active, state.previous) == (B, A)
    for end in (Trigger.TRIAL_FAILED, Trigger.DROPPED):
        again = advance(on_trial(state, C, 3), end)
        assert (again.active, again.previous, again.before) == (B, A, msgspec.UNSET)


def test_a_bundle_that_fails_on_its_return_is_no_way_back_any_more() -> None:
    state = advance(on_trial(committed(A), B), Trigger.TRIAL_PASSED)
    failed = advance(on_trial(state, A, 3), Trigger.TRIAL_FAILED)
    assert (failed.active, failed.previous, failed.blocked) == (B, "", (A,))
    tested = advance(advance(desired(state, A, 3), Trigger.FETCHED), Trigger.TEST_STARTED)
    failed = advance(tested, Trigger.TEST_FAILED)
    assert (failed.active, failed.previous, failed.blocked) == (B, "", (A,))


def test_a_trial_that_is_dropped_with_nothing_before_it_leaves_nothing() -> None:
    state = advance(on_trial(SlotState(), A), Trigger.DROPPED, generation=9)
    assert (state.phase, state.active, state.previous, state.blocked) == (Phase.IDLE, "", "", ())


def test_the_bundle_before_the_previous_one_is_written_in_a_trial_only() -> None:
    """An older agent, which does not know the field, reads what this one leaves outside a trial."""
    state = advance(on_trial(committed(A), B), Trigger.TRIAL_PASSED)
    assert b"before" not in msgspec.json.encode(state)
    assert b"before" in msgspec.json.encode(on_trial(state, C, 3))


def test_transitions_outside_the_table_are_refused() -> None:
    for phase in Phase:
        for trigger in Trigger:
            state = SlotState(phase=phase, active=A, previous=C, target=B)
            if (phase, trigger) in CHAMPION:
                assert advance(state, trigger).phase is CHAMPION[phase, trigger]
            else:
                with pytest.raises(ConflictError) as caught:
                    advance(state, trigger)
                assert caught.value.code == "slots.not_allowed"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Trigger)), st.sampled_from([A, B, C]), st.booleans()), max_size=40))
def test_random_lives_keep_the_laws(tmp_path_factory: pytest.TempPathFactory, events) -> None:
    """Any sequence of events and crashes: active passed its test, blocked is not tried, generations never fall."""
    root = tmp_path_factory.mktemp("life")
    file, state, generation, passed, proven = champion_file(root), SlotState(), 0, {""}, {""}
    for trigger, digest, crash in events:
        if crash:
            state = file.load() or SlotState()
        if (state.phase, trigger) not in CHAMPION or (trigger is Trigger.DESIRED and digest in state.blocked):
            continue
        before = state
        if trigger is Trigger.DESIRED:
            generation += 1
            state = advance(state, trigger, target=digest, generation=generation)
        else:
            state = advance(state, trigger)
        if trigger is Trigger.TEST_PASSED:
            passed.add(before.target)
        if trigger is Trigger.TRIAL_PASSED:
            proven.add(before.active)
        file.save(state)
        assert file.load() == state
        assert state.active in passed
        assert {state.committed, state.previous} <= proven
        assert not {state.active, state.previous, state.target} & set(state.blocked)
        assert state.generation >= before.generation
        if before.phase is Phase.COMMITTED and state.phase is Phase.COMMITTED:
            assert state.active == before.active


def test_a_power_cut_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = champion_file(tmp_path)
    file.save(committed(A))
    from edge_agent.delivery import state_file as module

    def cut(*_: object, **__: object) -> None:
        raise OSError("power")

    monkeypatch.setattr(module, "write_atomically", cut)
    with pytest.raises(OSError, match="power"):
        file.save(committed(B))
    assert file.load().active == A


@pytest.mark.parametrize("damage", [b"", b"{", b'{"state":{},"sha256":"0"}', b"\0" * 70_000])
def test_a_broken_state_file_is_set_aside_and_the_backup_used(tmp_path: Path, damage: bytes) -> None:
    found: list[Path] = []
    file = champion_file(tmp_path, lambda path, _why: found.append(path))
    file.save(committed(A))
    file.save(committed(B))
    (tmp_path / "state.json").write_bytes(damage)
    assert file.load().active == A
    assert len(found) == 1
    assert found[0].exists()


def test_with_both_files_broken_the_agent_starts_afresh(tmp_path: Path) -> None:
    file = champion_file(tmp_path)
    file.save(committed(A))
    file.save(committed(B))
    for name in ("state.json", "state.json.bak"):
        (tmp_path / name).write_bytes(b"rubbish")
    assert file.load() is None


def test_files_of_format_1_are_read() -> None:
    """Golden files, written by the first agent with this format; they are never rewritten."""
    golden = Path(__file__).parents[2] / "golden" / "state-v1"
    champion, challenger, lot = (file(golden).read() for file in (champion_file, challenger_file, lot_file))
    assert champion == SlotState(
        generation=7,
        phase=Phase.TRIAL,
        active="b" * 64,
        previous="a" * 64,
        tries=1,
        trial_items=50,
        trial_s=60.0,
        rollout_id="12",
        swap=Swap.LOT_CHANGE,
        swap_within_s=900.0,
        blocked=("c" * 64,),
    )
    assert challenger == ChallengerState(generation=8, phase=ShadowPhase.SHADOW, digest="d" * 64, tries=1)
    assert lot is not None
    assert (lot.lot, lot.variety, lot.source, len(lot.requests)) == ("B-1182", "gala", LotSource.OPERATOR, 2)


def test_the_written_state_equals_the_golden_files(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "state-v1"
    for file in (champion_file, challenger_file, lot_file):
        state = file(golden).read()
        assert state is not None
        file(tmp_path).save(state)
    assert {path.name: path.read_bytes() for path in golden.iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = champion_file(tmp_path)
    file.save(msgspec.structs.replace(committed(A), generation=7))
    path = tmp_path / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"generation":7', b'"generation":9'))
    with pytest.raises(InputError, match="wrong checksum"):
        file.read()
    assert file.load() is None
