"""Intervals of shares: how sure a count of items makes a rate."""

import math
from typing import Final

_Z95: Final = 1.959963984540054


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest also for none and for all.

    Args:
        share: What was seen, 0..1.
        count: Items it was seen on; weighted items count as (sum w)^2 / sum w^2 (Kish 1965).
    """
    if count <= 0.0:
        return 0.0, 1.0
    scale = 1.0 + _Z95**2 / count
    centre = (share + _Z95**2 / (2.0 * count)) / scale
    half = _Z95 * math.sqrt(share * (1.0 - share) / count + _Z95**2 / (4.0 * count**2)) / scale
    # At the ends rounding would leave a trace of doubt that the formula does not have.
    return 0.0 if share <= 0.0 else max(0.0, centre - half), 1.0 if share >= 1.0 else min(1.0, centre + half)
