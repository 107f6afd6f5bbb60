"""Models trained elsewhere: what becomes a bundle and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.operating_point import held_out_of
from control_plane.training.foreign.onnx_import import ImportSettings, import_onnx
from models.bundle import read_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import folder

SPEC = PreprocessSpec()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "photos", items=24)


def exported(path: Path, *, batch: int | str = 1, classes: int = 2, opset: int = 13, ir: int = 8) -> Path:
    """Makes a graph as PyTorch exports it: float32 NCHW RGB, normalised, one batch size, logits."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.2, (classes, 3)).astype(np.float32)
    weights[0], weights[1] = [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "torch",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 64, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = ir
    onnx.save(model, str(path))
    return path


def imported(data: Path, **options: object) -> ImportSettings:
    values = {"name": "torch", "classes": ["sound", "defect"], "data": str(data), "mean": [0.5] * 3, "std": [0.2] * 3}
    return ImportSettings(**(values | options))


def test_a_model_from_elsewhere_becomes_a_bundle(data: Path, tmp_path: Path) -> None:
    bundle = import_onnx(exported(tmp_path / "m.onnx"), imported(data), tmp_path / "b").bundle
    again = read_bundle(tmp_path / "b")
    assert again.digest == bundle.digest
    classifier = OnnxClassifier(again.model)
    again.golden.check(classifier)
    assert classifier.embedding_size == 0
    assert classifier.classify(load_dataset(data, SPEC).views[:5]).probabilities.shape == (5, 2)


@pytest.mark.parametrize(("opset", "ir"), [(11, 6), (17, 9), (18, 10), (20, 10), (21, 11)])
def test_a_model_in_the_format_of_any_exporter_becomes_a_bundle(
    data: Path, tmp_path: Path, opset: int, ir: int
) -> None:
    # PyTorch 2.13 stamps format 9 on opset 17 and 10 on opset 18 and later.
    bundle = import_onnx(exported(tmp_path / "m.onnx", opset=opset, ir=ir), imported(data), tmp_path / "b").bundle
    bundle.golden.check(OnnxClassifier(bundle.model))


def test_operators_newer_than_any_agent_reads_are_refused(data: Path, tmp_path: Path) -> None:
    path = exported(tmp_path / "m.onnx", opset=23, ir=11)
    model = onnx.load(str(path))
    model.graph.node.insert(2, helper.make_node("RMSNormalization", ["flat", "one"], ["even"], axis=-1))
    model.graph.node[-1].input[0] = "even"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "one"))
    onnx.save(model, str(path))
    with pytest.raises(InputError) as caught:
        import_onnx(path, imported(data), tmp_path / "b")
    assert caught.value.code == "import.wrong_signature"
    assert "opset 17 to 21" in str(caught.value)


def test_an_imported_model_learns_its_fusion_from_items_it_never_saw(data: Path, tmp_path: Path) -> None:
    model = exported(tmp_path / "m.onnx", batch="N")
    plain = import_onnx(model, imported(data), tmp_path / "plain").bundle
    assert plain.recipe.fusion.calibration_items == 0
    assert "held_out" not in plain.lineage
    bundle = import_onnx(model, imported(data, unseen=True), tmp_path / "b").bundle
    assert bundle.recipe.fusion.calibration_items == 24
    assert held_out_of(bundle.lineage, bundle.recipe).truth.count(0) == 12
    assert "Brier score" in bundle.card


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"classes": ["sound", "a", "b"]}, "import.wrong_classes"),
        ({"classes": ["fine", "defect"]}, "import.wrong_classes"),
        ({"view_px": 32}, "import.wrong_signature"),
        ({"logits": False}, "import.wrong_signature"),
        ({"layout": "sideways"}, "import.bad_settings"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(data: Path, tmp_path: Path, options: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        import_onnx(exported(tmp_path / "m.onnx"), imported(data, **options), tmp_path / "b")
    assert caught.value.code == code
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_no_model_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for content in (b"", b"rubbish", exported(tmp_path / "x.onnx").read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            import_onnx(path, imported(data), tmp_path / "b")
        assert caught.value.code in {"import.unreadable", "import.wrong_signature"}
