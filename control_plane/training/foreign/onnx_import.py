"""Makes a bundle from a model trained elsewhere (for example exported from PyTorch).

The graph is wrapped, not changed: uint8 BGR views in, then scaling, channel order and layout of the model, and a
softmax where it gives logits. The labelled folder gives golden views, reference and figures; the answers of the wrapped
graph must be those of the original, and they must not contradict the folder (`import_checks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, inliner, numpy_helper, version_converter

from control_plane.data.dataset import Dataset
from control_plane.data.photo_folder import load_dataset
from control_plane.evaluation.items import items_of, reference_profile, truth_in
from control_plane.evaluation.metrics import measure
from control_plane.evaluation.operating_point import hold_out
from control_plane.training.card import write_card
from control_plane.training.cross_validation import answers_of
from control_plane.training.ensemble import softmax
from control_plane.training.foreign.foreign_model import FLOATS, ForeignModel, dims, read_model
from control_plane.training.foreign.import_checks import (
    Preparation,
    Trial,
    Tried,
    check_answers,
    check_double_softmax,
    check_names,
)
from control_plane.training.fusion import learn_fusion
from control_plane.training.onnx_graph import DIFFERENCE_LIMIT, ParityReport, compare
from control_plane.training.onnx_writer import IR_VERSION, OPSET
from control_plane.training.pipeline import golden_views
from models.bundle import CARD, LINEAGE, MODEL, PREPROCESS, PROFILE, RECIPE, Bundle, sha256, write_bundle
from models.classifier import PROBABILITIES, SCALARS_INPUT, OnnxClassifier
from models.errors import InputError
from models.fusion import fuse
from models.golden import GOLDEN
from models.profile import encode_profile
from models.recipe import Recipe
from models.view_spec import PreprocessSpec, ScalarName

_HALF_LIMIT: Final = 5e-3
"""Largest difference of a probability with half-precision weights: one prepared by numpy rounds otherwise."""
_TRIED_VIEWS: Final = 200
_NEWEST_OPSET, _NEWEST_IR = 21, 10
"""Newest opset and format that the oldest ONNX Runtime of an agent (1.20) reads."""


class ImportSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Input format of the imported model and meaning of its outputs."""

    name: str
    classes: list[str] = []
    """Names in the order of the outputs; empty = those that the model's file names."""
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
    scalars: list[ScalarName] = []
    """Measured columns of labels.csv that a second input [N, K] takes, in its order; unknown values become medians."""
    unseen: bool = False
    """Whether the model has not learnt from the folder; then its items teach fusion, calibration and costs."""

    @property
    def preparation(self) -> Preparation:
        """The stated way from pixels to the input."""
        return Preparation(scale=self.scale, mean=tuple(self.mean), std=tuple(self.std), channels=self.channels)


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an import found, for terminal, page and API."""

    bundle: str
    name: str
    size_bytes: int
    output: str
    """The output that was taken for the answers."""
    other_outputs: tuple[str, ...]
    classes: tuple[str, ...]
    names_in_model: tuple[str, ...]
    """Class names in the model's file; empty = it has none."""
    scalars: tuple[str, ...]
    precision: str
    """`float32` or `float16`, of the model's input."""
    metrics: dict[str, Any]
    """Figures on the folder, of views and items; the model may have learnt from it."""
    parity: ParityReport
    tried: tuple[Tried, ...]
    """Reasons that were tried because the answers are hardly better than chance."""
    dataset: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Imported:
    """A written bundle and the report on it."""

    bundle: Bundle
    report: ImportReport

    def summary(self) -> dict[str, Any]:
        """Returns plain values for the API and the command line."""
        return dict(msgspec.to_builtins(self.report))


def import_onnx(path: Path, settings: ImportSettings, output: Path) -> Imported:
    """Wraps a model, measures it on the labelled folder, and writes the bundle.

    Raises:
        InputError: `import.unreadable`, `import.oversize`, `import.external_data`, `import.wrong_signature`,
            `import.wrong_classes`, `import.class_order`, `import.double_softmax`, `import.constant_answers`,
            `import.below_chance`, `import.parity_failed`, `import.bad_settings`, and those of the data set.
        BundleError: The wrapped graph does not load.
    """
    try:  # a plain constructor does not check settings from a command line or a request
        settings = msgspec.convert(msgspec.to_builtins(settings), ImportSettings)
    except msgspec.ValidationError as error:
        raise InputError("import.bad_settings", f"The settings are wrong: {error}.") from error
    model = read_model(path, len(settings.classes), len(settings.scalars))
    settings = msgspec.structs.replace(settings, classes=settings.classes or list(model.names))
    warning = check_names(model.names, settings.classes)
    spec = PreprocessSpec(view_px=settings.view_px, scalars=tuple(settings.scalars))
    spec.check()
    dataset = load_dataset(
        Path(settings.data), spec, good_class=settings.good_class, require_items=1, scalars=spec.scalars or ()
    )
    good = settings.good_class or dataset.classes[0]
    if good not in settings.classes:
        raise InputError(
            "import.wrong_classes", "The good class is none of the model's.", expected=list(settings.classes), got=good
        )
    recipe = Recipe(classes=tuple(settings.classes), good_class=good)
    recipe.check()
    graph = wrap(model, settings, medians_of(dataset.scalars))
    classifier = OnnxClassifier(graph)
    parity = _parity(model, settings, classifier, dataset)
    answers, embedding = answers_of(classifier, dataset.views, dataset.scalars)
    metrics = _metrics(dataset, recipe, spec, answers)
    trial = _trial(model, settings, dataset, recipe)
    tried, warnings = check_answers(trial, answers[_rows(dataset)], metrics["view"]["auc"])
    facts = {"digest": dataset.digest, **dataset.report.summary()}
    learnt: dict[str, Any] = {}
    if settings.unseen:
        recipe, learnt = _learn(answers, dataset, recipe, spec)
    lineage = {
        "imported_sha256": sha256(path.read_bytes()),
        "dataset": facts,
        "metrics": metrics,
        "parity": msgspec.to_builtins(parity),
        "settings": {k: v for k, v in msgspec.to_builtins(settings).items() if k != "data"},
        **learnt,
    }
    card = write_card(settings.name, facts, metrics, parity, recipe, learnt.get("fusion"))
    parts = {
        MODEL: graph,
        PREPROCESS: spec.encoded(),
        RECIPE: msgspec.json.encode(recipe),
        PROFILE: encode_profile(reference_profile(dataset, recipe, spec.max_views, answers, embedding)),
        GOLDEN: golden_views(classifier, dataset.views, dataset.labels, dataset.scalars, answers).encoded(),
        LINEAGE: msgspec.json.encode(lineage, order="sorted"),
        CARD: card.encode(),
    }
    bundle = write_bundle(output, settings.name, parts)
    report = ImportReport(
        bundle=bundle.digest,
        name=settings.name,
        size_bytes=bundle.manifest.size_bytes,
        output=model.output.name,
        other_outputs=model.others,
        classes=recipe.classes,
        names_in_model=model.names,
        scalars=spec.scalars,
        precision=FLOATS[model.image.type.tensor_type.elem_type].name,
        metrics=metrics,
        parity=parity,
        tried=tuple(tried),
        dataset=facts,
        warnings=tuple(text for text in (warning, *warnings) if text),
    )
    return Imported(bundle, report)


def _learn(
    answers: NDArray[np.float64], dataset: Dataset, recipe: Recipe, spec: PreprocessSpec
) -> tuple[Recipe, dict[str, Any]]:
    """Returns the recipe with a fusion learnt on the items of the folder, and facts for the lineage."""
    found = list(items_of(dataset, spec.max_views))
    truth = truth_in(recipe, dataset, found)
    learnt = learn_fusion([answers[item.chosen] for item in found], truth != recipe.good, good=recipe.good)
    held = hold_out(recipe.classes, truth, learnt.fused)
    facts = {"fusion": learnt.report, "held_out": msgspec.to_builtins(held)}
    return msgspec.structs.replace(recipe, fusion=learnt.spec), facts


def medians_of(scalars: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 (K,): the median of the known values of each scalar; 0 where none is known."""
    columns = [column[np.isfinite(column)] for column in scalars.T]
    return np.array([np.median(column) if len(column) else 0.0 for column in columns], np.float32)


def wrap(model: ForeignModel, settings: ImportSettings, medians: NDArray[np.float32]) -> bytes:
    """Wraps the imported graph so that it has the signature of a bundle.

    Args:
        model: The model.
        settings: How its input is prepared and what its output means.
        medians: float32 (K,), what stands for unknown scalars.

    Raises:
        InputError: `import.wrong_signature`.
    """
    proto = _converted(model.proto)
    names = [model.image.name, *([model.scalars.name] if model.scalars is not None else [])]
    inputs = {value.name: value for value in proto.graph.input}
    source = inputs[model.image.name]
    side = settings.view_px
    expected = [3, side, side] if settings.layout == "nchw" else [side, side, 3]
    given = dims(source)[1:]
    if any(isinstance(d, int) and d != e for d, e in zip(given, expected, strict=True)):
        raise InputError("import.wrong_signature", "The model's input has another shape.", expected=expected, got=given)
    for value in (*(inputs[name] for name in names), *proto.graph.output):
        _free_batch(value)
    before = _before(settings, proto, medians, [inputs[name].type.tensor_type.elem_type for name in names])
    joints = list(zip(["prepared", "filled"], [f"m_{name}" for name in names], strict=False))
    joined = compose.merge_models(before, compose.add_prefix(proto, "m_"), joints)
    del joined.graph.output[:]
    joined.graph.node.append(helper.make_node("Cast", [f"m_{model.output.name}"], ["answers"], to=TensorProto.FLOAT))
    final = helper.make_node("Softmax" if settings.logits else "Identity", ["answers"], [PROBABILITIES])
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


def _free_batch(value: onnx.ValueInfoProto) -> None:
    """Makes the batch size of an input or output variable."""
    if value.type.HasField("tensor_type") and value.type.tensor_type.shape.dim:
        value.type.tensor_type.shape.dim[0].ClearField("dim_value")
        value.type.tensor_type.shape.dim[0].dim_param = "N"


def _before(
    settings: ImportSettings, wanted: onnx.ModelProto, medians: NDArray[np.float32], kinds: Sequence[int]
) -> onnx.ModelProto:
    """Returns the part before the model, from views and scalars to its inputs, in its own opset and format."""
    side, count = settings.view_px, len(medians)
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
        helper.make_node("Transpose", ["normal"], ["placed"], perm=[0, 3, 1, 2])
        if settings.layout == "nchw"
        else helper.make_node("Identity", ["normal"], ["placed"]),
        helper.make_node("Cast", ["placed"], ["prepared"], to=kinds[0]),
    ]
    shape: list[Any] = ["N", 3, side, side] if settings.layout == "nchw" else ["N", side, side, 3]
    inputs = [helper.make_tensor_value_info("views", TensorProto.UINT8, ["N", side, side, 3])]
    outputs = [helper.make_tensor_value_info("prepared", kinds[0], shape)]
    if count:
        constants["medians"] = medians
        nodes += [
            helper.make_node("IsNaN", [SCALARS_INPUT], ["unknown"]),
            helper.make_node("Where", ["unknown", "medians", SCALARS_INPUT], ["known"]),
            helper.make_node("Cast", ["known"], ["filled"], to=kinds[1]),
        ]
        inputs.append(helper.make_tensor_value_info(SCALARS_INPUT, TensorProto.FLOAT, ["N", count]))
        outputs.append(helper.make_tensor_value_info("filled", kinds[1], ["N", count]))
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "before", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _opset(wanted))])
    model.ir_version = wanted.ir_version
    return model


def _prepared(
    views: NDArray[np.uint8], preparation: Preparation, layout: Literal["nchw", "nhwc"]
) -> NDArray[np.float32]:
    """Prepares views for the original model by numpy."""
    picture = views[..., ::-1] if preparation.channels == "rgb" else views
    mean, std = np.asarray(preparation.mean, np.float32), np.asarray(preparation.std, np.float32)
    fed = (picture.astype(np.float32) * np.float32(preparation.scale) - mean) / std
    return np.ascontiguousarray(fed.transpose(0, 3, 1, 2) if layout == "nchw" else fed, np.float32)


def _rows(dataset: Dataset) -> NDArray[np.intp]:
    """Returns at most about 200 rows, evenly spaced, on which the original model is run."""
    return np.arange(0, len(dataset.views), max(1, len(dataset.views) // _TRIED_VIEWS))


def _filled(scalars: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.isnan(scalars), medians_of(scalars), scalars).astype(np.float32)


def _parity(
    model: ForeignModel, settings: ImportSettings, classifier: OnnxClassifier, dataset: Dataset
) -> ParityReport:
    """Compares the wrapped graph with the original, whose input numpy prepares.

    Raises:
        InputError: `import.double_softmax`, `import.wrong_signature`, `import.parity_failed`.
    """
    rows = _rows(dataset)
    raw = model.run(
        _prepared(dataset.views[rows], settings.preparation, settings.layout), _filled(dataset.scalars)[rows]
    )
    if raw.shape[1] != len(settings.classes):
        raise InputError(
            "import.wrong_classes",
            "The model answers for another number of classes.",
            expected=list(settings.classes),
            got=raw.shape[1],
        )
    check_double_softmax(raw, logits=settings.logits)
    expected = softmax(raw) if settings.logits else raw
    got, _ = answers_of(classifier, dataset.views[rows], dataset.scalars[rows])
    half = model.image.type.tensor_type.elem_type == TensorProto.FLOAT16
    report = compare(expected, got, limit=_HALF_LIMIT if half else DIFFERENCE_LIMIT)
    if not report.passed:
        raise InputError(
            "import.parity_failed",
            "The wrapped model answers otherwise than the original.",
            expected=report.band / 2,
            got=report,
        )
    return report


def _trial(model: ForeignModel, settings: ImportSettings, dataset: Dataset, recipe: Recipe) -> Trial:
    """Returns what the search for a reason needs, on a part of the views."""
    rows = _rows(dataset)

    def answers(preparation: Preparation) -> NDArray[np.float64]:
        raw = model.run(_prepared(dataset.views[rows], preparation, settings.layout), _filled(dataset.scalars)[rows])
        return softmax(raw) if settings.logits else raw

    columns = columns_of(dataset, recipe)
    return Trial(answers, settings.preparation, columns[dataset.labels[rows]], recipe.good, recipe.classes)


def columns_of(dataset: Dataset, recipe: Recipe) -> NDArray[np.intp]:
    """Returns, per class of the folder, its column in the recipe; a recipe of one defect class takes every defect."""
    names = [recipe.good_class if k == 0 else name for k, name in enumerate(dataset.classes)]
    only = 1 - recipe.good if len(recipe.classes) == 2 else -1
    return np.array([recipe.classes.index(name) if name in recipe.classes else only for name in names], np.intp)


def _metrics(dataset: Dataset, recipe: Recipe, spec: PreprocessSpec, answers: NDArray[np.float64]) -> dict[str, Any]:
    """Returns view and item figures on the folder; the model may have learnt from its items."""
    good = recipe.good
    order = [good, *(k for k in range(len(recipe.classes)) if k != good)]
    columns = columns_of(dataset, recipe)
    known = (columns >= 0).all()
    place = np.array([order.index(c) if known else int(k > 0) for k, c in enumerate(columns)], np.intp)
    names = tuple(recipe.classes[k] for k in order) if known else (recipe.good_class, "bad")

    def reduced(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows[:, order] if known else np.column_stack((rows[:, good], 1.0 - rows[:, good]))

    found = list(items_of(dataset, spec.max_views))
    truth = np.array([place[item.truth] for item in found])
    fused = np.array([fuse(answers[item.chosen], recipe.fusion, good) for item in found])
    items = np.array([item.name for item in found])
    return {
        "protocol": "on the given folder; the imported model may have been trained on it",
        "view": measure(place[dataset.labels], reduced(answers), dataset.items, names),
        "item": measure(truth, reduced(fused), items, names),
    }
