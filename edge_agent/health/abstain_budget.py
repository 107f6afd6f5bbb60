"""Does the line keep to its abstain budget? Windows in, a change of answer out; no clock, no frames.

A window of ten seconds holds too few items to judge a share of a few percent, so the last windows are added up until
they hold enough. Over the budget is what is so beyond doubt (lower end of the 95 % interval, of a hundred items or
more); within it again is what does not exceed it any more: the answer does not flutter.
"""

from collections import deque
from typing import Final

from models.statistics import wilson_interval

MEMORY_ITEMS: Final = 400
LEAST_ITEMS: Final = 100
"""Fewer items are no evidence: one unsure item of four is more than one percent and means nothing."""


class AbstainWatch:
    """Follows the share of unsure items of one line."""

    def __init__(self) -> None:
        self._windows: deque[tuple[int, int]] = deque(maxlen=1000)
        self.over = False
        self.share = 0.0
        """Share of unsure items in the windows in memory, 0..1."""

    def update(self, items: int, unsure: int, budget: float) -> bool:
        """Takes a window; True when the answer (`over`) has changed.

        Args:
            items: Judged in the window.
            unsure: Of them, those on which the line abstained.
            budget: Largest share that may be unsure, 0..1.
        """
        if items:
            self._windows.append((items, unsure))
        known = sum(count for count, _ in self._windows)
        while self._windows and known - self._windows[0][0] >= MEMORY_ITEMS:
            known -= self._windows.popleft()[0]
        self.share = sum(count for _, count in self._windows) / known if known else 0.0
        before = self.over
        if self.over:
            self.over = self.share > budget
        else:
            self.over = known >= LEAST_ITEMS and wilson_interval(self.share, known)[0] > budget
        return self.over != before

    def forget(self) -> None:
        """Starts again: another bundle, lot or variety counts by itself. Over stays over until it is seen otherwise."""
        self._windows.clear()
