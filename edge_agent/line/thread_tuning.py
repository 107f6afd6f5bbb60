"""Measures how many threads OpenCV and ONNX Runtime should use on this machine.

It takes under half a second at the start. The processors are shared with the camera, the ejection thread and perhaps
a second line, so processor time is what is scarce: only thread counts that cost at most a tenth more of it than the
thriftiest are considered, and of those a larger one must shorten the p99 by a fifth. More threads that only burn time
are refused, more threads that shorten the tail for nothing are taken. The counts are measured in turns, so that a
burst of other work hits all of them alike.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from models.bundle import read_bundle
from models.classifier import OnnxClassifier

_MODEL_S: Final = 0.3
_OPENCV_S: Final = 0.1
_BATCH: Final = 8
_MOST_THREADS: Final = 8
_MOST_RUNS: Final = 200
_DEARER: Final = 1.10
_SHORTER: Final = 0.8


@dataclass(frozen=True, slots=True)
class ThreadTiming:
    """The measurement of one thread count."""

    threads: int
    p99_ms: float
    cpu_ms: float
    """Processor time of one run over all threads, milliseconds."""
    runs: int


@dataclass(slots=True)
class _Measured:
    work: Callable[[], object]
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: float = 0.0


def thread_counts(cores: int | None = None) -> list[int]:
    """Returns 1, 2, 4, ... up to the processors this process may use, at most eight."""
    most = min(cores or len(os.sched_getaffinity(0)), _MOST_THREADS)
    return [count for count in (1, 2, 4, 8) if count <= most]


def choose(trials: Sequence[ThreadTiming]) -> ThreadTiming:
    """Chooses a thread count by the rule at the head of this module; pure."""
    limit = _DEARER * min(trial.cpu_ms for trial in trials)
    thrifty = sorted((t for t in trials if t.cpu_ms <= limit), key=lambda t: t.threads)
    best = thrifty[0]
    for trial in thrifty[1:]:
        if trial.p99_ms < _SHORTER * best.p99_ms:
            best = trial
    return best


def measure(
    work_for: Callable[[int], Callable[[], object]],
    counts: Sequence[int],
    budget_s: float,
    *,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> list[ThreadTiming]:
    """Runs the same work with each thread count in turns until the budget is spent; each at least three times.

    Args:
        work_for: Gives the work of a thread count; called again before each turn where the count is a global setting.
        counts: Thread counts.
        budget_s: Of wall time, preparation included.
        wall: Seconds.
        cpu: Seconds of processor time of this process.
    """
    ends_s = wall() + budget_s
    measured = {count: _Measured(work_for(count)) for count in counts}
    for each in measured.values():
        each.work()
    turns = 0
    while turns < 3 or (wall() < ends_s and turns < _MOST_RUNS):
        turns += 1
        for each in measured.values():
            began_s, began_cpu_s = wall(), cpu()
            each.work()
            each.wall_ms.append((wall() - began_s) * 1000.0)
            each.cpu_ms += (cpu() - began_cpu_s) * 1000.0
    return [
        ThreadTiming(count, float(np.quantile(each.wall_ms, 0.99)), each.cpu_ms / turns, turns)
        for count, each in measured.items()
    ]


def tune_model(directory: Path, digest: str | None, counts: Sequence[int] | None = None) -> list[ThreadTiming]:
    """Measures a bundle's model on a batch of eight views.

    Raises:
        BundleError: The bundle is not usable.
    """
    graph = read_bundle(directory, digest=digest).model

    def work_for(count: int) -> Callable[[], object]:
        classifier = OnnxClassifier(graph, threads=count)
        views = np.full((_BATCH, classifier.view_px, classifier.view_px, 3), 128, np.uint8)
        return lambda: classifier.classify(views)

    return measure(work_for, counts or thread_counts(), _MODEL_S)


def tune_opencv(counts: Sequence[int] | None = None) -> list[ThreadTiming]:
    """Measures what locating does to a frame of 1280x720; leaves OpenCV with the chosen count."""
    frame = np.random.default_rng(0).integers(0, 255, (720, 1280, 3), dtype=np.uint8)
    small = cv2.resize(frame, (320, 180), interpolation=cv2.INTER_AREA)

    def work_for(count: int) -> Callable[[], object]:
        def work() -> object:
            cv2.setNumThreads(count)
            seen = cv2.resize(frame, (320, 180), interpolation=cv2.INTER_AREA)
            different = cv2.absdiff(seen, small)
            return cv2.morphologyEx(different, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))

        return work

    trials = measure(work_for, counts or thread_counts(), _OPENCV_S)
    cv2.setNumThreads(choose(trials).threads)
    return trials


def facts(name: str, trials: Sequence[ThreadTiming]) -> dict[str, str]:
    """Returns what was measured and chosen: `onnx_threads` = "1", `onnx_trials` = "1: p99 2.1 ms, ..."."""
    rows = (f"{t.threads}: p99 {t.p99_ms:.2f} ms, cpu {t.cpu_ms:.2f} ms, {t.runs} runs" for t in trials)
    return {f"{name}_threads": str(choose(trials).threads), f"{name}_trials": "; ".join(rows)}
