"""Intervals of shares: how sure a count of items makes a rate."""

import math
from typing import Final

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
