"""How well identities are kept: CLEAR MOT and IDF1 on boxes whose truth is known.

MOTA = 1 - (misses + false positives + identity switches) / truth boxes (Bernardin & Stiefelhagen, "Evaluating multiple
object tracking performance: the CLEAR MOT metrics", 2008). IDF1 = 2 IDTP / (truth boxes + given boxes), with the
one-to-one pairing of identities that makes it largest (Ristani et al., "Performance measures and a data set for
multi-target, multi-camera tracking", 2016).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from edge_agent.seams import Frame
from edge_agent.simulation import SimulatedLine

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
