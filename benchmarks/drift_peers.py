"""What others would run on the same counts, by their documented defaults, and a detector that always alarms."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from control_plane.detection.finding import LineSum
from control_plane.detection.moments import basis, moments
from models.profile import Profile

Floats = NDArray[np.float64]
REFRACTORY_S: Final = 3600.0
TUNED: Final = ", at its benign maximum"


class Peer:
    """A detector over blocks of counts of each line and feature.

    Args:
        name: As it is shown.
        block_s: Length of a block.
        threshold: At which it alarms.
        statistic: From reference counts (F, 16) and block counts (F, 16) to one number.
    """

    def __init__(self, name: str, block_s: float, threshold: float, statistic: Callable[[str, Floats], float]) -> None:
        self.name, self.block_s, self.threshold = name, block_s, threshold
        self._statistic = statistic
        self.alarms = 0
        self.largest = 0.0
        """Largest statistic that was seen."""
        self.first_s: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets the blocks, not the figures."""
        self._blocks: dict[str, Floats] = {}
        self._spans: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def take(self, now_s: float, sums: list[LineSum]) -> None:
        """Takes a span of some lines."""
        for given in sums:
            counts = given.window.feature_counts().astype(np.float64)
            self._blocks[given.line] = self._blocks.get(given.line, 0.0) + counts
            self._spans[given.line] = self._spans.get(given.line, 0.0) + given.window.duration_ms / 1000.0
            if self._spans[given.line] >= self.block_s:
                self._judge(given.line, now_s)

    def _judge(self, line: str, now_s: float) -> None:
        value = self._statistic(line, self._blocks.pop(line))
        self._spans[line] = 0.0
        if math.isfinite(value):
            self.largest = max(self.largest, value)
        if value > self.threshold:
            self.first_s = self.first_s or now_s
            if now_s - self._last.get(line, -1e9) >= REFRACTORY_S:
                self.alarms += 1
                self._last[line] = now_s


def _psi(reference: Floats) -> Callable[[str, Floats], float]:
    p = (reference + 0.5) / (reference + 0.5).sum(axis=1, keepdims=True)

    def statistic(_line: str, counts: Floats) -> float:
        q = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
        return float(((q - p) * np.log(q / p)).sum(axis=1).max())

    return statistic


def _kolmogorov(reference: Floats) -> Callable[[str, Floats], float]:
    """Minus the decimal logarithm of the smallest p-value, Bonferroni over the features, on the bins."""
    p = (reference / reference.sum(axis=1, keepdims=True)).cumsum(axis=1)
    known = reference.sum(axis=1)

    def statistic(_line: str, counts: Floats) -> float:
        n = np.maximum(counts.sum(axis=1), 1.0)
        distance = np.abs((counts / n[:, None]).cumsum(axis=1) - p).max(axis=1)
        logs = stats.kstwobign.logsf(distance * np.sqrt(n * known / (n + known)))
        return float(-(logs.min() + math.log(len(reference))) / math.log(10.0))

    return statistic


def _stream(reference: NDArray[np.int64], kind: Any) -> Callable[[str, Floats], float]:
    """A univariate detector of river on the standardised mean of each feature."""
    functions = basis(reference)
    detectors: dict[tuple[str, int], Any] = {}

    def statistic(line: str, counts: Floats) -> float:
        found = 0.0
        for k, value in enumerate(moments(counts, functions)[::2]):
            detector = detectors.setdefault((line, k), kind())
            detector.update(float(value))
            found = max(found, float(detector.drift_detected))
        return found

    return statistic


def peers(profile: Profile, largest: Mapping[str, float] | None = None) -> list[Peer]:
    """All that can run here.

    Args:
        profile: Reference counts.
        largest: Largest statistic of a peer on benign days; it then runs once more with this as its threshold.
    """
    reference = profile.count_array()
    real = reference.astype(np.float64)
    tunable: list[tuple[str, float, float, Callable[[str, Floats], float]]] = [
        ("PSI > 0.2, 1 h", 3600.0, 0.2, _psi(real)),
        ("PSI > 0.2, 5 min", 300.0, 0.2, _psi(real)),
        ("KS p < 0.05, 5 min", 300.0, -math.log10(0.05), _kolmogorov(real)),
    ]
    found = [Peer("always alarms", 60.0, 0.5, lambda _line, _counts: 1.0)]
    for name, block_s, threshold, statistic in tunable:
        found.append(Peer(name, block_s, threshold, statistic))
        if largest and name in largest:
            found.append(Peer(f"{name}{TUNED}", block_s, largest[name], statistic))
    try:
        drift = importlib.import_module("river.drift")
    except ImportError:
        return found
    return [
        *found,
        Peer("river ADWIN, 1 min", 60.0, 0.5, _stream(reference, drift.ADWIN)),
        Peer("river Page-Hinkley, 1 min", 60.0, 0.5, _stream(reference, drift.PageHinkley)),
    ]
