"""Judges a labelled folder with a bundle exactly as an agent would: same views, same graph, same fusion and recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.items import items_of, truth_in
from control_plane.evaluation.metrics import measure
from control_plane.evaluation.operating_point import HeldOut, hold_out
from control_plane.evaluation.shortcuts import shortcuts
from models.bundle import Bundle, read_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.recipe import Recipe


def evaluate(
    bundle_directory: Path,
    data: Path,
    *,
    exclude_doubt: bool = False,
    good_class: str = "",
    progress: Callable[[float], None] = lambda _share: None,
) -> dict[str, Any]:
    """Returns view and item figures of a bundle on a labelled folder.

    Where the classes of folder and bundle differ (one has `defect`, the other has names of defects), both are reduced
    to good and `bad`.

    Args:
        bundle_directory: The bundle; verified, and its golden views are reproduced first.
        data: Labelled folder; see `photo_folder.load_dataset`.
        exclude_doubt: Whether views in doubt are left out.
        good_class: Good class of the folder; empty = by name.
        progress: Is called with 0..1.

    Raises:
        InputError: The folder cannot be used.
        BundleError: The bundle cannot be used on this machine.
    """
    bundle, dataset, probabilities, blind = _judged(bundle_directory, data, good_class, progress)
    labels, reduce, classes = _aligned(dataset, bundle.recipe)
    kept = ~dataset.doubt if exclude_doubt else np.ones(len(labels), bool)
    items = [item for item in items_of(dataset, bundle.preprocess.max_views) if kept[item.rows].any()]
    fused = np.array([bundle.recipe.decide(probabilities[item.chosen]).probabilities for item in items])
    every = np.array([bundle.recipe.decide(probabilities[item.rows]).probabilities for item in items])
    truth = np.array([labels[_row_of(item.truth, item.rows, dataset)] if item.truth else 0 for item in items])
    names = np.array([item.name for item in items])
    policy = bundle.recipe.policy()
    cuts: dict[str, Any] = {"threshold": bundle.recipe.threshold() or 1.0}
    view = measure(labels[kept], reduce(probabilities[kept]), dataset.items[kept], classes)
    without: dict[str, Any] = {}
    if blind is not None:
        unweighed = np.array([bundle.recipe.decide(blind[item.chosen]).probabilities for item in items])
        called = policy.choose(unweighed)[0] != 0
        without["item_without_scalars"] = measure(truth, reduce(unweighed), names, classes, called=called, **cuts)
    short = shortcuts(dataset, view["auc"]["value"])
    dataset.report.warnings.extend(short.pop("warnings"))
    progress(1.0)
    return {
        "bundle": bundle.digest,
        "dataset": dataset.digest,
        "exclude_doubt": exclude_doubt,
        "views_per_item": bundle.preprocess.max_views,
        "warnings": dataset.report.warnings,
        "skipped": dataset.report.skipped,
        "left_out": dict(sorted(dataset.report.left_out.items())),
        "left_out_examples": dict(sorted(dataset.report.examples.items())),
        "shortcuts": short,
        "metrics": {
            "view": view,
            "item": measure(truth, reduce(fused), names, classes, called=policy.choose(fused)[0] != 0, **cuts),
            "item_all_views": measure(
                truth, reduce(every), names, classes, called=policy.choose(every)[0] != 0, **cuts
            ),
            **without,
        },
    }


def judged_items(bundle_directory: Path, data: Path, *, good_class: str = "") -> HeldOut:
    """Returns the fused items of a labelled folder, on which costs can be counted if the model did not learn from them.

    Raises:
        InputError: `evaluation.wrong_classes`, and as `evaluate`.
        BundleError: As `evaluate`.
    """
    bundle, dataset, probabilities, _ = _judged(bundle_directory, data, good_class, lambda _share: None)
    recipe = bundle.recipe
    items = list(items_of(dataset, bundle.preprocess.max_views))
    truth = truth_in(recipe, dataset, items)
    fused = np.array([recipe.decide(probabilities[item.chosen]).probabilities for item in items])
    return hold_out(recipe.classes, truth, fused)


def _judged(
    bundle_directory: Path, data: Path, good_class: str, progress: Callable[[float], None]
) -> tuple[Bundle, Dataset, NDArray[np.float64], NDArray[np.float64] | None]:
    """Returns bundle, folder, the probabilities of every view, and those with all scalars unknown, if it takes any."""
    bundle = read_bundle(bundle_directory)
    classifier = OnnxClassifier(bundle.model)
    bundle.golden.check(classifier)
    dataset = load_dataset(
        data,
        bundle.preprocess,
        good_class=good_class,
        progress=lambda s: progress(0.4 * s),
        require_items=0,
        measured=bundle.preprocess.scalars,
    )
    names = bundle.preprocess.scalars
    scalars = dataset.scalars_in(names)
    for name, column in zip(names, scalars.T, strict=True):
        if not np.isfinite(column).any():
            dataset.report.warnings.append(f"The bundle takes {name}, which the folder does not have.")
    answers, blind = [], []
    for start in range(0, len(dataset.views), 32):
        part = slice(start, start + 32)
        answers.append(classifier.classify(dataset.views[part], scalars[part] if names else None).probabilities)
        if names:
            blind.append(classifier.classify(dataset.views[part]).probabilities)
        progress(0.4 + 0.6 * start / len(dataset.views))
    unweighed = np.concatenate(blind).astype(np.float64) if blind else None
    return bundle, dataset, np.concatenate(answers).astype(np.float64), unweighed


def _row_of(truth: int, rows: NDArray[np.intp], dataset: Dataset) -> int:
    """Returns a row of the item that has the class of the item."""
    return int(rows[np.flatnonzero(dataset.labels[rows] == truth)[0]])


def _aligned(
    dataset: Dataset, recipe: Recipe
) -> tuple[NDArray[np.int64], Callable[[NDArray[np.floating]], NDArray[np.float64]], tuple[str, ...]]:
    """Brings labels and probabilities to common classes, the good one first."""
    good = recipe.good
    order = [good, *(k for k in range(len(recipe.classes)) if k != good)]
    names = tuple(recipe.classes[k] for k in order)
    if set(dataset.classes) <= set(names) and dataset.classes[0] == recipe.good_class:
        place = np.array([names.index(name) for name in dataset.classes], np.int64)
        return place[dataset.labels], lambda p: np.asarray(p[:, order], np.float64), names
    if dataset.classes[0] != recipe.good_class and recipe.good_class in dataset.classes:
        raise InputError(
            "evaluation.wrong_good_class",
            "Folder and bundle disagree which class is good.",
            expected=recipe.good_class,
            got=dataset.classes[0],
        )
    labels = (dataset.labels > 0).astype(np.int64)
    return labels, lambda p: np.column_stack((p[:, good], 1.0 - p[:, good])), (recipe.good_class, "bad")
