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
from control_plane.data.splits import item_folds
from control_plane.evaluation.items import items_of, judge_item
from control_plane.evaluation.metrics import auc_within_folds, measure
from control_plane.evaluation.operating_point import HeldOut, cost_report, hold_out, tuned
from control_plane.evaluation.shortcuts import shortcuts
from control_plane.training.augment import varied
from control_plane.training.card import write_card
from control_plane.training.fusion import LearntFusion, learn_fusion
from control_plane.training.head import Head, fit_head, view_weights
from control_plane.training.onnx_graph import ParityReport, build_graph, parity
from control_plane.training.patch_features import FeatureExtractor, FeatureSpec, part_names, unions, widths
from control_plane.training.quantise import Cost, card_section, check_cost, cost_of, quantise
from models.bundle import CARD, LINEAGE, MODEL, PREPROCESS, PROFILE, RECIPE, Bundle, write_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.golden import GOLDEN, Golden
from models.profile import build_profile, feature_names
from models.recipe import Recipe, Share, Terms
from models.view_spec import PreprocessSpec

GOLDEN_VIEWS: Final = 32
GOLDEN_TOLERANCE: Final = 2e-3
VARIED: Final = 2
"""Augmented copies of each view that standard effort learns from."""
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


@dataclass(frozen=True, slots=True)
class _Fitted:
    extractor: FeatureExtractor
    head: Head
    graph: bytes
    votes: dict[str, float]
    """Weight of the log-probabilities of each part of the features; zero = the part is left out."""


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
    root: Path, settings: TrainSettings, output: Path, *, progress: Progress = lambda _stage, _share: None
) -> TrainedModel:
    """Trains from a labelled folder and writes the bundle.

    Args:
        root: Labelled folder; see `photo_folder.load_dataset`.
        settings: Settings of the run.
        output: Directory of the bundle, to be made.
        progress: Is called with (stage, 0..1); an exception raised in it ends the training.

    Raises:
        InputError: The data cannot be used, or `training.parity_failed`.
        BundleError: The bundle could not be written.
    """
    with threadpool_limits(1):
        return _train(root, settings, output, _Clock(progress))


def _train(root: Path, settings: TrainSettings, output: Path, clock: _Clock) -> TrainedModel:
    spec = PreprocessSpec(view_px=settings.features.view_px)
    clock.stage("reading photographs", 0.0)
    dataset = load_dataset(
        root, spec, good_class=settings.good_class, progress=lambda s: clock.stage("reading photographs", 0.05 * s)
    )
    probabilities, parities, cost = _cross_validate(dataset, settings, clock)
    clock.stage("calibrating items", 0.76)
    learnt, recipe, held = _recipe(dataset, probabilities, settings, spec)
    metrics = _metrics(dataset, settings, probabilities, learnt, recipe, spec)
    clock.stage("fitting on everything", 0.8)
    fitted = _fit(dataset, np.arange(len(dataset.views)), settings)
    clock.stage("checking parity", 0.93)
    report = _parity(parities, parity(fitted.extractor, fitted.head, fitted.graph, dataset.views, None))
    if cost is not None:
        clock.stage("quantising", 0.95)
        fitted = replace(fitted, graph=quantise(fitted.graph, dataset.views, seed=settings.seed))
    clock.stage("making the reference", 0.96)
    parts = _parts(dataset, probabilities, recipe, spec, fitted)
    facts = _dataset_facts(dataset, metrics["view"]["auc"]["value"])
    lineage = {
        "dataset": facts,
        "settings": msgspec.to_builtins(settings),
        "versions": {name: version(name) for name in ("sortline", "numpy", "scikit-learn", "skl2onnx", "onnxruntime")},
        "metrics": metrics,
        "parity": msgspec.to_builtins(report),
        "penalties": list(fitted.head.penalties),
        "votes": fitted.votes,
        "fusion": learnt.report,
        "costs": _costs(held, recipe),
        "held_out": msgspec.to_builtins(held),
        "quantised": None if cost is None else {"cost": msgspec.to_builtins(cost)},
    }
    card = write_card(settings.name, facts, metrics, report, recipe, learnt.report, fitted.votes)
    parts |= {
        MODEL: fitted.graph,
        RECIPE: msgspec.json.encode(recipe),
        PREPROCESS: spec.encoded(),
        LINEAGE: msgspec.json.encode(lineage, order="sorted"),
        CARD: (card + (card_section(cost) if cost is not None else "")).encode(),
    }
    bundle = write_bundle(output, settings.name, parts)
    clock.stage("done", 1.0)
    return TrainedModel(bundle, metrics, report, facts, clock.seconds)


def _dataset_facts(dataset: Dataset, view_auc: float | None) -> dict[str, Any]:
    """Returns what the lineage, the card and people keep of the data set, its shortcuts included."""
    found = shortcuts(dataset, view_auc)
    dataset.report.warnings.extend(found.pop("warnings"))
    return {"digest": dataset.digest, **dataset.report.summary(), "shortcuts": found}


def _fit(dataset: Dataset, rows: NDArray[np.intp], settings: TrainSettings) -> _Fitted:
    """Fits features and head on these rows only."""
    views, labels, items = dataset.views[rows], dataset.labels[rows], dataset.items[rows]
    rng = np.random.default_rng(settings.seed)
    extractor = FeatureExtractor.fit(views, items, settings.features, seed=settings.seed)
    weights = view_weights(labels, items)
    standard = settings.effort == "standard"
    pictures = [views, *(varied(views, rng) for _ in range(VARIED if standard else 0))]
    features = np.concatenate([extractor.transform(part) for part in pictures])
    labels, items, weights = (np.concatenate([part] * len(pictures)) for part in (labels, items, weights))
    head, parts = fit_head(
        features,
        labels,
        items,
        weights,
        classes=len(dataset.classes),
        widths=widths(settings.features),
        seed=settings.seed,
        optional=settings.features.tint,
        calibrate_on=np.arange(len(features)) < len(rows),
        unite=unions(settings.features) if standard else (),
    )
    votes = dict.fromkeys(part_names(settings.features), 0.0)
    votes |= {list(votes)[k]: round(float(vote), 4) for k, vote in zip(parts, head.votes, strict=True)}
    extractor = extractor.only(parts)
    metadata = {"sortline.classes": ",".join(dataset.classes), "sortline.dataset": dataset.digest}
    return _Fitted(extractor, head, build_graph(extractor, head, name=settings.name, metadata=metadata), votes)


def _folds(dataset: Dataset, settings: TrainSettings) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Returns (training rows, held-out rows) of each fold, the same for the same data set and settings."""
    split = np.array([photo.split for photo in dataset.photos])
    if not ((split == "test").any() and (split != "test").any()):
        return list(item_folds(dataset.items, dataset.labels, folds=settings.folds, seed=settings.seed))
    # The data set names its held-out items; the others still need out-of-fold answers.
    rest = np.flatnonzero(split != "test")
    inner = item_folds(dataset.items[rest], dataset.labels[rest], folds=settings.folds, seed=settings.seed)
    return [(rest, np.flatnonzero(split == "test"))] + [(rest[a], rest[b]) for a, b in inner]


def _cross_validate(
    dataset: Dataset, settings: TrainSettings, clock: _Clock
) -> tuple[NDArray[np.float64], list[ParityReport], Cost | None]:
    """Returns out-of-fold probabilities (N, C) of the ONNX graph of each fold, and its parity on the held-out views.

    With eight bits the probabilities are those of the quantised graphs, and the third part is their cost.
    """
    found = np.zeros((len(dataset.views), len(dataset.classes)))
    eight = np.zeros_like(found)
    reports: list[ParityReport] = []
    folds = _folds(dataset, settings)
    for number, (train_rows, test_rows) in enumerate(folds):
        clock.stage(f"cross-validating by item {number + 1}/{len(folds)}", 0.05 + 0.7 * number / len(folds))
        if len(np.unique(dataset.labels[train_rows])) < len(dataset.classes):
            raise InputError(
                "dataset.too_few_items",
                "A class has too few items for this many folds.",
                expected="every class in every training part",
                got=f"fold {number + 1} of {len(folds)}",
            )
        fitted = _fit(dataset, train_rows, settings)
        views = dataset.views[test_rows]
        reports.append(parity(fitted.extractor, fitted.head, fitted.graph, views, None))
        found[test_rows] = _answers(OnnxClassifier(fitted.graph), views)[0]
        if settings.precision == "int8":
            small = quantise(fitted.graph, dataset.views[train_rows], seed=settings.seed)
            eight[test_rows] = _answers(OnnxClassifier(small), views)[0]
    if settings.precision == "float32":
        return found, reports, None
    cost = cost_of(found, eight, dataset.labels, dataset.items, seed=settings.seed)
    check_cost(cost)
    return eight, reports, cost


def _answers(classifier: OnnxClassifier, views: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    answers = [classifier.classify(views[start : start + 64]) for start in range(0, len(views), 64)]
    probabilities = np.concatenate([a.probabilities for a in answers]).astype(np.float64)
    return probabilities, np.concatenate([a.embedding for a in answers])


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
    probabilities: NDArray[np.float64],
    learnt: LearntFusion,
    recipe: Recipe,
    spec: PreprocessSpec,
) -> dict[str, Any]:
    """Returns out-of-fold figures of views and items, and of the views without those in doubt."""
    sure = ~dataset.doubt
    held_out = [rows for _, rows in _folds(dataset, settings)]
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
    return metrics


def _parts(
    dataset: Dataset, probabilities: NDArray[np.float64], recipe: Recipe, spec: PreprocessSpec, fitted: _Fitted
) -> dict[str, bytes]:
    """Makes the reference profile (from out-of-fold items) and the golden views."""
    classifier = OnnxClassifier(fitted.graph)
    rows, names, counts = [], feature_names(classifier.embedding_size), dict.fromkeys(dataset.classes, 0)
    for item in items_of(dataset, spec.max_views):
        views = dataset.views[item.chosen]
        embedding = classifier.classify(views).embedding
        verdict, features = judge_item(recipe, views, probabilities[item.chosen], embedding)
        rows.append(features)
        counts[verdict.klass] += 1
    golden = golden_views(classifier, dataset.views, dataset.labels)
    return {PROFILE: msgspec.msgpack.encode(build_profile(np.stack(rows), names, counts)), GOLDEN: golden.encoded()}


def golden_views(classifier: OnnxClassifier, views: NDArray[np.uint8], labels: NDArray[np.int64]) -> Golden:
    """Chooses golden views: some of each class, and those closest to the decision threshold."""
    probabilities, embedding = _answers(classifier, views)
    near = np.argsort(np.abs(probabilities[:, 0] - 0.5), kind="stable")[: GOLDEN_VIEWS // 2]
    each = max(1, GOLDEN_VIEWS // 2 // max(len(np.unique(labels)), 1))
    spread = [
        np.flatnonzero(labels == k)[:: max(1, int((labels == k).sum()) // each)][:each] for k in np.unique(labels)
    ]
    chosen = np.unique(np.concatenate([near, *spread]))
    return Golden(
        views=views[chosen],
        scalars=np.zeros((len(chosen), classifier.scalars), np.float32),
        probabilities=probabilities[chosen].astype(np.float32),
        embedding=embedding[chosen],
        tolerance=GOLDEN_TOLERANCE,
    )
