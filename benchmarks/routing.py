"""Routing, end-to-end accuracy and repeatability of items on the simulated line.

Three different questions, kept apart:

* *Routing*: of all items that pass, how many end in the outlet of their own verdict, hit by their own shot. It judges
  tracking, timing and ejection, not the model; items without a verdict, with two, or hit by another's shot are wrong.
* *End to end*: how many items end where their true kind belongs. It adds the model, which here never saw these apples.
* *Repeatability*: the same items pass a second time, with another roll and other noise, in the same lane or in the
  next one; how many get the same outlet. The simulation repeats an item's axis of roll, so a real machine, where an
  apple comes back lying otherwise, will repeat itself less.

Time is virtual: speed changes and stops are exact, and the machine's load plays no part.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.figures import Figures, Row
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.simulation.line import SimulatedItem, SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge, Judged

NEAR_MM: Final = 20.0
"""A verdict belongs to the item whose centre is this close."""
_ENOUGH: Final = 300
"""Items from which a share of 90 % is known to 3.4 % (95 %)."""
UNSTEADY: Final = (
    "2s speed_factor=0.8; 5s speed_factor=1.2; 8s stopped; 9.5s clear; 12s speed_factor=1.2; 14s stopped; "
    "15s speed_factor=0.8; 18s clear; 20s stopped; 21s speed_factor=1.1; 24s clear"
)


@dataclass(slots=True)
class Passed:
    """The items of one run, with their verdicts and outlets."""

    items: dict[int, SimulatedItem] = field(default_factory=dict)
    verdicts: dict[int, list[str]] = field(default_factory=dict)
    """Outlets given to each item, normally one."""
    strangers: int = 0
    """Verdicts on something that is no item."""
    settled: set[int] = field(default_factory=set)

    def outlet(self, item_id: int) -> str:
        """Returns the outlet in which the item ended."""
        return self.items[item_id].ejected_to or "pass"

    @property
    def routed_right(self) -> int:
        """Items that ended in the outlet of their one verdict."""
        return sum(self.verdicts.get(k, []) == [self.outlet(k)] for k in self.settled)

    @property
    def sorted_right(self) -> int:
        """Items that ended where their kind belongs."""
        return sum((self.items[k].apple.kind == "sound") == (self.outlet(k) == "pass") for k in self.settled)


def run(config: SimulationConfig, judge: Judge, frames: int, schedule: str = "") -> Passed:
    """Runs the line in virtual time."""
    line = SimulatedLine(config, virtual=True, schedule=schedule)
    counter = LineCounter(config.lanes, clock=line.now)
    queue = EjectionQueue(line, line, clock=line.now)
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=line.now)
    core.use(judge)
    passed = Passed()

    def take(judged: Judged, outlet: str) -> None:
        lane = [i for i in line.items() if i.lane == judged.track.lane]
        near = min(lane, key=lambda i: abs(i.item_mm - judged.track.item_mm), default=None)
        if near is None or abs(near.item_mm - judged.track.item_mm) > NEAR_MM:
            passed.strangers += 1
            return
        passed.verdicts.setdefault(near.item_id, []).append(outlet)

    core.on_verdict = take
    end_mm = max(line.geometry.outlets_mm.values()) + 100.0
    for _ in range(frames):
        before_s = line.now()
        frame = line.read(1.0)
        queue.run_to(before_s, line.now())
        if frame is not None:
            passed.items.update((item.item_id, item) for item in line.items())
            core.process(frame)
            passed.settled.update(k for k, i in passed.items.items() if frame.belt_mm > i.item_mm + end_mm)
    return passed


def stage(figures: Figures, bundle: Path, seconds: float) -> None:
    """Routing at three rates with an unsteady belt, then repeatability."""
    judge = Judge(bundle)
    frames = round(seconds * 30.0)
    rows: list[Row] = []
    bounds = {}
    right = truly = total = 0
    for rate in (7.5, 9.0, 10.5):
        config = SimulationConfig(seed=31, lanes=4, items_per_s=rate)
        passed = run(config, judge, frames, UNSTEADY)
        name = f"{rate:g} items/s/lane: ended in the outlet of its verdict"
        rows.append((name, 100.0 * passed.routed_right / len(passed.settled), f"% of {len(passed.settled)} items"))
        bounds[name] = (">=", 99.0)
        right, truly, total = right + passed.routed_right, truly + passed.sorted_right, total + len(passed.settled)
    rows.append(("all rates: ended in the outlet of its verdict", 100.0 * right / total, f"% of {total} items"))
    rows.append(("all rates: ended where its true kind belongs", 100.0 * truly / total, "%, the model included"))
    figures.table("routing, 4 lanes, speed +-20 % and stops", rows, bounds)
    repeatability(figures, judge, frames)


def repeatability(figures: Figures, judge: Judge, frames: int) -> None:
    """Measures repeatability: the same items again in the same lane and in the next one."""
    config = SimulationConfig(seed=41, lanes=2, items_per_s=9.0)
    first = _by_place(run(config, judge, frames), 0, config.lanes)
    rows: list[Row] = []
    bounds = {}
    for name, again, shift, limit in (
        ("same lane, another roll and noise: same outlet", 1, 0, 90.0),
        ("next lane, another roll and noise: same outlet", 2, 1, 81.0),
    ):
        other = msgspec.structs.replace(config, again=again, shifted_lanes=shift)
        second = _by_place(run(other, judge, frames), shift, config.lanes)
        both = [(first[k], second[k]) for k in first.keys() & second.keys()]
        # The apples must be the same ones, or the figure means nothing.
        assert all(a[0] == b[0] for a, b in both)
        share = sum(a[1] == b[1] for a, b in both) / len(both)
        rows.append((name, 100.0 * share, f"% of {len(both)} items"))
        if len(both) >= _ENOUGH:
            bounds[name] = (">=", limit)
    note = "" if bounds else f"Fewer than {_ENOUGH} items: too few to hold it against the published 90 and 81 %."
    figures.table("repeatability of the outlet, the same items twice", rows, bounds, note=note)


def _by_place(passed: Passed, shift: int, lanes: int) -> dict[tuple[int, int], tuple[str, str]]:
    """(lane of origin, how many-th in it) -> (which apple, where it ended)."""
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for lane in range(lanes):
        order = sorted((i for i in passed.items.values() if i.lane == lane), key=lambda i: i.item_mm)
        for number, item in enumerate(order):
            if item.item_id in passed.settled:
                found[(lane - shift) % lanes, number] = (item.apple.name, passed.outlet(item.item_id))
    return found
