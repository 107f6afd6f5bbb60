"""Fits one model per fold and one on everything, and answers for every view by a model that has not seen its item.

The fits are independent, so they run in processes beside each other, one per core, each with one thread. Augmented
copies of the views are made once and shared, because a copy depends on its view alone; dictionaries, projections and
votes are learnt in each fit from its own training views. The number of processes changes no byte of the result.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from control_plane.data.cells import TEST
from control_plane.data.dataset import Dataset
from control_plane.data.splits import item_folds
from control_plane.training.augment import varied
from control_plane.training.head import Head, fit_head, view_weights
from control_plane.training.onnx_graph import ParityReport, build_graph, compare
from control_plane.training.patch_features import FeatureExtractor, FeatureSpec, part_names, unions, widths
from control_plane.training.quantise import quantise
from models.classifier import OnnxClassifier
from models.errors import InputError

COPIES: Final = 2
"""Augmented copies of each view that standard effort learns from."""
_CHUNK: Final = 512
"""Views that one task augments; the place of a chunk is its seed, so that the number of processes does not matter."""
_LEAST_VIEWS: Final = 600
"""With fewer views the start of a process takes longer than it saves."""
_LEAST_MAPPED_BYTES: Final = 4096
_UNKNOWN_SHARE: Final = 0.5
"""Share of the scalars of augmented copies that are made unknown, so that the model learns to judge without them."""
Rows = NDArray[np.intp]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """What decides a fit besides its views."""

    name: str
    features: FeatureSpec
    augmented: bool
    """Whether augmented copies and unions are learnt from."""
    precision: Literal["float32", "int8"]
    folds: int
    seed: int
    classes: tuple[str, ...]
    dataset_digest: str


@dataclass(frozen=True, slots=True)
class Samples:
    """The arrays of a data set that fits share; in another process they are mapped from files.

    Attributes:
        views: uint8 (N, S, S, 3).
        copies: uint8 (V, N, S, S, 3), augmented copies; V = 0 without augmentation.
        labels: int64 (N,).
        items: int64 (N,), number of the item of each view, in the order of the items' names.
        scalars: float32 (N, K), NaN where unknown.
    """

    views: NDArray[np.uint8]
    copies: NDArray[np.uint8]
    labels: NDArray[np.int64]
    items: NDArray[np.int64]
    scalars: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model and what it answers.

    Attributes:
        extractor: Features of the parts that vote.
        head: The classifier.
        graph: Serialised ONNX, float32.
        votes: Weight of the log-probabilities of each part of the features; zero = the part is left out.
        parity: scikit-learn against ONNX on the held-out views, or on all views where none are held out.
        answers: float64 (n, C), probabilities of those views by the graph.
        embedding: float32 (n, E) of those views.
        blind: float64 (n, C), probabilities with all scalars unknown; None where the graph takes no scalars.
        eight_bits: The quantised graph; None with float32.
        eight_answers: float64 (n, C) by the quantised graph; None with float32.
    """

    extractor: FeatureExtractor
    head: Head
    graph: bytes
    votes: dict[str, float]
    parity: ParityReport
    answers: Floats
    embedding: NDArray[np.float32]
    blind: Floats | None
    eight_bits: bytes | None
    eight_answers: Floats | None

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the columns of the graph's input `scalars`."""
        return self.extractor.spec.scalars


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """The result over all folds.

    Attributes:
        probabilities: float64 (N, C), each view by a model that has not seen its item; quantised with int8.
        wide: float64 (N, C), the same in float32.
        blind: float64 (N, C), the same with all scalars unknown; None without scalars.
        parities: One report per fold.
        final: The model fitted on everything.
    """

    probabilities: Floats
    wide: Floats
    blind: Floats | None
    parities: list[ParityReport]
    final: Fitted


def folds_of(dataset: Dataset, *, folds: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Returns (training rows, held-out rows) of each fold, the same for the same data set and seed."""
    held_out = np.array([photo.split == TEST for photo in dataset.photos])
    if not held_out.any() or held_out.all():
        return list(item_folds(dataset.items, dataset.labels, folds=folds, seed=seed))
    # The data set names its held-out items; the others still need out-of-fold answers.
    rest = np.flatnonzero(~held_out)
    inner = item_folds(dataset.items[rest], dataset.labels[rest], folds=folds, seed=seed)
    return [(rest, np.flatnonzero(held_out))] + [(rest[a], rest[b]) for a, b in inner]


def cross_validate(
    dataset: Dataset,
    settings: FitSettings,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _count: None,
) -> CrossValidation:
    """Fits every fold and the whole.

    Args:
        dataset: The data set.
        settings: Settings of the fits.
        processes: Processes beside each other; None = one per core that this process may use.
        progress: Is called with (finished fits, all fits); an exception raised in it ends the training.

    Raises:
        InputError: `dataset.too_few_items`, `training.not_quantisable`.
    """
    folds = folds_of(dataset, folds=settings.folds, seed=settings.seed)
    for number, (train, _) in enumerate(folds):
        if len(np.unique(dataset.labels[train])) < len(dataset.classes):
            raise InputError(
                "dataset.too_few_items",
                "A class has too few items for this many folds.",
                expected="every class in every training part",
                got=f"fold {number + 1} of {len(folds)}",
            )
    every = np.arange(len(dataset.views))
    tasks = [(every, every[:0]), *folds]  # the largest first, so that no process ends long after the others
    found: dict[int, Fitted] = {}
    cores = len(os.sched_getaffinity(0)) if processes is None else processes
    with _workers(dataset, settings, 1 if len(every) < _LEAST_VIEWS else cores) as fit:
        waiting = {fit(*task): number for number, task in enumerate(tasks)}
        progress(0, len(tasks))
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            progress(len(found), len(tasks))
    return _joined(dataset, folds, [found[k + 1] for k in range(len(folds))], found[0])


def _joined(dataset: Dataset, folds: list[tuple[Rows, Rows]], fitted: list[Fitted], final: Fitted) -> CrossValidation:
    wide = np.zeros((len(dataset.views), len(dataset.classes)))
    eight, blind = wide.copy(), wide.copy()
    for (_, test), own in zip(folds, fitted, strict=True):
        wide[test] = own.answers
        blind[test] = own.answers if own.blind is None else own.blind
        eight[test] = own.answers if own.eight_answers is None else own.eight_answers
    has_scalars = any(own.blind is not None for own in (*fitted, final))
    parities = [own.parity for own in fitted]
    return CrossValidation(eight, wide, blind if has_scalars else None, parities, final)


# -- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def _workers(
    dataset: Dataset, settings: FitSettings, processes: int
) -> Iterator[Callable[[Rows, Rows], "Future[Fitted]"]]:
    """Yields a function that starts a fit; the fits run in other processes, or here where there is only one."""
    if processes <= 1:
        samples = _samples(dataset, settings)
        for task in _chunks(samples):
            _augment(samples.views, samples.copies, settings.seed, *task)
        yield lambda train, test: _Here().submit(fit, samples, settings, train, test)
        return
    with tempfile.TemporaryDirectory(prefix="sortline-train-") as scratch:
        folder = Path(scratch)
        samples = _samples(dataset, settings, folder)
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        try:
            for future in [pool.submit(_augment_in, folder, settings.seed, *task) for task in _chunks(samples)]:
                future.result()
            yield lambda train, test: pool.submit(_fit_in, folder, settings, train, test)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Here(Executor):
    """Runs a task at once in this process."""

    def submit(self, task: Callable[..., Fitted], /, *args: object, **_: object) -> "Future[Fitted]":  # type: ignore[override]
        future: Future[Fitted] = Future()
        future.set_result(task(*args))
        return future


def _samples(dataset: Dataset, settings: FitSettings, folder: Path | None = None) -> Samples:
    """Returns the shared arrays, the copies still empty; writes them to a folder where one is given."""
    count = COPIES if settings.augmented else 0
    shape = (count, *dataset.views.shape)
    scalars = dataset.scalars_in(settings.features.scalars)
    items = np.unique(dataset.items, return_inverse=True)[1].astype(np.int64)
    if folder is None:
        return Samples(dataset.views, np.zeros(shape, np.uint8), dataset.labels, items, scalars)
    arrays: dict[str, NDArray[Any]] = {
        "views": dataset.views,
        "labels": dataset.labels,
        "items": items,
        "scalars": scalars,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    if count:
        np.lib.format.open_memmap(folder / "copies.npy", "w+", np.uint8, shape).flush()
    else:
        np.save(folder / "copies.npy", np.zeros(shape, np.uint8))
    return _mapped(folder)


def _mapped(folder: Path) -> Samples:
    names = ("views", "copies", "labels", "items", "scalars")
    arrays = [_load(folder / f"{name}.npy") for name in names]
    return Samples(*arrays)


def _load(path: Path) -> NDArray[Any]:
    """Maps an array from its file; an empty one, which cannot be mapped, is read."""
    array: NDArray[Any] = np.load(path, mmap_mode=None if path.stat().st_size < _LEAST_MAPPED_BYTES else "r")
    return array


def _chunks(samples: Samples) -> list[tuple[int, int]]:
    starts = range(0, len(samples.views), _CHUNK)
    return [(copy, start) for copy in range(len(samples.copies)) for start in starts]


def _augment(views: NDArray[np.uint8], copies: NDArray[np.uint8], seed: int, copy: int, start: int) -> None:
    chunk = slice(start, start + _CHUNK)
    copies[copy, chunk] = varied(views[chunk], np.random.default_rng((seed, copy, start)))


def _augment_in(folder: Path, seed: int, copy: int, start: int) -> None:
    copies = np.load(folder / "copies.npy", mmap_mode="r+")
    _augment(np.load(folder / "views.npy", mmap_mode="r"), copies, seed, copy, start)
    copies.flush()


def _fit_in(folder: Path, settings: FitSettings, train: Rows, test: Rows) -> Fitted:
    return fit(_mapped(folder), settings, train, test)


# -- one fit --------------------------------------------------------------------------------------------------------


def fit(samples: Samples, settings: FitSettings, train: Rows, test: Rows) -> Fitted:
    """Fits features and head on some rows and answers for others.

    Args:
        samples: The shared arrays.
        settings: Settings of the fit.
        train: Rows to learn from.
        test: Held-out rows; empty = the answers are for the training rows.
    """
    with threadpool_limits(1):
        return _fit(samples, settings, train, test)


def _fit(samples: Samples, settings: FitSettings, train: Rows, test: Rows) -> Fitted:
    spec = settings.features
    views, labels, items = samples.views[train], samples.labels[train], samples.items[train]
    scalars = samples.scalars[train]
    extractor = FeatureExtractor.fit(views, items, spec, seed=settings.seed, scalars=scalars)
    features = [extractor.transform(views, scalars)]
    for number, copy in enumerate(samples.copies):
        unknown = np.random.default_rng((settings.seed, number)).random(samples.scalars.shape)[train] < _UNKNOWN_SHARE
        features.append(extractor.transform(copy[train], np.where(unknown, np.float32(np.nan), scalars)))
    times = len(features)
    head, parts = fit_head(
        np.concatenate(features),
        np.concatenate([labels] * times),
        np.concatenate([items] * times),
        np.concatenate([view_weights(labels, items)] * times),
        classes=len(settings.classes),
        widths=widths(spec),
        seed=settings.seed,
        optional=spec.tint + bool(spec.scalars),
        unprojected=bool(spec.scalars),
        calibrate_on=np.arange(times * len(train)) < len(train),
        unite=unions(spec) if settings.augmented else (),
    )
    votes = dict.fromkeys(part_names(spec), 0.0)
    votes |= {list(votes)[k]: round(float(vote), 4) for k, vote in zip(parts, head.votes, strict=True)}
    extractor = extractor.only(parts)
    metadata = {"sortline.classes": ",".join(settings.classes), "sortline.dataset": settings.dataset_digest}
    graph = build_graph(extractor, head, name=settings.name, metadata=metadata)
    known = None if len(test) else _of_parts(features[0], widths(spec), parts)
    return _answered(samples, settings, extractor, head, graph, votes, train, test, known)


def _of_parts(features: NDArray[np.float32], widths: tuple[int, ...], parts: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the columns of these parts, as an extractor of only these parts would compute them."""
    ends = np.cumsum(widths)
    return np.hstack([features[:, ends[k] - widths[k] : ends[k]] for k in parts])


def _answered(
    samples: Samples,
    settings: FitSettings,
    extractor: FeatureExtractor,
    head: Head,
    graph: bytes,
    votes: dict[str, float],
    train: Rows,
    test: Rows,
    known: NDArray[np.float32] | None,
) -> Fitted:
    """Answers for the held-out views by the graph, and compares them with scikit-learn.

    `known` are the features of the training views, where these are what is answered for.
    """
    rows = test if len(test) else train
    views, scalars = samples.views[rows], samples.scalars[rows]
    classifier = OnnxClassifier(graph)
    answers, embedding = answers_of(classifier, views, scalars)
    features = extractor.transform(views, scalars) if known is None else known
    report = compare(head.predict_proba(features), answers)
    small = quantise(graph, samples.views[train], seed=settings.seed) if settings.precision == "int8" else None
    return Fitted(
        extractor=extractor,
        head=head,
        graph=graph,
        votes=votes,
        parity=report,
        answers=answers,
        embedding=embedding,
        blind=answers_of(classifier, views, None)[0] if classifier.scalars else None,
        eight_bits=small,
        eight_answers=None if small is None else answers_of(OnnxClassifier(small), views, scalars)[0],
    )


def answers_of(
    classifier: OnnxClassifier, views: NDArray[np.uint8], scalars: NDArray[np.float32] | None
) -> tuple[Floats, NDArray[np.float32]]:
    """Returns probabilities, float64 (N, C), and embedding, float32 (N, E), of many views."""
    answers = [
        classifier.classify(views[at : at + 64], None if scalars is None else scalars[at : at + 64])
        for at in range(0, len(views), 64)
    ]
    probabilities = np.concatenate([answer.probabilities for answer in answers]).astype(np.float64)
    return probabilities, np.concatenate([answer.embedding for answer in answers])
