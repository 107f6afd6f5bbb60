"""Changes of the bundle, the challenger and the lot, made by the sorting thread between two frames.

The loader prepares bundles and challengers in its own thread; this module decides when what is ready takes over. A
window never mixes two bundles, two challengers or two lots: each change closes the current window first.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from edge_agent.line.counters import LineCounter
from edge_agent.line.loader import LoadedJudge, LoadedShadow, Loader, fault_of, is_due
from edge_agent.line.sorting import LineCore
from edge_agent.line_protocol import FromLine, SetLot, ShadowChanged, ShadowFailed, Swapped, WindowClosed
from edge_agent.vision.judge import Judge
from models.errors import BundleError

log = logging.getLogger("sortline.line")


class Switching:
    """Applies what is ready to the core; one assignment between two frames, so no frame waits for a load.

    Args:
        counter: Holds the lot, the variety and the current window.
        say: Queues a report to the supervisor; never waits.
        swap_within_s: Longest wait for a gap on the belt, seconds.
        threads: Intra-op threads of ONNX Runtime for bundles that judge; 0 = measured with the first bundle.
        champion: The bundle that judges from the first frame on, if there is one.
        outlets: Outlets of the line, with those that need no ejection; None = any outlet is taken.
    """

    def __init__(
        self,
        counter: LineCounter,
        say: Callable[[FromLine], None],
        *,
        swap_within_s: float,
        threads: int,
        champion: Judge | None = None,
        outlets: frozenset[str] | None = None,
    ) -> None:
        self._counter, self._say, self._swap_within_s = counter, say, swap_within_s
        self.champion = champion
        self.loader = Loader(threads, say, lambda: self.champion, outlets)
        self._waiting: tuple[LoadedJudge, tuple[str, str]] | None = None
        """The bundle that is ready, and the lot and variety that ran when it became so."""
        self._next_lot: deque[tuple[SetLot, float]] = deque(maxlen=1)
        """The lot that shall begin, and when it was requested (monotonic seconds)."""

    def request_lot(self, request: SetLot, since_s: float) -> None:
        """Notes a lot change; a newer request replaces one that has not begun.

        Args:
            request: Lot and variety.
            since_s: When it was requested, monotonic seconds.
        """
        self._next_lot.append((request, since_s))

    def apply(self, core: LineCore) -> None:
        """Takes over what is ready and due; called by the sorting thread between two frames."""
        if self._next_lot:
            self._begin_lot(core, *self._next_lot[0])
        if self.loader.shadow:
            self._switch_shadow(core, self.loader.shadow.pop())
        if self.loader.judge and self._may_switch(core, self.loader.judge[0]):
            self._switch_judge(core)

    def _switch_judge(self, core: LineCore) -> None:
        started = time.perf_counter()
        loaded = self.loader.judge.pop()
        judge = self.champion = loaded.judge
        window = self._counter.close_window()
        core.use(judge)
        gap_ms = (time.perf_counter() - started) * 1000.0
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        self._say(Swapped(digest=judge.digest, load_ms=loaded.load_ms, gap_ms=gap_ms))
        log.info("bundle %s judges from now on", judge.digest[:12])
        self._check_shadow(core, judge)

    def _switch_shadow(self, core: LineCore, loaded: LoadedShadow) -> None:
        window = self._counter.close_window()
        if core.shadow is not None:
            core.shadow.retire()
        core.shadow = loaded.shadow
        self._counter.use_shadow(loaded.shadow)
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        if loaded.shadow is not None:
            loaded.shadow.start()
        digest = loaded.shadow.judge.digest if loaded.shadow else ""
        self._say(ShadowChanged(digest=digest, load_ms=loaded.load_ms))
        if core.judge is not None:
            self._check_shadow(core, core.judge)

    def _check_shadow(self, core: LineCore, champion: Judge) -> None:
        """Retires a challenger that needs other views than a new champion takes."""
        shadow = core.shadow
        if shadow is None:
            return
        try:
            shadow.check(champion)
        except BundleError as error:
            shadow.retire()
            core.shadow = None
            self._counter.use_shadow(None)
            self._say(ShadowFailed(digest=shadow.judge.digest, fault=fault_of(error)))

    def _may_switch(self, core: LineCore, loaded: LoadedJudge) -> bool:
        """Returns whether a bundle may take over now: at once where none judges, else when what it waits for has come.

        Items in sight keep the bundle that took their first view either way: the gap only spares them two models.
        """
        if self._waiting is None or self._waiting[0] is not loaded:
            self._waiting = (loaded, self._counter.lot_and_variety)
        return core.judge is None or is_due(
            loaded,
            waited_s=time.monotonic() - loaded.since_s,
            line_within_s=self._swap_within_s,
            at_gap=core.tracker.open == 0,
            lot_changed=self._counter.lot_and_variety != self._waiting[1],
        )

    def _begin_lot(self, core: LineCore, request: SetLot, since_s: float) -> None:
        """Begins the lot at a gap, or after `swap_within_s` without one; items in sight then belong to the new lot."""
        if core.tracker.open and time.monotonic() - since_s <= self._swap_within_s:
            return
        request, _ = self._next_lot.pop()
        if (request.lot, request.variety) == self._counter.lot_and_variety:
            return
        window = self._counter.close_window()
        self._counter.begin_lot(request.lot, request.variety)
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        log.info("lot %r of variety %r runs from now on", request.lot, request.variety)
