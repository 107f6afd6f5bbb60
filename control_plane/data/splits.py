"""Splits by physical item: all views of an item are on one side. A split by view would measure memory, not skill."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def item_folds(
    items: NDArray[np.generic], labels: NDArray[np.integer], *, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yields stratified folds of items.

    Items are sorted by their share of each class, shuffled within ties, and dealt out like cards, so every fold gets
    its part of good, bad and mixed items. Deterministic by seed.

    Args:
        items: (N,) item of each view.
        labels: (N,) class of each view.
        folds: Number of folds; at most as many as there are items.
        seed: Seed of the shuffle.

    Yields:
        (indices of training views, indices of test views); each view is tested once.
    """
    names, place = np.unique(items, return_inverse=True)
    folds = max(2, min(folds, len(names)))
    rng = np.random.default_rng(seed)
    mean = np.array([labels[place == k].mean() for k in range(len(names))])
    order = np.lexsort((rng.random(len(names)), np.round(mean, 1)))
    fold_of = np.empty(len(names), np.int64)
    # Each round of `folds` neighbours goes to the folds in a random order of its own.
    for start in range(0, len(names), folds):
        chunk = order[start : start + folds]
        fold_of[chunk] = rng.permutation(folds)[: len(chunk)]
    for fold in range(folds):
        test = fold_of[place] == fold
        if test.any() and not test.all():
            yield np.flatnonzero(~test), np.flatnonzero(test)
