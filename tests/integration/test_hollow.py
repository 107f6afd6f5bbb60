"""A defect that only the scale reveals is collected, learnt, and ejected on the simulated line."""

from pathlib import Path

import pytest

from control_plane.training.pipeline import TrainSettings, train
from edge_agent.devices.hardware import open_hardware
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.offline.collect import collect
from edge_agent.vision.judge import Judge

FRAMES = 450


def ejected(bundle: Path, *, weighs: bool) -> dict[str, float]:
    """Runs a line in virtual time; returns the share of the items of each kind that left by the reject outlet."""
    world = open_hardware(LineConfig(lanes=2, seed=31, defect_share=0.3, hollow_share=0.25), virtual=True)
    line, now_s = world.simulation, [0.0]
    assert line is not None
    queue = world.ejection_queue(LineConfig(lanes=2), lambda: now_s[0])
    counter = LineCounter(2, truth=line.truth, clock=lambda: now_s[0])
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=lambda: now_s[0])
    core.weights = world.weights if weighs else ()
    core.use(Judge(bundle))
    for _ in range(FRAMES):
        frame = line.read(1.0)
        assert frame is not None
        queue.run_to(now_s[0], frame.captured_s)
        now_s[0] = frame.captured_s
        core.process(frame)
    shares = {}
    for kind in ("sound", "hollow", "rot"):
        found = {key: count for key, count in line.truth().outcomes.items() if key.startswith(f"{kind}>")}
        shares[kind] = found.get(f"{kind}>reject", 0) / sum(found.values())
    return shares


@pytest.mark.slow
def test_hollow_items_are_learnt_with_the_scale_and_ejected_by_it(tmp_path: Path) -> None:
    collect(LineConfig(lanes=2, seed=7, defect_share=0.4, hollow_share=0.35), tmp_path / "data", items=120)
    found = train(tmp_path / "data", TrainSettings(name="apples", effort="quick", folds=2), tmp_path / "bundle")
    item, blind = found.metrics["item"], found.metrics["item_without_scalars"]
    place = item["classes"].index("hollow")
    caught, guessed = (one["confusion_shares"][place][place]["value"] for one in (item, blind))
    assert caught > 0.8
    assert guessed < caught - 0.3
    with_scale, without = ejected(tmp_path / "bundle", weighs=True), ejected(tmp_path / "bundle", weighs=False)
    assert with_scale["hollow"] > 0.8
    assert without["hollow"] < with_scale["hollow"] - 0.4
    assert with_scale["sound"] < 0.25
