"""Chooses members, penalties, votes and calibration from what the members answer on items they were not fitted on.

Log-probabilities of members are added. The contrast members have equal votes. An optional member joins only where it
lowers the loss on items that no member was fitted on; then the votes are weighed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.floating]
_BEYOND_DOUBT: Final = 2.0
"""An optional member must save this many standard errors of loss: one useless member in forty passes."""
_LEAST_VOTE: Final = 0.2
"""Smallest vote, as a share of the strongest; a weaker vote does not justify its computing time on the line."""
_LEAST_VIEWS: Final = 20
"""With fewer held-out views nothing is calibrated."""
_PULL: Final = 0.01
"""Strength of the prior of votes and biases, in units of the mean log loss."""


def softmax(scores: Floats) -> NDArray[np.float64]:
    """Returns rows that add up to one."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float64)


@dataclass(frozen=True, slots=True)
class Vote:
    """The members that vote, their penalties, weights and biases."""

    members: tuple[int, ...]
    penalties: tuple[float, ...]
    votes: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Answers of the members on items they were not fitted on.

    Attributes:
        logs: Per member: penalty -> (n, C) log-probabilities.
        labels: (n,).
        weights: (n,) of the views, for choosing penalties.
        items: (n,) number of the item of each view.
        classes: C.
        unprojected: Number of members, the last ones, that see scalars and no views.
    """

    logs: list[dict[float, NDArray[np.float64]]]
    labels: NDArray[np.integer]
    weights: NDArray[np.floating]
    items: NDArray[np.intp]
    classes: int
    unprojected: int = 0

    def vote(self, sure: int) -> Vote:
        """Gives the first `sure` members equal votes; each one behind them joins if it lowers the loss.

        It joins when the loss it saves, mean over items, exceeds two standard errors of that mean: a member that saw
        twenty items has learnt their skins, one that saw hundreds has not. Votes are weighed only when it joins, for
        the same reason.
        """
        first = tuple(range(sure))
        chosen = [min(self.logs[0], key=lambda p: self._loss(self._together(first, [p] * sure)))] * sure
        alone = self._alike(first, chosen)
        if sure == len(self.logs) or not self._enough:
            return alone
        members, best = first, alone
        for k in range(sure, len(self.logs)):
            penalty = min(self.logs[k], key=lambda p, own=self.logs[k]: self._loss(own[p]))  # type: ignore[misc]
            joined = self._alike((*members, k), [*chosen, penalty])
            saved = self._item_losses(best) - self._item_losses(joined)
            if saved.mean() > _BEYOND_DOUBT * saved.std(ddof=1) / np.sqrt(len(saved)):
                members, chosen, best = joined.members, [*chosen, penalty], joined
        return alone if members == first else self._weighed(members, chosen)

    @property
    def _enough(self) -> bool:
        return len(self.labels) >= _LEAST_VIEWS and len(np.unique(self.labels)) == self.classes

    def _together(self, members: Sequence[int], penalties: Sequence[float]) -> NDArray[np.float64]:
        return np.asarray(np.mean([self.logs[k][p] for k, p in zip(members, penalties, strict=True)], axis=0))

    def _loss(self, scores: Floats) -> float:
        picked = np.clip(softmax(scores), 1e-6, 1.0)[np.arange(len(self.labels)), self.labels]
        return float(-(self.weights * np.log(picked)).sum())

    def _item_losses(self, vote: Vote) -> NDArray[np.float64]:
        scores = self._scores(vote.members, vote.penalties)
        found = softmax(np.tensordot(vote.votes, scores, 1) + vote.bias)
        losses = -np.log(np.clip(found[np.arange(len(self.labels)), self.labels], 1e-9, 1.0))
        return np.asarray(np.bincount(self.items, losses) / np.bincount(self.items), np.float64)

    def _scores(self, members: Sequence[int], penalties: Sequence[float]) -> NDArray[np.float64]:
        return np.stack([self.logs[k][p] for k, p in zip(members, penalties, strict=True)])

    def _alike(self, members: tuple[int, ...], penalties: Sequence[float]) -> Vote:
        """Fits one temperature for all members (Guo et al. 2017, with biases)."""
        count = len(members)
        if not self._enough:
            return Vote(members, tuple(penalties), np.full(count, 1.0 / count), np.zeros(self.classes))
        mean = self._together(members, penalties)[None]
        found = self._minimise(mean, np.exp, np.zeros(1), [(-2.0, 2.0)])
        temperature, bias = np.exp(found[0]), found[1:]
        return Vote(members, tuple(penalties), np.full(count, temperature / count), bias)

    def _weighed(self, members: tuple[int, ...], penalties: Sequence[float]) -> Vote:
        """Fits a non-negative weight for each member; those with very small ones go, but one that sees views stays."""
        bounds = [(0.0, 4.0)] * len(members)
        found = self._minimise(self._scores(members, penalties), np.asarray, np.zeros(len(members)), bounds)
        votes, bias = found[: len(members)], found[len(members) :]
        strong = votes >= _LEAST_VOTE * votes.max()
        of_views = np.array(members) < len(self.logs) - self.unprojected
        if not (strong & of_views).any():  # the features of one part give the embedding that drift is watched by
            strong[np.where(of_views, votes, -1.0).argmax()] = True
        if strong.all():
            return Vote(members, tuple(penalties), votes, bias)
        return self._weighed(tuple(np.array(members)[strong].tolist()), np.array(penalties)[strong].tolist())

    def _minimise(
        self, scores: Floats, votes_of: Any, prior: Floats, bounds: list[tuple[float, float]]
    ) -> NDArray[np.float64]:
        """Returns the parameters of the votes, then the biases, by a log loss that weighs all items alike."""
        weights = 1.0 / np.bincount(self.items)[self.items]
        weights = weights / weights.sum()
        split = len(prior)

        def loss(x: NDArray[np.float64]) -> float:
            found = softmax(np.tensordot(votes_of(x[:split]), scores, 1) + x[split:])
            picked = np.log(np.clip(found[np.arange(len(self.labels)), self.labels], 1e-9, 1.0))
            pull = ((x[:split] - prior) ** 2).sum() + (x[split:] ** 2).sum()
            return float(-(weights * picked).sum() + _PULL * pull)

        limits = bounds + [(-3.0, 3.0)] * self.classes
        found = minimize(loss, np.concatenate((prior, np.zeros(self.classes))), method="L-BFGS-B", bounds=limits)
        return np.asarray(found.x, np.float64)
