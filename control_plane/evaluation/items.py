"""Items from views in training and evaluation, chosen as on the line: at most K views, spaced by roll."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from control_plane.data.dataset import Dataset
from control_plane.evaluation.metrics import item_truth
from models.errors import InputError
from models.preprocess import view_features
from models.profile import Profile, build_profile, feature_names, item_features
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


def reference_profile(
    dataset: Dataset,
    recipe: Recipe,
    max_views: int,
    probabilities: NDArray[np.floating],
    embedding: NDArray[np.float32],
) -> Profile:
    """Returns the reference of a bundle: how its recipe judges the items of a data set, and what was measured of them.

    Args:
        dataset: The labelled views.
        recipe: Decides.
        max_views: Most views of an item that are judged.
        probabilities: (N, C) of the views, best from a model that did not learn from them.
        embedding: float32 (N, E) of the views.
    """
    features, verdicts, varieties = [], [], []
    scalars = np.full((len(dataset.scalar_names), len(np.unique(dataset.items))), np.nan)
    for number, item in enumerate(items_of(dataset, max_views)):
        at = item.chosen
        verdict, measured = judge_item(recipe, dataset.views[at], probabilities[at], embedding[at])
        features.append(measured)
        verdicts.append(verdict.klass)
        varieties.append(next((p.variety for p in (dataset.photos[row] for row in item.rows) if p.variety), ""))
        for column in range(len(dataset.scalar_names)):
            # As on the line: what is known when the last view is judged.
            known = [value for value in dataset.scalars[item.rows, column] if np.isfinite(value)]
            scalars[column, number] = known[-1] if known else np.nan
    return build_profile(
        np.stack(features),
        feature_names(embedding.shape[1]),
        dict.fromkeys(recipe.classes, 0) | Counter(verdicts),
        scalars=dict(zip(dataset.scalar_names, scalars, strict=True)),
        varieties=varieties,
        verdicts=verdicts,
    )
