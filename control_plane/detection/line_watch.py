"""Everything that is followed of one line, and how one sum of windows goes into it.

Each source (camera, lots, lanes, peers, ejectors, known truth, variety) keeps the signals that it saw last; they are
present until the source is asked again. While the camera shows a fault of its own, its items teach nothing and are
judged by nothing: a dirty lens must not stay behind as a drift of the fruit once it is wiped.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from control_plane.detection.camera_channel import CameraState
from control_plane.detection.contrast import ContrastReference, Member, new_member, step
from control_plane.detection.facts import BundleFacts
from control_plane.detection.finding import Detector, LineSum, Signal
from control_plane.detection.lot_channel import Chunk, LotState, empty_chunk
from control_plane.detection.moments import Floats, class_counts, mean_log, moments
from control_plane.detection.sequential import Array, Latch, RateWatch
from models.statistics import wilson_interval
from models.view_spec import LENGTH, WEIGHT
from models.windows import Window

CHUNK_ITEMS: Final = 50
"""Items of a line, and of each lane, that are judged together."""
LEAST_ITEMS: Final = 25
"""A lane or line with fewer items when the others are complete takes no part."""
LEAST_CHUNK_S: Final = 60.0
CHUNK_S: Final = 300.0
"""Shortest and longest wait for members: the noise of a comparison must not depend on the length of windows."""
LEAST_LANES: Final = 3
ERROR_TRIALS: Final = 1000
"""Items of known truth from which the usual rate of errors is learnt: lots differ in it."""
_FEATURE_MARKS: Final = {
    "sharpness": "sharp",
    "lightness": "light",
    "contrast": "light",
    "highlight": "light",
    "dark_share": "light",
    "centre_x": "place",
    "centre_y": "place",
}
"""What a difference from the siblings means when this feature shows it most."""


class LineState(msgspec.Struct, kw_only=True, eq=False):
    """One line."""

    site: str
    bundle: str = ""
    lot: str = ""
    variety: str = ""
    lot_began_s: float = 0.0
    last_s: float = 0.0
    camera: CameraState = msgspec.field(default_factory=CameraState)
    lot_state: LotState | None = None
    lot_sum: Chunk | None = None
    lot_clean: bool = True
    """Whether the camera was sound for the whole lot so far."""
    pending: Chunk | None = None
    """Items that wait to be judged against the reference."""
    peer_pending: Chunk | None = None
    """Items that wait to be compared with other lines."""
    peer: Member | None = None
    lane_pending: Array | None = None
    """(M, F, 16)."""
    lane_items: list[int] = []
    lane_span_s: float = 0.0
    lanes: list[Member] = []
    ejectors: dict[str, RateWatch] = {}
    ejector_latches: dict[str, Latch] = {}
    errors: RateWatch = msgspec.field(default_factory=lambda: RateWatch(learn_trials=ERROR_TRIALS))
    errors_latch: Latch = msgspec.field(default_factory=Latch)
    signals: dict[str, list[Signal]] = {}
    """By source."""

    @property
    def camera_faulty(self) -> bool:
        """Whether the camera shows a fault of its own now."""
        return bool(self.signals.get("camera"))

    def all_signals(self) -> list[Signal]:
        """Returns the signals of all sources."""
        return [signal for found in self.signals.values() for signal in found]

    def start_bundle(self, bundle: str, facts: BundleFacts | None) -> None:
        """Forgets what depends on the bundle; the camera and the ejectors stay the same."""
        self.bundle = bundle
        self.lot_state = self.lot_sum = self.pending = self.peer_pending = self.peer = self.lane_pending = None
        self.lanes, self.lane_items, self.lane_span_s, self.lot = [], [], 0.0, ""
        self.errors, self.errors_latch = RateWatch(learn_trials=ERROR_TRIALS), Latch()
        self.signals = {source: found for source, found in self.signals.items() if source in {"camera", "ejectors"}}
        if facts is not None:
            self.peer = new_member(2 * len(facts.features))

    def start_lot(self, lot: str, variety: str, now_s: float) -> None:
        """Begins another lot: what waits is dropped, since chunks are of one lot."""
        self.lot, self.variety, self.lot_began_s = lot, variety, now_s
        self.lot_sum = self.pending = self.peer_pending = self.lane_pending = None
        self.lane_items, self.lane_span_s, self.lot_clean = [], 0.0, True

    # -- what needs no reference of the fruit --------------------------------------------------------------------

    def take_camera(self, window: Window, span_s: float, now_s: float) -> None:
        """Takes the camera's looks."""
        health = window.camera_health
        if health.looks or health.repeated:
            self.signals["camera"] = self.camera.take(
                health, frames=window.frames, span_s=span_s, now_s=now_s, items=window.items
            )
        if self.camera_faulty:
            self.lot_clean = False

    def take_ejectors(self, window: Window, now_s: float) -> None:
        """Takes the photo-eyes' confirmations; the present signals are those of the ejectors that miss too often."""
        tables: dict[str, dict[str, int]] = {}
        for key, count in window.ejectors.items():
            ejector, _, what = key.rpartition("/")
            if ejector and what in {"confirmed", "missed"}:
                tables.setdefault(ejector, {})[what] = count
        kept = {signal.words["ejector"]: signal for signal in self.signals.get("ejectors", ())}
        for ejector, counts in tables.items():
            missed = counts.get("missed", 0)
            trials = missed + counts.get("confirmed", 0)
            watch = self.ejectors.setdefault(ejector, RateWatch())
            latch = self.ejector_latches.setdefault(ejector, Latch())
            if trials and latch.take(watch.take(trials, missed), now_s, trials):
                kept[ejector] = _ejector_signal(ejector, watch, latch)
            elif trials:
                kept.pop(ejector, None)
        self.signals["ejectors"] = list(kept.values())

    def take_truth(
        self, window: Window, facts: BundleFacts, now_s: float, *, reviewed: tuple[int, int] = (0, 0)
    ) -> None:
        """Takes items of known truth: seeded ones of the window, and (items, wrong) of reviews."""
        trials, wrong = reviewed
        for pair, count in window.truth.items():
            kind, arrow, outlet = pair.partition(">")
            if arrow and kind in facts.outlets:
                trials += count
                wrong += count * (facts.outlets[kind] != outlet)
        if trials <= 0 or self.camera_faulty:
            return
        ratio = self.errors.take(trials, wrong)
        present = self.errors_latch.take(ratio, now_s, trials, self.lot)
        self.signals["truth"] = [_error_signal(self.errors, self.errors_latch)] if present else []

    # -- what compares members on the same lot -------------------------------------------------------------------

    def take_lanes(self, window: Window, facts: BundleFacts, functions: Floats, reference: ContrastReference) -> None:
        """Compares the lanes of the line when each has enough items."""
        lanes = window.by_lane
        if len(lanes) < LEAST_LANES or self.camera_faulty:
            return
        shape = (len(facts.features), functions.shape[1])
        counts = np.array([lane.feature_counts() if lane.items else np.zeros(shape) for lane in lanes], np.float64)
        if self.lane_pending is None or len(self.lane_pending) != len(lanes):
            self.lane_pending, self.lane_items, self.lane_span_s = np.zeros((len(lanes), *shape)), [0] * len(lanes), 0.0
        self.lane_pending = self.lane_pending + counts
        self.lane_items = [n + lane.items for n, lane in zip(self.lane_items, lanes, strict=True)]
        self.lane_span_s += window.duration_ms / 1000.0
        if not complete(min(self.lane_items), self.lane_span_s):
            return
        while len(self.lanes) < len(lanes):
            self.lanes.append(new_member(2 * len(facts.features)))
        rows = [k for k, items in enumerate(self.lane_items) if items >= LEAST_ITEMS]
        if len(rows) >= LEAST_LANES:
            members = [self.lanes[k] for k in rows]
            z = moments(self.lane_pending[rows], functions)
            found = step(reference, members, z, span_s=self.lane_span_s, lot=self.lot)
            self.signals["lanes"] = [
                contrast_signal("lane", Detector.LANE, self.lanes[k].latch, seen, facts, lane=k)
                for k, (ratio, *seen) in zip(rows, found, strict=True)
                if self.lanes[k].latch.take(ratio, self.last_s, self.lane_items[k], self.lot)
            ]
        self.lane_pending = None

    def chunk_of(self, window: Window, facts: BundleFacts, counts: Floats, span_s: float) -> Chunk:
        """Returns the items of a window as a chunk."""
        chunk = empty_chunk(facts)
        chunk.counts = counts
        chunk.classes = class_counts(window.classes, facts.classes)
        chunk.items, chunk.span_s = window.items, span_s
        weights, lengths = window.scalars.get(WEIGHT, ()), window.scalars.get(LENGTH, ())
        if sum(weights) and WEIGHT in facts.scalar_edges:
            chunk.weights[0] = sum(weights)
            chunk.weights[1] = sum(weights) * mean_log(weights, facts.scalar_edges[WEIGHT])
        if sum(lengths) and LENGTH in facts.scalar_edges:
            chunk.lengths = sum(lengths)
            chunk.weights[2] = chunk.lengths * mean_log(lengths, facts.scalar_edges[LENGTH])
        return chunk


def complete(fewest: int, span_s: float) -> bool:
    """Returns whether members that have at least so many items, waiting for so long, are compared now."""
    return span_s >= CHUNK_S or (fewest >= CHUNK_ITEMS and span_s >= LEAST_CHUNK_S)


def _ejector_signal(ejector: str, watch: RateWatch, latch: Latch) -> Signal:
    lane, _, outlet = ejector.partition("/")
    share = watch.since_failures / max(watch.since_trials, 1)
    return Signal(
        name="ejector",
        detector=Detector.EJECTOR,
        ratio=latch.ratio,
        effect=share,
        effect_unit="share of shots",
        interval=wilson_interval(share, watch.since_trials),
        items=watch.since_trials,
        delay_items=latch.delay_items,
        delay_s=latch.delay_s,
        lane=int(lane) if lane.isdecimal() else None,
        evidence={"usual": round(watch.usual, 4), "now": round(watch.recent, 4), "shots": watch.since_trials},
        words={"ejector": ejector, "outlet": outlet, "percent": f"{share:.0%}"},
    )


def _error_signal(watch: RateWatch, latch: Latch) -> Signal:
    share = watch.since_failures / max(watch.since_trials, 1)
    return Signal(
        name="errors",
        detector=Detector.ACCURACY,
        ratio=latch.ratio,
        effect=share,
        effect_unit="share of items",
        interval=wilson_interval(share, watch.since_trials),
        items=watch.since_trials,
        delay_items=latch.delay_items,
        delay_s=latch.delay_s,
        lots=tuple(latch.lots),
        evidence={"usual": round(watch.usual, 4), "now": round(watch.recent, 4)},
        words={"percent": f"{share:.0%}"},
    )


def contrast_signal(
    name: str, detector: Detector, latch: Latch, seen: Sequence[Floats], facts: BundleFacts, *, lane: int | None = None
) -> Signal:
    """Returns the signal of a member that stands out from its siblings.

    Args:
        name: `camera` or `lane`.
        detector: Its channel.
        latch: Of the member.
        seen: (2F,) difference, standard deviations of an item; (2F,) contribution of each number to its strength.
        facts: Of the bundle.
        lane: Number of the lane, for lanes.
    """
    table, parts = (part.reshape(-1, 2) for part in seen)
    strength = np.abs(table).max(axis=1)
    # What stands out is judged beside what usually differs, not by its size.
    order = np.argsort(parts.sum(axis=1))[::-1][:6]
    feature = facts.features[int(order[0])]
    mark = _FEATURE_MARKS.get(feature, "")
    return Signal(
        name=name,
        detector=detector,
        ratio=latch.ratio,
        effect=float(strength[order[0]]),
        effect_unit="standard deviations of an item",
        items=latch.since_items,
        delay_items=latch.delay_items,
        delay_s=latch.delay_s,
        lots=tuple(latch.lots),
        lane=lane,
        evidence={
            "features": {
                facts.features[k]: {"location": round(float(table[k, 0]), 3), "spread": round(float(table[k, 1]), 3)}
                for k in order
            }
        },
        words={"feature": feature},
        marks=(mark,) if mark else (),
    )


def usable_counts(given: LineSum, facts: BundleFacts) -> Floats | None:
    """Returns float64 (F, 16) of a window, or None where it has no features or other ones than the bundle."""
    counts = given.window.feature_counts()
    return counts.astype(np.float64) if len(counts) == len(facts.features) and given.window.items else None
