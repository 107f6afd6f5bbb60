"""From counts in the 16 bins of the profile to numbers that tests can work with.

For each feature, `z` has two moments: the location and the spread. They are means over the items of two functions of
the bin, orthonormal under the reference: with `u_b = P(<b) + p_b / 2` the first is `(u - mean) / sd`, the second its
square less 1, made orthogonal to the first. Under the reference both have mean 0 and variance 1 per item.

Law: moments are means, so moments of two spans, weighted by their items, are the moments of their sum.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_PRIOR: Final = 0.5
"""Count added to every bin of the reference, so that a bin without reference items stays finite."""
_FLAT: Final = 1e-9


def basis(reference: NDArray[np.integer]) -> Floats:
    """Returns the two functions of the bin for each feature.

    Args:
        reference: (F, B) counts of the reference items.

    Returns:
        float64 (F, B, 2); zeros for a feature whose reference lies in one bin.
    """
    counts = np.asarray(reference, np.float64) + _PRIOR
    p = counts / counts.sum(axis=1, keepdims=True)
    u = p.cumsum(axis=1) - p / 2.0
    first = _standardised(u, p)
    square = first**2
    slope = (p * square * first).sum(axis=1, keepdims=True)
    second = _standardised(square - slope * first, p)
    return np.stack((first, second), axis=2)


def _standardised(values: Floats, p: Floats) -> Floats:
    centred = values - (p * values).sum(axis=1, keepdims=True)
    deviation = np.sqrt((p * centred**2).sum(axis=1, keepdims=True))
    return np.where(deviation > _FLAT, centred / np.maximum(deviation, _FLAT), 0.0)


def moments(counts: NDArray[np.integer] | Floats, functions: Floats) -> Floats:
    """Returns the moments of a span.

    Args:
        counts: (..., F, B) items in each bin.
        functions: (F, B, 2) of `basis`.

    Returns:
        float64 (..., 2 * F): location and spread of the first feature, of the second, and so on; 0, which is no
        evidence either way, where no item of a feature is known.
    """
    totals = counts.sum(axis=-1)[..., None]
    sums = np.einsum("...fb,fbk->...fk", np.asarray(counts, np.float64), functions)
    found = np.where(totals > 0, sums / np.maximum(totals, 1), 0.0)
    return found.reshape(*counts.shape[:-2], -1)


def class_counts(classes: Mapping[str, int], names: Sequence[str]) -> Floats:
    """Returns float64 (K,): the counts of these classes in their order; other classes count nothing."""
    return np.array([classes.get(name, 0) for name in names], np.float64)


def angles(shares: Floats) -> Floats:
    """Returns shares on a scale where their sampling noise is the same everywhere: `2 asin(sqrt(s))`."""
    return np.asarray(2.0 * np.arcsin(np.sqrt(np.clip(shares, 0.0, 1.0))))


def mean_log(counts: Sequence[int], edges: Sequence[float]) -> float:
    """Returns the mean logarithm of a positive measurement from its counts in bins.

    A bin counts as the logarithm of its middle; the outer bins are as wide as their neighbours.

    Args:
        counts: (16,) items per bin.
        edges: (15,) inner edges, ascending.

    Returns:
        NaN where nothing was counted or the edges are not positive.
    """
    total = sum(counts)
    if total == 0 or edges[0] <= 0.0:
        return math.nan
    inner = np.asarray(edges, np.float64)
    low = max(2.0 * inner[0] - inner[1], 0.5 * inner[0])
    whole = np.concatenate(((low,), inner, (2.0 * inner[-1] - inner[-2],)))
    middles = (whole[:-1] + whole[1:]) / 2.0
    return float(np.asarray(counts, np.float64) @ np.log(middles) / total)
