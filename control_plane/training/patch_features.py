"""Features learnt from views, computed by an ONNX graph in training and on the line alike.

A dictionary of small patches per scale: patches are normalised by their own contrast and whitened, clustered by
k-means (Coates & Ng, "Learning Feature Representations with K-means", 2012), and applied as one convolution with a
soft threshold, pooled over the item by mean, by maximum and by the mean of local maxima: a defect may be small, so the
maximum must count, and every sound item has its stem, so one maximum must not decide. One
scale sees fine detail in colour, one sees larger form in brightness alone: the two err on different skins, so each
gets a classifier of its own (`head`) and their mean errs less than either. A third part (`colour_features`) measures
large soft areas of another colour, which contrast does not show. What is outside the item is filled with
the item's mean colour and no patch that touches it is pooled, so belt and backdrop cannot matter; contrast
normalisation takes out the lamp.

`write_features` is the only implementation; `FeatureExtractor.transform` runs it with ONNX Runtime.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from control_plane.training.colour_features import TINT_FEATURES, Tint, united_tint, write_tint
from control_plane.training.onnx_writer import GraphWriter, as_float32, floats, views_input
from control_plane.training.scalar_features import ScalarTransform, keep_first, scalar_width, write_scalars
from models.classifier import SCALARS_INPUT, ort

Views = NDArray[np.uint8]
Floats = NDArray[np.float32]
_WHITEN_EPS = 0.033
"""Is added to each eigenvalue per channel before whitening, in units of the normalised patch."""
_GREY = (0.2, 0.4, 0.4)
"""Weights of blue, green and red: less of the noisy blue."""
_INSIDE = 0.999
"""Share of a patch that must be item for its position to be pooled."""
_TILES = 3
"""The view is cut into this many by this many tiles, each of which gives one local maximum."""
_AT_ONCE = 4
"""Views per run of the graph: what lies between two nodes then stays in the processor's cache. 64 take twice the time
for the same bits (measured)."""
_LEAST_SHARE = 1e-4
"""Below one position in any picture: keeps the mean over no position finite."""


@dataclass(frozen=True, slots=True)
class PatchScale:
    """The shape of one dictionary: patches of `patch_px` on the view shrunk by `shrink`, every `stride` pixels."""

    shrink: int
    patch_px: int
    stride: int
    noise: float
    """Added to a patch's variance, grey levels squared: flat skin is not blown up to noise (Coates & Ng, section 2.1).
    Compression and camera noise have a variance of that size; it is less where pixels are averaged."""
    grey: bool = False

    @property
    def channels(self) -> int:
        """Channels of its patches: 1 in grey, 3 in colour."""
        return 1 if self.grey else 3


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Shape of the feature extractor."""

    view_px: int = 64
    filters: int = 192
    """Patches in the dictionary of each scale."""
    scales: tuple[PatchScale, ...] = (
        PatchScale(1, 6, 2, noise=60.0),
        PatchScale(2, 6, 1, noise=20.0, grey=True),
    )
    patches: int = 50_000
    """Patches per scale that the dictionary is learnt on."""
    threshold: float = 1.0
    """The soft threshold, in units of the whitened patch (Coates & Ng 2012)."""
    tint: bool = True
    """Whether the last part measures colour and brightness relative to the item (`colour_features`)."""
    scalars: tuple[str, ...] = ()
    """Names of the scalars that a part behind all others describes (`scalar_features`)."""


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Kernels float32 (filters, channels, p, p), each of mean zero, and biases float32 (filters,), none above zero.

    Mean zero takes the patch's mean out by itself; without positive biases a patch of no contrast excites nothing.
    """

    kernels: Floats
    biases: Floats


@dataclass(frozen=True, slots=True)
class FeatureExtractor:
    """Fitted dictionaries, one per scale, the usual tint, and the transformation of the scalars."""

    spec: FeatureSpec
    dictionaries: tuple[Dictionary, ...]
    tint: Tint | None = None
    scalars: ScalarTransform | None = None

    @classmethod
    def fit(
        cls,
        views: Views,
        groups: NDArray[np.generic],
        spec: FeatureSpec,
        *,
        seed: int,
        scalars: Floats | None = None,
    ) -> "FeatureExtractor":
        """Learns the dictionaries.

        Args:
            views: uint8 (N, S, S, 3) BGR, background zero.
            groups: (N,) item of each view: each item gives about equally many patches.
            spec: Shape of the extractor.
            scalars: float32 (N, K), NaN where unknown; needed where the shape has scalars.
            seed: Seed of the drawn patches and the first centroids; the same seed and views give the same bytes.
        """
        rng = np.random.default_rng(seed)
        found = tuple(_learn(views, groups, spec, scale, rng, seed) for scale in spec.scales)
        measured = ScalarTransform.fit(scalars, groups) if spec.scalars and scalars is not None else None
        return cls(spec, found, Tint.fit(views, groups) if spec.tint else None, measured)

    def only(self, parts: Sequence[int]) -> "FeatureExtractor":
        """Returns an extractor with only the parts of these numbers."""
        scales = len(self.spec.scales)
        kept = [k for k in range(scales) if k in parts]
        measured = scales + self.spec.tint in parts
        spec = replace(
            self.spec,
            scales=tuple(self.spec.scales[k] for k in kept),
            tint=self.spec.tint and scales in parts,
            scalars=self.spec.scalars if measured else (),
        )
        return FeatureExtractor(
            spec,
            tuple(self.dictionaries[k] for k in kept),
            self.tint if spec.tint else None,
            self.scalars if measured else None,
        )

    def transform(self, views: Views, scalars: Floats | None = None) -> Floats:
        """Returns float32 (N, F), the features of each view.

        Args:
            views: uint8 (N, S, S, 3) BGR, background zero.
            scalars: float32 (N, K), NaN where unknown; None = all unknown.
        """
        feed: dict[str, NDArray[Any]] = {"views": views}
        if self.scalars is not None:
            unknown = np.full((len(views), len(self.spec.scalars)), np.nan, np.float32)
            feed[SCALARS_INPUT] = unknown if scalars is None else as_float32(scalars)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        graph = features_graph(self).SerializeToString()
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        parts = [np.zeros((0, feature_count(self.spec)), np.float32)]
        for start in range(0, len(views), _AT_ONCE):
            part = {name: np.ascontiguousarray(rows[start : start + _AT_ONCE]) for name, rows in feed.items()}
            parts.append(session.run(["features"], part)[0])
        return np.concatenate(parts).astype(np.float32, copy=False)


def _learn(
    views: Views, groups: NDArray[np.generic], spec: FeatureSpec, scale: PatchScale, rng: np.random.Generator, seed: int
) -> Dictionary:
    patches = normalised(_sample_patches(views, groups, spec, scale, rng), scale.noise)
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((patches - mean).T.astype(np.float64)))
    whiten = vectors @ np.diag(1.0 / np.sqrt(np.maximum(values, 0.0) + _WHITEN_EPS * scale.channels)) @ vectors.T
    white = ((patches - mean) @ whiten).astype(np.float32)
    clusters = min(spec.filters, len(white))
    means = MiniBatchKMeans(
        n_clusters=clusters,
        random_state=seed,
        n_init=1,
        batch_size=4096,
        max_iter=12,
        reassignment_ratio=0.0,
        compute_labels=False,
    ).fit(white)
    atoms = np.zeros((spec.filters, white.shape[1]))
    atoms[:clusters] = means.cluster_centers_
    atoms /= np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-9)
    flat = atoms @ whiten.T
    biases = np.minimum(-(flat @ mean) - spec.threshold, 0.0)
    flat -= flat.mean(axis=1, keepdims=True)
    shaped = flat.reshape(spec.filters, scale.patch_px, scale.patch_px, scale.channels).transpose(0, 3, 1, 2)
    return Dictionary(as_float32(shaped), as_float32(biases))


def normalised(patches: Floats, noise: float) -> Floats:
    """Returns float32 (N, D): each patch minus its mean, divided by its own contrast."""
    centred = patches - patches.mean(axis=1, keepdims=True)
    return as_float32(centred / np.sqrt(patches.var(axis=1, keepdims=True) + noise))


def shrunk(views: Views, scale: PatchScale) -> tuple[Floats, NDArray[np.bool_]]:
    """Returns the first step of the graph in numpy, for sampling patches and as the reference in tests.

    Returns:
        float32 (N, s, s, channels): mean colour (or grey) of the item pixels of each block of `shrink` x `shrink`,
        the item's mean where a block is not mostly item; bool (N, s, s): mostly item.
    """
    shrink = scale.shrink
    x = views.astype(np.float32)
    inside = (x.max(axis=3, keepdims=True) > 0).astype(np.float32)
    if scale.grey:
        x = x @ np.array(_GREY, np.float32)[:, None]
    count = np.maximum(inside.sum(axis=(1, 2, 3)), 1.0)
    mean = (x.sum(axis=(1, 2)) / count[:, None])[:, None, None, :]
    side = x.shape[1] // shrink
    blocks = x[:, : side * shrink, : side * shrink].reshape(len(x), side, shrink, side, shrink, -1).mean(axis=(2, 4))
    share = inside[:, : side * shrink, : side * shrink].reshape(len(x), side, shrink, side, shrink, 1).mean(axis=(2, 4))
    mostly = share > 0.5
    return as_float32(np.where(mostly, blocks / np.maximum(share, 1e-3), mean)), mostly[..., 0]


def _sample_patches(
    views: Views, groups: NDArray[np.generic], spec: FeatureSpec, scale: PatchScale, rng: np.random.Generator
) -> Floats:
    """Returns float32 (patches, p * p * channels) from inside the items, about equally many per item."""
    size = scale.patch_px
    names = np.unique(groups)
    each = max(8, spec.patches // len(names))
    found: list[Floats] = []
    for name in names:
        members = np.flatnonzero(groups == name)
        chosen = rng.choice(members, size=min(len(members), max(1, each // 24)), replace=False)
        colours, inside = shrunk(views[chosen], scale)
        side = colours.shape[1]
        per_view = -(-each // len(chosen))
        for picture, mask in zip(colours, inside, strict=True):
            y, x = rng.integers(0, side - size + 1, size=(per_view, 2)).T
            whole = sliding_window_view(mask, (size, size))[y, x].all(axis=(1, 2))
            windows = sliding_window_view(picture, (size, size), axis=(0, 1))[y[whole], x[whole]]
            found.append(windows.transpose(0, 2, 3, 1).reshape(-1, size * size * scale.channels))
    if not sum(map(len, found)):  # items too small to hold a patch still give one
        colours, _ = shrunk(views, scale)
        found = [picture[:size, :size].reshape(1, -1) for picture in colours]
    return np.concatenate(found)


def united(first: Floats, second: Floats) -> Floats:
    """Features of one scale as if one view showed what two views show, side by side and as large as before.

    Follows from how `_pooled` pools: means average, a maximum is the larger one, local maxima average.

    Args:
        first: (N, 3 * filters): root of the mean, maximum, mean of local maxima.
        second: (N, 3 * filters).

    Returns:
        (N, 3 * filters); `united(a, a) == a`, and the order of the two does not matter.
    """
    mean_a, top_a, tops_a = np.split(first, 3, axis=1)
    mean_b, top_b, tops_b = np.split(second, 3, axis=1)
    mean = np.sqrt((mean_a**2 + mean_b**2) / 2.0)
    return as_float32(np.hstack([mean, np.maximum(top_a, top_b), (tops_a + tops_b) / 2.0]))


def widths(spec: FeatureSpec) -> tuple[int, ...]:
    """Returns the number of features of each part: one part per scale, then tint, then scalars."""
    own = (scalar_width(len(spec.scalars)),) if spec.scalars else ()
    return (3 * spec.filters,) * len(spec.scales) + (TINT_FEATURES,) * spec.tint + own


def unions(spec: FeatureSpec) -> list[Callable[[Floats, Floats], Floats]]:
    """Returns, per part, the function that unites the features of two views."""
    found: list[Callable[[Floats, Floats], Floats]] = [united] * len(spec.scales)
    return found + [united_tint] * spec.tint + [keep_first] * bool(spec.scalars)


def part_names(spec: FeatureSpec) -> list[str]:
    """Returns a name for each part that people read, in the order of `widths`."""
    names = [f"contrast in {'brightness' if scale.grey else 'colour'}, 1/{scale.shrink}" for scale in spec.scales]
    return names + ["tint"] * spec.tint + [f"scalars: {', '.join(spec.scalars)}"] * bool(spec.scalars)


def feature_count(spec: FeatureSpec) -> int:
    """Returns F, the number of features of one view."""
    return sum(widths(spec))


def features_graph(extractor: FeatureExtractor) -> onnx.ModelProto:
    """Returns the features as a model of their own: `views` -> `features` float32 [N, F], one part after the other."""
    w = GraphWriter()
    w.op("Concat", write_features(w, extractor), output="features", axis=1)
    return w.model(graph_inputs(extractor), [floats("features", feature_count(extractor.spec))], name="features")


def graph_inputs(extractor: FeatureExtractor) -> list[onnx.ValueInfoProto]:
    """Returns the inputs that `write_features` reads: `views`, and `scalars` where there are any."""
    own = [floats(SCALARS_INPUT, len(extractor.spec.scalars))] if extractor.scalars is not None else []
    return [views_input(extractor.spec.view_px), *own]


def write_features(w: GraphWriter, extractor: FeatureExtractor) -> list[str]:
    """Adds the feature nodes to a graph with the inputs of `graph_inputs`; returns the features of each part."""
    colour = w.op("Transpose", [w.op("Cast", ["views"], to=1)], perm=[0, 3, 1, 2])
    inside = w.op("Cast", [w.op("Greater", [w.reduce("ReduceMax", colour, [1]), w.constant(0.0)])], to=1)
    count = w.op("Max", [w.reduce("ReduceSum", inside, [2, 3]), w.constant(1.0)])
    grey = w.op("Conv", [colour, w.constant(np.reshape(_GREY, (1, 3, 1, 1)))])
    parts: list[str] = []
    for scale, dictionary in zip(extractor.spec.scales, extractor.dictionaries, strict=True):
        x = grey if scale.grey else colour
        mean = w.op("Div", [w.reduce("ReduceSum", x, [2, 3]), count])
        picture, mostly = _shrink(w, x, inside, mean, scale.shrink)
        positions = (extractor.spec.view_px // scale.shrink - scale.patch_px) // scale.stride + 1
        parts.append(_pooled(w, picture, mostly, dictionary, scale, positions))
    if extractor.tint is not None:
        parts.append(write_tint(w, extractor.tint, colour, inside))
    if extractor.scalars is not None:
        parts.append(write_scalars(w, extractor.scalars, SCALARS_INPUT))
    return parts


def _shrink(w: GraphWriter, x: str, inside: str, mean: str, shrink: int) -> tuple[str, str]:
    """`shrunk` as nodes: [N, channels, s, s] and [N, 1, s, s]."""
    share = inside
    if shrink > 1:
        shape: dict[str, Any] = {"kernel_shape": [shrink] * 2, "strides": [shrink] * 2}
        x, share = w.op("AveragePool", [x], **shape), w.op("AveragePool", [inside], **shape)
    mostly = w.op("Greater", [share, w.constant(0.5)])
    colour = w.op("Div", [x, w.op("Max", [share, w.constant(1e-3)])])
    return w.op("Where", [mostly, colour, mean]), w.op("Cast", [mostly], to=1)


def _pooled(
    w: GraphWriter, picture: str, mostly: str, dictionary: Dictionary, scale: PatchScale, positions: int
) -> str:
    """Responses to contrast-normalised patches at `positions` x `positions`, soft-thresholded and pooled over the item.

    With patch mean m, contrast s, kernel k of mean zero and bias b: k . (patch - m) / s + b = conv(patch) / s + b, so
    that normalisation costs two small poolings instead of touching every patch. Where a patch is not all item, 1 / s
    is set to zero: with b <= 0 nothing is left of it after the threshold.
    """
    window: dict[str, Any] = {"kernel_shape": [scale.patch_px] * 2, "strides": [scale.stride] * 2}
    response = w.op("Conv", [picture, w.constant(dictionary.kernels)], **window)
    m = w.op("AveragePool", [w.reduce("ReduceMean", picture, [1])], **window)
    square = w.op("AveragePool", [w.reduce("ReduceMean", w.op("Mul", [picture, picture]), [1])], **window)
    variance = w.op("Relu", [w.op("Sub", [square, w.op("Mul", [m, m])])])
    contrast = w.op("Sqrt", [w.op("Add", [variance, w.constant(scale.noise)])])
    covered = w.op("AveragePool", [mostly], **window)
    pooled = w.op("Cast", [w.op("Greater", [covered, w.constant(_INSIDE)])], to=1)
    scaled = w.op("Mul", [response, w.op("Div", [pooled, contrast])])
    active = w.op("Relu", [w.op("Add", [scaled, w.constant(dictionary.biases.reshape(1, -1, 1, 1))])])
    share = w.op("Max", [w.op("GlobalAveragePool", [pooled]), w.constant(_LEAST_SHARE)])
    mean = w.op("Div", [w.op("GlobalAveragePool", [active]), share])
    tile = -(-positions // _TILES)
    tops = w.op("MaxPool", [active], kernel_shape=[tile] * 2, strides=[tile] * 2, ceil_mode=1)
    pools = [w.op("Sqrt", [mean]), w.op("GlobalMaxPool", [tops]), w.op("GlobalAveragePool", [tops])]
    return w.op("Flatten", [w.op("Concat", pools, axis=1)], axis=1)
