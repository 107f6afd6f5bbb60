"""Makes a bundle from a model trained elsewhere (for example exported from PyTorch).

The graph is wrapped, not changed: uint8 BGR views in, then scaling, channel order and layout of the model, and a
softmax where it gives logits. The labelled folder gives golden views, reference and figures; the answers of the wrapped
graph must be those of the original.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, inliner, numpy_helper, version_converter

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.items import items_of, judge_item, truth_in
from control_plane.evaluation.metrics import measure
from control_plane.evaluation.operating_point import hold_out
from control_plane.training.card import write_card
from control_plane.training.fusion import learn_fusion
from control_plane.training.onnx_graph import ParityReport
from control_plane.training.onnx_writer import IR_VERSION, OPSET
from control_plane.training.pipeline import golden_views
from models.bundle import (
    CARD,
    LINEAGE,
    MAX_FILE_BYTES,
    MODEL,
    PREPROCESS,
    PROFILE,
    RECIPE,
    Bundle,
    sha256,
    write_bundle,
)
from models.classifier import PROBABILITIES, OnnxClassifier, ort
from models.errors import InputError
from models.golden import GOLDEN
from models.profile import build_profile, feature_names
from models.recipe import Recipe
from models.view_spec import PreprocessSpec

_LIMIT: Final = 1e-3
_NEWEST_OPSET, _NEWEST_IR = 21, 10
"""Newest opset and format that the oldest ONNX Runtime of an agent (1.20) reads."""


class ImportSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Input format of the imported model and meaning of its outputs."""

    name: str
    classes: Annotated[list[str], msgspec.Meta(min_length=2)]
    data: str
    good_class: str = ""
    view_px: Annotated[int, msgspec.Meta(ge=16, le=512)] = 64
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0 / 255.0
    """Pixels (0-255) are first multiplied by this."""
    mean: Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)] = msgspec.field(
        default_factory=lambda: [0.0] * 3
    )
    """Is then subtracted, per channel in the order of the model."""
    std: Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)] = msgspec.field(
        default_factory=lambda: [1.0] * 3
    )
    """Divides the result, per channel in the order of the model."""
    logits: bool = True
    unseen: bool = False
    """Whether the model has not learnt from the folder; then its items teach fusion, calibration and costs."""


def import_onnx(path: Path, settings: ImportSettings, output: Path) -> Bundle:
    """Wraps, checks and writes.

    Raises:
        InputError: `import.unreadable`, `import.oversize`, `import.external_data`, `import.wrong_signature`,
            `import.wrong_classes`, `import.parity_failed`, `import.bad_settings`, and those of the data set.
        BundleError: The wrapped graph does not load.
    """
    try:  # a plain constructor does not check settings from a command line or a request
        settings = msgspec.convert(msgspec.to_builtins(settings), ImportSettings)
    except msgspec.ValidationError as error:
        raise InputError("import.bad_settings", f"The settings are wrong: {error}.") from error
    original = _load(path)
    graph = wrap(original, settings)
    classifier = OnnxClassifier(graph)
    spec = PreprocessSpec(view_px=settings.view_px)
    dataset = load_dataset(Path(settings.data), spec, good_class=settings.good_class, require_items=1)
    good = settings.good_class or dataset.classes[0]
    if good not in settings.classes:
        raise InputError(
            "import.wrong_classes", "The good class is none of the model's.", expected=list(settings.classes), got=good
        )
    report = _parity(original, settings, classifier, dataset.views)
    recipe = Recipe(classes=tuple(settings.classes), good_class=good)
    recipe.check()
    learnt: dict[str, Any] = {}
    if settings.unseen:
        recipe, learnt = _learn(classifier, dataset, recipe, spec)
    profile, metrics = _reference(classifier, dataset, recipe, spec)
    facts = {"digest": dataset.digest, "views": dataset.report.views, "items": dataset.report.items}
    lineage = {
        "imported_sha256": sha256(path.read_bytes()),
        "dataset": facts,
        "metrics": metrics,
        "parity": msgspec.to_builtins(report),
        "settings": {k: v for k, v in msgspec.to_builtins(settings).items() if k != "data"},
        **learnt,
    }
    about = facts | {"classes": dataset.report.classes}
    parts = {
        MODEL: graph,
        PREPROCESS: spec.encoded(),
        RECIPE: msgspec.json.encode(recipe),
        PROFILE: profile,
        GOLDEN: golden_views(classifier, dataset.views, dataset.labels).encoded(),
        LINEAGE: msgspec.json.encode(lineage, order="sorted"),
        CARD: write_card(settings.name, about, metrics, report, recipe, learnt.get("fusion")).encode(),
    }
    return write_bundle(output, settings.name, parts)


def _learn(
    classifier: OnnxClassifier, dataset: Dataset, recipe: Recipe, spec: PreprocessSpec
) -> tuple[Recipe, dict[str, Any]]:
    """Returns the recipe with a fusion learnt on the items of the folder, and facts for the lineage."""
    found = list(items_of(dataset, spec.max_views))
    truth = truth_in(recipe, dataset, found)
    views = [classifier.classify(dataset.views[item.chosen]).probabilities for item in found]
    learnt = learn_fusion(views, truth != recipe.good, good=recipe.good)
    held = hold_out(recipe.classes, truth, learnt.fused)
    facts = {"fusion": learnt.report, "held_out": msgspec.to_builtins(held)}
    return msgspec.structs.replace(recipe, fusion=learnt.spec), facts


def _load(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(
                "import.oversize", f"{path} is too large.", expected=f"<= {MAX_FILE_BYTES}", got=path.stat().st_size
            )
        model = onnx.load_model(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except InputError:
        raise
    except Exception as error:  # protobuf, the checker and the file system raise unrelated types
        raise InputError(
            "import.unreadable", f"{path} is no valid ONNX model.", expected="an .onnx file", got=str(error)[:200]
        ) from error
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        raise InputError(
            "import.external_data", "The model keeps its weights elsewhere.", expected="one file", got="external data"
        )
    weights = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != TensorProto.FLOAT or len(_dims(inputs[0])) != 4:
        raise InputError(
            "import.wrong_signature",
            "The model must take one batch of pictures.",
            expected="one float32 input with 4 dimensions",
            got=[(i.name, _dims(i)) for i in inputs],
        )
    return model


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def wrap(original: onnx.ModelProto, settings: ImportSettings) -> bytes:
    """Wraps the imported graph so that it has the signature of a bundle.

    Raises:
        InputError: `import.wrong_signature`.
    """
    model = _converted(original)
    weights = {t.name for t in model.graph.initializer}
    source = next(i for i in model.graph.input if i.name not in weights)
    side = settings.view_px
    expected = [3, side, side] if settings.layout == "nchw" else [side, side, 3]
    given = _dims(source)[1:]
    if any(isinstance(d, int) and d != e for d, e in zip(given, expected, strict=True)):
        raise InputError("import.wrong_signature", "The model's input has another shape.", expected=expected, got=given)
    answers = _dims(model.graph.output[0])
    if len(answers) != 2 or (isinstance(answers[1], int) and answers[1] != len(settings.classes)):
        raise InputError(
            "import.wrong_classes",
            "The model answers for another number of classes.",
            expected=f"[N, {len(settings.classes)}]",
            got=answers,
        )
    _free_batch(model, source)
    before = _before(settings, model)
    joined = compose.merge_models(before, compose.add_prefix(model, "m_"), [("prepared", f"m_{source.name}")])
    answer = f"m_{model.graph.output[0].name}"
    del joined.graph.output[:]
    kind = "Softmax" if settings.logits else "Identity"
    final = helper.make_node(kind, [answer], [PROBABILITIES])
    if settings.logits:
        final.attribute.append(helper.make_attribute("axis", 1))
    joined.graph.node.append(final)
    joined.graph.output.append(
        helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["N", len(settings.classes)])
    )
    joined.graph.name = settings.name
    del joined.graph.value_info[:]
    return bytes(joined.SerializeToString(deterministic=True))


def _converted(original: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model in an opset that every agent reads: its own, or the nearest one."""
    current = _opset(original)
    copy = onnx.ModelProto()
    copy.CopyFrom(inliner.inline_local_functions(original) if original.functions else original)
    wanted = min(max(current, OPSET), _NEWEST_OPSET)
    try:
        if current != wanted:
            copy = version_converter.convert_version(copy, wanted)
        # Exporters stamp the format they were built with; what counts is what the operators need.
        copy.ir_version = IR_VERSION if wanted == OPSET else _NEWEST_IR
        onnx.checker.check_model(copy)  # the converter may leave attributes behind that the older operator lacks
    except Exception as error:  # the converter raises whatever its C++ side raises
        raise InputError(
            "import.wrong_signature",
            "The model's operators cannot be brought to a version that agents read.",
            expected=f"opset {OPSET} to {_NEWEST_OPSET}",
            got=f"opset {current}: {str(error)[:120]}",
        ) from error
    return copy


def _opset(model: onnx.ModelProto) -> int:
    return int(next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0))


def _free_batch(model: onnx.ModelProto, source: onnx.ValueInfoProto) -> None:
    """Makes the batch size of input and outputs variable."""
    for value in (source, *model.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_value")
        value.type.tensor_type.shape.dim[0].dim_param = "N"


def _before(settings: ImportSettings, wanted: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the part before the model, from uint8 BGR views to its input, in its own opset and format."""
    side = settings.view_px
    constants = {
        "scale": np.float32(settings.scale),
        "mean": np.asarray(settings.mean, np.float32),
        "std": np.asarray(settings.std, np.float32),
        "order": np.asarray([2, 1, 0] if settings.channels == "rgb" else [0, 1, 2], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["views", "order"], ["ordered"], axis=3),
        helper.make_node("Cast", ["ordered"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["prepared"], perm=[0, 3, 1, 2])
        if settings.layout == "nchw"
        else helper.make_node("Identity", ["normal"], ["prepared"]),
    ]
    shape: list[Any] = ["N", 3, side, side] if settings.layout == "nchw" else ["N", side, side, 3]
    graph = helper.make_graph(
        nodes,
        "before",
        [helper.make_tensor_value_info("views", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("prepared", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _opset(wanted))])
    model.ir_version = wanted.ir_version
    return model


def _parity(
    original: onnx.ModelProto, settings: ImportSettings, classifier: OnnxClassifier, views: NDArray[np.uint8]
) -> ParityReport:
    """Compares the wrapped graph with the original, whose input numpy prepares."""
    if classifier.classes != len(settings.classes):
        raise InputError(
            "import.wrong_classes", "The model answers for another number of classes.", expected=list(settings.classes)
        )
    session = ort.InferenceSession(original.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    chosen = views[:: max(1, len(views) // 200)]
    picture = chosen[..., ::-1] if settings.channels == "rgb" else chosen
    mean, std = np.asarray(settings.mean, np.float32), np.asarray(settings.std, np.float32)
    fed = (picture.astype(np.float32) * np.float32(settings.scale) - mean) / std
    fed = np.ascontiguousarray(fed.transpose(0, 3, 1, 2) if settings.layout == "nchw" else fed, np.float32)
    expected = np.concatenate([session.run(None, {name: fed[k : k + 1]})[0] for k in range(len(fed))])
    if settings.logits:
        powers = np.exp(expected - expected.max(axis=1, keepdims=True))
        expected = powers / powers.sum(axis=1, keepdims=True)
    got = np.concatenate([classifier.classify(chosen[k : k + 16]).probabilities for k in range(0, len(chosen), 16)])
    if not np.allclose(got.sum(axis=1), 1.0, atol=1e-3) or got.min() < 0.0:
        raise InputError(
            "import.wrong_signature",
            "The outputs are no probabilities; are they logits?",
            expected="rows that sum to 1",
        )
    difference = np.abs(got - expected)
    flips = int((got.argmax(axis=1) != expected.argmax(axis=1)).sum())
    passed = bool(difference.max() <= _LIMIT)
    report = ParityReport(
        views=len(chosen),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        flips=flips,
        band=2 * _LIMIT,
        passed=passed,
    )
    if not passed:
        raise InputError(
            "import.parity_failed",
            "The wrapped model answers otherwise than the original.",
            expected=_LIMIT,
            got=report,
        )
    return report


def _reference(
    classifier: OnnxClassifier, dataset: Dataset, recipe: Recipe, spec: PreprocessSpec
) -> tuple[bytes, dict[str, Any]]:
    """Returns profile and item figures on the folder; the model may have learnt from its items."""
    rows, truths, fused, names = [], [], [], []
    counts = dict.fromkeys(recipe.classes, 0)
    good = recipe.good
    for item in items_of(dataset, spec.max_views):
        answer = classifier.classify(dataset.views[item.chosen])
        verdict, features = judge_item(recipe, dataset.views[item.chosen], answer.probabilities, answer.embedding)
        rows.append(features)
        counts[verdict.klass] += 1
        fused.append([verdict.probabilities[good], 1.0 - verdict.probabilities[good]])
        truths.append(int(item.truth > 0))
        names.append(item.name)
    profile = build_profile(np.stack(rows), feature_names(classifier.embedding_size), counts)
    metrics = {
        "protocol": "on the given folder; the imported model may have been trained on it",
        "item": measure(np.array(truths), np.array(fused), np.array(names), (recipe.good_class, "bad")),
    }
    return msgspec.msgpack.encode(profile), metrics
