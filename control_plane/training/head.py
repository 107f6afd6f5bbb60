"""The classifier on top of the features: per scale scaled, projected, logistic; their mean, calibrated by item.

Each scale of the features has a member of its own, and the mean of their log-probabilities counts: members that see
different things err on different skins, and one classifier on all features together would learn the larger scale's
errors with its strengths (0.84 against 0.86 view AUC on the apples of the README).

It learns as well from views that were never taken: each view united with a good view of another item keeps its label,
so that the skin a defect happens to sit on tells less of the defect (`features.united`; a composition of
examples as in mixup, Zhang et al. 2018, but by the rule that labels follow here: a defect anywhere is a defect).

Strength of the penalty and calibration come from a cross-validation by item *inside* the training data, so the data
that measure the model never choose anything. Weights make items count alike however many views they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from control_plane.training.features import united
from control_plane.training.splits import item_folds

Floats = NDArray[np.floating]
EMBEDDING = 5
CLIP = 1e-7
"""Probabilities of a member are kept this far from zero before their logarithm is taken."""
_COMPONENTS = 96
_PENALTIES = (1e-3, 3e-3, 1e-2)
_VIEWS_PER_ITEM = 40


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted classifier.

    Attributes:
        members: scikit-learn, one per scale: its features (and imputed scalars) -> probabilities.
        widths: Features of each member, in their order.
        temperature: The mean of the members' log-probabilities is multiplied by this ...
        bias: ... and this (C,) is added before they are normalised again.
        medians: (K,) what stands for an unknown scalar.
        penalty: `C` of the logistic regressions that was chosen.
    """

    members: tuple[Pipeline, ...]
    widths: tuple[int, ...]
    temperature: float
    bias: NDArray[np.float64]
    medians: NDArray[np.float32]
    penalty: float

    def predict_proba(self, features: Floats, scalars: Floats | None = None) -> NDArray[np.float64]:
        """float64 (N, C), calibrated: the scikit-learn side of the parity check."""
        inputs = _inputs(np.asarray(features, np.float64), self.widths, scalars, self.medians)
        found = [member.predict_proba(own) for member, own in zip(self.members, inputs, strict=True)]
        return calibrated(_mean_log(found), self.temperature, self.bias)


def _inputs(
    features: Floats, widths: Sequence[int], scalars: Floats | None, medians: NDArray[np.float32]
) -> list[Floats]:
    """What each member sees: the features of its scale, and all scalars with the unknown ones filled."""
    edges = np.cumsum([0, *widths])
    parts: list[Floats] = [features[:, a:b] for a, b in pairwise(edges)]
    if not len(medians):
        return parts
    known = np.full((len(features), len(medians)), np.nan) if scalars is None else np.asarray(scalars)
    filled = np.where(np.isnan(known), medians, known)
    return [np.hstack([part, filled]) for part in parts]


def _mean_log(probabilities: Sequence[Floats]) -> NDArray[np.float64]:
    return np.asarray(np.mean([np.log(np.clip(p, CLIP, 1.0)) for p in probabilities], axis=0), np.float64)


def calibrated(scores: Floats, temperature: float, bias: Floats) -> NDArray[np.float64]:
    """softmax(temperature * scores + bias), rows; scores are log-probabilities up to a constant."""
    scores = temperature * scores + bias
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
    widths: Sequence[int],
    seed: int,
    scalars: Floats | None = None,
    calibrate_on: NDArray[np.bool_] | None = None,
    unions: bool = False,
) -> Head:
    """Fits, choosing penalty and calibration by an inner cross-validation by item.

    Args:
        features: (N, F).
        labels: (N,) 0..C-1, 0 = good.
        items: (N,) item of each view.
        weights: (N,) of each view.
        classes: C.
        widths: Features of each member; their sum is F.
        seed: Of folds, projection and unions.
        scalars: (N, K) or None.
        calibrate_on: Views that count for choosing and calibrating (augmented ones do not); None = all.
        unions: Learn from unions of views too; the layout of `features` must be that of `features.united`.
    """
    medians = np.zeros(0, np.float32)
    if scalars is not None and scalars.shape[1]:
        known = np.where(np.isnan(scalars).all(axis=0), 0.0, 1.0)
        medians = np.where(known > 0, np.nanmedian(np.where(known > 0, scalars, 0.0), axis=0), 0.0).astype(np.float32)
    views = _Views(_inputs(features, widths, scalars, medians), tuple(widths), labels, items, weights, seed, unions)
    chosen, scores = _choose(views, classes, calibrate_on)
    counted = np.ones(len(labels), bool) if calibrate_on is None else calibrate_on
    counted = counted & np.isfinite(scores).all(axis=1)
    temperature, bias = _calibrate(scores[counted], labels[counted], items[counted])
    every = np.arange(len(labels))
    bases, examples = views.bases(every), views.examples(every)
    members = [
        Pipeline([*base.steps, ("logistic", _logistic(chosen, base.transform(own), examples.labels, examples.weights))])
        for base, own in zip(bases, examples.inputs, strict=True)
    ]
    return Head(tuple(members), tuple(widths), temperature, bias, medians, chosen)


@dataclass(frozen=True, slots=True)
class _Examples:
    """What a classifier is fitted on."""

    inputs: list[Floats]
    labels: NDArray[np.integer]
    weights: Floats


@dataclass(frozen=True, slots=True)
class _Views:
    """All views that may be learnt from; see `fit_head`."""

    inputs: list[Floats]
    widths: tuple[int, ...]
    labels: NDArray[np.integer]
    items: NDArray[np.generic]
    weights: Floats
    seed: int
    unions: bool

    def bases(self, rows: NDArray[np.intp]) -> list[Pipeline]:
        """Scaling and projection of each member, from these views as they are."""
        return [_base(own[rows], self.seed) for own in self.inputs]

    def examples(self, rows: NDArray[np.intp]) -> _Examples:
        """These views, and their unions with good ones among them."""
        first, second = self._partners(rows) if self.unions else (rows[:0], rows[:0])
        inputs: list[Floats] = []
        for own, width in zip(self.inputs, self.widths, strict=True):
            both = united(own[first, :width], own[second, :width])
            inputs.append(np.vstack([own[rows], np.hstack([both, own[first, width:]])]))
        every = np.concatenate([rows, first])
        return _Examples(inputs, self.labels[every], self.weights[every])

    def _partners(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Each view with a good view drawn by weight; those that drew their own item are left out."""
        good = rows[self.labels[rows] == 0]
        share = self.weights[good] / self.weights[good].sum()
        drawn = np.random.default_rng(self.seed).choice(good, size=len(rows), p=share)
        other = self.items[drawn] != self.items[rows]
        return rows[other], drawn[other]


def _base(features: Floats, seed: int) -> Pipeline:
    components = min(_COMPONENTS, features.shape[1], len(features) - 1)
    project = PCA(components, random_state=seed, svd_solver="covariance_eigh")
    return Pipeline([("scale", StandardScaler()), ("project", project)]).fit(features)


def _choose(views: _Views, classes: int, counted: NDArray[np.bool_] | None) -> tuple[float, NDArray[np.float64]]:
    """The penalty with the smallest out-of-fold log loss, and its out-of-fold mean log-probabilities (or NaN)."""
    best: tuple[float, float, NDArray[np.float64]] | None = None
    labels, prepared = views.labels, []
    for train, test in item_folds(views.items, labels, folds=4, seed=views.seed):
        if len(np.unique(labels[train])) < classes:
            continue
        examples = views.examples(train)
        pairs = [
            (base.transform(seen), base.transform(own[test]))
            for base, seen, own in zip(views.bases(train), examples.inputs, views.inputs, strict=True)
        ]
        prepared.append((examples, test, pairs))
    for penalty in _PENALTIES:
        found = np.full((len(labels), classes), np.nan)
        for examples, test, pairs in prepared:
            fitted = [_logistic(penalty, seen, examples.labels, examples.weights) for seen, _ in pairs]
            found[test] = _mean_log([one.predict_proba(held) for one, (_, held) in zip(fitted, pairs, strict=True)])
        known = np.isfinite(found).all(axis=1) & (counted if counted is not None else True)
        if not known.any():
            return 1e-2, found
        picked = np.clip(calibrated(found[known], 1.0, np.zeros(classes)), 1e-6, 1.0)
        loss = float(-(views.weights[known] * np.log(picked[np.arange(len(picked)), labels[known]])).sum())
        if best is None or loss < best[0]:
            best = (loss, penalty, found)
    assert best is not None  # noqa: S101  there is at least one penalty
    return best[1], best[2]


def _logistic(penalty: float, features: Floats, labels: NDArray[np.integer], weights: Floats) -> Any:
    return LogisticRegression(C=penalty, max_iter=400).fit(features, labels, weights)


def _calibrate(
    scores: Floats, labels: NDArray[np.integer], items: NDArray[np.generic]
) -> tuple[float, NDArray[np.float64]]:
    """Temperature and class biases (Guo et al. 2017, with biases) by weighted log loss; each item weighs the same."""
    classes = scores.shape[1] if scores.ndim == 2 else 1
    identity = (1.0, np.zeros(classes))
    if len(labels) < 20 or len(np.unique(labels)) < classes:
        return identity
    _, place, counts = np.unique(items, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[place]
    weights = weights / weights.sum()

    def loss(parameters: NDArray[np.float64]) -> float:
        p = calibrated(scores, float(np.exp(parameters[0])), parameters[1:])
        picked = np.log(np.clip(p[np.arange(len(labels)), labels], 1e-9, 1.0))
        return float(-(weights * picked).sum() + 0.01 * (parameters**2).sum())

    found = minimize(loss, np.zeros(classes + 1), method="L-BFGS-B", bounds=[(-2.0, 2.0)] + [(-3.0, 3.0)] * classes)
    return float(np.exp(found.x[0])), np.asarray(found.x[1:], np.float64)
