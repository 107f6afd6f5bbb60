"""True class shares from counted verdicts: a classifier confuses classes, so counted shares are not the true ones.

The verdicts are a mixture of the rows of the confusion matrix, weighted by the true shares. The weights are found by
maximum likelihood on the simplex (expectation maximisation, which unlike inverting the matrix never gives a negative
share; the estimand is that of Lipton et al. 2018). The interval is a parametric bootstrap that draws the verdicts and
the rows of the matrix, so a matrix known from few items makes it wide. It covers these items, not future lots.
"""

from typing import Final

import numpy as np

from control_plane.detection.moments import Floats

_ROUNDS: Final = 200
_DRAWS: Final = 200
_SEED: Final = 20


def true_shares(counts: Floats, confusion: Floats) -> tuple[Floats, Floats]:
    """Estimates the true shares of the classes.

    Args:
        counts: (K,) verdicts.
        confusion: (K, K) held-out items, rows are the truth, columns the verdict.

    Returns:
        float64 (K,) shares, and (K, 2) their 95 % intervals.
    """
    rates = (confusion + 0.5) / (confusion + 0.5).sum(axis=1, keepdims=True)
    shares = _unmixed(counts[None], rates[None])[0]
    rng = np.random.default_rng(_SEED)
    total = max(int(counts.sum()), 1)
    drawn = rng.multinomial(total, counts / max(float(counts.sum()), 1.0), size=_DRAWS)
    rows = np.stack([rng.dirichlet(row + 0.5, size=_DRAWS) for row in confusion], axis=1)
    ends = np.quantile(_unmixed(drawn.astype(np.float64), rows), (0.025, 0.975), axis=0)
    # The bootstrap of a share at the edge may lie wholly on one side of the estimate.
    low, high = np.minimum(ends[0], shares), np.maximum(ends[1], shares)
    return shares, np.stack((low, high), axis=1)


def _unmixed(counts: Floats, rates: Floats) -> Floats:
    """Returns (N, K) weights of the rows that make these counts most likely; `rates` is (N or 1, K, K)."""
    size = counts.shape[1]
    weights = np.full((len(counts), size), 1.0 / size)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    for _ in range(_ROUNDS):
        mixed = np.einsum("nk,nkj->nj", weights, np.broadcast_to(rates, (len(counts), size, size)))
        pull = np.einsum(
            "nkj,nj->nk", np.broadcast_to(rates, (len(counts), size, size)), shares / np.maximum(mixed, 1e-12)
        )
        weights = weights * pull
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return np.asarray(weights)
