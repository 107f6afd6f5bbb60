"""Builds one ONNX graph from pixels to calibrated probabilities and checks it against scikit-learn."""

from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.pipeline import Pipeline

from control_plane.training.head import CLIP, EMBEDDING, Head
from control_plane.training.onnx_writer import ML_OPSET, OPSET, GraphWriter, floats
from control_plane.training.patch_features import FeatureExtractor, graph_inputs, write_features
from models.classifier import EMBEDDING as EMBEDDING_OUTPUT
from models.classifier import PROBABILITIES

DIFFERENCE_LIMIT = 1e-3
"""Largest difference of a probability that the parity check accepts: float32 against float64 through some 200 nodes."""


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Differences between scikit-learn and ONNX on the same views."""

    views: int
    max_difference: float
    mean_difference: float
    flips: int
    """Labels that differ outside the tolerance band: the best two classes are closer than the band inside it."""
    band: float
    passed: bool


def build_graph(extractor: FeatureExtractor, head: Head, *, name: str, metadata: dict[str, str]) -> bytes:
    """Builds the whole model: `views` (and `scalars`) -> `probabilities`, `embedding`.

    Args:
        extractor: Fitted features.
        head: Fitted classifier, converted by skl2onnx.
        name: Name of the graph.
        metadata: Stored as `metadata_props`.

    Returns:
        Serialised ONNX; the same parts give the same bytes.
    """
    w = GraphWriter()
    parts = write_features(w, extractor)
    logs: list[str] = []
    for member, part, width in zip(head.members, parts, head.widths, strict=True):
        raw = _graft(w, member, part, width)
        log = w.op("Log", [w.op("Clip", [raw, w.constant(CLIP), w.constant(1.0)])])
        logs.append(w.op("Mul", [log, w.constant(head.votes[len(logs)])]))
    scores = w.op("Sum", logs)
    w.op("Softmax", [w.op("Add", [scores, w.constant(head.bias)])], output=PROBABILITIES, axis=1)
    _embed(w, head.members[0], parts[0])
    outputs = [floats(PROBABILITIES, len(head.bias)), floats(EMBEDDING_OUTPUT, EMBEDDING)]
    model = w.model(graph_inputs(extractor), outputs, name=name, metadata=metadata)
    return bytes(model.SerializeToString(deterministic=True))


def _graft(w: GraphWriter, pipeline: Pipeline, features: str, width: int) -> str:
    """Copies the nodes of the converted pipeline under new names; returns the name of the probabilities."""
    options = {id(pipeline): {"zipmap": False}}
    prefix = w.fresh("head")
    converted = convert_sklearn(
        pipeline,
        initial_types=[("head_input", FloatTensorType([None, width]))],
        target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
        options=options,
    )
    names: dict[str, str] = {"head_input": features, "": ""}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"{prefix}_{len(names)}")

    for constant in converted.graph.initializer:
        copy = onnx.TensorProto()
        copy.CopyFrom(constant)
        copy.name = renamed(constant.name)
        w.constants.append(copy)
    for node in converted.graph.node:
        copy_node = onnx.NodeProto()
        copy_node.CopyFrom(node)
        copy_node.name = f"{prefix}_node_{len(w.nodes)}"
        copy_node.input[:] = [renamed(name) for name in node.input]
        copy_node.output[:] = [renamed(name) for name in node.output]
        w.nodes.append(copy_node)
    return names[converted.graph.output[1].name]


def _embed(w: GraphWriter, pipeline: Pipeline, features: str) -> None:
    """Writes the first principal components of a member's scaled features, with unit variance on the training views."""
    scale: Any = pipeline.named_steps["scale"]
    project: Any = pipeline.named_steps["project"]
    count = min(EMBEDDING, project.n_components_)
    axes = np.zeros((len(scale.mean_), EMBEDDING))
    axes[:, :count] = project.components_[:count].T / np.sqrt(np.maximum(project.explained_variance_[:count], 1e-12))
    matrix = axes / scale.scale_[:, None]
    offset = -(scale.mean_ / scale.scale_ + project.mean_) @ axes
    product = w.op("MatMul", [features, w.constant(matrix)])
    w.op("Add", [product, w.constant(offset)], output=EMBEDDING_OUTPUT)


def compare(
    expected: NDArray[np.float64], got: NDArray[np.float64], *, limit: float = DIFFERENCE_LIMIT
) -> ParityReport:
    """Compares the answers of scikit-learn and of the graph on the same views.

    Args:
        expected: float64 (N, C) of `Head.predict_proba`.
        got: float64 (N, C) of the graph.
        limit: Largest accepted difference of a probability; also the band in which a label may differ.
    """
    difference = np.abs(got - expected)
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 2.0 * limit
    flips = int(((got.argmax(axis=1) != expected.argmax(axis=1)) & decided).sum())
    worst = float(difference.max())
    return ParityReport(
        views=len(got),
        max_difference=worst,
        mean_difference=float(difference.mean()),
        flips=flips,
        band=2.0 * limit,
        passed=flips == 0 and worst <= limit,
    )
