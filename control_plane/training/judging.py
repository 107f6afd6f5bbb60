"""Items from views, in training and evaluation, as the line would see them: at most K views, spaced by roll."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from control_plane.training.datasets import Dataset
from control_plane.training.metrics import item_truth
from models.preprocess import view_features
from models.recipe import Recipe, Verdict
from models.windows import item_features


@dataclass(frozen=True, slots=True)
class ItemRows:
    """One item's rows in a data set."""

    name: str
    rows: NDArray[np.intp]
    """All views, in the order in which they roll past."""
    chosen: NDArray[np.intp]
    """The K an agent would have taken."""
    truth: int


def items_of(dataset: Dataset, max_views: int) -> Iterator[ItemRows]:
    """Every item of a data set."""
    names, place = np.unique(dataset.items, return_inverse=True)
    for number, name in enumerate(names):
        rows = np.flatnonzero(place == number)
        rows = np.array(sorted(rows, key=lambda row: dataset.photos[row].order), np.intp)
        spaced = np.linspace(0, len(rows) - 1, min(max_views, len(rows))).round().astype(int)
        yield ItemRows(str(name), rows, rows[spaced], item_truth(dataset.labels[rows], dataset.doubt[rows]))


def judge_item(
    recipe: Recipe, views: NDArray[np.uint8], probabilities: NDArray[np.floating], embedding: NDArray[np.float32]
) -> tuple[Verdict, NDArray[np.float32]]:
    """Verdict and monitored features of one item, by the code the line runs."""
    verdict = recipe.decide(probabilities)
    features = np.stack([view_features(view) for view in views])
    return verdict, item_features(features, embedding, verdict.probabilities, verdict.defect)
