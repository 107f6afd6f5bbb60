"""Items from views in training and evaluation, chosen as on the line: at most K views, spaced by roll."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from control_plane.data.dataset import Dataset
from control_plane.evaluation.metrics import item_truth
from models.errors import InputError
from models.preprocess import view_features
from models.profile import item_features
from models.recipe import Recipe, Verdict


@dataclass(frozen=True, slots=True)
class ItemRows:
    """The rows of one item in a data set."""

    name: str
    rows: NDArray[np.intp]
    """All views, in the order in which they roll past."""
    chosen: NDArray[np.intp]
    """The rows of the at most K views that an agent would judge."""
    truth: int


def items_of(dataset: Dataset, max_views: int) -> Iterator[ItemRows]:
    """Yields every item of a data set, by name."""
    names, place = np.unique(dataset.items, return_inverse=True)
    for number, name in enumerate(names):
        rows = np.flatnonzero(place == number)
        rows = np.array(sorted(rows, key=lambda row: dataset.photos[row].order), np.intp)
        spaced = np.linspace(0, len(rows) - 1, min(max_views, len(rows))).round().astype(int)
        yield ItemRows(str(name), rows, rows[spaced], item_truth(dataset.labels[rows], dataset.doubt[rows]))


def truth_in(recipe: Recipe, dataset: Dataset, items: Sequence[ItemRows]) -> NDArray[np.intp]:
    """Returns the class of each item as a column of the recipe; a recipe with one defect class maps all defects to it.

    Raises:
        InputError: `evaluation.wrong_classes`.
    """
    names = [dataset.classes[item.truth] if item.truth else recipe.good_class for item in items]
    if len(recipe.classes) == 2:
        defect = recipe.classes[1 - recipe.good]
        names = [recipe.good_class if name == recipe.good_class else defect for name in names]
    if unknown := sorted(set(names) - set(recipe.classes)):
        raise InputError(
            "evaluation.wrong_classes",
            "The folder has classes the bundle does not know.",
            expected=list(recipe.classes),
            got=unknown,
        )
    return np.array([recipe.classes.index(name) for name in names], np.intp)


def judge_item(
    recipe: Recipe, views: NDArray[np.uint8], probabilities: NDArray[np.floating], embedding: NDArray[np.float32]
) -> tuple[Verdict, NDArray[np.float32]]:
    """Returns verdict and monitored features of one item, by the code that runs on the line."""
    verdict = recipe.decide(probabilities)
    features = np.stack([view_features(view) for view in views])
    return verdict, item_features(features, embedding, verdict.probabilities, verdict.defect)
