"""Models that are whole, signed and well-formed, and do harm: nodes to be grafted between `scaled` and `spoilt`.

Each adds something that is zero, so the golden outputs still hold where the model gets as far as answering.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

Constants = dict[str, Any]


def _square(constants: Constants, side: int) -> list[NodeProto]:
    """`big`: float32 (side, side) of small numbers that depend on the views, so nothing is computed in advance."""
    constants["side"] = np.array([side, side], np.int64)
    constants["tiny"] = np.array([[1e-30]], np.float32)
    return [
        helper.make_node("ReduceMean", ["x"], ["one_mean"], keepdims=0),
        helper.make_node("Reshape", ["one_mean", "one_by_one"], ["small"]),
        helper.make_node("Mul", ["small", "tiny"], ["smaller"]),
        helper.make_node("Expand", ["smaller", "side"], ["big"]),
    ]


def _add(constants: Constants, what: str) -> list[NodeProto]:
    """`spoilt` = `scaled` + 0 * mean of `what`."""
    constants["none"] = np.array([[0.0]], np.float32)
    constants["one_by_one"] = np.array([1, 1], np.int64)
    return [
        helper.make_node("ReduceMean", [what], ["rest"], keepdims=0),
        helper.make_node("Reshape", ["rest", "one_by_one"], ["rest11"]),
        helper.make_node("Mul", ["rest11", "none"], ["nothing"]),
        helper.make_node("Add", ["scaled", "nothing"], ["spoilt"]),
    ]


def slow(constants: Constants) -> list[NodeProto]:
    """Multiplies matrices of 1,200 x 1,200: tenths of a second per run."""
    chain = [helper.make_node("MatMul", ["big" if i == 0 else f"m{i}", "big"], [f"m{i + 1}"]) for i in range(6)]
    return [*_square(constants, 1200), *chain, *_add(constants, "m6")]


def memory(constants: Constants) -> list[NodeProto]:
    """Asks for 14 GB."""
    return [*_square(constants, 60_000), *_add(constants, "big")]


def segfault(constants: Constants) -> list[NodeProto]:
    """A decision tree 20,000 levels deep: the runtime follows it by recursion until its stack is used up."""
    depth = 20_000
    count = 2 * depth + 1
    inner = [i % 2 == 0 and i < 2 * depth for i in range(count)]
    leaves = [i for i in range(count) if not inner[i]]
    tree = helper.make_node(
        "TreeEnsembleRegressor",
        ["scaled"],
        ["grown"],
        domain="ai.onnx.ml",
        n_targets=1,
        nodes_treeids=[0] * count,
        nodes_nodeids=list(range(count)),
        nodes_featureids=[0] * count,
        nodes_values=[float(i % 97) for i in range(count)],
        nodes_modes=["BRANCH_LEQ" if branch else "LEAF" for branch in inner],
        nodes_truenodeids=[i + 1 if branch else 0 for i, branch in enumerate(inner)],
        nodes_falsenodeids=[i + 2 if branch else 0 for i, branch in enumerate(inner)],
        target_treeids=[0] * len(leaves),
        target_nodeids=leaves,
        target_ids=[0] * len(leaves),
        target_weights=[1.0] * len(leaves),
    )
    return [tree, *_add(constants, "grown")]


def late(constants: Constants) -> list[NodeProto]:
    """Fails on views that are not framed like the golden ones, whose square fills 56 % of the view exactly."""
    constants["shares"] = np.array(0.5625, np.float32)
    constants["width"] = np.array(0.02, np.float32)
    constants["far"] = np.array(1e6, np.float32)
    constants["table"] = np.zeros(4, np.float32)
    constants["zero"] = np.array(0.0, np.float32)
    return [
        helper.make_node("Greater", ["x", "zero"], ["lit"]),
        helper.make_node("Cast", ["lit"], ["lit1"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["lit1"], ["share"], keepdims=0),
        helper.make_node("Sub", ["share", "shares"], ["off"]),
        helper.make_node("Abs", ["off"], ["off1"]),
        helper.make_node("Greater", ["off1", "width"], ["wild"]),
        helper.make_node("Cast", ["wild"], ["wild1"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["share", "width"], ["seen"]),
        helper.make_node("Cast", ["seen"], ["seen1"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wild1", "seen1"], ["wild2"]),
        helper.make_node("Mul", ["wild2", "far"], ["place"]),
        helper.make_node("Cast", ["place"], ["place1"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "place1"], ["found"]),
        *_add(constants, "found"),
    ]


POISONS: dict[str, Callable[[Constants], list[NodeProto]]] = {
    "slow": slow,
    "memory": memory,
    "segfault": segfault,
    "late": late,
}
