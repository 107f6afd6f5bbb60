"""Imported models that contradict their folder: measured, refused, and the reason named by trying it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LogisticRegression

from control_plane.data.photo_folder import load_dataset
from control_plane.training.foreign.foreign_model import class_names
from control_plane.training.foreign.onnx_import import ImportSettings, import_onnx
from models.bundle import read_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.view_spec import PreprocessSpec
from tests.simulators.photographs import folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "photos", items=24)


@pytest.fixture(scope="module")
def weights(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (192,) of the defect's log-odds in 8 x 8 means of RGB, and the intercept."""
    found = load_dataset(data, PreprocessSpec())
    means = found.views[..., ::-1].reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(-1, 192)
    fitted = LogisticRegression(C=1.0, max_iter=500).fit(means / 255.0, found.labels)
    return fitted.coef_[0], fitted.intercept_


def model(
    path: Path,
    weights: tuple[np.ndarray, np.ndarray],
    *,
    defect_first: bool = False,
    softmax: bool = False,
    kind: int = TensorProto.FLOAT,
    extra: bool = False,
    beside: bool = False,
    names: str = "",
    constant: bool = False,
) -> Path:
    """A small network of two classes whose logits are minus and plus half the log-odds."""
    coefficients, intercept = weights
    half = np.stack((-coefficients, coefficients)) / 2.0 * (0.0 if constant else 1.0)
    bias = np.array([-intercept[0], intercept[0]]) / 2.0
    if defect_first:
        half, bias = half[::-1], bias[::-1]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    arrays = {"w": half.astype(dtype), "b": bias.astype(dtype)}
    last = "raw" if softmax else "answer"
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], [last], transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], ["answer"], axis=1))
    outputs = [helper.make_tensor_value_info("answer", kind, ["N", 2])]
    if extra:
        outputs.insert(0, helper.make_tensor_value_info("flat", kind, ["N", 192]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", kind, ["N", 3, 64, 64])],
        outputs,
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    if names:
        helper.set_model_props(made, {"names": names})
    onnx.save(made, str(path), save_as_external_data=beside, location=f"{path.name}.data", size_threshold=16)
    return path


def settings(data: Path, **options: Any) -> ImportSettings:
    return ImportSettings(**({"name": "small", "classes": ["sound", "defect"], "data": str(data)} | options))


def refused(path: Path, asked: ImportSettings, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        import_onnx(path, asked, path.parent / "refused")
    assert caught.value.code == code
    assert not (path.parent / "refused").exists()
    return caught.value


def test_an_import_reports_what_it_measured(data: Path, tmp_path: Path, weights: Any) -> None:
    found = import_onnx(model(tmp_path / "m.onnx", weights), settings(data), tmp_path / "b").summary()
    view = found["metrics"]["view"]
    assert view["auc"]["value"] > 0.9
    assert view["auc"]["low"] < view["auc"]["value"] <= view["auc"]["high"]
    assert view["balanced_accuracy"]["value"] > 0.8
    assert np.array(found["metrics"]["item"]["confusion"]).sum() == 24
    assert (found["output"], found["precision"], found["tried"]) == ("answer", "float32", ())


def test_classes_in_the_wrong_order_are_refused_with_the_right_one(data: Path, tmp_path: Path, weights: Any) -> None:
    error = refused(model(tmp_path / "m.onnx", weights, defect_first=True), settings(data), "import.below_chance")
    assert "--classes defect,sound" in str(error)


@pytest.mark.parametrize(
    "names", ["{0: 'defect', 1: 'sound'}", '["defect", "sound"]', '{"0": "defect", "1": "sound"}', "defect, sound"]
)
def test_names_in_the_file_contradict_and_are_taken_where_none_are_stated(
    data: Path, tmp_path: Path, weights: Any, names: str
) -> None:
    path = model(tmp_path / "m.onnx", weights, defect_first=True, names=names)
    assert refused(path, settings(data), "import.class_order").expected == "defect,sound"
    found = import_onnx(path, settings(data, classes=[]), tmp_path / "b")
    assert found.bundle.recipe.classes == ("defect", "sound")
    assert found.report.metrics["view"]["auc"]["value"] > 0.9


def test_names_of_scikit_learn_are_read_and_other_names_are_warned_of(data: Path, tmp_path: Path, weights: Any) -> None:
    node = helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_strings=["bad", "good"])
    assert class_names(helper.make_model(helper.make_graph([node], "g", [], []))) == ("bad", "good")
    path = model(tmp_path / "m.onnx", weights, names="['fresh', 'rotten']")
    assert "fresh, rotten" in import_onnx(path, settings(data), tmp_path / "b").report.warnings[0]
    for odd in ("__import__('os')", "{0: 1}", "[" * 500, "9" * 200_000, "{'a': 'x', 'b': 'y'}"):
        made = onnx.ModelProto()
        helper.set_model_props(made, {"names": odd})
        assert class_names(made) == ()


def test_a_second_softmax_is_refused(data: Path, tmp_path: Path, weights: Any) -> None:
    path = model(tmp_path / "m.onnx", weights, softmax=True)
    assert refused(path, settings(data), "import.double_softmax").expected == "--no-logits"
    assert import_onnx(path, settings(data, logits=False), tmp_path / "b").report.metrics["view"]["auc"]["value"] > 0.9
    plain = model(tmp_path / "logits.onnx", weights)
    refused(plain, settings(data, logits=False), "import.wrong_signature")


def test_wrong_scaling_is_refused_with_the_scaling_that_works(data: Path, tmp_path: Path, weights: Any) -> None:
    path = model(tmp_path / "m.onnx", weights)
    wrong = settings(data, scale=1e-9)
    error = refused(path, wrong, "import.constant_answers")
    assert "--scale 0.00392157" in str(error)


@pytest.mark.parametrize("scale", [2.0 / 255.0, 5.0 / 255.0])
def test_a_scaling_that_keeps_the_order_and_spoils_the_probabilities_is_warned_of(
    data: Path, tmp_path: Path, weights: Any, scale: float
) -> None:
    path = model(tmp_path / "m.onnx", weights)
    right = import_onnx(path, settings(data), tmp_path / "right").report
    assert right.warnings == ()
    wrong = import_onnx(path, settings(data, scale=scale), tmp_path / "wrong").report
    assert wrong.metrics["view"]["auc"]["value"] > 0.7
    (warning,) = [text for text in wrong.warnings if "worse than a guess" in text]
    assert "--scale 0.00392157" in warning


def test_a_model_whose_answers_never_change_is_refused(data: Path, tmp_path: Path, weights: Any) -> None:
    path = model(tmp_path / "m.onnx", weights, constant=True)
    assert "none that was tried" in str(refused(path, settings(data), "import.constant_answers"))


def test_weights_in_a_file_beside_the_model_are_taken_from_any_folder(
    data: Path, tmp_path: Path, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = model(tmp_path / "m.onnx", weights, beside=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = import_onnx(path, settings(data), tmp_path / "b")
    assert found.report.metrics["view"]["auc"]["value"] > 0.9
    (tmp_path / "m.onnx.data").unlink()
    assert "m.onnx.data" in str(refused(path, settings(data), "import.external_data"))


def test_weights_outside_the_folder_of_the_model_are_refused(data: Path, tmp_path: Path, weights: Any) -> None:
    (tmp_path / "in").mkdir()
    path = model(tmp_path / "in" / "m.onnx", weights, beside=True)
    (tmp_path / "in" / "m.onnx.data").rename(tmp_path / "m.onnx.data")
    made = onnx.load(str(path), load_external_data=False)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.onnx.data"
    path.write_bytes(made.SerializeToString())
    refused(path, settings(data), "import.external_data")


def test_half_precision_is_cast_at_the_border(data: Path, tmp_path: Path, weights: Any) -> None:
    path = model(tmp_path / "m.onnx", weights, kind=TensorProto.FLOAT16)
    found = import_onnx(path, settings(data), tmp_path / "b")
    assert found.report.precision == "float16"
    assert found.report.metrics["view"]["auc"]["value"] > 0.9
    bundle = read_bundle(tmp_path / "b")
    bundle.golden.check(OnnxClassifier(bundle.model))


def test_the_output_with_the_shape_of_answers_is_taken_and_named(data: Path, tmp_path: Path, weights: Any) -> None:
    found = import_onnx(model(tmp_path / "m.onnx", weights, extra=True), settings(data), tmp_path / "b")
    assert (found.report.output, found.report.other_outputs) == ("answer", ("flat",))
    error = refused(tmp_path / "m.onnx", settings(data, classes=["sound", "a", "b"]), "import.wrong_classes")
    assert any("flat" in text and "192" in text for text in error.got)


def weighing(path: Path) -> Path:
    """A network that looks at the weight alone: below 100 g is a defect."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["column"]),
        helper.make_node("Mul", ["column", "zero"], ["nothing"]),
        helper.make_node("Sub", ["grams", "limit"], ["above"]),
        helper.make_node("Add", ["above", "nothing"], ["sound"]),
        helper.make_node("Neg", ["sound"], ["defect"]),
        helper.make_node("Concat", ["sound", "defect"], ["logits"], axis=1),
    ]
    constants = {"one": np.array([1], np.int64), "zero": np.float32(0.0), "limit": np.float32(100.0)}
    graph = helper.make_graph(
        nodes,
        "weighing",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 64, 64]),
            helper.make_tensor_value_info("grams", TensorProto.FLOAT, ["N", 1]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    onnx.save(made, str(path))
    return path


def test_a_model_that_weighs_gets_the_scalars_it_names(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", items=12)
    lines = (root / "labels.csv").read_text().splitlines()
    rows = [f"{line},{'' if n % 9 == 0 else 80 if 'defect' in line else 120}" for n, line in enumerate(lines[1:])]
    (root / "labels.csv").write_text("\n".join([f"{lines[0]},weight_g", *rows]))
    path = weighing(tmp_path / "m.onnx")
    refused(path, settings(root), "import.wrong_signature")
    found = import_onnx(path, settings(root, scalars=["weight_g"]), tmp_path / "b")
    assert found.bundle.preprocess.scalars == ("weight_g",)
    assert found.report.metrics["view"]["auc"]["value"] > 0.9
    classifier = OnnxClassifier(found.bundle.model)
    views = np.zeros((2, 64, 64, 3), np.uint8)
    answers = classifier.classify(views, np.array([[60.0], [140.0]], np.float32)).probabilities
    assert answers[0, 1] > 0.99
    assert answers[1, 0] > 0.99
    assert np.isfinite(classifier.classify(views).probabilities).all()
