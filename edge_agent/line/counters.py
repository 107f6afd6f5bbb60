"""Counts what the line does, for windows every ten seconds and live figures every second.

Counting takes microseconds and the reporter's work does not hold up the sorting thread.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.ejection.queue import EjectionQueue
from edge_agent.simulation.line import SimulatedTruth
from edge_agent.vision.judge import Judge, Judged
from models.histogram import Histogram, pack_counts
from models.messages import Live
from models.profile import BINS, FeatureCounter
from models.windows import CameraCounts, LaneCounts, Window

if TYPE_CHECKING:
    from edge_agent.health.camera_sensor import CameraSensor
    from edge_agent.line.shadow import Shadow

log = logging.getLogger("sortline.counting")
_NO_BINS: Final = (0,) * BINS
_NO_FEATURES: Final = np.zeros((0, BINS), np.int64)
_TALLIES = ("frames", "frames_dropped", "frames_bad", "items", "items_unjudged", "verdicts_late", "views")


@dataclass(slots=True)
class _LaneTally:
    """The judged items of one lane in the window that is open."""

    features: FeatureCounter | None
    """None while nothing judges."""
    classes: Counter[str] = field(default_factory=Counter)
    grades: Counter[str] = field(default_factory=Counter)
    outlets: Counter[str] = field(default_factory=Counter)

    def add(self, judged: Judged, outlet: str, *, own_bundle: bool) -> None:
        self.classes[judged.verdict.klass] += 1
        self.grades[judged.verdict.grade] += 1
        self.outlets[outlet] += 1
        if self.features is None:
            return
        # An item finished by the bundle before is counted, but its features belong to another profile.
        known = own_bundle and len(judged.features) == len(self.features)
        if known:
            self.features.add(judged.features, judged.track.scalars)
        else:
            self.features.add(np.full(len(self.features), np.nan, np.float32))

    def take(self) -> tuple[LaneCounts, NDArray[np.int64]]:
        """Returns the counts of the lane, and int64 (F, 16) of its features, and starts the next window."""
        counts, nulls, scalars = self.features.take() if self.features else (_NO_FEATURES, (), {})
        items = self.classes.total()
        lane = LaneCounts(
            items=items,
            classes=dict(self.classes),
            grades=dict(self.grades),
            outlets=dict(self.outlets),
            features=pack_counts(counts) if items else b"",
            nulls=nulls if items else (),
            scalars=scalars,
        )
        for table in (self.classes, self.grades, self.outlets):
            table.clear()
        return lane, counts


class LineCounter:
    """Counts for windows and live figures.

    Args:
        lanes: Number of lanes.
        lot: Lot that runs at the start.
        variety: Variety that runs at the start.
        lifetime_items: Items judged before this start.
        truth: Returns the simulation's truth; None on a real line.
        wall_ms: Milliseconds since 1970.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lanes: int,
        *,
        lot: str = "",
        variety: str = "",
        lifetime_items: int = 0,
        truth: Callable[[], SimulatedTruth] | None = None,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._truth, self._wall_ms, self._clock = truth, wall_ms, clock
        self.lot, self.variety = lot, variety
        self.lifetime_items = lifetime_items
        self.total: Counter[str] = Counter()
        self.total_classes: Counter[str] = Counter()
        self.total_outlets: Counter[str] = Counter()
        self._recent: deque[tuple[float, float]] = deque(maxlen=2000)
        self._frames_at: deque[float] = deque(maxlen=400)
        self._last_truth = truth() if truth else None
        self._bundle = ""
        self._lanes = [_LaneTally(None) for _ in range(lanes)]
        self._queue: EjectionQueue | None = None
        self._last_ejectors: dict[str, int] = {}
        self._last_shots: dict[str, int] = {}
        self.camera_sensor: CameraSensor | None = None
        """Whose counts the windows include; None = the camera is not watched."""
        self.shadow: Shadow | None = None
        """The challenger whose counts the windows include; see `use_shadow`."""
        self._last_shadow: dict[str, int] = {}
        self._restart()

    @property
    def lot_and_variety(self) -> tuple[str, str]:
        """Lot and variety of the same moment; any thread may ask."""
        with self._lock:
            return self.lot, self.variety

    def begin_lot(self, lot: str, variety: str) -> None:
        """Counts items for this lot from now on; close the window first, because a window never mixes two lots."""
        with self._lock:
            self.lot, self.variety = lot, variety

    def follow(self, queue: EjectionQueue) -> None:
        """Includes the shots of this queue in the windows."""
        self._queue = queue

    def _restart(self) -> None:
        self._started_ms, self._started_s = self._wall_ms(), self._clock()
        self._tally: Counter[str] = Counter()
        self._camera: Counter[str] = Counter()
        self._scalars_missing: Counter[str] = Counter()
        self._latency, self._inference = Histogram(), Histogram()

    def use(self, judge: Judge | None) -> None:
        """Counts features in the bins of this bundle from now on; a window never mixes two bundles."""
        with self._lock:
            self._bundle = judge.digest if judge else ""
            for lane in self._lanes:
                lane.features = FeatureCounter(judge.profile) if judge else None

    def use_shadow(self, shadow: "Shadow | None") -> None:
        """Includes this challenger's counts from now on; close the window first, because a window never mixes two."""
        with self._lock:
            self.shadow = shadow
            self._last_shadow = {}

    def count(self, name: str, amount: int = 1) -> None:
        """Adds to one of the tallies of the window and of the totals since the start."""
        with self._lock:
            self._tally[name] += amount
            self.total[name] += amount

    def scalar_missing(self, name: str) -> None:
        """Counts one item that was judged without a scalar which its bundle declares."""
        with self._lock:
            self._scalars_missing[name] += 1

    def camera(self, name: str, amount: int = 1) -> None:
        """Counts a named fault of the camera, or what was done and let through while it was blind."""
        with self._lock:
            self._camera[name] += amount

    def frame(self) -> None:
        """Counts one frame that was searched for items."""
        with self._lock:
            self._tally["frames"] += 1
            self.total["frames"] += 1
            self._frames_at.append(self._clock())

    def inference(self, elapsed_ms: float, views: int) -> None:
        """Counts one run of the model."""
        with self._lock:
            self._inference.add(elapsed_ms)
            self._tally["views"] += views
            self.total["views"] += views

    def verdict(self, judged: Judged, outlet: str, latency_ms: float, *, own_bundle: bool) -> None:
        """Counts one item with its verdict, which goes to `outlet` (the late outlet when the verdict came too late)."""
        if not self.total["items"]:
            log.info("first verdict: item=%s lane=%s", judged.track.item_id, judged.track.lane)
        with self._lock:
            self.lifetime_items += 1
            self.total["items"] += 1
            self.total_classes[judged.verdict.klass] += 1
            self.total_outlets[outlet] += 1
            self._recent.append((self._clock(), latency_ms))
            self._tally["items"] += 1
            self._latency.add(latency_ms)
            self._lanes[judged.track.lane].add(judged, outlet, own_bundle=own_bundle)

    def close_window(self) -> Window:
        """Returns the window since the last call and starts the next one."""
        truth = self._truth() if self._truth else None
        with self._lock:
            lanes, counts = zip(*(lane.take() for lane in self._lanes), strict=True)
            features = sum(counts[1:], counts[0])
            tallies: dict[str, Any] = {name: self._tally[name] for name in _TALLIES}
            window = Window(
                started_ms=self._started_ms,
                duration_ms=max(0, round((self._clock() - self._started_s) * 1000.0)),
                bundle=self._bundle,
                lot=self.lot,
                variety=self.variety,
                simulated=self._truth is not None,
                lanes=tuple(lane.items for lane in lanes),
                by_lane=lanes,
                classes=_summed(lane.classes for lane in lanes),
                grades=_summed(lane.grades for lane in lanes),
                outlets=_summed(lane.outlets for lane in lanes),
                latency_ms=self._latency,
                inference_ms=self._inference,
                features=features.astype("<u4").tobytes(),
                nulls=tuple((self._tally["items"] - features.sum(axis=1)).tolist()),
                scalars=_summed_bins(lane.scalars for lane in lanes),
                ejections=self._since(truth, "ejections"),
                ejectors=self._ejectors(),
                shots=self._shots(),
                lead_ms=self._queue.leads_ms() if self._queue else {},
                jitter_ms=self._jitter(),
                shadow=self._shadow(),
                shadow_bundle=self.shadow.judge.digest if self.shadow else "",
                camera=dict(+self._camera),
                camera_health=self.camera_sensor.take() if self.camera_sensor else CameraCounts(),
                scalars_missing=dict(self._scalars_missing),
                truth=self._since(truth, "outcomes"),
                lifetime_items=self.lifetime_items,
                **tallies,
            )
            self._last_truth = truth
            self._restart()
        return window

    def _ejectors(self) -> dict[str, int]:
        ledger = self._queue.ledger if self._queue else None
        now = ledger.counts() if ledger else {}
        before, self._last_ejectors = self._last_ejectors, now
        return _grown(now, before)

    def _shots(self) -> dict[str, int]:
        now = self._queue.counts() if self._queue else {}
        before, self._last_shots = self._last_shots, now
        return _grown(now, before)

    def _shadow(self) -> dict[str, int]:
        now = dict(self.shadow.counts) if self.shadow else {}
        before, self._last_shadow = self._last_shadow, now
        return _grown(now, before)

    def _jitter(self) -> Histogram:
        if self._queue is None:
            return Histogram()
        taken, self._queue.jitter_ms = self._queue.jitter_ms, Histogram()
        return taken

    def _since(self, truth: SimulatedTruth | None, name: str) -> dict[str, int]:
        if truth is None or self._last_truth is None:
            return {}
        return _grown(getattr(truth, name), getattr(self._last_truth, name))

    def live(self, boot_id: str, belt_mm_s: float, *, camera_fault: str = "") -> Live:
        """Returns rates of the last five seconds and totals since the start."""
        truth = self._truth() if self._truth else None
        with self._lock:
            now = self._clock()
            recent = [latency for at, latency in self._recent if now - at <= 5.0]
            span = min(5.0, max(now - self._first_s(), 1.0))
            frames = sum(1 for at in self._frames_at if now - at <= 5.0)
            ordered = sorted(recent)
            return Live(
                boot_id=boot_id,
                at_ms=self._wall_ms(),
                items_per_s=round(len(recent) / span, 2),
                frames_per_s=round(frames / span, 2),
                belt_mm_s=round(belt_mm_s, 1),
                p50_ms=round(ordered[len(ordered) // 2], 2) if ordered else 0.0,
                p99_ms=round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2) if ordered else 0.0,
                items=self.total["items"],
                items_unjudged=self.total["items_unjudged"],
                frames_dropped=self.total["frames_dropped"],
                verdicts_late=self.total["verdicts_late"],
                classes=dict(self.total_classes),
                outlets=dict(self.total_outlets),
                ejections=truth.ejections if truth else {},
                truth=truth.outcomes if truth else {},
                bundle=self._bundle,
                camera_fault=camera_fault,
            )

    def _first_s(self) -> float:
        return self._frames_at[0] if self._frames_at else self._clock()


def _summed(tables: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)


def _summed_bins(tables: Iterable[Mapping[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    total: dict[str, tuple[int, ...]] = {}
    for table in tables:
        for name, bins in table.items():
            total[name] = tuple(x + y for x, y in zip(total.get(name, _NO_BINS), bins, strict=True))
    return total


def _grown(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Returns the counts that have grown, by how much."""
    return {key: value - before.get(key, 0) for key, value in now.items() if value > before.get(key, 0)}
