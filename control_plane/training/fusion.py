"""Learns how the views of an item become one calibrated probability, on items the model never saw.

How many views count (`top_k`) is chosen by the held-out log loss of items, the sigmoid is Platt's. Twenty items
cannot distinguish neighbouring choices, so another `top_k` than the default must win by more than two standard errors
of the paired difference (one, as Breiman et al. 1984 take, is too little where three alternatives compete). What is
reported of items comes from fusions that did not see them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.model_selection import StratifiedKFold

from models.fusion import FusionSpec, fuse, item_evidence
from models.statistics import wilson_interval

TOP_K: Final = (1, 2, 3, 4)
_DEFAULT: Final = FusionSpec()
_MIN_ITEMS: Final = 20
_MIN_OF_A_KIND: Final = 4
_FOLDS: Final = 10
_MIN_SCALE: Final = 0.05
_DRAWS: Final = 400
_STEPS: Final = 50
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LearntFusion:
    """The fusion learnt from held-out items.

    Attributes:
        spec: For the bundle, learnt on all items.
        fused: float64 (items, C): each item fused by parameters learnt without it.
        report: Losses per `top_k`, calibration; plain values for the lineage.
    """

    spec: FusionSpec
    fused: Floats
    report: dict[str, Any]


def learn_fusion(items: Sequence[NDArray[np.floating]], bad: Flags, *, good: int = 0, seed: int = 1) -> LearntFusion:
    """Learns the fusion and measures how well its probabilities are calibrated.

    Args:
        items: Per item (V, C): probabilities of its views by a model that never saw the item.
        bad: bool (items,), True for defective items.
        good: Column of the good class.
        seed: Seed of the folds and of the bootstrap.
    """
    spec, losses = _DEFAULT, dict[str, float]()
    candidates = _candidates(items, good)
    if len(bad) >= _MIN_ITEMS and min(bad.sum(), (~bad).sum()) >= _MIN_OF_A_KIND:
        spec, losses = _choose(candidates, bad, seed)
    fused = np.stack([fuse(views, spec, good) for views in items])
    if spec.calibration_items:
        for train, test in _folds(bad, seed):
            own, _ = _choose({k: e[train] for k, e in candidates.items()}, bad[train], seed)
            for row in test:
                fused[row] = fuse(items[row], own, good)
    report = {"top_k": spec.top_k, "log_loss": losses, **calibration(bad, 1.0 - fused[:, good], seed=seed)}
    return LearntFusion(spec, fused, report)


def _candidates(items: Sequence[NDArray[np.floating]], good: int) -> dict[int, Floats]:
    """Returns the evidence of every item by `top_k`, for each choice that some item has enough views for."""
    most = max(len(views) for views in items)
    choices = sorted({k for k in TOP_K if k <= most} | {_DEFAULT.top_k})
    return {k: np.array([item_evidence(views, good, k) for views in items]) for k in choices}


def _choose(candidates: dict[int, Floats], bad: Flags, seed: int) -> tuple[FusionSpec, dict[str, float]]:
    """Returns the fusion learnt on these items and the held-out log loss of each `top_k`."""
    weights = balanced(bad)
    losses = {k: np.full(len(bad), np.nan) for k in candidates}
    for train, test in _folds(bad, seed):
        for k, evidence in candidates.items():
            score = np.polyval(fit_platt(evidence[train], bad[train]), evidence[test])
            losses[k][test] = np.logaddexp(0.0, np.where(bad[test], -score, score))
    means = {k: float(np.average(loss, weights=weights)) for k, loss in losses.items()}
    best = min(means, key=lambda k: (means[k], k))
    gain = (losses[_DEFAULT.top_k] - losses[best]) * weights
    chosen = best if gain.mean() > 2.0 * gain.std() / np.sqrt(len(gain)) else _DEFAULT.top_k
    scale, offset = fit_platt(candidates[chosen], bad)
    report = {str(k): round(mean, 4) for k, mean in means.items()}
    if scale <= _MIN_SCALE:
        return _DEFAULT, report
    return FusionSpec(top_k=chosen, scale=scale, offset=offset, calibration_items=len(bad)), report


def _folds(bad: Flags, seed: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    count = int(min(_FOLDS, bad.sum(), (~bad).sum()))
    splitter = StratifiedKFold(max(count, 2), shuffle=True, random_state=seed)
    return list(splitter.split(bad[:, None], bad))


def balanced(bad: Flags) -> Floats:
    """Returns weights of mean 1 that give good and defective items the shares of the fusion's prior."""
    share = min(max(float(bad.mean()), 1e-9), 1.0 - 1e-9)
    return np.where(bad, _DEFAULT.prior / share, (1.0 - _DEFAULT.prior) / (1.0 - share))


def fit_platt(evidence: Floats, bad: Flags) -> tuple[float, float]:
    """Returns slope and intercept of the log odds (Platt 1999) at the fusion's prior.

    Newton's method on the log loss plus half the squared slope finds the solution of scikit-learn's
    `LogisticRegression(C=1)` in a twentieth of the time; nested cross-validation calls it a thousand times.
    """
    weights = balanced(bad)
    design = np.column_stack((evidence, np.ones_like(evidence)))
    penalty = np.array([1.0, 0.0])

    def loss(at: Floats) -> float:
        scores = design @ at
        return float((weights * np.logaddexp(0.0, np.where(bad, -scores, scores))).sum() + 0.5 * at[0] ** 2)

    found, best = np.zeros(2), loss(np.zeros(2))
    for _ in range(_STEPS):
        p = expit(design @ found)
        slope = design.T @ (weights * (p - bad)) + penalty * found
        curvature = (design * (weights * p * (1.0 - p))[:, None]).T @ design + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curvature, slope)
        while loss(found - step) > best and np.abs(step).max() > 1e-10:
            step = step / 2.0
        found, best = found - step, loss(found - step)
        if np.abs(step).max() < 1e-9:
            break
    return float(found[0]), float(found[1])


def calibration(bad: Flags, defect: Floats, *, seed: int = 1) -> dict[str, Any]:
    """Measures the calibration of the items' probabilities at the fusion's prior.

    Args:
        bad: bool (items,), True for defective items.
        defect: float64 (items,), defect probability of each item, 0..1.
        seed: Seed of the bootstrap over items.

    Returns:
        Brier score with a 95 % interval, expected calibration error, a reliability table (bins of about equally
        many items, each with the Wilson interval of its share) and a `note` where the items are too few to judge.
    """
    weights = balanced(bad)
    errors = (defect - bad) ** 2
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(bad), (_DRAWS, len(bad)))
    draws = (errors * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    bins = int(np.clip(len(bad) // 10, 2, 10))
    order = np.argsort(defect, kind="stable")
    rows, gap = [], 0.0
    for members in np.array_split(order, bins):
        own = weights[members]
        said, share = float(np.average(defect[members], weights=own)), float(np.average(bad[members], weights=own))
        gap += abs(said - share) * float(own.sum() / weights.sum())
        low, high = wilson_interval(share, float(own.sum() ** 2 / (own**2).sum()))
        rows.append(
            {
                "items": len(members),
                "from": round(float(defect[members].min()), 4),
                "to": round(float(defect[members].max()), 4),
                "predicted": round(said, 4),
                "observed": round(share, 4),
                "low": round(low, 4),
                "high": round(high, 4),
            }
        )
    low, high = np.quantile(draws, (0.025, 0.975))
    found: dict[str, Any] = {
        "items": len(bad),
        "prior": _DEFAULT.prior,
        "brier": {"value": round(float(np.average(errors, weights=weights)), 4), "low": round(float(low), 4)}
        | {"high": round(float(high), 4)},
        "calibration_error": round(gap, 4),
        "reliability": rows,
    }
    if len(bad) < 200:
        found["note"] = (
            f"{len(bad)} items in {bins} bins: each share is known to about "
            f"+-{max(r['high'] - r['low'] for r in rows) / 2:.0%}, so the calibration error says little."
        )
    return found
