"""Quality and cost of tracking: CLEAR MOT and IDF1 on boxes whose truth is known.

MOTA = 1 - (misses + false positives + identity switches) / truth boxes (Bernardin & Stiefelhagen, "Evaluating multiple
object tracking performance: the CLEAR MOT metrics", 2008). IDF1 = 2 IDTP / (truth boxes + given boxes), with the
one-to-one pairing of identities that makes it largest (Ristani et al., "Performance measures and a data set for
multi-target, multi-camera tracking", 2016).
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.figures import Figures, Row
from benchmarks.peers import peer_tracks, tracker_works
from edge_agent.interfaces import Frame
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.segmentation import Detection, Locator
from edge_agent.vision.tracking import Tracker

CASES: Final = {
    "nominal speed": "",
    "belt at 80 %": "0s speed_factor=0.8",
    "belt at 120 %": "0s speed_factor=1.2",
    "slow, stop, fast": "3s speed_factor=0.8; 8s stopped; 10s speed_factor=1.2; 20s clear",
}

GATE_PX = 40.0
"""A box belongs to a true item of its lane when their centres are this close along the belt: half an item."""


@dataclass(slots=True)
class Identities:
    """Collects frames, then gives the figures."""

    truth_boxes: int = 0
    given_boxes: int = 0
    misses: int = 0
    false_positives: int = 0
    switches: int = 0
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(true id, given id) -> frames together."""
    _last: dict[int, int] = field(default_factory=dict)

    def add(self, truth: list[tuple[int, int, float]], given: list[tuple[int, int, float]]) -> None:
        """One frame: (id, lane, x centre in pixels) of each true item and of each box the tracker gave."""
        self.truth_boxes += len(truth)
        self.given_boxes += len(given)
        free = set(range(len(given)))
        for true_id, lane, x in truth:
            near = [k for k in free if given[k][1] == lane and abs(given[k][2] - x) < GATE_PX]
            if not near:
                self.misses += 1
                continue
            best = min(near, key=lambda k: abs(given[k][2] - x))
            free.discard(best)
            given_id = given[best][0]
            self.pairs[true_id, given_id] += 1
            self.switches += self._last.get(true_id, given_id) != given_id
            self._last[true_id] = given_id
        self.false_positives += len(free)

    @property
    def items(self) -> int:
        """True items that were seen at all."""
        return len({true for true, _ in self.pairs})

    def figures(self) -> dict[str, float]:
        """MOTA, IDF1, boxes that went wrong, items under several ids, and ids given to several items."""
        wrong = self.misses + self.false_positives + self.switches
        trues = sorted({true for true, _ in self.pairs})
        givens = sorted({given for _, given in self.pairs})
        table = np.zeros((len(trues), len(givens)))
        for (true, given), frames in self.pairs.items():
            table[trues.index(true), givens.index(given)] = frames
        rows, columns = linear_sum_assignment(-table)
        held = float(table[rows, columns].sum())
        per_true = Counter(true for true, _ in self.pairs)
        per_given = Counter(given for _, given in self.pairs)
        return {
            "mota": 1.0 - wrong / max(self.truth_boxes, 1),
            "idf1": 2.0 * held / max(self.truth_boxes + self.given_boxes, 1),
            "switches": self.switches,
            "misses": self.misses,
            "false_positives": self.false_positives,
            "items_with_several_ids": sum(count > 1 for count in per_true.values()),
            "ids_with_several_items": sum(count > 1 for count in per_given.values()),
        }


def true_boxes(line: SimulatedLine, frame: Frame, margin_px: float = 6.0) -> list[tuple[int, int, float]]:
    """(id, lane, x) of each item that is wholly in the picture, and not just about to touch its edge."""
    scale, width = line.config.mm_per_px, line.config.width_px
    found = []
    for item in line.items():
        x, half = (frame.belt_mm - item.item_mm) / scale, item.apple.length_mm / scale / 2.0 + margin_px
        if half <= x <= width - half:
            found.append((item.item_id, item.lane, x))
    return found


def stage(figures: Figures, frames: int, peers_python: str) -> None:
    """Our tracker and a peer's on the same places, from the same frames."""
    missing = tracker_works(peers_python)
    if missing:
        figures.skip("a peer's tracker", missing)
    for name, schedule in CASES.items():
        _case(figures, name, schedule, frames, "" if missing else peers_python)


@dataclass(slots=True)
class _Ours:
    """The result of the product's tracker on one case."""

    places: list[list[Detection]] = field(default_factory=list)
    """Per frame, whole items only: what both trackers are given."""
    truths: list[list[tuple[int, int, float]]] = field(default_factory=list)
    given: list[list[tuple[int, int, float]]] = field(default_factory=list)
    seconds: float = 0.0


def _ours(schedule: str, frames: int, config: SimulationConfig) -> _Ours:
    line = SimulatedLine(config, virtual=True, schedule=schedule)
    ids = iter(range(1, 1_000_000))
    locator, tracker = Locator(line.geometry), Tracker(line.geometry, lambda: next(ids))
    found = _Ours()
    for _ in range(frames):
        frame = line.read(1.0)
        assert frame is not None
        places = locator.find(frame.image)
        started = time.perf_counter()
        seen, _ = tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
        found.seconds += time.perf_counter() - started
        found.places.append([place for place in places if place.whole])
        found.truths.append(true_boxes(line, frame))
        found.given.append([(track.item_id, place.lane, place.x_px) for track, place in seen])
    return found


def _scores(ours: _Ours, given: list[list[tuple[int, int, float]]]) -> tuple[dict[str, float], int, float]:
    """Figures, items, and the share of items that were switched, doubled or missed; after the belt has filled."""
    identities = Identities()
    items: set[int] = set()
    for truth, boxes in list(zip(ours.truths, given, strict=True))[30:]:
        identities.add(truth, boxes)
        items.update(true for true, _, _ in truth)
    found = identities.figures()
    wrong = found["items_with_several_ids"] + found["ids_with_several_items"] + len(items) - identities.items
    return found, len(items), wrong / len(items)


def _case(figures: Figures, name: str, schedule: str, frames: int, peers_python: str) -> None:
    config = SimulationConfig(seed=1, lanes=4, items_per_s=10.0)
    ours = _ours(schedule, frames, config)
    found, items, wrong = _scores(ours, ours.given)
    rows: list[Row] = [
        ("MOTA", found["mota"], f"on {items} items"),
        ("IDF1", found["idf1"], ""),
        ("switched, doubled or missed, share of items", wrong, ""),
        ("time per frame", 1e6 * ours.seconds / frames, "us"),
    ]
    bounds = {
        "MOTA": (">=", 0.978),
        "IDF1": (">=", 0.989),
        "switched, doubled or missed, share of items": ("<=", 0.005),
    }
    if peers_python:
        theirs = peer_tracks(peers_python, ours.places, config.frames_per_s)
        given = [
            [(identity, place.lane, place.x_px) for identity, place in zip(ids, places, strict=True) if identity >= 0]
            for ids, places in zip(theirs.ids, ours.places, strict=True)
        ]
        other, _, other_wrong = _scores(ours, given)
        rows += [
            (f"{theirs.name}: MOTA", other["mota"], ""),
            (f"{theirs.name}: IDF1", other["idf1"], ""),
            (f"{theirs.name}: switched, doubled or missed", other_wrong, ""),
            (f"{theirs.name}: time per frame", 1e6 * theirs.seconds / frames, "us"),
            ("our errors / theirs (MOTA)", (1.0 - found["mota"]) / max(1.0 - other["mota"], 1e-9), ""),
            ("our time / theirs", ours.seconds / theirs.seconds, ""),
        ]
        bounds |= {"our errors / theirs (MOTA)": ("<=", 1.0), "our time / theirs": ("<=", 1.0)}
    figures.table(f"tracking, 4 lanes x 10 items/s, 5 % touching, {name}", rows, bounds)
