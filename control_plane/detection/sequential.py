"""Statistics that are followed over time, and their state as bytes.

All of them know the length of each span, so that ten spans of 10 s and one of 100 s weigh the same.
"""

import math
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import numpy as np

from models.errors import MessageError
from models.statistics import wilson_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
else:  # the codec below needs the class itself
    Array = np.ndarray

S = TypeVar("S", bound=msgspec.Struct)
_RELEASE: Final = 0.7
"""A condition ends below this share of its threshold: the answer does not flutter."""
_QUIET: Final = 0.5
"""Below this share of its threshold a statistic shows nothing: what comes later is taken as the beginning."""


def weight(span_s: float, memory_s: float) -> float:
    """Returns the weight of a span in an exponential mean with this memory: `1 - exp(-span / memory)`."""
    return -math.expm1(-span_s / memory_s)


class Latch(msgspec.Struct):
    """A condition that begins at its threshold and ends well below it; it remembers when the excursion began."""

    on: bool = False
    ratio: float = 0.0
    """Statistic / threshold at the last step."""
    items: int = 0
    """Items seen so far."""
    began_s: float = 0.0
    began_items: int = 0
    """When the statistic was quiet for the last time."""
    delay_s: float = 0.0
    delay_items: int = 0
    """From there until the condition was on."""
    lots: list[str] = []
    """Lots since then, newest last, at most eight."""

    def take(self, ratio: float, now_s: float, items: int = 0, lot: str = "") -> bool:
        """Takes the statistic, divided by its threshold; returns whether the condition is present."""
        if ratio < _QUIET or self.began_s == 0.0:
            self.began_s, self.began_items, self.lots = now_s, self.items, []
        if lot and lot not in self.lots[-1:]:
            self.lots = [*self.lots[-7:], lot]
        self.items += items
        self.ratio = ratio
        if not self.on and ratio >= 1.0:
            self.on = True
            self.delay_s, self.delay_items = now_s - self.began_s, self.items - self.began_items
        elif self.on and ratio < _RELEASE:
            self.on = False
        return self.on

    @property
    def since_items(self) -> int:
        """Items since the excursion began."""
        return self.items - self.began_items


class RateWatch(msgspec.Struct):
    """CUSUM of a rate of failures: learns the usual rate, then looks for a multiple of it.

    The usual rate is taken at the upper end of what the trials of learning allow: a rate learnt too low would alarm by
    itself in the end.

    The sum of log-likelihood ratios of `worse` against `usual`, cut at 0, is compared with `_LIMIT`: without a change
    the mean number of trials to an alarm is at least `exp(_LIMIT)`, about nine million (Lorden 1971), which is more
    than a month of one ejector.
    """

    learn_trials: int = 300
    trials: int = 0
    failures: int = 0
    """While learning."""
    usual: float = 0.0
    """0 while learning."""
    score: float = 0.0
    recent: float = 0.0
    """Rate of the last trials, exponential with a memory of 200 trials."""
    since_trials: int = 0
    since_failures: int = 0
    """Since the score was 0 for the last time."""

    def take(self, trials: int, failures: int) -> float:
        """Takes a span; returns score / limit, 0 while learning."""
        if trials <= 0:
            return self.score / _LIMIT
        share = failures / trials
        self.recent += (share - self.recent) * weight(trials, 200.0)
        if not self.usual:
            self.trials += trials
            self.failures += failures
            if self.trials >= self.learn_trials:
                high = wilson_interval(self.failures / self.trials, self.trials)[1]
                self.usual = min(max(_ABOVE * high, _LEAST_RATE), 0.5)
            return 0.0
        usual, worse = self.usual, min(max(2.5 * self.usual, _WORSE_RATE), 0.9)
        step = failures * math.log(worse / usual) + (trials - failures) * math.log((1.0 - worse) / (1.0 - usual))
        self.score = min(max(self.score + step, 0.0), 2.0 * _LIMIT)
        if self.score == 0.0:
            self.since_trials = self.since_failures = 0
        else:
            self.since_trials += trials
            self.since_failures += failures
        return self.score / _LIMIT


_LIMIT: Final = 16.0
_ABOVE: Final = 1.1
_LEAST_RATE: Final = 0.01
_WORSE_RATE: Final = 0.05


def encode_state(state: msgspec.Struct) -> bytes:
    """Packs a state with its arrays. Law: `decode_state(encode_state(s), type(s))` continues as `s` would."""
    return msgspec.msgpack.encode(state, enc_hook=_pack)


def decode_state(data: bytes, kind: type[S]) -> S:
    """Reads a state.

    Raises:
        MessageError: `detection.bad_state`; the caller starts to learn from nothing.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind, dec_hook=_unpack)
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise MessageError(
            "detection.bad_state",
            "What detection has learnt cannot be read; it learns again.",
            expected=kind.__name__,
            got=error,
        ) from error


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [list(value.shape), value.astype("<f8").tobytes()]
    raise NotImplementedError(type(value).__name__)


def _unpack(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        shape, data = value
        return np.frombuffer(data, "<f8").reshape(shape).copy()
    raise NotImplementedError(kind.__name__)
