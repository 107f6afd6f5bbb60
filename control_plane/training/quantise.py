"""Quantises a model to eight bits (convolutions and projections) and measures gain and cost.

Static quantisation (QDQ, weights per channel) by ONNX Runtime; the ranges of activations come from views the model
learnt from. The result is another model with its own golden views, fusion and figures, to which a parity check against
float32 does not apply. It is bounded by its accuracy cost on views it did not learn from.

Sums of eight bits may saturate on x86 processors without VNNI instructions: where golden views do not reproduce, an
agent refuses the bundle (`golden.mismatch`) before it judges anything.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from control_plane.evaluation.metrics import auc, balanced_accuracy
from models.bundle import CARD, LINEAGE, MODEL, PARTS, Bundle, read_bundle, write_bundle
from models.classifier import VIEWS_INPUT, OnnxClassifier
from models.errors import InputError
from models.golden import GOLDEN, Golden

# isort: split
# The library's telemetry is off only after the import of models.classifier.
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

AUC_LIMIT: Final = 0.01
"""Largest loss of the area under the ROC that is accepted."""
FLIP_LIMIT: Final = 0.05
"""Largest share of views whose verdict may change."""
_CALIBRATION_VIEWS: Final = 256
_BATCH: Final = 16
_ROUNDS: Final = 15
_DRAWS: Final = 200
Views = NDArray[np.uint8]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Differences between int8 and float32 on the same views."""

    views: int
    items: int
    flips: float
    """Share of views that change sides."""
    max_difference: float
    mean_difference: float
    auc: dict[str, float]
    """`float32`, `int8`, and `cost` with its 95 % interval over items (`low`, `high`)."""
    balanced_accuracy: dict[str, float]
    """`float32`, `int8` and `cost` of the balanced accuracy at a threshold of one half."""

    @property
    def accepted(self) -> bool:
        """Whether AUC cost and flips are within their limits."""
        return self.auc["cost"] <= AUC_LIMIT and self.flips <= FLIP_LIMIT


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised bundle and its report.

    Attributes:
        bundle: The written bundle.
        report: Cost, milliseconds per view and bytes of both; plain values.
    """

    bundle: Bundle
    report: dict[str, Any]


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    def __init__(self, views: Views, scalars: int) -> None:
        feeds = []
        for start in range(0, len(views), _BATCH):
            feed: dict[str, Any] = {VIEWS_INPUT: views[start : start + _BATCH]}
            if scalars:
                feed["scalars"] = np.full((len(feed[VIEWS_INPUT]), scalars), np.nan, np.float32)
            feeds.append(feed)
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """Returns the next batch; None at the end."""
        return next(self._feeds, None)


def quantise(graph: bytes, views: Views, *, seed: int = 1) -> bytes:
    """Returns the graph with int8 convolutions and matrix products.

    Args:
        graph: Serialised ONNX, float32.
        views: uint8 (N, S, S, 3) that the model learnt from; they give the ranges of activations.
        seed: Seed of the choice among them.

    Raises:
        InputError: `training.not_quantisable`.
    """
    chosen = np.random.default_rng(seed).permutation(len(views))[:_CALIBRATION_VIEWS]
    reader = _Reader(views[np.sort(chosen)], OnnxClassifier(graph).scalars)
    verbosity = logging.getLogger().level
    with tempfile.TemporaryDirectory() as scratch:
        source, prepared, target = (str(Path(scratch) / name) for name in ("a.onnx", "b.onnx", "c.onnx"))
        Path(source).write_bytes(graph)
        try:
            logging.getLogger().setLevel(
                logging.ERROR
            )  # the library warns that the model is not preprocessed although it is
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul"],
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,  # without VNNI, x86 adds pairs of 8-bit products in 16 bits, which saturate
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        except Exception as error:  # the library raises unrelated types from five packages
            raise InputError(
                "training.not_quantisable",
                "ONNX Runtime cannot quantise this graph.",
                expected="a graph of convolutions and matrix products",
                got=str(error)[:200],
            ) from error
        finally:
            logging.getLogger().setLevel(verbosity)
        model = onnx.load_model(target)
    original = onnx.load_from_string(graph)
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    model.producer_name, model.producer_version = original.producer_name, ""
    return bytes(model.SerializeToString(deterministic=True))


def cost_of(
    float32: NDArray[np.floating],
    int8: NDArray[np.floating],
    labels: NDArray[np.integer],
    items: NDArray[np.generic],
    *,
    good: int = 0,
    seed: int = 1,
) -> Cost:
    """Measures what eight bits cost on views the model did not learn from.

    Args:
        float32: (N, C) probabilities.
        int8: (N, C) probabilities of the quantised model.
        labels: (N,) classes.
        items: (N,) item of each view.
        good: Column and label of the good class.
        seed: Seed of the bootstrap over items.
    """
    bad = labels != good
    wide, narrow = 1.0 - float32[:, good], 1.0 - int8[:, good]
    names, place = np.unique(items, return_inverse=True)
    rows_of = [np.flatnonzero(place == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    drawn = [np.concatenate([rows_of[k] for k in rng.integers(0, len(names), len(names))]) for _ in range(_DRAWS)]
    side = bad.astype(int)

    def both(figure: Any) -> dict[str, float]:
        a, b = figure(np.arange(len(bad)), wide), figure(np.arange(len(bad)), narrow)
        costs = np.array([figure(rows, wide) - figure(rows, narrow) for rows in drawn])
        costs = costs[np.isfinite(costs)]
        low, high = np.quantile(costs, (0.025, 0.975)) if len(costs) else (np.nan, np.nan)
        found = {"float32": a, "int8": b, "cost": a - b, "low": low, "high": high}
        return {name: round(float(value), 5) for name, value in found.items()}

    difference = np.abs(float32 - int8)
    return Cost(
        views=len(bad),
        items=len(names),
        flips=round(float((float32.argmax(axis=1) != int8.argmax(axis=1)).mean()), 5),
        max_difference=round(float(difference.max()), 5),
        mean_difference=round(float(difference.mean()), 6),
        auc=both(lambda rows, score: auc(bad[rows], score[rows])),
        balanced_accuracy=both(lambda rows, score: balanced_accuracy(side[rows], (score[rows] >= 0.5).astype(int))),
    )


def check_cost(cost: Cost) -> None:
    """Refuses a quantised model that costs too much accuracy.

    Raises:
        InputError: `training.quantisation_costs`: keep the float32 model.
    """
    if not cost.accepted:
        raise InputError(
            "training.quantisation_costs",
            "Eight bits cost this model too much.",
            expected=f"AUC cost <= {AUC_LIMIT:g}, <= {FLIP_LIMIT:.0%} of the views on another side",
            got=f"AUC cost {cost.auc['cost']:g}, {cost.flips:.1%}",
        )


def milliseconds_per_view(graphs: dict[str, bytes], views: Views, *, batch: int = 8) -> dict[str, float]:
    """Measures processor time of one view in a batch on one thread, the best of several rounds.

    The rounds alternate between the graphs, so that a busy machine slows all of them alike.
    """
    loaded = {name: OnnxClassifier(graph) for name, graph in graphs.items()}
    best = dict.fromkeys(loaded, float("inf"))
    for classifier in loaded.values():
        classifier.warm_up(batch)
    for _ in range(_ROUNDS):
        for name, classifier in loaded.items():
            started = time.thread_time()
            classifier.classify(views[:batch])
            best[name] = min(best[name], (time.thread_time() - started) * 1000.0 / len(views[:batch]))
    return {name: round(value, 4) for name, value in best.items()}


def quantised(
    directory: Path,
    output: Path,
    views: Views,
    labels: NDArray[np.integer],
    items: NDArray[np.generic],
    *,
    gate: bool = True,
) -> Quantised:
    """Writes the bundle in `directory` with an int8 model, its golden views and its cost.

    Half of the items give the ranges of activations, the cost is counted on the other half. The items should be ones
    that the model has not learnt from; this cannot be checked here.

    Args:
        directory: Directory of the float32 bundle.
        output: Directory to be made.
        views: uint8 (N, S, S, 3).
        labels: (N,) 0 = good.
        items: (N,) item of each view.
        gate: Whether a model that costs too much is refused; False only measures.

    Raises:
        InputError: `training.not_quantisable`, `training.quantisation_costs`.
        BundleError: The bundle is not whole.
    """
    bundle = read_bundle(directory)
    ranges = _half(labels, items)
    graph = quantise(bundle.model, views[ranges])
    wide, narrow = OnnxClassifier(bundle.model), OnnxClassifier(graph)
    rest = ~ranges if (~ranges).any() else ranges
    cost = cost_of(
        _probabilities(wide, views[rest]),
        _probabilities(narrow, views[rest]),
        np.where(labels[rest] == 0, bundle.recipe.good, -1),
        items[rest],
        good=bundle.recipe.good,
    )
    if gate:
        check_cost(cost)
    facts = {"of": bundle.digest, "cost": msgspec.to_builtins(cost)}
    files = {part: (directory / part).read_bytes() for part in PARTS} | {
        MODEL: graph,
        GOLDEN: _golden(bundle.golden, narrow).encoded(),
        LINEAGE: msgspec.json.encode(bundle.lineage | {"quantised": facts}, order="sorted"),
        CARD: (bundle.card + card_section(cost)).encode(),
    }
    written = write_bundle(output, bundle.manifest.name, files)
    times = milliseconds_per_view({"float32": bundle.model, "int8": graph}, views)
    report = msgspec.to_builtins(cost) | {
        "accepted": cost.accepted,
        "ms_per_view": times | {"ratio": round(times["int8"] / times["float32"], 3)},
        "model_bytes": {"float32": len(bundle.model), "int8": len(graph)},
    }
    return Quantised(written, report)


def _half(labels: NDArray[np.integer], items: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Selects views of every other item among the good and among the defective ones, so that both give ranges."""
    names = np.unique(items)
    ill = np.array([(labels[items == name] > 0).any() for name in names])
    chosen = [*names[ill][::2], *names[~ill][::2]]
    return np.asarray(np.isin(items, chosen), np.bool_)


def _probabilities(classifier: OnnxClassifier, views: Views) -> NDArray[np.float32]:
    parts = [classifier.classify(views[s : s + 64]).probabilities for s in range(0, len(views), 64)]
    return np.concatenate(parts)


def _golden(golden: Golden, classifier: OnnxClassifier) -> Golden:
    """Returns the same views with the answers of this model."""
    answer = classifier.classify(golden.views, golden.scalars if golden.scalars.shape[1] else None)
    return msgspec.structs.replace(golden, probabilities=answer.probabilities, embedding=answer.embedding)


def card_section(cost: Cost) -> str:
    """Returns the section of the model card about eight bits."""
    lines = ["", "## Eight bits", f"int8 against float32 on {cost.views} views of {cost.items} items:"]
    for name, figure in (("AUC", cost.auc), ("balanced accuracy", cost.balanced_accuracy)):
        lines.append(
            f"- {name} {figure['float32']:.4f} -> {figure['int8']:.4f},"
            f" cost {figure['cost']:+.4f} ({figure['low']:+.4f} to {figure['high']:+.4f})"
        )
    lines.append(f"- {cost.flips:.2%} of the views change sides; largest difference {cost.max_difference:.3f}")
    return "\n".join([*lines, ""])
