"""Loads bundles beside the one that judges: its own thread, so that no frame waits.

What is ready lies in a place for one (`judge`, `shadow`) until the sorting thread takes it between two frames; a newer
one replaces an older one that was not taken. A bundle that cannot be loaded is reported and changes nothing.
"""

import ctypes
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_agent.line.shadow import Shadow
from edge_agent.line.thread_tuning import choose, facts, tune_model
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import FromLine, Load, LoadFailed, LoadShadow, ShadowFailed, Tuned
from edge_agent.sampling.disagreement import SampleFolder
from edge_agent.vision.judge import Judge
from models.errors import BundleError, SortlineError
from models.messages import Fault, Swap

_WAITING: Final = 4
_POLL_S: Final = 0.5
_LOT_WITHIN_S: Final = 3600.0
"""A bundle that waits for a lot change without a deadline of its own takes over after so long."""


def fault_of(error: SortlineError) -> Fault:
    """Returns an error as a fault that happens now."""
    return Fault(code=error.code, message=str(error)[:600], at_ms=time.time_ns() // 1_000_000)


def return_memory() -> None:
    """Returns memory that start and loading used for a moment to the system (glibc only; elsewhere it does nothing)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True, slots=True)
class LoadedJudge:
    """A bundle that is warm and waits for its switch."""

    judge: Judge
    load_ms: float
    since_s: float
    """When it was ready, monotonic seconds."""
    swap: Swap = Swap.BELT_GAP
    swap_within_s: float | None = None
    """Longest wait, seconds; None = the line's own."""


def is_due(loaded: LoadedJudge, *, waited_s: float, line_within_s: float, at_gap: bool, lot_changed: bool) -> bool:
    """Returns whether a bundle that is ready may take over between these two frames. Pure.

    Args:
        loaded: The bundle, and what it waits for.
        waited_s: How long it has waited.
        line_within_s: The line's own longest wait for a gap.
        at_gap: No item is in sight.
        lot_changed: Another lot has begun since it was ready.
    """
    if loaded.swap is Swap.NOW:
        return True
    if loaded.swap is Swap.LOT_CHANGE and not lot_changed:
        return waited_s > (_LOT_WITHIN_S if loaded.swap_within_s is None else loaded.swap_within_s)
    return at_gap or waited_s > (line_within_s if loaded.swap_within_s is None else loaded.swap_within_s)


@dataclass(frozen=True, slots=True)
class LoadedShadow:
    """A challenger that is warm, its thread not yet started; None = the line shall have no challenger."""

    shadow: Shadow | None
    load_ms: float = 0.0


@dataclass(slots=True)
class Loader:
    """The loading thread.

    Attributes:
        threads: Intra-op threads of ONNX Runtime for bundles that judge.
        say: Queues a report to the supervisor.
        champion: Returns the judge that works now, whose views a challenger must take.
        judge: At most one bundle that is ready.
        shadow: At most one challenger that is ready.
    """

    threads: int
    """0 = measured with the first bundle."""
    say: Callable[[FromLine], None]
    champion: Callable[[], Judge | None]
    outlets: frozenset[str] | None = None
    """Outlets of the line, with those that need no ejection; None = any outlet is taken."""
    judge: deque[LoadedJudge] = field(default_factory=lambda: deque(maxlen=1))
    shadow: deque[LoadedShadow] = field(default_factory=lambda: deque(maxlen=1))
    _loads: "queue.Queue[Load | LoadShadow]" = field(default_factory=lambda: queue.Queue(_WAITING))

    def offer(self, load: Load | LoadShadow) -> None:
        """Queues a request; never waits. A request beyond the limit is refused and reported."""
        try:
            self._loads.put_nowait(load)
        except queue.Full:
            self._refuse(load, Fault(code="line.busy", message="Too many bundles are waiting to be loaded."))

    def _refuse(self, load: Load | LoadShadow, fault: Fault) -> None:
        failed = LoadFailed if isinstance(load, Load) else ShadowFailed
        self.say(failed(digest=load.digest, fault=fault))

    def run(self, stop: threading.Event) -> None:
        """Loads what is requested until the line stops; the body of the thread."""
        while not stop.is_set():
            try:
                load = self._loads.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            self.load(load)

    def load(self, load: Load | LoadShadow) -> None:
        """Loads one bundle or challenger; a failure is reported."""
        started = time.perf_counter()
        try:
            if isinstance(load, Load):
                threads = self.threads_for(Path(load.directory), load.digest)
                judge = Judge(Path(load.directory), digest=load.digest, threads=threads)
                self._check_outlets(judge)
                load_ms = (time.perf_counter() - started) * 1000.0
                self.judge.append(LoadedJudge(judge, load_ms, time.monotonic(), load.swap, load.swap_within_s))
            else:
                shadow = self._challenger(load) if load.digest else None
                self.shadow.append(LoadedShadow(shadow, (time.perf_counter() - started) * 1000.0))
        except SortlineError as error:
            self._refuse(load, fault_of(error))
            return
        return_memory()

    def _check_outlets(self, judge: Judge) -> None:
        if self.outlets is not None:
            judge.recipe.check_outlets(self.outlets)

    def threads_for(self, directory: Path, digest: str | None) -> int:
        """Returns how many threads a bundle gets: as configured, else measured once with the first bundle.

        Raises:
            BundleError: The bundle is not usable.
        """
        if not self.threads:
            trials = tune_model(directory, digest)
            self.threads = choose(trials).threads
            self.say(Tuned(facts=facts("onnx", trials)))
        return self.threads

    def _challenger(self, load: LoadShadow) -> Shadow:
        champion = self.champion()
        if champion is None:
            raise BundleError(
                "shadow.no_champion",
                "There is no champion to compare with.",
                expected="a bundle that judges",
                got="none",
            )
        keep = SampleFolder(Path(load.samples)) if load.samples else lambda _found: None
        shadow = Shadow(Judge(Path(load.directory), digest=load.digest, threads=1), keep)
        shadow.check(champion)
        self._check_outlets(shadow.judge)
        return shadow


def load_shadow(config: LineConfig, champion: Judge | None) -> Shadow | None:
    """Returns the challenger of a configuration, started; None where there is none.

    Raises:
        BundleError: It is not usable, or needs other views than the champion.
    """
    if not config.shadow:
        return None
    keep = SampleFolder(Path(config.samples)) if config.samples else lambda _found: None
    shadow = Shadow(Judge(Path(config.shadow), threads=1), keep)
    if champion is not None:
        shadow.check(champion)
    shadow.judge.recipe.check_outlets(config.outlets)
    shadow.start()
    return shadow


def load_judge(config: LineConfig, threads_for: Callable[[Path, str | None], int]) -> Judge | None:
    """Returns the bundle that a configuration starts with; None where there is none.

    Args:
        config: The line.
        threads_for: Returns how many threads of ONNX Runtime the bundle in a directory gets.

    Raises:
        BundleError: It is not usable, or its recipe names an outlet that the line lacks.
    """
    if not config.bundle:
        return None
    directory, digest = Path(config.bundle), config.digest or None
    judge = Judge(directory, digest=digest, threads=threads_for(directory, digest))
    judge.recipe.check_outlets(config.outlets)
    return judge
