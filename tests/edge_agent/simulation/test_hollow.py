"""Hollow items look sound and weigh less: only the simulated scale shows it, and without them nothing changes."""

import msgspec
import numpy as np
import pytest

from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.simulation.rendering import Kind, hollowed, render_library

LINE = SimulationConfig(seed=3, lanes=1, apples=8, varieties=("red",))


def films(
    config: SimulationConfig, frames: int = 240
) -> tuple[SimulatedLine, dict[int, tuple[str, str, float, float]]]:
    """Runs a line; returns it, and kind, label, length and weight of every item that was seen."""
    line = SimulatedLine(config, virtual=True)
    seen = {}
    for _ in range(frames):
        frame = line.read(1.0)
        assert frame is not None
        for item in line.items():
            truth = line.view_truth(frame.belt_mm, item.lane, item.item_mm)
            assert truth is not None
            weight_g = line.load_cell(item.lane).value_for(item.item_mm)
            assert weight_g == truth.weight_g
            if item.apple.kind in {Kind.SOUND, Kind.HOLLOW}:
                assert truth.label == item.apple.kind
                assert truth.visible_share == 0.0
            seen[item.item_id] = (truth.kind, truth.apple, item.apple.length_mm, weight_g)
    return line, seen


def test_a_hollow_item_looks_sound_and_weighs_four_fifths() -> None:
    _, seen = films(msgspec.structs.replace(LINE, hollow_share=0.4))
    densities = {kind: [w / mm**3 for k, _, mm, w in seen.values() if k == kind] for kind in ("sound", "hollow")}
    assert len(densities["hollow"]) >= 8
    assert max(densities["hollow"]) < min(densities["sound"])
    assert np.mean(densities["hollow"]) / np.mean(densities["sound"]) == pytest.approx(0.8, abs=0.02)
    names = [{name for k, name, _, _ in seen.values() if k == kind} for kind in ("sound", "hollow")]
    assert not names[0] & names[1]


def test_hollow_apples_change_no_other_apple() -> None:
    def drawn(hollow: int) -> list[bytes]:
        items = render_library(np.random.default_rng(1), apples=8, varieties=("red",), mm_per_px=2.0, hollow=hollow)
        return [item.sprites[0].colour.tobytes() for item in items]

    plain = drawn(0)
    assert drawn(3)[:8] == plain
    assert len(drawn(3)) == 11


def test_photographs_roll_as_hollow_items_too() -> None:
    (item, *_) = render_library(np.random.default_rng(1), apples=1, varieties=("red",), mm_per_px=2.0)
    hollow = hollowed(item)
    assert set(hollow.labels) == {"hollow"}
    assert hollow.sprites is item.sprites
    assert hollow.name != item.name
