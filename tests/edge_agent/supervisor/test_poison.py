"""Bundles that are whole and harmful: the self-test, in a process of its own, finds out all but the one that waits."""

from pathlib import Path

import pytest

from edge_agent.delivery.selftest_process import run_selftest_process
from tests.simulators.tiny_bundle import tiny_bundle

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("poison", "codes"),
    [
        ("segfault", {"selftest.crashed"}),
        pytest.param("nan", {"model.not_finite"}, marks=slow),
        pytest.param("memory", {"model.failed", "selftest.crashed"}, marks=slow),
        pytest.param("slow", {"selftest.too_slow", "selftest.timeout"}, marks=slow),
        pytest.param("shape", {"model.wrong_signature"}, marks=slow),
        pytest.param("opset", {"model.unloadable"}, marks=slow),
        pytest.param("golden", {"golden.mismatch"}, marks=slow),
        pytest.param("late", set(), marks=slow),
        pytest.param("", set(), marks=slow),
    ],
)
def test_a_harmful_model_is_found_before_it_reaches_the_line(tmp_path: Path, poison: str, codes: set[str]) -> None:
    digest = tiny_bundle(tmp_path / "b", poison=poison, view_px=64).digest
    # A wide budget of time for good models on a busy machine; the slow one is slower than that by far.
    done = run_selftest_process(tmp_path / "b", digest, 100.0 if poison == "slow" else 2000.0, 120.0, 2048)
    assert (done.fault.code if done.fault else "") in (codes or {""})
    if poison == "segfault":
        assert done.fault is not None
        assert "signal 11" in done.fault.message
