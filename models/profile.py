"""Reference profile: bins of each monitored feature, the class mix, and how counts are compared with them."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError
from models.histogram import Count
from models.view_spec import VIEW_FEATURES

BINS: Final = 16
LEAST_ITEMS: Final = 32
"""Fewer items of a variety, or fewer known values of a scalar, are no reference: two to a bin."""
MOST_VARIETIES: Final = 64
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


def feature_names(embedding_size: int) -> tuple[str, ...]:
    """Returns the names of the monitored features of an item, in the order of `item_features`."""
    return (*VIEW_FEATURES, "logit", "entropy", *(f"embedding_{k}" for k in range(embedding_size)))


def item_features(
    view_features: NDArray[np.float32],
    embedding: NDArray[np.float32],
    probabilities: Iterable[float],
    defect: float,
) -> NDArray[np.float32]:
    """Returns the monitored features of one judged item.

    Args:
        view_features: float32 (V, 9) of `models.preprocess.view_features`.
        embedding: float32 (V, E).
        probabilities: The item's fused class probabilities.
        defect: The item's defect probability.

    Returns:
        float32 (9 + 2 + E,): means over the views, log-odds of the defect probability, entropy in nats.
    """
    p = min(max(defect, 1e-6), 1.0 - 1e-6)
    entropy = -sum(q * math.log(q) for q in probabilities if q > 0.0)
    own = np.array([math.log(p / (1.0 - p)), entropy], np.float32)
    return np.concatenate((view_features.mean(axis=0), own, embedding.mean(axis=0))).astype(np.float32)


class ScalarBins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reference of one measured scalar, such as `weight_g`."""

    edges: tuple[float, ...]
    """15 ascending inner edges, the k/16 quantiles of the reference items, in the scalar's unit."""
    counts: tuple[Count, ...]
    """Number of reference items in each of the 16 bins."""


class VarietyReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reference items of one variety, in the bins of the whole profile."""

    items: Count
    counts: tuple[tuple[Count, ...], ...]
    """For each feature the number of items in each of the 16 bins."""
    class_counts: dict[Label, Count]
    """Number of verdicts of each class."""

    def count_array(self) -> NDArray[np.int64]:
        """Returns the counts as int64 (F, 16)."""
        return np.asarray(self.counts, np.int64).reshape(len(self.counts), BINS)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reference of a bundle (`profile.msgpack`): bin edges, counts and class mix of its training items."""

    schema_version: Literal[1] = 1
    features: tuple[Label, ...]
    edges: tuple[tuple[float, ...], ...]
    """For each feature 15 ascending inner edges, the k/16 quantiles of the reference items."""
    counts: tuple[tuple[Count, ...], ...]
    """For each feature the number of reference items in each of the 16 bins."""
    class_counts: dict[Label, Count]
    """Number of verdicts of each class on the reference items."""
    items: Count
    view_defect: tuple[float, ...] = ()
    """Mean defect probability of each lot's items, where lots are known: the spread between lots."""
    scalars: dict[Label, ScalarBins] = {}
    """Reference of each measured scalar that the training data know."""
    varieties: Annotated[dict[Label, VarietyReference], msgspec.Meta(max_length=MOST_VARIETIES)] = {}
    """Reference of each variety with enough items in the training data."""

    def check(self) -> None:
        """Refuses a profile whose parts do not fit.

        Raises:
            BundleError: `profile.inconsistent`.
        """
        rows = len(self.features)
        shapes_ok = len(self.edges) == len(self.counts) == rows and all(
            len(edges) == BINS - 1 and len(counts) == BINS
            for edges, counts in zip(self.edges, self.counts, strict=True)
        )
        if not shapes_ok or any(not all(map(math.isfinite, e)) or list(e) != sorted(e) for e in self.edges):
            raise BundleError(
                "profile.inconsistent",
                "profile.msgpack contradicts itself.",
                expected=f"{rows} features with {BINS - 1} finite ascending edges and {BINS} counts each",
                got=f"{len(self.edges)} rows of edges, {len(self.counts)} of counts",
            )
        for name, bins in self.scalars.items():
            finite = len(bins.edges) == BINS - 1 and all(map(math.isfinite, bins.edges))
            if not finite or list(bins.edges) != sorted(bins.edges) or len(bins.counts) != BINS:
                raise BundleError(
                    "profile.inconsistent",
                    f"The bins of {name} in profile.msgpack contradict themselves.",
                    expected=f"{BINS - 1} finite ascending edges and {BINS} counts",
                    got=f"{len(bins.edges)} edges, {len(bins.counts)} counts",
                )
        for name, variety in self.varieties.items():
            if len(variety.counts) != rows or any(len(counts) != BINS for counts in variety.counts):
                raise BundleError(
                    "profile.inconsistent",
                    f"The reference of variety {name} in profile.msgpack has other bins than the whole.",
                    expected=f"{rows} rows of {BINS} counts",
                    got=[len(counts) for counts in variety.counts],
                )

    def edge_array(self) -> NDArray[np.float64]:
        """Returns the edges as float64 (F, 15)."""
        return np.asarray(self.edges, np.float64).reshape(len(self.features), BINS - 1)

    def count_array(self) -> NDArray[np.int64]:
        """Returns the counts as int64 (F, 16)."""
        return np.asarray(self.counts, np.int64).reshape(len(self.features), BINS)


def build_profile(
    features: NDArray[np.float32],
    names: tuple[str, ...],
    class_counts: Mapping[str, int],
    *,
    scalars: Mapping[str, NDArray[np.floating]] | None = None,
    varieties: Sequence[str] = (),
    verdicts: Sequence[str] = (),
) -> Profile:
    """Builds the reference of a bundle.

    Args:
        features: float32 (items, F) of `item_features` over items the model did not learn from.
        names: Names of the F features.
        class_counts: Number of verdicts of each class on those items.
        scalars: Name -> measured value of each item, NaN = unknown; left out where fewer than 32 are known.
        varieties: Variety of each item, empty = unknown; one with fewer than 32 items gets no reference of its own.
        verdicts: Class of the verdict on each item; needed with `varieties`.
    """
    binned = [_binned(column) for column in features.T.astype(np.float64)]
    measured = {name: values[np.isfinite(values)].astype(np.float64) for name, values in (scalars or {}).items()}
    counted = Counter(variety for variety in varieties if variety).most_common(MOST_VARIETIES)
    return Profile(
        features=names,
        edges=tuple(edges for edges, _ in binned),
        counts=tuple(counts for _, counts in binned),
        class_counts=dict(class_counts),
        items=len(features),
        scalars={
            name: ScalarBins(edges=edges, counts=counts)
            for name, values in measured.items()
            if len(values) >= LEAST_ITEMS
            for edges, counts in [_binned(values)]
        },
        varieties={
            variety: _reference_of(
                features[[other == variety for other in varieties]],
                [edges for edges, _ in binned],
                [verdict for verdict, other in zip(verdicts, varieties, strict=True) if other == variety],
            )
            for variety, items in sorted(counted)
            if items >= LEAST_ITEMS
        },
    )


def _binned(values: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Returns the 15 inner edges of the known values and their counts in the 16 bins."""
    known = values[np.isfinite(values)]
    edges = np.quantile(known, np.arange(1, BINS) / BINS) if known.size else np.zeros(BINS - 1)
    return tuple(float(e) for e in edges), tuple(int(c) for c in _bin_counts(known, edges))


def _reference_of(
    features: NDArray[np.float32], edges: Sequence[tuple[float, ...]], verdicts: Sequence[str]
) -> VarietyReference:
    columns = [column[np.isfinite(column)] for column in features.T.astype(np.float64)]
    counts = [_bin_counts(known, np.asarray(row)) for known, row in zip(columns, edges, strict=True)]
    return VarietyReference(
        items=len(features),
        counts=tuple(tuple(int(c) for c in row) for row in counts),
        class_counts=dict(Counter(verdicts)),
    )


def _bin_counts(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=BINS)


def encode_profile(profile: Profile) -> bytes:
    """Writes `profile.msgpack`. Law: `parse_profile(encode_profile(p)) == p`.

    Keys of what the training data do not know are left out: such a profile has the bytes it always had, and agents that
    are older than these keys read it.
    """
    optional = {"scalars", "varieties"}
    values = {name: getattr(profile, name) for name in profile.__struct_fields__}
    return msgspec.msgpack.encode({name: value for name, value in values.items() if value or name not in optional})


def parse_profile(data: bytes) -> Profile:
    """Reads `profile.msgpack`.

    Raises:
        BundleError: `profile.malformed`, `profile.inconsistent`.
    """
    try:
        profile = msgspec.msgpack.decode(data, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(
            "profile.malformed",
            "profile.msgpack is not a profile.",
            expected="Profile, schema_version 1",
            got=error,
        ) from error
    profile.check()
    return profile


class FeatureCounter:
    """Counts item features and scalars in the bins of a profile, one item at a time, without allocating per item."""

    def __init__(self, profile: Profile) -> None:
        self._edges = profile.edge_array()
        self._rows = np.arange(len(self._edges))
        self._counts = np.zeros((len(self._edges), BINS), np.uint32)
        self._nulls = np.zeros(len(self._edges), np.int64)
        self._scalar_edges = {name: bins.edges for name, bins in profile.scalars.items()}
        self._scalars: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._edges)

    def add(self, features: NDArray[np.float32], scalars: Mapping[str, float | None] | None = None) -> None:
        """Counts one item.

        Args:
            features: float32 (F,), NaN = unknown.
            scalars: Measured values of the item; None = unknown. Those without bins in the profile are left out.
        """
        known = np.isfinite(features)
        bins = (self._edges < features[:, None]).sum(axis=1)
        self._counts[self._rows[known], bins[known]] += 1
        self._nulls += ~known
        for name, edges in self._scalar_edges.items():
            value = scalars.get(name) if scalars else None
            if value is not None and math.isfinite(value):
                self._scalars.setdefault(name, [0] * BINS)[bisect_left(edges, value)] += 1

    def take(self) -> tuple[NDArray[np.int64], tuple[int, ...], dict[str, tuple[int, ...]]]:
        """Returns the counts so far and resets them.

        Returns:
            int64 (F, 16) counts; per feature the number of items for which it is not known; scalar -> 16 counts, of the
            scalars that were measured at all.
        """
        counts, nulls = self._counts.astype(np.int64), tuple(self._nulls.tolist())
        scalars = {name: tuple(bins) for name, bins in self._scalars.items()}
        self._counts[:] = 0
        self._nulls[:] = 0
        self._scalars = {}
        return counts, nulls, scalars


def stability_index(reference: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Returns the population stability index of each feature, with its expected sampling noise removed.

    Half a count is added to every bin, so an empty bin stays finite. From the plain index
    `sum((q - p) * ln(q / p))` its expectation under no drift, `(bins - 1) * (1/n + 1/m)` (Yurdakul 2018), is
    subtracted, and the result is cut at 0, so that small windows show no drift.

    Args:
        reference: (F, B) counts of the profile.
        counts: (F, B) counts seen.

    Returns:
        float64 (F,); NaN where either side has no item.
    """
    bins = reference.shape[1]
    n = reference.sum(axis=1).astype(np.float64)
    m = counts.sum(axis=1).astype(np.float64)
    p = (reference + 0.5) / (n + 0.5 * bins)[:, None]
    q = (counts + 0.5) / (m + 0.5 * bins)[:, None]
    with np.errstate(divide="ignore"):
        noise = (bins - 1) * (1.0 / n + 1.0 / m)
    index = np.maximum(((q - p) * np.log(q / p)).sum(axis=1) - noise, 0.0)
    return np.where((n > 0) & (m > 0), index, np.nan)
