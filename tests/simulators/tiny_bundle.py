"""A small, whole bundle whose graph is built by hand: the darker an item, the likelier a defect."""

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.bundle import CARD, LINEAGE, MODEL, PREPROCESS, PROFILE, RECIPE, Bundle, write_bundle
from models.classifier import OnnxClassifier
from models.golden import GOLDEN, Golden
from models.profile import build_profile, encode_profile, feature_names
from models.recipe import Recipe
from models.view_spec import PreprocessSpec
from tests.simulators.poison import POISONS


def tiny_graph(
    *, bias: float = 0.0, view_px: int = 64, padding: int = 0, poison: str = "", weighs: bool = False
) -> bytes:
    """Views -> P(defect) = sigmoid(6 - mean lightness / 16 + bias); `padding` random bytes make it large.

    `weighs`: a known weight adds a hundredth of its grams to the score.
    `poison`: "nan" answers NaN, "shape" has the wrong signature; those of `tests.simulators.poison` are grafted on.
    """
    nodes = [
        helper.make_node("Cast", ["views"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean4"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Flatten", ["mean4"], ["mean"], axis=1),
        helper.make_node("Mul", ["mean", "slope"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["score" if not weighs else "seen"]),
        helper.make_node("Sigmoid", ["score"], ["bad"]),
        helper.make_node("Sub", ["one", "bad"], ["good"]),
        helper.make_node("Concat", ["good", "bad"], ["probabilities"], axis=1),
        helper.make_node("Concat", ["mean", "mean", "mean", "mean", "mean"], ["embedding"], axis=1),
    ]
    if weighs:
        nodes[5:5] = [
            helper.make_node("IsNaN", ["scalars"], ["unknown"]),
            helper.make_node("Where", ["unknown", "zero", "scalars"], ["grams"]),
            helper.make_node("Mul", ["grams", "per_gram"], ["heavier"]),
            helper.make_node("Add", ["seen", "heavier"], ["score"]),
        ]
    constants = {
        "zero": np.array([[0.0]], np.float32),
        "per_gram": np.array([[0.01]], np.float32),
        "slope": np.array([[-1.0 / 16.0 if poison != "nan" else np.nan]], np.float32),
        "offset": np.array([[6.0 + bias]], np.float32),
        "one": np.array([[1.0]], np.float32),
    }
    if poison in POISONS:
        nodes[4:4] = POISONS[poison](constants)
        next(node for node in nodes if node.output[0] == "score").input[0] = "spoilt"
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    if padding:
        noise = np.random.default_rng(padding).integers(0, 256, padding, dtype=np.uint8)
        initializers.append(numpy_helper.from_array(noise, "unused_weights"))
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 2]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 5]),
    ]
    name = "pictures" if poison == "shape" else "views"
    if poison == "shape":
        nodes[0] = helper.make_node("Cast", ["pictures"], ["x"], to=TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", view_px, view_px, 3])]
    if weighs:
        inputs.append(helper.make_tensor_value_info("scalars", TensorProto.FLOAT, ["N", 1]))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    domains = [helper.make_opsetid("", 99 if poison == "opset" else 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=domains if poison in {*POISONS, "opset"} else domains[:1])
    model.ir_version = 8
    if poison != "opset":
        onnx.checker.check_model(model)
    return model.SerializeToString()


def tiny_files(
    *,
    bias: float = 0.0,
    view_px: int = 64,
    padding: int = 0,
    poison: str = "",
    seed: int = 0,
    weighs: bool = False,
) -> dict[str, bytes]:
    """The parts of a tiny bundle. `poison`: also "golden" (outputs that do not reproduce)."""
    rng = np.random.default_rng(seed)
    views = np.zeros((8, view_px, view_px, 3), np.uint8)
    for row, view in enumerate(views):
        view[8:-8, 8:-8] = np.clip(rng.normal(40 + 25 * row, 5, view[8:-8, 8:-8].shape), 1, 255)
    graph = tiny_graph(bias=bias, view_px=view_px, padding=padding, poison=poison, weighs=weighs)
    honest = OnnxClassifier(tiny_graph(bias=bias, view_px=view_px, weighs=weighs)).classify(views)
    wrong = 0.05 if poison == "golden" else 0.0
    golden = Golden(
        views=views,
        scalars=np.full((len(views), int(weighs)), np.nan, np.float32),
        probabilities=honest.probabilities + np.float32(wrong),
        embedding=honest.embedding,
        tolerance=1e-4,
    )
    features = rng.normal(size=(200, len(feature_names(5)))).astype(np.float32)
    recipe = Recipe(classes=("sound", "defect"), good_class="sound")
    return {
        MODEL: graph,
        PREPROCESS: PreprocessSpec(view_px=view_px, scalars=("weight_g",) if weighs else ()).encoded(),
        RECIPE: msgspec.json.encode(recipe),
        PROFILE: encode_profile(build_profile(features, feature_names(5), {"sound": 150, "defect": 50})),
        GOLDEN: golden.encoded(),
        CARD: b"# tiny\n",
        LINEAGE: msgspec.json.encode({"dataset": "none", "seed": seed}),
    }


def tiny_bundle(directory: Path, *, name: str = "tiny", **options: object) -> Bundle:
    """Writes a tiny bundle to a new directory."""
    return write_bundle(directory, name, tiny_files(**options))  # type: ignore[arg-type]
