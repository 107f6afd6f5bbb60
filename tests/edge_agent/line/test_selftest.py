"""The self-test judges the model, not the company it keeps."""

from types import SimpleNamespace

import pytest

from edge_agent.line import selftest


@pytest.mark.parametrize(
    ("wall_s", "processor_s", "own_ms"),
    [
        pytest.param(0.050, 0.020, 20.0, id="other processes took the processor away"),
        pytest.param(0.050, 0.050, 50.0, id="the model alone"),
        pytest.param(0.050, 0.090, 50.0, id="two threads of the model"),
    ],
)
def test_the_time_of_a_run_is_the_models_own(
    monkeypatch: pytest.MonkeyPatch, wall_s: float, processor_s: float, own_ms: float
) -> None:
    clock = {"wall": 10.0, "processor": 3.0}

    def run() -> None:
        clock["wall"] += wall_s
        clock["processor"] += processor_s

    fake = SimpleNamespace(perf_counter=lambda: clock["wall"], process_time=lambda: clock["processor"])
    monkeypatch.setattr(selftest, "time", fake)
    assert selftest._own_ms(run) == pytest.approx(own_ms)
