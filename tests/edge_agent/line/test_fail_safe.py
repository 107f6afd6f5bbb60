"""While the camera is at fault the configured fail-safe acts, no item is judged twice, and the line comes back."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge_agent.devices.hardware import open_hardware
from edge_agent.line_config import FailSafeConfig, LineConfig
from edge_agent.simulation.faults import Faults
from edge_agent.vision.judge import Judge
from models.errors import ConfigError
from tests.simulators.camera_bench import FAULTS, Bench
from tests.simulators.tiny_bundle import tiny_bundle

if TYPE_CHECKING:
    from edge_agent.simulation.line import SimulatedItem


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Judge(directory)


def blind_line(judge: Judge, fault: str, seconds: float = 4.0, **fail_safe: object) -> Bench:
    bench = Bench(judge, **fail_safe)
    bench.run(3.0)
    bench.trouble(FAULTS[fault], seconds)
    bench.run(3.0)
    return bench


def test_pass_fires_nothing_and_counts_the_unseen_belt(judge: Judge) -> None:
    bench = blind_line(judge, "absent", default="pass")
    window = bench.counter.close_window()
    assert window.camera["blind_mm"] == pytest.approx(4500, abs=100)
    assert window.camera["blind_ms"] == pytest.approx(4500, abs=100)
    assert "blind_shots" not in window.camera
    assert bench.escaped > 30


@pytest.mark.parametrize(("fault", "named_after_s"), [("frozen", 0.8), ("stalled", 1.1)])
def test_eject_all_lets_no_item_through_once_the_fault_is_named(judge: Judge, fault: str, named_after_s: float) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(4.0)
    before = bench.escaped
    bench.trouble(FAULTS[fault], 5.0)
    # 9 items/s at 1 m/s. Between the camera and the outlet lie 700 mm of items that were judged (most as sound), and
    # what passed the outlet before the fault was named is gone.
    assert bench.escaped - before <= 9 * (0.8 + max(named_after_s - 0.7, 0.0)) + 2
    bench.run(2.0)
    assert bench.counter.close_window().camera["blind_shots"] > 100


def test_eject_all_hits_every_item_of_the_unseen_stretch(judge: Judge) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(3.0)
    from_mm = bench.line.position_mm(bench.now)
    bench.line.set_trouble(FAULTS["absent"])
    items: dict[int, SimulatedItem] = {}
    for step in range(60):
        if step == 40:
            bench.line.set_trouble(Faults())
            to_mm = bench.line.position_mm(bench.now) - 200.0  # from here on the camera sees at least half of it
        bench.run(0.1)
        items |= {item.item_id: item for item in bench.line._lanes[0].items}
    unseen = [item for item in items.values() if from_mm < item.item_mm < to_mm]
    assert len(unseen) > 25
    assert [item for item in unseen if not item.ejected_to] == []


def test_eject_all_on_a_standing_belt_fires_nothing(judge: Judge) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(3.0)
    bench.trouble(Faults(stopped=True), 1.0)
    bench.line.set_trouble(Faults(stopped=True, absent=True))
    bench.run(0.5)
    fired = bench.queue.fired
    bench.run(5.0)
    assert bench.queue.fired == fired


def test_eject_all_blames_no_valve(judge: Judge) -> None:
    bench = Bench(judge, ledger=True, default="eject-all")
    bench.run(3.0)
    bench.trouble(FAULTS["absent"], 3.0)
    bench.run(2.0)
    counts = bench.queue.ledger.counts()
    assert counts["0/reject/fired"] < bench.queue.fired
    assert counts.get("0/reject/missed", 0) == 0


def test_stop_line_stops_the_belt_and_starts_it_again(judge: Judge) -> None:
    bench = Bench(judge, default="stop-line")
    bench.run(3.0)
    bench.trouble(FAULTS["black"], 3.0)
    assert bench.line.speed_mm_s() == 0.0
    bench.run(2.0)
    assert bench.line.speed_mm_s() == pytest.approx(1000.0)
    assert bench.actions == ["stop-line", ""]
    assert bench.counter.close_window().camera["blind_mm"] < 300


def test_each_fault_has_its_own_action(judge: Judge) -> None:
    bench = Bench(judge, default="stop-line", frozen="eject-all", absent="pass")
    bench.run(2.0)
    for fault in ("frozen", "absent", "black"):
        bench.trouble(FAULTS[fault], 2.0)
        bench.run(1.5)
    assert bench.actions == ["eject-all", "", "pass", "", "stop-line", ""]


def test_a_slow_camera_is_judged_and_not_blind(judge: Judge) -> None:
    bench = blind_line(judge, "slow", default="eject-all")
    window = bench.counter.close_window()
    assert [code for _, code in bench.events] == ["camera.slow", "camera.recovered"]
    assert bench.actions == ["pass", ""]
    assert "blind_ms" not in window.camera


@pytest.mark.parametrize(
    ("fault", "action"),
    [
        ("absent", "pass"),
        ("frozen", "stop-line"),
        ("corrupt", "eject-all"),
        *(
            pytest.param(fault, action, marks=pytest.mark.slow)
            for fault in ("absent", "frozen", "corrupt", "black", "stalled")
            for action in ("pass", "eject-all", "stop-line")
        ),
    ],
)
def test_no_item_is_judged_twice_across_a_fault(judge: Judge, fault: str, action: str) -> None:
    bench = Bench(judge, seed=4, default=action)
    bench.run(2.0)
    for seconds in (0.2, 1.5):
        bench.trouble(FAULTS[fault], seconds)
        bench.run(2.0)
    places = sorted(judged.track.item_mm for judged, _ in bench.judged)
    assert len(places) > 25
    assert min(np.diff(places)) > 40.0  # the smallest apple is 45 mm long


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"fail_safe": FailSafeConfig(black="stop-line")}, "line.no_belt_control"),
        ({"fail_safe": FailSafeConfig(default="eject-all", outlet="bin")}, "line.no_fail_safe_outlet"),
        ({"belt": "modbus://plc/holding/3"}, "line.no_encoder"),
    ],
)
def test_a_fail_safe_that_cannot_be_done_is_refused_at_the_start(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(ConfigError) as caught:
        open_hardware(LineConfig(camera=str(tmp_path), **changes))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_faults_without_an_action_use_the_default() -> None:
    config = FailSafeConfig(default="eject-all", black="stop-line")
    assert config.action("camera.black") == "stop-line"
    assert config.action("camera.frozen") == "eject-all"
    assert config.action("camera.slow") == "pass"
    assert config.actions == {"eject-all", "stop-line", "pass"}
    assert Counter(FailSafeConfig().actions) == {"pass": 1}
