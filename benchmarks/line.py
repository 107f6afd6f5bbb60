"""The path from frame to ejector against what it cannot do without: `python -m benchmarks.line [--quick] [--json F]`.

Every ratio has its baseline in the same run, in turns with what it is compared with. Exit status 1 when a bound is
missed. `--bundle` takes a trained bundle; without it one is trained on simulated items first.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PlainLoop, supervision_tracker
from benchmarks.tracking import Identities, true_boxes
from control_plane.training.pipeline import TrainSettings, train
from edge_agent.child import LINE_ENVIRONMENT
from edge_agent.collect import collect
from edge_agent.counting import LineCounter
from edge_agent.ejection import EjectionQueue
from edge_agent.judging import Judge
from edge_agent.line_config import LineConfig
from edge_agent.locate import SHRINK, Located, Locator
from edge_agent.pipe import Beat, FromLine, Pipe, Stop, Swapped, WindowClosed
from edge_agent.seams import Frame
from edge_agent.simulation import SimulatedLine, SimulationConfig
from edge_agent.sorting import LineCore
from edge_agent.tracking import Tracker
from models.windows import Window, merge

if TYPE_CHECKING:
    from collections.abc import Callable

HD = SimulationConfig(seed=1, lanes=4, items_per_s=3.75, width_px=1280, lane_px=180, reject_mm=900.0)
"""1280x720, twelve items in sight on average."""
BUSY = SimulationConfig(seed=1, lanes=4, items_per_s=10.0)


class Figures:
    """Collects rows, prints them, knows whether a bound was missed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.data: dict[str, Any] = {}
        self.missed: list[str] = []

    def table(self, title: str, rows: list[tuple[str, float | str, str]], bounds: dict[str, tuple[str, float]]) -> None:
        """Rows of (name, value, unit); a bound is ("<=" or ">=", limit)."""
        table = Table(title=title, title_justify="left")
        for head in ("figure", "value", "bound"):
            table.add_column(head, justify="left" if head == "figure" else "right")
        for name, value, unit in rows:
            sign, limit = bounds.get(name, ("", 0.0))
            number = float(value) if not isinstance(value, str) else float("nan")
            ok = not sign or (number <= limit if sign == "<=" else number >= limit)
            if not ok:
                self.missed.append(f"{title}: {name} is {number:.4g}, bound {sign} {limit:g}")
            shown = value if isinstance(value, str) else f"{value:,.4g} {unit}"
            table.add_row(name, shown if ok else f"[red]{shown}", f"{sign} {limit:g}" if sign else "")
        self.data[title] = {name: value for name, value, _ in rows}
        self._console.print(table)


def make_bundle(folder: Path, console: Console) -> Path:
    """A model of the usual size, trained on simulated items."""
    with console.status("training a model to measure with (about a minute)"):
        collect(LineConfig(lanes=2, seed=7), folder / "data", items=240)
        train(folder / "data", TrainSettings(name="benchmark", folds=2), folder / "bundle")
    return folder / "bundle"


def frames_of(config: SimulationConfig, count: int) -> tuple[SimulatedLine, list[Frame]]:
    """Drawn beforehand: drawing is not what is measured."""
    line = SimulatedLine(config, virtual=True)
    frames = [line.read(1.0) for _ in range(count + 60)]
    return line, [frame for frame in frames[60:] if frame is not None]


def core_of(line: SimulatedLine, judge: Judge) -> LineCore:
    """A line without a clock: the queue takes every shot and fires none."""
    counter = LineCounter(line.config.lanes, clock=lambda: 0.0)
    queue = EjectionQueue(line, line, clock=lambda: 0.0)
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=lambda: 0.0)
    core.use(judge)
    return core


# -- overhead -----


class BareCalls:
    """The library calls a frame cannot do without, on the very crops and batches the line took."""

    def __init__(self, line: SimulatedLine, judge: Judge, background: np.ndarray) -> None:
        self._size = (line.geometry.width_px // SHRINK, line.geometry.height_px // SHRINK)
        self._lanes = [(r.top_px // SHRINK, r.bottom_px // SHRINK) for r in line.geometry.lanes]
        self._judge, self._background = judge, background

    def process(self, frame: Frame, boxes: list[tuple[int, int, int, int]]) -> None:
        small = cv2.resize(frame.image, self._size, interpolation=cv2.INTER_AREA)
        blue, green, red = cv2.split(cv2.absdiff(small, self._background))
        mask = cv2.threshold(cv2.max(cv2.max(blue, green), red), 26, 255, cv2.THRESH_BINARY)[1]
        for top, bottom in self._lanes:
            cv2.connectedComponentsWithStats(mask[top:bottom], connectivity=4)
        side = self._judge.preprocess.view_px
        views = [
            cv2.resize(frame.image[y0:y1, x0:x1], (side, side), interpolation=cv2.INTER_AREA)
            for x0, y0, x1, y1 in boxes
        ]
        if views:
            self._judge.classifier.classify(views)


def overhead(figures: Figures, bundle: Path, count: int) -> None:
    """Whole pipeline against the bare calls, frame by frame in turns."""
    line, frames = frames_of(HD, count)
    judge = Judge(bundle)
    boxes = boxes_taken(line, frames, judge)
    core = core_of(line, judge)
    bare = BareCalls(line, judge, cv2.resize(frames[0].image, (320, 180), interpolation=cv2.INTER_AREA))
    whole_s: list[float] = []
    bare_s: list[float] = []
    for number, frame in enumerate(frames):
        # In turns, and in turns first: whoever comes second finds the frame in the processor's cache.
        steps = [
            (whole_s, lambda f=frame: core.process(f)),
            (bare_s, lambda f=frame, n=number: bare.process(f, boxes[n])),
        ]
        for seconds, step in steps if number % 2 else reversed(steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    window = core.counter.close_window()
    ratio = sum(whole_s) / sum(bare_s)
    rows: list[tuple[str, float | str, str]] = [
        ("pipeline, mean", 1e3 * statistics.mean(whole_s), "ms"),
        ("bare calls, mean", 1e3 * statistics.mean(bare_s), "ms"),
        ("pipeline / bare calls", ratio, ""),
        ("pipeline, p99", 1e3 * float(np.quantile(whole_s, 0.99)), "ms"),
        ("views per frame", window.views / len(frames), ""),
    ]
    figures.table("one 1280x720 frame with 12 items", rows, {"pipeline / bare calls": ("<=", 1.5)})


def boxes_taken(line: SimulatedLine, frames: list[Frame], judge: Judge) -> list[list[tuple[int, int, int, int]]]:
    """Which crops the line takes of each frame."""
    taken: list[list[tuple[int, int, int, int]]] = []
    core = core_of(line, judge)
    plain = judge.take_view

    def note(locator: Locator, image: np.ndarray, track: Any, place: Located) -> bool:
        taken[-1].append((place.left_px, place.top_px, place.right_px, place.bottom_px))
        return plain(locator, image, track, place)

    judge.take_view = note  # type: ignore[method-assign]
    for frame in frames:
        taken.append([])
        core.process(frame)
    judge.take_view = plain  # type: ignore[method-assign]
    return taken


# -- tracking, peers -----


def tracking(figures: Figures, count: int) -> None:
    """Identity figures and cost of ours and of a peer's tracker on the same places."""
    cases = {
        "10 items/s/lane": "",
        "belt at 80 %": "0s speed_factor=0.8",
        "belt at 120 %": "0s speed_factor=1.2",
        "slow, stop, fast": "3s speed_factor=0.8; 8s stopped; 10s speed_factor=1.2; 20s clear",
    }
    for name, schedule in cases.items():
        line = SimulatedLine(BUSY, virtual=True, schedule=schedule)
        ids = iter(range(1, 1_000_000))
        locator, tracker = Locator(line.geometry), Tracker(line.geometry, lambda ids=ids: next(ids))
        peer = supervision_tracker(BUSY.frames_per_s)
        ours, theirs = Identities(), Identities()
        ours_s = theirs_s = 0.0
        truths: set[int] = set()
        for number in range(count):
            frame = line.read(1.0)
            assert frame is not None
            places = locator.find(frame.image)
            started = time.perf_counter()
            seen, _ = tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
            ours_s += time.perf_counter() - started
            peers: list[tuple[int, int, float]] = []
            if peer is not None:
                started = time.perf_counter()
                peers = peer([p for p in places if p.whole])
                theirs_s += time.perf_counter() - started
            if number < 30:
                continue
            truth = true_boxes(line, frame)
            truths.update(t[0] for t in truth)
            ours.add(truth, [(track.item_id, place.lane, place.x_px) for track, place in seen])
            theirs.add(truth, peers)
        found = ours.figures()
        wrong = found["items_with_several_ids"] + found["ids_with_several_items"] + len(truths) - ours.items
        rows: list[tuple[str, float | str, str]] = [
            ("MOTA", found["mota"], ""),
            ("IDF1", found["idf1"], ""),
            ("items", float(len(truths)), ""),
            ("switched + doubled + missed, share of items", wrong / len(truths), ""),
            ("tracking per frame", 1e6 * ours_s / count, "us"),
        ]
        bounds = {
            "MOTA": (">=", 0.978),
            "IDF1": (">=", 0.989),
            "switched + doubled + missed, share of items": ("<=", 0.005),
        }
        if peer is None:
            rows.append(("supervision ByteTrack", "not installed: pip install supervision", ""))
        else:
            other = theirs.figures()
            rows += [
                ("supervision ByteTrack: MOTA", other["mota"], ""),
                ("supervision ByteTrack: IDF1", other["idf1"], ""),
                ("supervision ByteTrack: items with several ids", other["items_with_several_ids"], ""),
                ("supervision ByteTrack: per frame", 1e6 * theirs_s / count, "us"),
                ("ours / ByteTrack, time", ours_s / theirs_s, ""),
            ]
            bounds["ours / ByteTrack, time"] = ("<=", 1.0)
        figures.table(f"tracking, 4 lanes, {name}", rows, bounds)


def plain_loop(figures: Figures, bundle: Path, count: int) -> None:
    """A loop of OpenCV and ONNX Runtime as users write it, on the same frames."""
    line, frames = frames_of(HD, count)
    judge = Judge(bundle)
    core, peer = core_of(line, judge), PlainLoop(judge)
    ours_s = theirs_s = 0.0
    for frame in frames:
        started = time.perf_counter()
        core.process(frame)
        between = time.perf_counter()
        peer.process(frame.image)
        ours_s, theirs_s = ours_s + between - started, theirs_s + time.perf_counter() - between
    rows: list[tuple[str, float | str, str]] = [
        ("ours per frame", 1e3 * ours_s / len(frames), "ms"),
        ("plain loop per frame", 1e3 * theirs_s / len(frames), "ms"),
        ("ours / plain loop", ours_s / theirs_s, ""),
    ]
    figures.table("a plain OpenCV + ONNX Runtime loop on the same frames", rows, {"ours / plain loop": ("<=", 1.0)})


def saturation(figures: Figures, bundle: Path, count: int) -> None:
    """Items per second and core when frames never wait, by lanes and views."""
    judge = Judge(bundle)
    rows: list[tuple[str, float | str, str]] = []
    for lanes in (1, 2, 4, 8):
        line, frames = frames_of(msgspec.structs.replace(BUSY, lanes=lanes, apples=16), count)
        for views in (4, 6, 10):
            judge.preprocess = msgspec.structs.replace(judge.preprocess, max_views=views)
            core = core_of(line, judge)
            started = time.process_time()
            for frame in frames:
                core.process(frame)
            used = time.process_time() - started
            window = core.counter.close_window()
            per_item = window.views / max(window.items, 1)
            rows.append((f"{lanes} lanes, {per_item:.1f} views per item", window.items / used, "items/s/core"))
    figures.table("saturation of one core", rows, {})


# -- the real process -----


def resident_mb(pid: int) -> float:
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(f.split()[1]) for f in fields if f.startswith("Rss:")) / 1024.0


def soak(figures: Figures, bundle: Path, seconds: float, console: Console) -> None:
    """The line process in real time on one core, its simulated camera included."""
    config = LineConfig(lanes=4, items_per_s=10.0, bundle=str(bundle), window_s=5.0, belt_mm_s=1000.0)
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "line.json"
        path.write_bytes(msgspec.json.encode(config))
        command = [sys.executable, "-m", "edge_agent.line", "--config", str(path), "--pipe-fd", str(theirs.fileno())]
        core = min(os.sched_getaffinity(0))
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
            env=os.environ | LINE_ENVIRONMENT,
        )
        os.sched_setaffinity(child.pid, {core})
        theirs.close()
        try:
            _watch(figures, Pipe(ours), child.pid, started, seconds, console)
        finally:
            child.terminate()
            child.wait(10)


def _watch(figures: Figures, pipe: Pipe, pid: int, started: float, seconds: float, console: Console) -> None:
    windows: list[Window] = []
    memory: list[float] = []
    first_s = None
    with console.status("the line process at work") as status:
        while time.monotonic() - started < seconds:
            message = pipe.receive(FromLine, 2.0)
            match message:
                case WindowClosed(window=window):
                    windows.append(window)
                    memory.append(resident_mb(pid))
                    status.update(f"{time.monotonic() - started:.0f} of {seconds:.0f} s, {memory[-1]:.0f} MB resident")
                case Beat(items_on_bundle=items) if items and first_s is None:
                    first_s = time.monotonic() - started
                case Swapped():
                    pass
    pipe.send(Stop())
    whole = windows[1]
    for window in windows[2:]:
        whole = merge(whole, window)
    shots = whole.ejections
    outcomes = whole.truth
    rows: list[tuple[str, float | str, str]] = [
        ("frames", float(whole.frames), ""),
        ("frames dropped", float(whole.frames_dropped), ""),
        ("frames per second", 1e3 * whole.frames / whole.duration_ms, ""),
        ("items per second", 1e3 * whole.items / whole.duration_ms, ""),
        ("views per item", whole.views / max(whole.items, 1), ""),
        ("frame to verdict, p50", whole.latency_ms.quantile(0.5), "ms"),
        ("frame to verdict, p99", whole.latency_ms.quantile(0.99), "ms"),
        ("ejection jitter, p99", whole.jitter_ms.quantile(0.99), "ms"),
        ("ejections on time", shots.get("on_time", 0) / max(sum(shots.values()), 1), ""),
        ("items settled", float(sum(outcomes.values())), ""),
        ("start to first verdict, at most", first_s or float("nan"), "s"),
        ("line process, resident", memory[-1], "MB"),
        ("resident, last / first quarter", statistics.mean(memory[-3:]) / statistics.mean(memory[1:4]), ""),
    ]
    bounds = {
        "frames dropped": ("<=", 0.0),
        "views per item": (">=", 4.0),
        "frame to verdict, p99": ("<=", 15.0),
        "ejection jitter, p99": ("<=", 2.0),
        "ejections on time": (">=", 0.99),
        "start to first verdict, at most": ("<=", 3.0),
        "line process, resident": ("<=", 160.0),
        "resident, last / first quarter": ("<=", 1.05),
    }
    figures.data["soak, memory MB"] = memory
    figures.table(f"4 lanes x 10 items/s on one core for {seconds:.0f} s", rows, bounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="trained bundle; one is trained when missing")
    parser.add_argument("--quick", action="store_true", help="under a minute with --bundle")
    parser.add_argument("--soak", type=float, default=0.0, metavar="S", help="seconds of the soak (600; quick 20)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    console = Console()
    figures = Figures(console)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.bundle or make_bundle(Path(scratch), console)
        frames = 150 if options.quick else 600
        stages: list[Callable[[], None]] = [
            lambda: overhead(figures, bundle, frames),
            lambda: plain_loop(figures, bundle, frames),
            lambda: tracking(figures, 240 if options.quick else 900),
            lambda: saturation(figures, bundle, 90 if options.quick else 300),
            lambda: soak(figures, bundle, options.soak or (20.0 if options.quick else 600.0), console),
        ]
        for stage in stages:
            stage()
    if options.json:
        options.json.write_text(json.dumps(figures.data | {"missed": figures.missed}, indent=2))
    for line in figures.missed:
        console.print(f"[red]missed[/] {line}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())
