"""The classifier on top of the features: one member per part, scaled, projected, logistic; and a vote (`ensemble`).

Each part of the features has a member of its own: members with different inputs err on different skins, and one
classifier on all features together would learn the larger part's errors with its strengths (0.84 against 0.86 view
AUC on the apples of the README).

It learns also from composed views: a view united with a good view of another item keeps its label, so that the skin
around a defect carries less information about the label (`patch_features.united`; a composition of examples as in
mixup, Zhang et al. 2018, but by the rule that labels follow here: a defect anywhere is a defect).

Penalties, votes and calibration come from a cross-validation by item *inside* the training data, so the data
that measure the model never choose anything. Weights make items count alike however many views they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from control_plane.data.splits import item_folds
from control_plane.training.ensemble import HeldOutScores, softmax

Floats = NDArray[np.floating]
Unite = Callable[[Any, Any], Any]
"""Combines the features of one part of two views: (N, F), (N, F) -> (N, F), as if one view showed both."""
EMBEDDING = 5
"""Principal components of the first member that are given out for drift monitoring."""
CLIP = 1e-7
"""Probabilities of a member are kept this far from zero before their logarithm is taken."""
_COMPONENTS = 96
_PENALTIES = (1e-3, 3e-3, 1e-2)
_OPTIONAL_PENALTIES = (1e-2, 3e-2, 1e-1)
"""An optional member is tested on held-out items before it votes, so its regularisation may be weaker."""
_SCALAR_PENALTIES = (0.1, 1.0, 10.0)
"""A handful of whitened scalars needs less regularisation than hundreds of features."""
_VIEWS_PER_ITEM = 40
"""An item with more views than this weighs no more than one with this many."""


@dataclass(frozen=True, slots=True)
class Head:
    """A fitted classifier.

    Attributes:
        members: scikit-learn, one per part: its features -> probabilities.
        widths: Features of each member, in their order.
        votes: (M,) what each member's log-probabilities are multiplied by before they are added ...
        bias: ... and this (C,) is added before they are normalised again.
        penalties: `C` of each member's logistic regression.
    """

    members: tuple[Pipeline, ...]
    widths: tuple[int, ...]
    votes: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalties: tuple[float, ...]

    def predict_proba(self, features: Floats) -> NDArray[np.float64]:
        """Returns float64 (N, C), calibrated: the scikit-learn side of the parity check."""
        inputs = _inputs(np.asarray(features, np.float64), self.widths)
        found = [_log(member.predict_proba(own)) for member, own in zip(self.members, inputs, strict=True)]
        return softmax(np.tensordot(self.votes, np.stack(found), 1) + self.bias)


def _inputs(features: Floats, widths: Sequence[int]) -> list[Floats]:
    """Returns the features of each part."""
    return [features[:, a:b] for a, b in pairwise(np.cumsum([0, *widths]))]


def _log(probabilities: Floats) -> NDArray[np.float64]:
    return np.asarray(np.log(np.clip(probabilities, CLIP, 1.0)), np.float64)


def view_weights(labels: NDArray[np.integer], items: NDArray[np.generic]) -> NDArray[np.float64]:
    """Returns the weight of each view, mean 1: an item counts up to `_VIEWS_PER_ITEM` views, classes count alike."""
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
    optional: int = 0,
    unprojected: int = 0,
    calibrate_on: NDArray[np.bool_] | None = None,
    unite: Sequence[Unite] = (),
) -> tuple[Head, tuple[int, ...]]:
    """Fits, choosing members, penalties and calibration by an inner cross-validation by item.

    Args:
        features: (N, F).
        labels: (N,) 0..C-1, 0 = good.
        items: (N,) item of each view.
        weights: (N,) of each view.
        classes: C.
        widths: Features of each member; their sum is F.
        seed: Seed of folds, projection and unions.
        optional: Number of members, the last ones, that vote only where they lower the held-out loss.
        unprojected: Number of the optional members, the last ones, whose few features need no projection: scalars.
        calibrate_on: Views that count for choosing and calibrating (augmented ones do not); None = all.
        unite: Per member, the function that makes unions of views to learn from; empty = no unions.

    Returns:
        The head, and the numbers of the members that have a vote in it.
    """
    inputs = _inputs(features, widths)
    projected = tuple(k < len(inputs) - unprojected for k in range(len(inputs)))
    # Under weak regularisation the solver's line search ends early in float32.
    inputs = [own if p else own.astype(np.float64) for own, p in zip(inputs, projected, strict=True)]
    views = _Views(inputs, projected, labels, items, weights, seed, tuple(unite))
    sure = len(inputs) - optional
    grids = [
        _SCALAR_PENALTIES if not own else _PENALTIES if k < sure else _OPTIONAL_PENALTIES
        for k, own in enumerate(projected)
    ]
    vote = _ask(views, grids, classes, calibrate_on).vote(sure)
    every = np.arange(len(labels))
    bases, examples = views.bases(every), views.examples(every)
    members = [
        Pipeline([*bases[k].steps, ("logistic", _logistic(penalty, bases[k].transform(examples.inputs[k]), examples))])
        for k, penalty in zip(vote.members, vote.penalties, strict=True)
    ]
    kept = tuple(widths[k] for k in vote.members)
    return Head(tuple(members), kept, vote.votes, vote.bias, vote.penalties), vote.members


@dataclass(frozen=True, slots=True)
class _Examples:
    """Inputs, labels and weights that a classifier is fitted on."""

    inputs: list[Floats]
    labels: NDArray[np.integer]
    weights: Floats


@dataclass(frozen=True, slots=True)
class _Views:
    """All views that may be learnt from; the fields are arguments of `fit_head`."""

    inputs: list[Floats]
    projected: tuple[bool, ...]
    labels: NDArray[np.integer]
    items: NDArray[np.generic]
    weights: Floats
    seed: int
    unite: tuple[Unite, ...]

    def bases(self, rows: NDArray[np.intp]) -> list[Pipeline]:
        """Fits scaling and projection of each member on these views, without unions."""
        return [_base(own[rows], self.seed, project=p) for own, p in zip(self.inputs, self.projected, strict=True)]

    def examples(self, rows: NDArray[np.intp]) -> _Examples:
        """Returns these views and their unions with good ones among them."""
        if not self.unite:
            return _Examples([own[rows] for own in self.inputs], self.labels[rows], self.weights[rows])
        first, second = self._partners(rows)
        inputs: list[Floats] = []
        for own, united in zip(self.inputs, self.unite, strict=True):
            inputs.append(np.vstack([own[rows], united(own[first], own[second])]))
        every = np.concatenate([rows, first])
        return _Examples(inputs, self.labels[every], self.weights[every])

    def _partners(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Pairs each view with a good view drawn by weight; pairs of one item are left out."""
        good = rows[self.labels[rows] == 0]
        share = self.weights[good] / self.weights[good].sum()
        drawn = np.random.default_rng(self.seed).choice(good, size=len(rows), p=share)
        other = self.items[drawn] != self.items[rows]
        return rows[other], drawn[other]


def _base(features: Floats, seed: int, *, project: bool) -> Pipeline:
    """Fits the steps before the classifier: scaling, and a projection on the largest components."""
    scale = ("scale", StandardScaler())
    if not project:
        return Pipeline([scale]).fit(features)
    components = min(_COMPONENTS, features.shape[1], len(features) - 1)
    pca = PCA(components, random_state=seed, svd_solver="covariance_eigh")
    return Pipeline([scale, ("project", pca)]).fit(features)


def _ask(
    views: _Views, grids: Sequence[tuple[float, ...]], classes: int, counted: NDArray[np.bool_] | None
) -> HeldOutScores:
    """Cross-validates every member under every penalty of its grid."""
    labels = views.labels
    found = [{penalty: np.full((len(labels), classes), np.nan) for penalty in grid} for grid in grids]
    known = np.zeros(len(labels), bool)
    for train, test in item_folds(views.items, labels, folds=4, seed=views.seed):
        if len(np.unique(labels[train])) < classes:
            continue
        known[test] = True
        examples = views.examples(train)
        for logs, base, seen, own in zip(found, views.bases(train), examples.inputs, views.inputs, strict=True):
            learnt, held = base.transform(seen), base.transform(own[test])
            for penalty, log in logs.items():
                log[test] = _log(_logistic(penalty, learnt, examples).predict_proba(held))
    known = known if counted is None else known & counted
    kept = [{penalty: log[known] for penalty, log in member.items()} for member in found]
    place = np.unique(views.items[known], return_inverse=True)[1]
    return HeldOutScores(kept, labels[known], views.weights[known], place, classes, views.projected.count(False))


def _logistic(penalty: float, features: Floats, examples: _Examples) -> Any:
    # With two classes Newton's method needs four steps, each less than ten of L-BFGS, which takes some fifty; with more
    # classes its matrix grows too large. Both end at the same minimum.
    solver = "newton-cholesky" if len(np.unique(examples.labels)) == 2 else "lbfgs"
    model = LogisticRegression(C=penalty, max_iter=400, solver=solver)
    return model.fit(features, examples.labels, examples.weights)
