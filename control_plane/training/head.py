"""The classifier on top of the features: scaled, projected, logistic, calibrated out of fold by item.

Strength of the penalty and calibration come from a cross-validation by item *inside* the training data, so the data
that measure the model never choose anything. Weights make items count alike however many views they have.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from control_plane.training.splits import item_folds

Floats = NDArray[np.floating]
EMBEDDING = 5
_COMPONENTS = 256
_PENALTIES = (1e-3, 1e-2, 1e-1)
_VIEWS_PER_ITEM = 40


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted classifier.

    Attributes:
        pipeline: scikit-learn: features (and imputed scalars) -> probabilities.
        temperature: The log-probabilities are multiplied by this ...
        bias: ... and this (C,) is added before they are normalised again.
        medians: (K,) what stands for an unknown scalar.
        penalty: `C` of the logistic regression that was chosen.
    """

    pipeline: Pipeline
    temperature: float
    bias: NDArray[np.float64]
    medians: NDArray[np.float32]
    penalty: float

    def predict_proba(self, features: Floats, scalars: Floats | None = None) -> NDArray[np.float64]:
        """float64 (N, C), calibrated: the scikit-learn side of the parity check."""
        joined = self.joined(features, scalars)
        return calibrated(self.pipeline.predict_proba(joined), self.temperature, self.bias)

    def joined(self, features: Floats, scalars: Floats | None) -> NDArray[np.float64]:
        """Features and imputed scalars side by side."""
        if not len(self.medians):
            return np.asarray(features, np.float64)
        known = np.full((len(features), len(self.medians)), np.nan) if scalars is None else np.asarray(scalars)
        filled = np.where(np.isnan(known), self.medians, known)
        return np.hstack([np.asarray(features, np.float64), filled])


def calibrated(probabilities: Floats, temperature: float, bias: Floats) -> NDArray[np.float64]:
    """softmax(temperature * log p + bias), rows."""
    scores = temperature * np.log(np.clip(probabilities, 1e-7, 1.0)) + bias
    scores = scores - scores.max(axis=1, keepdims=True)
    powers = np.exp(scores)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)


def view_weights(labels: NDArray[np.integer], items: NDArray[np.generic]) -> NDArray[np.float64]:
    """Weight of each view: an item counts up to so many views per class, and classes count alike; mean 1."""
    weights = np.zeros(len(labels))
    for klass in np.unique(labels):
        of_class = labels == klass
        for item in np.unique(items[of_class]):
            own = of_class & (items == item)
            weights[own] = min(own.sum(), _VIEWS_PER_ITEM) / own.sum()
        weights[of_class] /= weights[of_class].sum()
    return np.asarray(weights * len(labels) / weights.sum(), np.float64)


def fit_head(
    features: Floats,
    labels: NDArray[np.integer],
    items: NDArray[np.generic],
    weights: Floats,
    *,
    classes: int,
    seed: int,
    scalars: Floats | None = None,
    calibrate_on: NDArray[np.bool_] | None = None,
) -> Head:
    """Fits, choosing penalty and calibration by an inner cross-validation by item.

    Args:
        features: (N, F).
        labels: (N,) 0..C-1.
        items: (N,) item of each view.
        weights: (N,) of each view.
        classes: C.
        seed: Of folds and projection.
        scalars: (N, K) or None.
        calibrate_on: Views that count for choosing and calibrating (augmented ones do not); None = all.
    """
    medians = np.zeros(0, np.float32)
    if scalars is not None and scalars.shape[1]:
        known = np.where(np.isnan(scalars).all(axis=0), 0.0, 1.0)
        medians = np.where(known > 0, np.nanmedian(np.where(known > 0, scalars, 0.0), axis=0), 0.0).astype(np.float32)
        features = np.hstack([features, np.where(np.isnan(scalars), medians, scalars)])
    chosen, scores = _choose(features, labels, items, weights, classes, seed, calibrate_on)
    counted = np.ones(len(labels), bool) if calibrate_on is None else calibrate_on
    counted = counted & np.isfinite(scores).all(axis=1)
    temperature, bias = _calibrate(scores[counted], labels[counted], items[counted])
    pipeline = _pipeline(chosen, features, seed).fit(features, labels, logistic__sample_weight=weights)
    return Head(pipeline, temperature, bias, medians, chosen)


def _pipeline(penalty: float, features: Floats, seed: int) -> Pipeline:
    components = min(_COMPONENTS, features.shape[1], len(features) - 1)
    return Pipeline(
        [
            ("scale", StandardScaler()),
            ("project", PCA(components, random_state=seed, svd_solver="covariance_eigh")),
            ("logistic", LogisticRegression(C=penalty, max_iter=400)),
        ]
    )


def _choose(
    features: Floats,
    labels: NDArray[np.integer],
    items: NDArray[np.generic],
    weights: Floats,
    classes: int,
    seed: int,
    counted: NDArray[np.bool_] | None,
) -> tuple[float, NDArray[np.float64]]:
    """The penalty with the smallest out-of-fold log loss, and its out-of-fold probabilities (NaN where unknown)."""
    folds = list(item_folds(items, labels, folds=4, seed=seed))
    best: tuple[float, float, NDArray[np.float64]] | None = None
    prepared = []
    for train, test in folds:
        if len(np.unique(labels[train])) < classes:
            continue
        base = _pipeline(1.0, features[train], seed)[:-1].fit(features[train])
        prepared.append((train, test, base.transform(features[train]), base.transform(features[test])))
    for penalty in _PENALTIES:
        found = np.full((len(labels), classes), np.nan)
        for train, test, inside, outside in prepared:
            model: Any = LogisticRegression(C=penalty, max_iter=400).fit(inside, labels[train], weights[train])
            found[test] = model.predict_proba(outside)
        known = np.isfinite(found).all(axis=1) & (counted if counted is not None else True)
        if not known.any():
            return 1e-2, found
        picked = np.clip(found[known, labels[known]], 1e-6, 1.0)
        loss = float(-(weights[known] * np.log(picked)).sum() / weights[known].sum())
        if best is None or loss < best[0]:
            best = (loss, penalty, found)
    assert best is not None  # noqa: S101  there is at least one penalty
    return best[1], best[2]


def _calibrate(
    probabilities: Floats, labels: NDArray[np.integer], items: NDArray[np.generic]
) -> tuple[float, NDArray[np.float64]]:
    """Temperature and class biases (Guo et al. 2017, with biases) by weighted log loss; each item weighs the same."""
    classes = probabilities.shape[1] if probabilities.ndim == 2 else 1
    identity = (1.0, np.zeros(classes))
    if len(labels) < 20 or len(np.unique(labels)) < classes:
        return identity
    _, place, counts = np.unique(items, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[place]
    weights = weights / weights.sum()

    def loss(parameters: NDArray[np.float64]) -> float:
        p = calibrated(probabilities, float(np.exp(parameters[0])), parameters[1:])
        picked = np.log(np.clip(p[np.arange(len(labels)), labels], 1e-9, 1.0))
        return float(-(weights * picked).sum() + 0.01 * (parameters**2).sum())

    found = minimize(loss, np.zeros(classes + 1), method="L-BFGS-B", bounds=[(-2.0, 2.0)] + [(-3.0, 3.0)] * classes)
    return float(np.exp(found.x[0])), np.asarray(found.x[1:], np.float64)
