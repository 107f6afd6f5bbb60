"""A small writer of ONNX graphs: names nodes, keeps constants, checks the result. It is independent of the features."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
ML_OPSET = 3


class GraphWriter:
    """Collects nodes and constants; every call returns the name of the new value."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._count = 0

    def fresh(self, hint: str) -> str:
        """Returns a name that is not in use."""
        self._count += 1
        return f"{self._prefix}{hint}_{self._count}"

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Stores an array and returns its name."""
        name = self.fresh("c")
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output and returns the name of the output."""
        name = output or self.fresh(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n_{name}", **attributes))
        return name

    def reduce(self, kind: str, value: str, axes: Sequence[int], *, keep: bool = True) -> str:
        """Adds a reduction; in opset 17 only ReduceSum takes its axes as an input."""
        if kind == "ReduceSum":
            return self.op(kind, [value, self.constant(list(axes), np.int64)], keepdims=int(keep))
        return self.op(kind, [value], axes=list(axes), keepdims=int(keep))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        name: str,
        metadata: dict[str, str] | None = None,
    ) -> onnx.ModelProto:
        """Returns the model after the checker has accepted it."""
        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.constants)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        model = helper.make_model(graph, opset_imports=imports, producer_name="sortline")
        model.ir_version = IR_VERSION
        helper.set_model_props(model, dict(sorted((metadata or {}).items())))
        onnx.checker.check_model(model)
        return model


def views_input(view_px: int) -> onnx.ValueInfoProto:
    """Declares the input `views`, uint8 [N, S, S, 3]."""
    return helper.make_tensor_value_info("views", TensorProto.UINT8, ["N", view_px, view_px, 3])


def floats(name: str, columns: int) -> onnx.ValueInfoProto:
    """Declares a value, float32 [N, columns]."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", columns])


def as_float32(array: Any) -> NDArray[np.float32]:
    """Returns the array as contiguous float32."""
    return np.ascontiguousarray(array, np.float32)
