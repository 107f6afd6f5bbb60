"""Eight bits: another model with golden views of its own, a cost that is counted, and a gate that refuses."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.metrics import roc_auc_score

from control_plane.training.pipeline import TrainSettings, train
from control_plane.training.quantise import check_cost, cost_of, milliseconds_per_view, quantise, quantised
from models.bundle import LINEAGE, MODEL, PARTS, read_bundle, write_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.golden import GOLDEN
from tests.simulators.photographs import folder
from tests.simulators.tiny_bundle import tiny_files


def conv_graph(*, seed: int = 0, sharp: float = 1.0) -> bytes:
    """A small network of the usual kind: convolution, rectifier, mean, projection."""
    rng = np.random.default_rng(seed)
    dark = rng.normal(0, 0.02, (8, 3, 5, 5)).astype(np.float32) - np.float32(0.004)
    project = rng.normal(0, 0.2, (8, 2)).astype(np.float32)
    project[:, 0], project[:, 1] = np.abs(project[:, 0]) * sharp, -np.abs(project[:, 1]) * sharp
    values = {
        "kernels": dark,
        "bias": np.full(8, 3.0, np.float32),
        "project": project,
        "offset": np.array([-1.2, 1.2], np.float32) * sharp,
        "look": rng.normal(0, 1, (8, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["views"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "kernels", "bias"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m4"], axes=[2, 3]),
        helper.make_node("Flatten", ["m4"], ["m"]),
        helper.make_node("MatMul", ["m", "project"], ["s"]),
        helper.make_node("Add", ["s", "offset"], ["o"]),
        helper.make_node("Softmax", ["o"], ["probabilities"], axis=1),
        helper.make_node("MatMul", ["m", "look"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("views", TensorProto.UINT8, ["N", 64, 64, 3])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 5]),
        ],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    helper.set_model_props(model, {"sortline.classes": "sound,defect"})
    return bytes(model.SerializeToString())


def views_of(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 2
    views = np.zeros((count, 64, 64, 3), np.uint8)
    for row, view in enumerate(views):
        middle = rng.normal(90 if labels[row] else 150, 20)
        view[6:-6, 6:-6] = np.clip(rng.normal(middle, 12, (52, 52, 3)), 1, 255)
    return views, labels, np.array([f"i{row // 2 * 2 + row % 2}" for row in range(count)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tiny_files()
    graph = conv_graph()
    golden = read_golden(files[GOLDEN], OnnxClassifier(graph))
    directory = tmp_path_factory.mktemp("wide") / "apples"
    write_bundle(directory, "apples", files | {MODEL: graph, GOLDEN: golden})
    return directory


def read_golden(data: bytes, classifier: OnnxClassifier) -> bytes:
    from models.bundle import parse_golden

    golden = parse_golden(data)
    answer = classifier.classify(golden.views)
    return msgspec.structs.replace(
        golden, probabilities=answer.probabilities, embedding=answer.embedding, tolerance=2e-3
    ).encoded()


def test_eight_bits_are_used_and_the_rest_of_the_graph_is_as_it_was() -> None:
    graph = conv_graph()
    views, _, _ = views_of()
    small = quantise(graph, views)
    kinds = [node.op_type for node in onnx.load_from_string(small).graph.node]
    assert "DequantizeLinear" in kinds
    stored = {t.data_type for t in onnx.load_from_string(small).graph.initializer if len(t.dims) == 4}
    assert stored == {TensorProto.INT8}
    assert OnnxClassifier(small).metadata == {"sortline.classes": "sound,defect"}
    assert quantise(graph, views) == small, "the same views and seed give the same bytes"
    difference = np.abs(
        OnnxClassifier(small).classify(views).probabilities - OnnxClassifier(graph).classify(views).probabilities
    )
    assert 0.0 < difference.max() < 0.05


def test_a_quantised_bundle_has_its_own_golden_views_and_reports_its_cost(bundle: Path, tmp_path: Path) -> None:
    made = quantised(bundle, tmp_path / "small", *views_of())
    before, after = read_bundle(bundle), read_bundle(tmp_path / "small")
    assert after.golden.check(OnnxClassifier(after.model)) <= after.golden.tolerance
    assert (after.golden.views == before.golden.views).all()
    assert (after.golden.probabilities != before.golden.probabilities).any()
    assert after.recipe == before.recipe
    assert after.lineage["quantised"]["of"] == before.digest
    assert "## Eight bits" in after.card
    same = [part for part in PARTS if (bundle / part).read_bytes() == (tmp_path / "small" / part).read_bytes()]
    assert set(PARTS) - set(same) == {MODEL, GOLDEN, LINEAGE, "card.md"}
    report = made.report
    assert report["accepted"]
    assert report["items"] == 30, "half of the items gave the ranges, the other half counts"
    assert report["auc"]["cost"] == pytest.approx(report["auc"]["float32"] - report["auc"]["int8"])
    assert report["ms_per_view"]["int8"] > 0.0


def test_both_halves_hold_both_kinds_however_the_items_are_named(bundle: Path, tmp_path: Path) -> None:
    views, labels, _ = views_of()
    alternating = np.array([f"item-{row:02d}" for row in range(len(views))])  # good and bad in turn
    report = quantised(bundle, tmp_path / "small", views, labels, alternating).report
    assert np.isfinite(report["auc"]["cost"])
    assert report["items"] == 30


def test_a_model_that_eight_bits_hurt_is_refused() -> None:
    _, labels, items = views_of()
    rng = np.random.default_rng(3)
    noisy = np.clip(0.5 + 0.4 * (labels - 0.5) + rng.normal(0, 0.1, len(labels)), 0.01, 0.99)
    float32 = np.column_stack((1.0 - noisy, noisy))
    hurt = np.clip(noisy + rng.normal(0, 0.4, len(labels)), 0.01, 0.99)
    cost = cost_of(float32, np.column_stack((1.0 - hurt, hurt)), labels, items)
    assert cost.auc["cost"] > 0.01
    assert cost.auc["float32"] == pytest.approx(roc_auc_score(labels, noisy), abs=1e-5)
    assert cost.auc["low"] <= cost.auc["cost"] <= cost.auc["high"]
    with pytest.raises(InputError) as caught:
        check_cost(cost)
    assert caught.value.code == "training.quantisation_costs"
    check_cost(cost_of(float32, float32, labels, items))
    flipped = float32.copy()
    flipped[:6] = flipped[:6, ::-1]
    assert cost_of(float32, flipped, labels, items).flips == pytest.approx(0.1)


def test_a_graph_that_cannot_be_quantised_is_refused() -> None:
    views, _, _ = views_of(4)
    with pytest.raises(InputError) as caught:
        quantise(conv_graph(), views[:, :32, :32])
    assert caught.value.code == "training.not_quantisable"


def test_times_are_taken_in_turn_and_are_finite() -> None:
    views, _, _ = views_of(8)
    found = milliseconds_per_view({"a": conv_graph(), "b": conv_graph()}, views)
    assert set(found) == {"a", "b"}
    assert all(0.0 < value < 1000.0 for value in found.values())


@pytest.mark.slow
def test_training_with_eight_bits_learns_the_fusion_from_them_and_reports_their_cost(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos", items=24)
    made = train(data, TrainSettings(name="discs", effort="quick", folds=3, precision="int8"), tmp_path / "b")
    bundle = read_bundle(tmp_path / "b")
    bundle.golden.check(OnnxClassifier(bundle.model))
    cost = bundle.lineage["quantised"]["cost"]
    assert cost["views"] == 96
    assert cost["auc"]["cost"] <= 0.01
    assert made.metrics["view"]["auc"]["value"] == pytest.approx(cost["auc"]["int8"], abs=1e-4)
    assert "## Eight bits" in bundle.card
