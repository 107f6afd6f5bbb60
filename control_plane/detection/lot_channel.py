"""C2, C3 and the scale: the items of a line against the spread between lots of its reference.

The moments, less the line's usual ones and less what the class mix explains, are smoothed (330 s), whitened by the
covariance between lots, shortened to a norm that one lot in five exceeds, and followed with a memory of 2.3 h. One odd
lot, however odd, moves this mean no further than an ordinary one; what lasts over four to eight lots moves it to the
threshold. A lot that lies three times further out than any reference lot is reported by itself: another fruit.
The class mix (C3) and the weight against the size take the same way, the latter without a clip.
"""

import math
from typing import Any, Final

import msgspec
import numpy as np

from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Detector, Signal
from control_plane.detection.moments import Floats, moments
from control_plane.detection.reference import FAST_S, SLOW_S, Fit, LotRecord, clipped
from control_plane.detection.sequential import Array, Latch, weight
from models.profile import BINS

ODD_ITEMS: Final = 200
ODD_FACTOR: Final = 3.0
UNCLEAR: Final = 0.6
"""From this share of its threshold on the covariate channel may be about to explain a change of the class mix."""
HARMFUL_WEIGHT: Final = 0.015
"""Least lasting difference of weight that is reported, as a logarithm (1.5 %)."""
GEOMETRY: Final = frozenset({"area_share", "aspect"})
"""Features of the shape, which no camera fault of our table and no skin defect changes."""


class Chunk(msgspec.Struct, kw_only=True, eq=False):
    """Counts of a line that wait until they are enough items, or a finished sum of a lot so far."""

    counts: Array
    """(F, 16)."""
    classes: Array
    """(K,)."""
    items: int = 0
    span_s: float = 0.0
    weights: Array = msgspec.field(default_factory=lambda: np.zeros(3))
    """Items with a weight, sum of its logarithms, sum of the logarithms of the length over items that have one."""
    lengths: int = 0

    def add(self, other: "Chunk") -> None:
        """Adds the counts of a later span."""
        self.counts = self.counts + other.counts
        self.classes = self.classes + other.classes
        self.weights = self.weights + other.weights
        self.items, self.span_s = self.items + other.items, self.span_s + other.span_s
        self.lengths += other.lengths

    @property
    def shares(self) -> Floats:
        """Returns float64 (K,), the shares of the classes."""
        return np.asarray(self.classes / max(float(self.classes.sum()), 1.0))

    def weight_log(self) -> float:
        """Returns the mean logarithm of the weight; NaN where nothing was weighed."""
        return float(self.weights[1] / self.weights[0]) if self.weights[0] else math.nan

    def size(self, z: Floats, facts: BundleFacts) -> float:
        """Returns what the weight is compared with; NaN where there is nothing."""
        if self.lengths:
            return float(self.weights[2] / self.lengths)
        return float(z[2 * facts.features.index("area_share")]) if "area_share" in facts.features else math.nan


def empty_chunk(facts: BundleFacts) -> Chunk:
    """Returns a chunk without items."""
    return Chunk(counts=np.zeros((len(facts.features), BINS)), classes=np.zeros(len(facts.classes)))


class LotState(msgspec.Struct, kw_only=True, eq=False):
    """What is followed of one line over its lots."""

    fast: Array
    """(2F,) smoothed moments, less what is usual."""
    slow: Array
    """(2F,) whitened, clipped, averaged."""
    label_fast: Array
    label_slow: Array
    weight_slow: float = 0.0
    covariate: Latch = msgspec.field(default_factory=Latch)
    label: Latch = msgspec.field(default_factory=Latch)
    scale: Latch = msgspec.field(default_factory=Latch)
    odd: Latch = msgspec.field(default_factory=Latch)
    classes: Array
    """(K,) class counts since the excursion of the mix began."""
    factor: float = 1.0
    """Raised where people say that an alarm was false."""

    def take(
        self,
        chunk: Chunk,
        lot: Chunk,
        fit: Fit,
        facts: BundleFacts,
        functions: Floats,
        *,
        line: str,
        name: str,
        now_s: float,
    ) -> list[Signal]:
        """Takes a chunk of items; returns what is present.

        Args:
            chunk: New items, all of one lot.
            lot: Sum of the lot so far, this chunk included.
            fit: Reference of bundle and variety.
            facts: Of the bundle.
            functions: Its moments' functions.
            line: Agent id.
            name: Name of the lot.
            now_s: End of the chunk, seconds.
        """
        z = moments(chunk.counts, functions)
        residual = fit.residual(line, z, chunk.shares)
        self.fast = self.fast + weight(chunk.span_s, FAST_S) * (residual - self.fast)
        pull = clipped(fit.covariate.whiten @ self.fast, fit.covariate.clip)
        self.slow = self.slow + weight(chunk.span_s, SLOW_S) * (pull - self.slow)
        ratio = float(self.slow @ self.slow) / max(fit.margin * self.factor * fit.covariate.largest, 1e-12)
        found = []
        if self.covariate.take(ratio, now_s, chunk.items, name):
            found.append(self._covariate(fit, facts, self.fast, self.covariate, "covariate"))
        found += self._odd_lot(chunk, lot, fit, facts, functions, line=line, name=name, now_s=now_s)
        found += self._label(chunk, fit, facts, line=line, name=name, now_s=now_s)
        return found + self._scale(chunk, z, fit, facts, line=line, name=name, now_s=now_s)

    def _odd_lot(
        self,
        chunk: Chunk,
        lot: Chunk,
        fit: Fit,
        facts: BundleFacts,
        functions: Floats,
        *,
        line: str,
        name: str,
        now_s: float,
    ) -> list[Signal]:
        ratio, residual = 0.0, self.fast
        if lot.items >= ODD_ITEMS:
            residual = fit.residual(line, moments(lot.counts, functions), lot.shares)
            vector = fit.covariate.whiten @ residual
            ratio = float(vector @ vector) / max(ODD_FACTOR * self.factor * fit.covariate.odd, 1e-12)
        if not self.odd.take(ratio, now_s, chunk.items, name):
            return []
        return [self._covariate(fit, facts, residual, self.odd, "odd-lot")]

    def _covariate(self, fit: Fit, facts: BundleFacts, residual: Floats, latch: Latch, name: str) -> Signal:
        table = residual.reshape(-1, 2)
        strength = np.abs(table).max(axis=1)
        order = np.argsort(strength)[::-1]
        shape = [abs(float(table[k, 0])) for k, feature in enumerate(facts.features) if feature in GEOMETRY]
        evidence: dict[str, Any] = {
            "features": {
                facts.features[k]: {"location": round(float(table[k, 0]), 3), "spread": round(float(table[k, 1]), 3)}
                for k in order[:6]
            },
            "lots_of_reference": fit.lots,
            "direction": np.round(residual / max(float(np.linalg.norm(residual)), 1e-9), 3).tolist(),
        }
        location, spread = (float(np.linalg.norm(table[:, k])) for k in (0, 1))
        return _signal(
            name,
            Detector.COVARIATE,
            latch,
            float(strength[order[0]]) if len(order) else 0.0,
            "standard deviations of an item",
            evidence,
            {"feature": facts.features[order[0]] if len(order) else ""},
            marks={"shape": max(shape, default=0.0) > 0.5, "whole": location > 1.5 * spread},
        )

    def _label(self, chunk: Chunk, fit: Fit, facts: BundleFacts, *, line: str, name: str, now_s: float) -> list[Signal]:
        residual = fit.label_residual(line, chunk.shares)
        self.label_fast = self.label_fast + weight(chunk.span_s, FAST_S) * (residual - self.label_fast)
        pull = clipped(fit.label.whiten @ self.label_fast, fit.label.clip)
        self.label_slow = self.label_slow + weight(chunk.span_s, SLOW_S) * (pull - self.label_slow)
        ratio = float(self.label_slow @ self.label_slow) / max(fit.margin * self.factor * fit.label.largest, 1e-12)
        # Items that are about to leave the reference are judged wrongly, which changes the mix: wait for that to clear.
        if self.covariate.ratio >= UNCLEAR and not self.label.on:
            ratio = min(ratio, 0.99)
        before = self.label.began_s
        on = self.label.take(ratio, now_s, chunk.items, name)
        self.classes = chunk.classes.copy() if self.label.began_s != before else self.classes + chunk.classes
        if not on:
            return []
        usual, now = fit.shares_of(line), self.classes / max(float(self.classes.sum()), 1.0)
        most = int(np.abs(now - usual).argmax())
        evidence = {
            "usual_shares": {c: round(float(s), 4) for c, s in zip(facts.classes, usual, strict=True)},
            "shares": {c: round(float(s), 4) for c, s in zip(facts.classes, now, strict=True)},
            "counts": {c: int(n) for c, n in zip(facts.classes, self.classes, strict=True)},
        }
        effect = float(now[most] - usual[most])
        words = {"class": facts.classes[most], "direction": "more" if effect > 0 else "fewer"}
        return [
            _signal("label", Detector.LABEL, self.label, effect, f"share of {facts.classes[most]}", evidence, words)
        ]

    def _scale(
        self, chunk: Chunk, z: Floats, fit: Fit, facts: BundleFacts, *, line: str, name: str, now_s: float
    ) -> list[Signal]:
        residual = fit.weight_residual(line, chunk.weight_log(), chunk.size(z, facts))
        if not math.isfinite(residual) or not math.isfinite(fit.weight_largest):
            return []
        self.weight_slow += weight(chunk.span_s, SLOW_S) * (residual - self.weight_slow)
        threshold = self.factor * max(fit.margin * fit.weight_largest, HARMFUL_WEIGHT)
        if not self.scale.take(abs(self.weight_slow) / threshold, now_s, chunk.items, name):
            return []
        evidence = {"weight_against_size": round(math.expm1(self.weight_slow), 4), "threshold": round(threshold, 4)}
        words = {
            "percent": f"{abs(math.expm1(self.weight_slow)):.1%}",
            "direction": "heavy" if self.weight_slow > 0 else "light",
        }
        effect = math.expm1(self.weight_slow)
        return [_signal("scale", Detector.COVARIATE, self.scale, effect, "share of the weight", evidence, words)]


def new_state(facts: BundleFacts) -> LotState:
    """Returns the state of a line of which nothing is known."""
    size, kinds = 2 * len(facts.features), len(facts.classes)
    return LotState(
        fast=np.zeros(size),
        slow=np.zeros(size),
        label_fast=np.zeros(kinds),
        label_slow=np.zeros(kinds),
        classes=np.zeros(kinds),
    )


def record_of(line: str, lot: str, chunk: Chunk, facts: BundleFacts, functions: Floats) -> LotRecord:
    """Returns a finished lot for the reference."""
    z = moments(chunk.counts, functions)
    return LotRecord(
        line=line,
        lot=lot,
        duration_s=chunk.span_s,
        items=chunk.items,
        z=z,
        shares=chunk.shares,
        weight=chunk.weight_log(),
        size=chunk.size(z, facts),
    )


def _signal(
    name: str,
    detector: Detector,
    latch: Latch,
    effect: float,
    unit: str,
    evidence: dict[str, Any],
    words: dict[str, str],
    *,
    marks: dict[str, bool] | None = None,
) -> Signal:
    return Signal(
        name=name,
        detector=detector,
        ratio=latch.ratio,
        effect=effect,
        effect_unit=unit,
        items=latch.since_items,
        delay_items=latch.delay_items,
        delay_s=latch.delay_s,
        lots=tuple(latch.lots),
        evidence=evidence,
        words=words,
        marks=tuple(mark for mark, present in (marks or {}).items() if present),
    )
