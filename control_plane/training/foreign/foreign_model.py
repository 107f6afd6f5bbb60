"""A model trained elsewhere, as its file describes it: inputs, output, class names, weights beside it, number format.

What the file leaves open (scaling, order of channels, meaning of the outputs) is stated by a person and tested by
`import_checks`.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper

from models.bundle import MAX_FILE_BYTES
from models.classifier import ort
from models.errors import InputError

FLOATS: Final[dict[int, np.dtype[Any]]] = {
    int(TensorProto.FLOAT): np.dtype(np.float32),
    int(TensorProto.FLOAT16): np.dtype(np.float16),
}
"""Types of input and output that are taken; half precision is cast at the border of the graph."""
_NAME_KEYS: Final = ("names", "class_names", "classes", "labels", "id2label")
"""Metadata in which Ultralytics, Roboflow, Keras converters and Hugging Face keep class names."""
_ROW_RANK: Final = 2
_IMAGE_RANK: Final = 4


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A checked model and what its file contains.

    Attributes:
        proto: The model with its weights inside.
        image: The input that takes pictures.
        scalars: The input that takes scalars, or None.
        output: The output that answers for the classes.
        others: Names of the other outputs.
        names: Class names in the model's order; empty = the file has none.
    """

    proto: onnx.ModelProto
    image: onnx.ValueInfoProto
    scalars: onnx.ValueInfoProto | None
    output: onnx.ValueInfoProto
    others: tuple[str, ...]
    names: tuple[str, ...]

    def run(self, pictures: NDArray[np.float32], scalars: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Returns the raw outputs, float64 (N, C), of prepared pictures, run one by one: the batch may be fixed."""
        session = ort.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])
        kind = FLOATS[self.image.type.tensor_type.elem_type]
        answers = []
        for row in range(len(pictures)):
            feed: dict[str, Any] = {self.image.name: pictures[row : row + 1].astype(kind)}
            if self.scalars is not None and scalars is not None:
                own = FLOATS[self.scalars.type.tensor_type.elem_type]
                feed[self.scalars.name] = scalars[row : row + 1].astype(own)
            answers.append(session.run([self.output.name], feed)[0])
        return np.concatenate(answers).astype(np.float64)


def read_model(path: Path, classes: int, scalars: int) -> ForeignModel:
    """Reads and checks an ONNX file, with weights that lie in files beside it.

    Args:
        path: The .onnx file.
        classes: Number of classes that the output must have; 0 = as many as the model names.
        scalars: Number of scalars that the second input must take; 0 = there is no second input.

    Raises:
        InputError: `import.oversize`, `import.unreadable`, `import.external_data`, `import.wrong_signature`,
            `import.wrong_classes`.
    """
    proto = _loaded(path)
    names = class_names(proto)
    image, second = _inputs(proto, scalars)
    output = _output(proto, classes or len(names))
    others = tuple(o.name for o in proto.graph.output if o.name != output.name)
    return ForeignModel(proto, image, second, output, others, names)


def _loaded(path: Path) -> onnx.ModelProto:
    try:
        _bounded(path, path.stat().st_size)
        model = onnx.load_model(str(path), load_external_data=False)
        beside = [t for t in _tensors(model.graph) if t.data_location == TensorProto.EXTERNAL]
        if beside:
            _load_beside(path, model, beside)
        onnx.checker.check_model(model)
    except InputError:
        raise
    except Exception as error:  # protobuf, the checker and the file system raise unrelated types
        raise InputError(
            "import.unreadable", f"{path} is no valid ONNX model.", expected="an .onnx file", got=str(error)[:200]
        ) from error
    return model


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Returns the initialisers and the constants of a graph, of its subgraphs too."""
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            if attribute.HasField("g"):
                found += _tensors(attribute.g)
    return found


def _load_beside(path: Path, model: onnx.ModelProto, tensors: Sequence[onnx.TensorProto]) -> None:
    """Loads weights from the files beside the model; a file elsewhere, or one that is missing, is refused."""
    files = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    total = path.stat().st_size
    for name in sorted(files):
        place = (path.parent / name).resolve()
        if not place.is_relative_to(path.parent.resolve()) or not place.is_file():
            raise InputError(
                "import.external_data",
                f"The model keeps its weights in {name}, which is not beside it.",
                expected=f"{path.parent / name}",
                got="no such file",
            )
        total += place.stat().st_size
    _bounded(path, total)
    external_data_helper.load_external_data_for_model(model, str(path.parent.resolve()))


def _bounded(path: Path, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise InputError(
            "import.oversize", f"{path} is too large.", expected=f"<= {MAX_FILE_BYTES} bytes with its weights", got=size
        )


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    """Returns the shape of a tensor; fixed sizes are numbers, free ones names. Empty for what is no tensor."""
    if not value.type.HasField("tensor_type"):
        return []
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def _described(values: Sequence[onnx.ValueInfoProto]) -> list[str]:
    kinds = {v.name: v.type.tensor_type.elem_type if v.type.HasField("tensor_type") else 0 for v in values}
    names = {v.name: TensorProto.DataType.Name(kinds[v.name]).lower() if kinds[v.name] else "no tensor" for v in values}
    return [f"{v.name}: {names[v.name]} {dims(v)}" for v in values]


def _inputs(proto: onnx.ModelProto, scalars: int) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto | None]:
    """Returns the input for pictures and the one for scalars."""
    weights = {t.name for t in proto.graph.initializer}
    inputs = [i for i in proto.graph.input if i.name not in weights]
    taken = [i for i in inputs if i.type.tensor_type.elem_type in FLOATS]
    images = [i for i in taken if len(dims(i)) == _IMAGE_RANK]
    rows = [
        i for i in taken if len(dims(i)) == _ROW_RANK and dims(i)[1] in {scalars, ""} | ({"K"} if scalars else set())
    ]
    if len(images) != 1 or len(inputs) != 1 + bool(scalars) or (scalars and len(rows) != 1):
        wanted = "one input of pictures, float32 or float16 with 4 dimensions"
        raise InputError(
            "import.wrong_signature",
            "The model does not take one batch of pictures"
            + (f" and {scalars} scalars." if scalars else " alone; name the scalars it takes, if it does."),
            expected=wanted + (f", and one of scalars, [N, {scalars}]" if scalars else ""),
            got=_described(inputs),
        )
    return images[0], rows[0] if scalars else None


def _output(proto: onnx.ModelProto, classes: int) -> onnx.ValueInfoProto:
    """Returns the output whose shape is that of answers for the classes; of several, the first."""
    outputs = list(proto.graph.output)
    rows = [o for o in outputs if o.type.tensor_type.elem_type in FLOATS and len(dims(o)) == _ROW_RANK]
    exact = [o for o in rows if classes and dims(o)[1] == classes]
    free = [o for o in rows if isinstance(dims(o)[1], str)]
    if not exact and not free:
        raise InputError(
            "import.wrong_classes",
            "No output of the model answers for this number of classes.",
            expected=f"an output [N, {classes}], float32 or float16 (scikit-learn: export with zipmap=False)",
            got=_described(outputs),
        )
    chosen: onnx.ValueInfoProto = (exact or free)[0]
    return chosen


def class_names(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Returns the class names in the model's order, as exporters write them; empty where there are none."""
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    for key in _NAME_KEYS:
        found = _names_in(facts.get(key, ""))
        if found:
            return found
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"classlabels_strings", "classlabels_string"} and attribute.strings:
                return tuple(text.decode("utf-8", "replace") for text in attribute.strings)
    return ()


def _names_in(text: str) -> tuple[str, ...]:
    """Reads names from JSON, from a Python literal (Ultralytics), or from a list with commas."""
    if not text or len(text) > 100_000:
        return ()
    value: Any = None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            break
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    if value is None:
        value = [part.strip() for part in text.split(",")] if "," in text else []
    if isinstance(value, dict):
        try:
            value = [value[key] for key in sorted(value, key=int)]
        except (TypeError, ValueError):
            return ()
    well = isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(name, str) for name in value)
    return tuple(value) if well else ()
