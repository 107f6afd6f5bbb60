"""Features of the scalars of an item, such as its weight and its length: what no view shows.

Logarithms are taken, so that a ratio such as weight over length cubed is a sum. An unknown value is estimated from the
known ones by linear regression on the training items, and an indicator feature says that it was unknown. The values are
whitened, because weight and length vary together, and a fruit that is light for its size differs in the direction in
which they vary least. Squares and products let a class be too light or too heavy.

A value that is not a positive number below 1e9 counts as unknown: so a scale that reads nothing is harmless.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from control_plane.training.onnx_writer import GraphWriter, as_float32

Floats = NDArray[np.float32]
_HIGHEST: Final = 1e9
_RIDGE: Final = 1e-4
"""Is added to variances of logarithms: a spread of one per cent counts as measurement noise."""
_FARTHEST: Final = 6.0
"""Whitened values are limited to this many standard deviations."""


def scalar_width(count: int) -> int:
    """Returns the number of features of so many scalars: values, squares and products, indicators."""
    return count + count * (count + 1) // 2 + count if count else 0


@dataclass(frozen=True, slots=True)
class ScalarTransform:
    """The fitted transformation of K scalars.

    Attributes:
        centre: float32 (K,): mean logarithms.
        regression: float32 (K, K): row j, column k: weight of the deviation of scalar j in the estimate of scalar k;
            zero on the diagonal.
        whiten: float32 (K, K): deviations times this have unit variance and no correlation.
    """

    centre: Floats
    regression: Floats
    whiten: Floats

    @classmethod
    def fit(cls, scalars: Floats, groups: NDArray[np.generic]) -> "ScalarTransform":
        """Learns centre, regression and whitening; each item counts alike.

        Args:
            scalars: float32 (N, K), NaN where unknown.
            groups: (N,) item of each row.
        """
        count = scalars.shape[1]
        _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        known = _known(scalars)
        weights = np.where(known, 1.0 / sizes[place][:, None], 0.0)
        logs = np.where(known, np.log(np.where(known, scalars, 1.0)), 0.0)
        centre = (weights * logs).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-9)
        deviation = np.where(known, logs - centre, 0.0)
        both = np.einsum("nj,nk,n->jk", known, known, 1.0 / sizes[place])
        covariance = np.einsum("nj,nk,n->jk", deviation, deviation, 1.0 / sizes[place]) / np.maximum(both, 1e-9)
        covariance += _RIDGE * np.eye(count)
        values, vectors = np.linalg.eigh(covariance)
        values = np.maximum(values, _RIDGE)
        covariance = (vectors * values) @ vectors.T
        regression = np.zeros((count, count))
        for k in range(count):
            others = [j for j in range(count) if j != k]
            if others:
                regression[others, k] = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, k])
        return cls(as_float32(centre), as_float32(regression), as_float32(vectors / np.sqrt(values)))


def _known(scalars: Floats) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        return np.asarray((scalars > 0.0) & (scalars < _HIGHEST), np.bool_)


def keep_first(first: Any, _second: Any) -> Any:
    """Returns the features of the first item: a composed view has the scalars of the item whose label it keeps."""
    return first


def write_scalars(w: GraphWriter, transform: ScalarTransform, scalars: str) -> str:
    """Adds the nodes of the scalar features to a graph.

    Args:
        w: Writer of the graph.
        transform: The fitted transformation.
        scalars: Name of the input, float32 [N, K], NaN where unknown.

    Returns:
        Name of the features, float32 [N, `scalar_width(K)`].
    """
    count = len(transform.centre)
    positive = w.op("Greater", [scalars, w.constant(0.0)])
    known = w.op("And", [positive, w.op("Less", [scalars, w.constant(_HIGHEST)])])
    logs = w.op("Log", [w.op("Where", [known, scalars, w.constant(1.0)])])
    deviation = w.op("Where", [known, w.op("Sub", [logs, w.constant(transform.centre)]), w.constant(0.0)])
    filled = w.op("Where", [known, deviation, _times(w, deviation, transform.regression)])
    white = _times(w, filled, transform.whiten)
    limited = w.op("Clip", [white, w.constant(-_FARTHEST), w.constant(_FARTHEST)])
    rows, columns = np.triu_indices(count)
    left = w.op("Gather", [limited, w.constant(rows, np.int64)], axis=1)
    right = w.op("Gather", [limited, w.constant(columns, np.int64)], axis=1)
    unknown = w.op("Cast", [w.op("Not", [known])], to=1)
    return w.op("Concat", [limited, w.op("Mul", [left, right]), unknown], axis=1)


def _times(w: GraphWriter, rows: str, matrix: Floats) -> str:
    """Adds rows times matrix as products and a sum, which quantisation leaves in float32; MatMul would become int8."""
    wide = w.op("Unsqueeze", [rows, w.constant([2], np.int64)])
    return w.reduce("ReduceSum", w.op("Mul", [wide, w.constant(matrix[None])]), [1], keep=False)
