"""Shortcuts: how well the classes can be separated by what is not the item (Geirhos et al. 2020).

A logistic regression that sees only the outer ring of each photograph, and one that sees only size and shape of its
file, are cross-validated by item. Where one of them is about as good as the model, the classes were photographed in
different ways, and figures of the model say little about items on a line.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from control_plane.data.dataset import Dataset
from control_plane.data.splits import item_folds
from control_plane.evaluation.metrics import auc, with_interval

LEAST_AUC: Final = 0.65
"""A shortcut below this is weak, however weak the model is."""
NEAR: Final = 0.1
"""A shortcut is near the model where its AUC falls short of the model's by less than this."""
_FOLDS: Final = 5


def shortcuts(dataset: Dataset, model_auc: float | None, *, seed: int = 1) -> dict[str, Any]:
    """Measures the shortcuts of a data set and compares them with a model.

    Args:
        dataset: The data set.
        model_auc: View AUC of the model, by item-wise cross-validation or on held-out items; None = unknown.
        seed: Seed of folds and bootstrap.

    Returns:
        `ring` and `file`: AUC with its interval over items, and `near`, whether it is near the model's; `warnings`:
        sentences for people, empty where there is no shortcut.
    """
    bad = dataset.labels > 0
    found: dict[str, Any] = {}
    warnings: list[str] = []
    parts = (
        ("ring", dataset.surroundings, "the outer ring of the photographs, without the item"),
        ("file", dataset.file_facts, "size and shape of the files"),
    )
    names, place = np.unique(dataset.items, return_inverse=True)
    for name, features, what in parts:
        scores = _held_out(features, bad, dataset, seed)
        figure = with_interval(lambda rows, s=scores: auc(bad[rows], s[rows]), place, len(names), seed)
        near = _is_near(figure, model_auc)
        found[name] = figure | {"near": near}
        if near:
            warnings.append(
                f"SHORTCUT: a classifier that sees only {what} reaches AUC {figure['value']:.3f}; the model reaches "
                f"{model_auc:.3f}. The classes were photographed in different ways: do not trust these figures."
            )
    return found | {"warnings": warnings}


def _held_out(
    features: NDArray[np.float32], bad: NDArray[np.bool_], dataset: Dataset, seed: int
) -> NDArray[np.float64]:
    """Returns the defect probability (N,) of each view by a model that was fitted on other items."""
    found = np.full(len(bad), bad.mean())
    for train, test in item_folds(dataset.items, dataset.labels, folds=_FOLDS, seed=seed):
        if bad[train].all() or not bad[train].any():
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=300))
        found[test] = model.fit(features[train], bad[train]).predict_proba(features[test])[:, 1]
    return found


def _is_near(figure: dict[str, Any], model_auc: float | None) -> bool:
    value = figure["value"]
    if value is None or model_auc is None or value < LEAST_AUC:
        return False
    beyond_chance = figure["low"] is None or figure["low"] > 0.5
    return bool(beyond_chance and value > model_auc - NEAR)
