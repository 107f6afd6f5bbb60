"""The life cycle of bundles: nothing is forgotten by a crash, nothing bad is tried twice, a commit is final."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.delivery.lifecycle import TRANSITIONS, SlotState, Trigger, advance, already_running
from edge_agent.delivery.state_file import StateFile
from models.errors import ConflictError
from models.messages import Phase

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


def test_a_trial_that_is_overtaken_goes_back_without_blame() -> None:
    state = desired(committed(A), B, 2)
    for trigger in (Trigger.FETCHED, Trigger.TEST_STARTED, Trigger.TEST_PASSED, Trigger.TRIAL_STARTED):
        state = advance(state, trigger)
    state = desired(state, C, 3)
    assert (state.phase, state.active, state.target, state.blocked) == (Phase.FETCHING, A, C, ())


def test_a_bundle_that_runs_already_only_moves_the_generation() -> None:
    assert already_running(committed(A), generation=9).generation == 9


def test_what_the_table_does_not_list_is_refused() -> None:
    for phase in Phase:
        for trigger in Trigger:
            state = SlotState(phase=phase, active=A, target=B)
            if (phase, trigger) in TRANSITIONS:
                assert advance(state, trigger).phase is TRANSITIONS[phase, trigger]
            else:
                with pytest.raises(ConflictError) as caught:
                    advance(state, trigger)
                assert caught.value.code == "slots.not_allowed"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Trigger)), st.sampled_from([A, B, C]), st.booleans()), max_size=40))
def test_random_lives_keep_the_laws(tmp_path_factory: pytest.TempPathFactory, events) -> None:
    """Any sequence of events and crashes: active passed its test, blocked is not tried, generations never fall."""
    root = tmp_path_factory.mktemp("life")
    file, state, generation, passed = StateFile(root), SlotState(), 0, {""}
    for trigger, digest, crash in events:
        if crash:
            state = file.load()
        if (state.phase, trigger) not in TRANSITIONS or (trigger is Trigger.DESIRED and digest in state.blocked):
            continue
        before = state
        if trigger is Trigger.DESIRED:
            generation += 1
            state = advance(state, trigger, target=digest, generation=generation)
        else:
            state = advance(state, trigger)
        if trigger is Trigger.TEST_PASSED:
            passed.add(before.target)
        file.save(state)
        assert file.load() == state
        assert state.active in passed
        assert state.target not in state.blocked or not state.target
        assert state.active not in state.blocked or not state.active
        assert state.generation >= before.generation
        if before.phase is Phase.COMMITTED and state.phase is Phase.COMMITTED:
            assert state.active == before.active


def test_a_power_cut_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(tmp_path)
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
    file = StateFile(tmp_path, found.append)
    file.save(committed(A))
    file.save(committed(B))
    (tmp_path / "state.json").write_bytes(damage)
    assert file.load().active == A
    assert len(found) == 1
    assert found[0].exists()


def test_with_both_files_broken_the_agent_starts_afresh(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.save(committed(A))
    file.save(committed(B))
    for name in ("state.json", "state.json.bak"):
        (tmp_path / name).write_bytes(b"rubbish")
    assert file.load() == SlotState()


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.save(msgspec.structs.replace(committed(A), generation=7))
    path = tmp_path / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"generation":7', b'"generation":9'))
    assert file.load().generation == 0
