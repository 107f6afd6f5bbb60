"""Trains a model: from a labelled folder to a bundle.

The steps in their order: read, cross-validate by item, calibrate, fit on all views, convert, check parity, make the
reference, write.

Every figure comes from views of items that the measured model has not learnt from. The bundle holds no time and no
host name: the same data, seed and code give the same digest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.items import items_of, reference_profile
from control_plane.evaluation.metrics import auc_within_folds, measure
from control_plane.evaluation.operating_point import HeldOut, cost_report, hold_out, tuned
from control_plane.evaluation.shortcuts import shortcuts
from control_plane.training.card import write_card
from control_plane.training.cross_validation import CrossValidation, FitSettings, answers_of, cross_validate, folds_of
from control_plane.training.fusion import LearntFusion, learn_fusion
from control_plane.training.onnx_graph import ParityReport
from control_plane.training.patch_features import FeatureSpec
from control_plane.training.quantise import Cost, card_section, check_cost, cost_of
from models.bundle import CARD, LINEAGE, MODEL, PREPROCESS, PROFILE, RECIPE, Bundle, write_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.fusion import fuse
from models.golden import GOLDEN, Golden
from models.profile import encode_profile
from models.recipe import Recipe, Share, Terms
from models.view_spec import PreprocessSpec, ScalarName

GOLDEN_VIEWS: Final = 32
GOLDEN_TOLERANCE: Final = 2e-3
Progress = Callable[[str, float], None]


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a training run."""

    name: str
    seed: int = 1
    effort: Literal["quick", "standard"] = "standard"
    """`quick` has a smaller dictionary, no augmentation and no unions, for a first look and for the demo."""
    folds: int = 5
    good_class: str = ""
    abstain_budget: Share = 0.0
    """Largest share of items, 0..1, that may take the unsure outlet; the band is learnt from held-out items."""
    scalars: tuple[ScalarName, ...] | None = None
    """Measured columns of labels.csv to learn from; None = `weight_g` and `length_mm` where they exist; () = none."""
    precision: Literal["float32", "int8"] = "float32"
    """`int8` is smaller, and faster where the processor has VNNI; it is refused where it costs accuracy."""

    @property
    def features(self) -> FeatureSpec:
        """Shape of the feature extractor at this effort."""
        return FeatureSpec(filters=96, patches=30_000) if self.effort == "quick" else FeatureSpec()


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A finished training run."""

    bundle: Bundle
    metrics: dict[str, Any]
    parity: ParityReport
    dataset: dict[str, Any]
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Returns plain values for the API and the command line."""
        return {
            "bundle": self.bundle.digest,
            "name": self.bundle.manifest.name,
            "size_bytes": self.bundle.manifest.size_bytes,
            "metrics": self.metrics,
            "parity": msgspec.to_builtins(self.parity),
            "dataset": self.dataset,
            "seconds": self.seconds,
        }


class _Clock:
    """Measures durations of the stages and reports progress over all of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", time.perf_counter()

    def stage(self, name: str, share: float) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(self.seconds.get(self._stage, 0.0) + now - self._since, 2)
        self._stage, self._since = name, now
        self._progress(name, share)


def train(
    root: Path,
    settings: TrainSettings,
    output: Path,
    *,
    progress: Progress = lambda _stage, _share: None,
    processes: int | None = None,
) -> TrainedModel:
    """Trains from a labelled folder and writes the bundle.

    Args:
        root: Labelled folder; see `photo_folder.load_dataset`.
        settings: Settings of the run.
        output: Directory of the bundle, to be made.
        progress: Is called with (stage, 0..1); an exception raised in it ends the training.
        processes: Processes that fit beside each other; None = one per core. The result does not depend on it.

    Raises:
        InputError: The data cannot be used, or `training.parity_failed`.
        BundleError: The bundle could not be written.
    """
    with threadpool_limits(1):
        return _train(root, settings, output, _Clock(progress), processes)


def _train(root: Path, settings: TrainSettings, output: Path, clock: _Clock, processes: int | None) -> TrainedModel:
    spec = PreprocessSpec(view_px=settings.features.view_px)
    clock.stage("reading photographs", 0.0)
    dataset = load_dataset(
        root,
        spec,
        good_class=settings.good_class,
        progress=lambda s: clock.stage("reading photographs", 0.05 * s),
        scalars=settings.scalars,
    )
    found = cross_validate(
        dataset,
        _fit_settings(settings, dataset),
        processes=processes,
        progress=lambda done, count: clock.stage("cross-validating by item", 0.05 + 0.83 * done / count),
    )
    clock.stage("checking parity", 0.88)
    report = _parity(found.parities, found.final.parity)
    cost = _cost(dataset, found, settings)
    clock.stage("calibrating items", 0.89)
    learnt, recipe, held = _recipe(dataset, found.probabilities, settings, spec)
    metrics = _metrics(dataset, settings, found, learnt, recipe, spec)
    facts = _dataset_facts(dataset, metrics["view"]["auc"]["value"])
    clock.stage("making the reference", 0.96)
    final = found.final
    spec = msgspec.structs.replace(spec, scalars=final.scalars)
    lineage = {
        "dataset": facts,
        "settings": msgspec.to_builtins(settings),
        "versions": {name: version(name) for name in ("sortline", "numpy", "scikit-learn", "skl2onnx", "onnxruntime")},
        "metrics": metrics,
        "parity": msgspec.to_builtins(report),
        "penalties": list(final.head.penalties),
        "votes": final.votes,
        "fusion": learnt.report,
        "costs": _costs(held, recipe),
        "held_out": msgspec.to_builtins(held),
        "quantised": None if cost is None else {"cost": msgspec.to_builtins(cost)},
    }
    card = write_card(settings.name, facts, metrics, report, recipe, learnt.report, final.votes)
    parts = _parts(dataset, found, recipe, spec) | {
        MODEL: final.eight_bits or final.graph,
        RECIPE: msgspec.json.encode(recipe),
        PREPROCESS: spec.encoded(),
        LINEAGE: msgspec.json.encode(lineage, order="sorted"),
        CARD: (card + (card_section(cost) if cost is not None else "")).encode(),
    }
    bundle = write_bundle(output, settings.name, parts)
    clock.stage("done", 1.0)
    return TrainedModel(bundle, metrics, report, facts, clock.seconds)


def _fit_settings(settings: TrainSettings, dataset: Dataset) -> FitSettings:
    """Returns the settings of the fits; scalars that no view knows are left out."""
    known = tuple(name for name, share in dataset.report.scalars.items() if share > 0.0)
    return FitSettings(
        name=settings.name,
        features=replace(settings.features, scalars=known),
        augmented=settings.effort == "standard",
        precision=settings.precision,
        folds=settings.folds,
        seed=settings.seed,
        classes=dataset.classes,
        dataset_digest=dataset.digest,
    )


def _cost(dataset: Dataset, found: CrossValidation, settings: TrainSettings) -> Cost | None:
    """Returns what eight bits cost on held-out views; None with float32.

    Raises:
        InputError: `training.quantisation_costs`.
    """
    if settings.precision == "float32":
        return None
    cost = cost_of(found.wide, found.probabilities, dataset.labels, dataset.items, seed=settings.seed)
    check_cost(cost)
    return cost


def _dataset_facts(dataset: Dataset, view_auc: float | None) -> dict[str, Any]:
    """Returns what the lineage, the card and people keep of the data set, its shortcuts included."""
    found = shortcuts(dataset, view_auc)
    dataset.report.warnings.extend(found.pop("warnings"))
    return {"digest": dataset.digest, **dataset.report.summary(), "shortcuts": found}


def _parity(folds: list[ParityReport], final: ParityReport) -> ParityReport:
    """Joins all parity checks into one report.

    Raises:
        InputError: `training.parity_failed`; the model must not be used.
    """
    every = [*folds, final]
    views = sum(r.views for r in every)
    whole = ParityReport(
        views=views,
        max_difference=max(r.max_difference for r in every),
        mean_difference=sum(r.mean_difference * r.views for r in every) / views,
        flips=sum(r.flips for r in every),
        band=final.band,
        passed=all(r.passed for r in every),
    )
    if not whole.passed:
        raise InputError(
            "training.parity_failed",
            "The converted model does not compute what scikit-learn computed.",
            expected=f"no flips, differences <= {final.band / 2:g}",
            got=f"{whole.flips} flips, {whole.max_difference:g}",
        )
    return whole


def _recipe(
    dataset: Dataset, probabilities: NDArray[np.float64], settings: TrainSettings, spec: PreprocessSpec
) -> tuple[LearntFusion, Recipe, HeldOut]:
    """Learns fusion and abstain band on out-of-fold items, under terms that price all mistakes alike."""
    found = list(items_of(dataset, spec.max_views))
    truth = np.array([item.truth for item in found])
    learnt = learn_fusion([probabilities[item.chosen] for item in found], truth > 0, seed=settings.seed)
    held = hold_out(dataset.classes, truth, learnt.fused, seed=settings.seed)
    recipe = Recipe(
        classes=dataset.classes,
        good_class=dataset.classes[0],
        fusion=learnt.spec,
        terms=Terms(abstain_budget=settings.abstain_budget or None),
    )
    return learnt, tuned(recipe, held), held


def _costs(held: HeldOut, recipe: Recipe) -> dict[str, Any]:
    """Returns the costs of the recipe on held-out items without the curve; empty where all are of one kind."""
    if len({truth == recipe.good for truth in held.truth}) < 2:
        return {}
    return {key: value for key, value in cost_report(held, recipe).items() if key != "curve"}


def _metrics(
    dataset: Dataset,
    settings: TrainSettings,
    cross: CrossValidation,
    learnt: LearntFusion,
    recipe: Recipe,
    spec: PreprocessSpec,
) -> dict[str, Any]:
    """Returns out-of-fold figures of views and items; also without views in doubt, and without scalars."""
    probabilities = cross.probabilities
    sure = ~dataset.doubt
    held_out = [rows for _, rows in folds_of(dataset, folds=settings.folds, seed=settings.seed)]
    score, bad = 1.0 - probabilities[:, 0], dataset.labels > 0
    found = list(items_of(dataset, spec.max_views))
    truth = np.array([item.truth for item in found])
    names = np.array([item.name for item in found])
    called = recipe.policy().choose(learnt.fused)[0] != 0
    metrics = {
        "protocol": "cross-validation by item; intervals: bootstrap over items, 95 %",
        "view": measure(dataset.labels, probabilities, dataset.items, dataset.classes)
        | {"auc_within_folds": auc_within_folds(bad, score, held_out)},
        "item": measure(
            truth, learnt.fused, names, dataset.classes, called=called, threshold=recipe.threshold() or 1.0
        ),
        "calibration": {key: learnt.report[key] for key in ("brier", "calibration_error")},
    }
    if dataset.doubt.any():
        metrics["view_without_doubt"] = measure(
            dataset.labels[sure], probabilities[sure], dataset.items[sure], dataset.classes
        ) | {"auc_within_folds": auc_within_folds(bad, score, [rows[sure[rows]] for rows in held_out])}
    if cross.blind is not None:
        blind = np.array([fuse(cross.blind[item.chosen], recipe.fusion, recipe.good) for item in found])
        called = recipe.policy().choose(blind)[0] != 0
        metrics["item_without_scalars"] = measure(
            truth, blind, names, dataset.classes, called=called, threshold=recipe.threshold() or 1.0
        )
    return metrics


def _parts(dataset: Dataset, cross: CrossValidation, recipe: Recipe, spec: PreprocessSpec) -> dict[str, bytes]:
    """Makes the reference profile (from out-of-fold items) and the golden views."""
    final, probabilities = cross.final, cross.probabilities
    classifier = OnnxClassifier(final.eight_bits or final.graph)
    scalars = dataset.scalars_in(final.scalars)
    answers, embedding = (
        (final.answers, final.embedding) if final.eight_bits is None else answers_of(classifier, dataset.views, scalars)
    )
    profile = reference_profile(dataset, recipe, spec.max_views, probabilities, embedding)
    golden = golden_views(classifier, dataset.views, dataset.labels, scalars, answers)
    return {PROFILE: encode_profile(profile), GOLDEN: golden.encoded()}


def golden_views(
    classifier: OnnxClassifier,
    views: NDArray[np.uint8],
    labels: NDArray[np.int64],
    scalars: NDArray[np.float32],
    answers: NDArray[np.floating],
) -> Golden:
    """Chooses golden views: some of each class, and those closest to the decision threshold.

    Args:
        classifier: The model of the bundle, which answers for the chosen views again.
        views: uint8 (N, S, S, 3).
        labels: (N,) classes.
        scalars: float32 (N, K), NaN where unknown; those of every fourth chosen view are made unknown.
        answers: (N, C) probabilities of the model.
    """
    near = np.argsort(np.abs(answers[:, 0] - 0.5), kind="stable")[: GOLDEN_VIEWS // 2]
    each = max(1, GOLDEN_VIEWS // 2 // max(len(np.unique(labels)), 1))
    spread = [
        np.flatnonzero(labels == k)[:: max(1, int((labels == k).sum()) // each)][:each] for k in np.unique(labels)
    ]
    chosen = np.unique(np.concatenate([near, *spread]))
    known = scalars[chosen]
    known[::4] = np.nan
    answer = classifier.classify(views[chosen], known if known.shape[1] else None)
    return Golden(
        views=views[chosen],
        scalars=known,
        probabilities=answer.probabilities,
        embedding=answer.embedding,
        tolerance=GOLDEN_TOLERANCE,
    )
