"""Processor time per frame, against the bare library calls and a plain loop, and the number of lines per core."""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import msgspec
import numpy as np

from benchmarks.figures import Figures, Row
from benchmarks.peers import Found, PlainLoop
from benchmarks.plots import Chart, render
from benchmarks.tracking import Identities, true_boxes
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Frame, Image
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.simulation.line import SimulatedItem, SimulatedLine, SimulationConfig
from edge_agent.simulation.rendering import Kind
from edge_agent.vision.judge import Judge, Judged
from edge_agent.vision.segmentation import SHRINK, Detection, Locator
from models.classifier import PROBABILITIES, VIEWS_INPUT

HD: Final = SimulationConfig(seed=1, lanes=4, items_per_s=3.75, width_px=1280, lane_px=180, reject_mm=900.0)
"""1280x720, twelve items in sight on average."""
_SPARE_FRAMES: Final = 60
"""Until the belt is full."""
Box = tuple[int, int, int, int]


@dataclass(slots=True)
class Film:
    """Frames that are drawn before the measurement."""

    line: SimulatedLine
    frames: list[Frame] = field(default_factory=list)
    truths: list[list[tuple[int, int, float]]] = field(default_factory=list)
    items: dict[int, SimulatedItem] = field(default_factory=dict)
    empty_belt: Image | None = None

    @classmethod
    def of(cls, config: SimulationConfig, count: int) -> "Film":
        """Returns frames of a full belt."""
        film = cls(SimulatedLine(config, virtual=True))
        for number in range(count + _SPARE_FRAMES):
            frame = film.line.read(1.0)
            assert frame is not None
            if number == 0:
                film.empty_belt = frame.image
            if number >= _SPARE_FRAMES:
                film.frames.append(frame)
                film.truths.append(true_boxes(film.line, frame))
                film.items |= {item.item_id: item for item in film.line.items()}
        return film


def core_of(line: SimulatedLine, judge: Judge) -> LineCore:
    """A line without a clock: the queue accepts every shot and fires none."""
    counter = LineCounter(line.config.lanes, clock=lambda: 0.0)
    queue = EjectionQueue(line, line, clock=lambda: 0.0)
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=lambda: 0.0)
    core.use(judge)
    return core


# -- overhead -----


class BareCalls:
    """The library calls a frame cannot do without, on the very crops and batches the line took.

    Each in the fastest form we know, so that the ratio shows our overhead and not a slow baseline: the frame is
    halved twice as the line does it, and the parts are labelled in one call without their statistics.
    """

    def __init__(self, line: SimulatedLine, judge: Judge, first: Frame) -> None:
        width, height = line.geometry.width_px, line.geometry.height_px
        self._half, self._size = (width // 2, height // 2), (width // SHRINK, height // SHRINK)
        self._side = judge.preprocess.view_px
        self._session = judge.classifier._session  # noqa: SLF001  the session itself, without our checks around it
        self._background = self._shrunk(first)

    def _shrunk(self, frame: Frame) -> Any:
        half = cv2.resize(frame.image, self._half, interpolation=cv2.INTER_AREA)
        return cv2.resize(half, self._size, interpolation=cv2.INTER_AREA)

    def process(self, frame: Frame, boxes: list[Box]) -> None:
        """resize, absdiff, threshold, connectedComponents, one resize per crop, one batched session.run."""
        blue, green, red = cv2.split(cv2.absdiff(self._shrunk(frame), self._background))
        mask = cv2.threshold(cv2.max(cv2.max(blue, green), red), 26, 255, cv2.THRESH_BINARY)[1]
        cv2.connectedComponents(mask, connectivity=4)
        size = (self._side, self._side)
        views = [cv2.resize(frame.image[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA) for x0, y0, x1, y1 in boxes]
        if views:
            self._session.run([PROBABILITIES], {VIEWS_INPUT: np.stack(views)})


def overhead(figures: Figures, bundle: Path, count: int) -> None:
    """Whole pipeline against the bare calls, frame by frame in turns."""
    film = Film.of(HD, count)
    judge = Judge(bundle)
    boxes = _boxes_taken(film, judge)
    core = core_of(film.line, judge)
    bare = BareCalls(film.line, judge, film.frames[0])
    whole_s: list[float] = []
    bare_s: list[float] = []
    for number, frame in enumerate(film.frames):
        # Alternating, and alternately first: the second one finds the frame in the processor's cache.
        steps = [
            (whole_s, lambda f=frame: core.process(f)),
            (bare_s, lambda f=frame, n=number: bare.process(f, boxes[n])),
        ]
        for seconds, step in steps if number % 2 else reversed(steps):
            started = time.thread_time()
            step()
            seconds.append(time.thread_time() - started)
    views = sum(map(len, boxes)) / len(film.frames)
    # Ratio of medians over blocks of frames: a block in which the machine did something else does not count.
    blocks = [_block_ratio(whole_s[k : k + 25], bare_s[k : k + 25]) for k in range(0, count, 25)]
    rows: list[Row] = [
        ("whole pipeline, mean", 1e3 * statistics.mean(whole_s), "ms of processor time"),
        ("bare calls, mean", 1e3 * statistics.mean(bare_s), "ms of processor time"),
        ("pipeline / bare calls, all frames", sum(whole_s) / sum(bare_s), ""),
        ("pipeline / bare calls, median of blocks of 25", statistics.median(blocks), ""),
        ("whole pipeline, p99", 1e3 * float(np.quantile(whole_s, 0.99)), "ms"),
        ("items in sight, mean", statistics.mean(map(len, film.truths)), "(whole ones)"),
        ("views per frame", views, ""),
    ]
    bounds = {"pipeline / bare calls, median of blocks of 25": ("<=", 1.5)}
    figures.table("one 1280x720 frame with 12 items on the belt", rows, bounds)


def _block_ratio(whole: list[float], bare: list[float]) -> float:
    return sum(whole) / sum(bare)


def _boxes_taken(film: Film, judge: Judge) -> list[list[Box]]:
    """Which crops the line takes of each frame."""
    taken: list[list[Box]] = []
    core = core_of(film.line, judge)
    plain = judge.take_view

    def note(locator: Locator, image: np.ndarray, track: Any, place: Detection) -> bool:
        taken[-1].append((place.left_px, place.top_px, place.right_px, place.bottom_px))
        return plain(locator, image, track, place)

    judge.take_view = note  # type: ignore[method-assign]
    for frame in film.frames:
        taken.append([])
        core.process(frame)
    judge.take_view = plain  # type: ignore[method-assign]
    return taken


# -- a plain loop -----


def plain_loop(figures: Figures, bundle: Path, count: int) -> None:
    """Time and accuracy of a loop as users write it, and of ours, on the same frames with the same model."""
    film = Film.of(msgspec.structs.replace(HD, seed=61), count)
    judge = Judge(bundle)
    assert film.empty_belt is not None
    core, peer = core_of(film.line, judge), PlainLoop(judge, film.empty_belt)
    verdicts: dict[int, tuple[int, float, bool]] = {}

    def take(judged: Judged, outlet: str) -> None:
        verdicts[judged.track.item_id] = (
            judged.track.lane,
            judged.track.item_mm,
            outlet in film.line.geometry.outlets_mm,
        )

    core.on_verdict = take
    ours_s = theirs_s = 0.0
    seen: list[list[Found]] = []
    for frame in film.frames:
        started = time.thread_time()
        core.process(frame)
        between = time.thread_time()
        seen.append(peer.process(frame.image))
        ours_s, theirs_s = ours_s + between - started, theirs_s + time.thread_time() - between
    defects, identities = _peer_defects(film, seen)
    ours = _our_verdicts(film, verdicts)
    both = ours.keys() & defects.keys()
    bad = {k: film.items[k].apple.kind != Kind.SOUND for k in both}
    limits = np.linspace(0.02, 0.98, 49)
    best = max(sum(bool(defects[k] > limit) == bad[k] for k in both) / len(both) for limit in limits)
    found = identities.figures()
    rows: list[Row] = [
        ("ours, per frame", 1e3 * ours_s / count, "ms of processor time"),
        ("plain loop, per frame", 1e3 * theirs_s / count, "ms of processor time"),
        ("ours / plain loop, time", ours_s / theirs_s, ""),
        ("ours: good and bad distinguished", 100.0 * statistics.mean(ours[k] for k in both), f"% of {len(both)} items"),
        ("plain loop: good and bad distinguished, best threshold", 100.0 * best, "% in hindsight"),
        ("plain loop: MOTA", found["mota"], ""),
        ("plain loop: IDF1", found["idf1"], ""),
    ]
    note = (
        "The plain loop averages the model over every frame of an item; its views are masked, but not as in training."
    )
    figures.table(
        "a plain OpenCV + ONNX Runtime loop, same frames", rows, {"ours / plain loop, time": ("<=", 1.0)}, note=note
    )


def _our_verdicts(film: Film, verdicts: dict[int, tuple[int, float, bool]]) -> dict[int, bool]:
    """True item -> whether its verdict was right."""
    right: dict[int, bool] = {}
    for lane, item_mm, bad in verdicts.values():
        near = [i for i in film.items.values() if i.lane == lane and abs(i.item_mm - item_mm) < 20.0]
        for item in near[:1]:
            right[item.item_id] = bad == (item.apple.kind != Kind.SOUND)
    return right


def _peer_defects(film: Film, seen: list[list[Found]]) -> tuple[dict[int, float], Identities]:
    """True item -> mean defect probability of the identity that followed it longest."""
    identities = Identities()
    defects: defaultdict[int, list[float]] = defaultdict(list)
    for truth, found in zip(film.truths, seen, strict=True):
        identities.add(truth, [(f.identity, int(f.y_px // film.line.config.lane_px), f.x_px) for f in found])
        for f in found:
            defects[f.identity].append(f.defect)
    best: dict[int, tuple[int, int]] = {}
    for (true, given), frames in identities.pairs.items():
        best[true] = max(best.get(true, (0, 0)), (frames, given))
    return {true: statistics.mean(defects[given]) for true, (_, given) in best.items()}, identities


# -- saturation -----


def saturation(figures: Figures, bundle: Path, count: int) -> None:
    """Items per second and core when frames never wait, by lanes and views."""
    judge = Judge(bundle)
    own = judge.preprocess.max_views
    grid: dict[int, list[tuple[float, float]]] = {}
    rows: list[Row] = []
    for lanes in (1, 2, 4, 8):
        # Slow enough that even ten views of an item are in sight: 20 mm from frame to frame.
        film = Film.of(SimulationConfig(seed=1, lanes=lanes, items_per_s=6.0, belt_mm_s=600.0, apples=16), count)
        for views in (4, 6, 8, 10):
            judge.preprocess = msgspec.structs.replace(judge.preprocess, max_views=views)
            core = core_of(film.line, judge)
            started = time.thread_time()
            for frame in film.frames:
                core.process(frame)
            used = time.thread_time() - started
            window = core.counter.close_window()
            rate = window.items / used
            grid.setdefault(views, []).append((float(lanes), rate))
            taken = window.views / max(window.items, 1)
            rows.append((f"{lanes} lanes, {views} views", rate, f"items/s/core ({taken:.1f} views taken)"))
    judge.preprocess = msgspec.structs.replace(judge.preprocess, max_views=own)
    figures.table("saturation: items per second of one core", rows, {})
    chart = Chart(
        "Saturation: what one core carries when frames never wait",
        "lanes of one camera (640 pixels wide, 30 frames/s)",
        "items/s/core",
        [(f"{views} views", points) for views, points in grid.items()],
        x_ticks=(1, 2, 4, 8),
    )
    figures.plots["saturation"] = render([chart], "Processor time of locate, track, crop, infer, fuse, schedule.")
