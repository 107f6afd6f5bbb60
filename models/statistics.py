"""Intervals of shares (how sure a count of items makes a rate), and moments of measurements that add exactly."""

import math
from typing import Annotated, Final

import msgspec

Z95: Final = 1.959963984540054
"""Quantile of the normal distribution of a two-sided 95 % interval."""


def wilson_interval(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Returns the interval of a share (Wilson 1927), which is honest also for none and for all.

    Args:
        share: What was seen, 0..1.
        count: Items it was seen on; weighted items count as (sum w)^2 / sum w^2 (Kish 1965).
        z: Quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
        Lower and upper bound, 0..1; `(0.0, 1.0)` where nothing was seen.
    """
    if count <= 0.0:
        return 0.0, 1.0
    scale = 1.0 + z**2 / count
    centre = (share + z**2 / (2.0 * count)) / scale
    half = z * math.sqrt(share * (1.0 - share) / count + z**2 / (4.0 * count**2)) / scale
    # At the ends rounding would leave a trace of doubt that the formula does not have.
    return 0.0 if share <= 0.0 else max(0.0, centre - half), 1.0 if share >= 1.0 else min(1.0, centre + half)


_THOUSANDTHS: Final = 1000
_MOST: Final = 2**63 - 1


class Moments(msgspec.Struct, frozen=True, array_like=True):
    """Number, sum and sum of squares of measurements, as integers of thousandths: floats would not add exactly.

    Laws: `a + b == b + a`, `(a + b) + c == a + (b + c)`, and `Moments.of(x) + Moments.of(y)` holds both.
    """

    count: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    total: Annotated[int, msgspec.Meta(ge=-_MOST, le=_MOST)] = 0
    """Sum of the measurements, thousandths."""
    squares: Annotated[int, msgspec.Meta(ge=0, le=_MOST)] = 0
    """Sum of their squares, millionths."""

    @classmethod
    def of(cls, value: float) -> "Moments":
        """Returns the moments of one measurement, rounded to thousandths; the caller bounds it to +-10,000."""
        thousandths = round(value * _THOUSANDTHS)
        return cls(1, thousandths, thousandths * thousandths)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def possible(self) -> bool:
        """Whether any measurements have these sums (by the inequality of Cauchy and Schwarz), and they fit the wire."""
        return self.count * self.squares >= self.total * self.total and max(abs(self.total), self.squares) <= _MOST

    @property
    def mean(self) -> float:
        """Mean of the measurements; NaN where there is none."""
        return self.total / (self.count * _THOUSANDTHS) if self.count else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the measurements (of the population); NaN where there is none."""
        if not self.count:
            return math.nan
        # Integers: no cancellation, however small the spread beside the mean.
        spread = self.count * self.squares - self.total * self.total
        return math.sqrt(max(spread, 0)) / (self.count * _THOUSANDTHS)
