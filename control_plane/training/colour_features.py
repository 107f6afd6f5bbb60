"""Tint features: how much the colour of each place differs from the usual colour of that place on an item.

Patches normalised by their own contrast (`patch_features`) show edges and texture; a large soft brown or dull area has
neither. Here brightness and two colour differences (logarithms of ratios, so that the lamp's gain falls out) are
taken relative to the item's own mean, and then relative to the mean of all items at the same place of the view:
shading and the darker rim are usual, a bruise is not. These deviations, as they are and smoothed over two
neighbourhoods, are projected on directions spread over the sphere and pooled as mean excess over thresholds and as
extremes: a soft histogram of "how much of the item is how different, and in which way".

The usual colour is only known from many items: from twenty items the features describe those twenty skins. `ensemble`
therefore gives their member a vote only where that lowers the loss on items it was not fitted on.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from control_plane.training.onnx_writer import GraphWriter, as_float32

Floats = NDArray[np.float32]
_SHRINK: Final = 2
_DARK: Final = 6.0
"""Grey levels added before the logarithm, so that noise in dark places stays small."""
_OPPONENT: Final = ((0.2, 0.4, 0.4), (0.0, -1.0, 1.0), (-1.0, 1.0, 0.0))
"""Rows: brightness, red against green, green against blue; of log B, G, R."""
_DIRECTIONS: Final = 12
_THRESHOLDS: Final = (0.0, 1.0, 2.0)
"""In standard deviations of all places of all items."""
_NEIGHBOURHOODS: Final = (3, 5)
"""Sides of the neighbourhoods, in places; every second place is measured."""
_LEAST_SPREAD: Final = 1e-3
_AT_ONCE: Final = 128
"""Views per batch while fitting: some 40 MB."""
TINT_FEATURES: Final = (1 + len(_NEIGHBOURHOODS)) * 2 * _DIRECTIONS * (len(_THRESHOLDS) + 1)


@dataclass(frozen=True, slots=True)
class Tint:
    """The usual colour of an item.

    Attributes:
        usual: float32 (3, s, s): mean of brightness and colour differences at each place, relative to the item's mean.
        spread: float32 (3,): standard deviation around it.
    """

    usual: Floats
    spread: Floats

    @classmethod
    def fit(cls, views: NDArray[np.uint8], groups: NDArray[np.generic]) -> "Tint":
        """Learns the usual colour; each item counts alike.

        Args:
            views: uint8 (N, S, S, 3) BGR, background zero.
            groups: (N,) item of each view.
        """
        _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1.0 / counts[place]
        side = views.shape[1] // _SHRINK
        covered, total, squares = np.zeros((side, side, 1)), np.zeros((side, side, 3)), np.zeros((side, side, 3))
        for start in range(0, len(views), _AT_ONCE):
            relative, mostly = _relative(views[start : start + _AT_ONCE])
            share = weights[start : start + _AT_ONCE]
            covered += np.tensordot(share, mostly, 1)[..., None]
            total += np.tensordot(share, relative, 1)
            squares += np.tensordot(share, relative**2, 1)
        usual = total / np.maximum(covered, 1e-9)
        variance = (squares - covered * usual**2).sum(axis=(0, 1)) / max(covered.sum(), 1e-9)
        spread = np.maximum(np.sqrt(np.maximum(variance, 0.0)), _LEAST_SPREAD)
        return cls(as_float32(usual.transpose(2, 0, 1)), as_float32(spread))


def united_tint(first: Floats, second: Floats) -> Floats:
    """Features as if one view showed what two views show, as `patch_features.united` does.

    Args:
        first: (N, TINT_FEATURES).
        second: (N, TINT_FEATURES).
    """
    shape = (len(first), 1 + len(_NEIGHBOURHOODS), 1 + len(_THRESHOLDS), 2 * _DIRECTIONS)
    a, b = first.reshape(shape), second.reshape(shape)
    both = np.sqrt((a**2 + b**2) / 2.0)
    both[:, :, 0] = np.maximum(a[:, :, 0], b[:, :, 0])
    return as_float32(both.reshape(len(first), TINT_FEATURES))


def directions() -> Floats:
    """Returns float32 (D, 3): unit vectors spread evenly over half a sphere (a Fibonacci lattice)."""
    k = np.arange(_DIRECTIONS) + 0.5
    height = 1.0 - k / _DIRECTIONS
    angle = np.pi * (1.0 + np.sqrt(5.0)) * k
    ring = np.sqrt(1.0 - height**2)
    return as_float32(np.stack((ring * np.cos(angle), ring * np.sin(angle), height), axis=1))


def _relative(views: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the first half of the graph in numpy, for fitting: float64 (N, s, s, 3), zero outside; bool (N, s, s)."""
    side = views.shape[1] // _SHRINK
    cut = views[:, : side * _SHRINK, : side * _SHRINK].astype(np.float64)
    inside = (cut.max(axis=3) > 0).astype(np.float64)
    blocks = cut.reshape(len(views), side, _SHRINK, side, _SHRINK, 3).mean(axis=(2, 4))
    share = inside.reshape(len(views), side, _SHRINK, side, _SHRINK).mean(axis=(2, 4))
    mostly = share > 0.5
    logs = np.log(blocks / np.maximum(share, 1e-3)[..., None] + _DARK) @ np.array(_OPPONENT).T
    count = np.maximum(mostly.sum(axis=(1, 2)), 1.0)[:, None, None, None]
    mean = (logs * mostly[..., None]).sum(axis=(1, 2), keepdims=True) / count
    return np.where(mostly[..., None], logs - mean, 0.0), mostly


def write_tint(w: GraphWriter, tint: Tint, colour: str, inside: str) -> str:
    """Adds the nodes of the tint features to a graph.

    Args:
        w: Writer of the graph.
        tint: The fitted usual colour.
        colour: float32 [N, 3, S, S] BGR, background zero.
        inside: float32 [N, 1, S, S], 1 on the item.

    Returns:
        The features, float32 [N, TINT_FEATURES].
    """
    shape: dict[str, Any] = {"kernel_shape": [_SHRINK] * 2, "strides": [_SHRINK] * 2}
    share = w.op("AveragePool", [inside], **shape)
    mostly = w.op("Cast", [w.op("Greater", [share, w.constant(0.5)])], to=1)
    mean_colour = w.op("Div", [w.op("AveragePool", [colour], **shape), w.op("Max", [share, w.constant(1e-3)])])
    logs = w.op("Log", [w.op("Add", [mean_colour, w.constant(_DARK)])])
    opponent = w.op("Conv", [logs, w.constant(np.reshape(_OPPONENT, (3, 3, 1, 1)))])
    count = w.op("Max", [w.reduce("ReduceSum", mostly, [2, 3]), w.constant(1.0)])
    mean = w.op("Div", [w.reduce("ReduceSum", w.op("Mul", [opponent, mostly]), [2, 3]), count])
    relative = w.op("Sub", [w.op("Sub", [opponent, mean]), w.constant(tint.usual[None])])
    deviation = w.op("Mul", [w.op("Div", [relative, w.constant(tint.spread.reshape(1, 3, 1, 1))]), mostly])
    parts = [_pooled(w, deviation, count)]
    parts += [_pooled(w, *_smoothed(w, deviation, mostly, size)) for size in _NEIGHBOURHOODS]
    return w.op("Flatten", [w.op("Concat", parts, axis=1)], axis=1)


def _smoothed(w: GraphWriter, deviation: str, mostly: str, size: int) -> tuple[str, str]:
    """Writes means over neighbourhoods that are mostly item (else zero) at every second place, and their count."""
    shape: dict[str, Any] = {
        "kernel_shape": [size] * 2,
        "pads": [size // 2] * 4,
        "strides": [2] * 2,
        "count_include_pad": 1,
    }
    covered = w.op("AveragePool", [mostly], **shape)
    counted = w.op("Cast", [w.op("Greater", [covered, w.constant(0.5)])], to=1)
    inverse = w.op("Div", [counted, w.op("Max", [covered, w.constant(0.5)])])
    smooth = w.op("Mul", [w.op("AveragePool", [deviation], **shape), inverse])
    return smooth, w.op("Max", [w.reduce("ReduceSum", counted, [2, 3]), w.constant(1.0)])


def _pooled(w: GraphWriter, deviation: str, count: str) -> str:
    """Writes, per direction and sign, square roots of the mean excess over each threshold, and the extreme."""
    axes = directions()
    both = np.concatenate((axes, -axes))[:, :, None, None]
    along = w.op("Conv", [deviation, w.constant(both)])
    pools = [w.op("GlobalMaxPool", [along])]
    for threshold in _THRESHOLDS:
        excess = w.op("Relu", [along if threshold == 0.0 else w.op("Sub", [along, w.constant(threshold)])])
        pools.append(w.op("Sqrt", [w.op("Div", [w.reduce("ReduceSum", excess, [2, 3]), count])]))
    return w.op("Concat", pools, axis=1)
