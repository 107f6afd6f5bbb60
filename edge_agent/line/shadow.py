"""A challenger judges the champion's views in spare milliseconds; its verdicts are not executed.

It has a thread of the lowest priority and a bounded queue, so a busy line skips the challenger and is never slowed by
it. The verdicts of the two are counted as `champion>challenger` outlets, and items they disagree on are kept for
people, newest first.

Law: every offered item is compared, skipped or failed, exactly one of them.
"""

import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.sampling.disagreement import Disagreement
from edge_agent.vision.judge import Judge, Judged
from models.errors import BundleError, SortlineError

log = logging.getLogger("sortline.shadow")
_WAITING: Final = 32
_NICENESS: Final = 15
_FINISH_S: Final = 2.0


@dataclass(slots=True)
class Shadow:
    """A loaded challenger.

    Attributes:
        judge: The challenger.
        keep: Called with each disagreement, on the shadow's thread.
    """

    judge: Judge
    keep: Callable[[Disagreement], None] = lambda _found: None
    waiting: int = _WAITING
    idle: threading.Event = field(default_factory=threading.Event)
    """Set while the line waits for a frame: only then an item is begun."""
    counts: Counter[str] = field(default_factory=Counter)
    """`champion>challenger` outlets, and `skipped`, `failed`."""
    _queue: "queue.Queue[tuple[Judged, str, str, str] | None]" = field(init=False)
    _thread: threading.Thread | None = None
    _retired: bool = False

    def __post_init__(self) -> None:
        self._queue = queue.Queue(self.waiting)
        self.idle.set()

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finishes what waits, for at most two seconds; what is left then is counted as skipped."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_FINISH_S)
            self._retired = True
            self.idle.set()
            self._thread.join()

    def retire(self) -> None:
        """Ends the thread after the item it compares now; what waits is given up. Never waits."""
        self._retired = True
        self.idle.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            log.debug("a full queue ends at its next item")

    def check(self, champion: Judge) -> None:
        """Refuses a challenger that needs other views than the champion takes.

        Raises:
            BundleError: `shadow.other_views`.
        """
        ours, theirs = self.judge.preprocess, champion.preprocess
        if (ours.view_px, ours.margin, ours.channels) != (theirs.view_px, theirs.margin, theirs.channels):
            raise BundleError(
                "shadow.other_views",
                "The challenger needs other views than the champion takes.",
                expected=f"{theirs.view_px} px, margin {theirs.margin}",
                got=f"{ours.view_px} px, margin {ours.margin}",
            )

    def offer(self, judged: Judged, outlet: str, variety: str, lot: str) -> None:
        """Queues an item that has its verdict; never waits."""
        try:
            self._queue.put_nowait((judged, outlet, variety, lot))
        except queue.Full:
            self.counts["skipped"] += 1

    def _run(self) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        except OSError as error:
            log.warning("shadow runs at normal priority: %s", error)
        while (offered := self._queue.get()) is not None:
            if self._retired:
                self.counts["skipped"] += 1
                if self._queue.empty():
                    break
                continue
            self.idle.wait(1.0)
            self.compare(*offered)

    def compare(self, judged: Judged, outlet: str, variety: str, lot: str) -> None:
        """Judges one item's views and counts the pair of outlets."""
        views = np.stack(judged.track.views)
        try:
            self.check_size(views)
            scalars = None
            if self.judge.preprocess.scalars:
                scalars = np.tile(self.judge.preprocess.scalar_row(judged.track.scalars), (len(views), 1))
            answer = self.judge.classifier.classify(views, scalars)
            verdict = self.judge.recipe.decide(answer.probabilities, variety, lot)
        except SortlineError as error:
            self.counts["failed"] += 1
            log.warning("challenger failed: %s", error)
            return
        self.counts[f"{outlet}>{verdict.outlet}"] += 1
        if outlet != verdict.outlet:
            self.keep(Disagreement(judged.track.item_id, views, judged.verdict, verdict))

    def check_size(self, views: NDArray[np.uint8]) -> None:
        """Refuses views of another size: they come from another champion than the one that was checked.

        Raises:
            BundleError: `shadow.other_views`.
        """
        side = self.judge.preprocess.view_px
        if views.shape[1:] != (side, side, 3):
            raise BundleError(
                "shadow.other_views",
                "The champion's views are not the challenger's.",
                expected=f"{side} px",
                got=views.shape,
            )
