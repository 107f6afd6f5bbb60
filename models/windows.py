"""Statistics that add: what an agent reports every 10 s and what the control plane compares it with.

Every count here is exact under merging (`a + b == whole`): features are counted in fixed bins whose inner edges
are quantiles of the bundle's reference items, latencies in a base-2 exponential histogram (OpenTelemetry's layout,
scale 4: a bucket is 2**(1/16) wide, so a quantile is off by 2.2 % at most).

The population stability index is shown as an effect size beside its sampling noise; it is no alarm by itself
(its expectation without any drift is about (bins - 1) * (1/n + 1/m)).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, MessageError
from models.view_spec import VIEW_FEATURES

BINS: Final = 16
LATENCY_SCALE: Final = 16
"""Buckets per doubling."""
MAX_WINDOW_BYTES: Final = 16 * 1024
MAX_BUCKETS: Final = 480
LEAST_BUCKET: Final = -240
LAST_BUCKET: Final = 239
"""Of a histogram: 2**-15 to 2**15 of its unit; what lies beyond is counted in the last one."""
_MOST_COUNTED: Final = 2**32 - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Histogram(msgspec.Struct, kw_only=True, forbid_unknown_fields=False):
    """Base-2 exponential histogram of positive values; zero and below are counted apart.

    Law: `a.merged(b)` has the counts of all values of `a` and `b`, in any order.
    """

    zero: Count = 0
    buckets: dict[int, Count] = {}
    """Bucket index -> count; bucket i holds values in (2**(i/16), 2**((i+1)/16)]."""

    def add(self, value: float, count: int = 1) -> None:
        """Counts one value (in whatever unit the field's name states)."""
        if value <= 0.0 or not math.isfinite(value):
            self.zero += count
            return
        index = min(max(math.ceil(math.log2(value) * LATENCY_SCALE) - 1, LEAST_BUCKET), LAST_BUCKET)
        self.buckets[index] = self.buckets.get(index, 0) + count

    def merged(self, other: "Histogram") -> "Histogram":
        """The histogram of both."""
        buckets = dict(self.buckets)
        for index, count in other.buckets.items():
            buckets[index] = buckets.get(index, 0) + count
        return Histogram(zero=self.zero + other.zero, buckets=buckets)

    @property
    def count(self) -> int:
        """Values counted."""
        return self.zero + sum(self.buckets.values())

    def quantile(self, q: float) -> float:
        """The value below which a share `q` of the values lies; NaN when nothing was counted."""
        total = self.count
        if total == 0:
            return math.nan
        rank = q * (total - 1)
        seen = self.zero
        if rank < seen:
            return 0.0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if rank < seen:
                return float(2.0 ** ((index + 0.5) / LATENCY_SCALE))
        return float(2.0 ** ((max(self.buckets) + 1) / LATENCY_SCALE))

    def share_above(self, value: float) -> float:
        """Share of the values in buckets that lie wholly above this one; NaN when nothing was counted."""
        total = self.count
        over = sum(n for index, n in self.buckets.items() if 2.0 ** (index / LATENCY_SCALE) >= value)
        return over / total if total else math.nan


def feature_names(embedding_size: int) -> tuple[str, ...]:
    """Names of the monitored features of an item, in the order of `item_features`."""
    return (*VIEW_FEATURES, "logit", "entropy", *(f"embedding_{k}" for k in range(embedding_size)))


def item_features(
    view_features: NDArray[np.float32],
    embedding: NDArray[np.float32],
    probabilities: Iterable[float],
    defect: float,
) -> NDArray[np.float32]:
    """The monitored features of one judged item.

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


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reference a bundle was trained on (`profile.msgpack`): bin edges, shares, class mix."""

    schema_version: Literal[1] = 1
    features: tuple[Label, ...]
    edges: tuple[tuple[float, ...], ...]
    """Per feature, 15 ascending inner edges: the k/16 quantiles of the reference items."""
    counts: tuple[tuple[Count, ...], ...]
    """Per feature, the reference items in each of the 16 bins."""
    class_counts: dict[Label, Count]
    """Verdicts on the reference items."""
    items: Count
    view_defect: tuple[float, ...] = ()
    """Mean defect probability of each lot's items, where lots are known: the spread between lots."""

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

    def edge_array(self) -> NDArray[np.float64]:
        """float64 (F, 15)."""
        return np.asarray(self.edges, np.float64).reshape(len(self.features), BINS - 1)

    def count_array(self) -> NDArray[np.int64]:
        """int64 (F, 16)."""
        return np.asarray(self.counts, np.int64).reshape(len(self.features), BINS)


def build_profile(features: NDArray[np.float32], names: tuple[str, ...], class_counts: Mapping[str, int]) -> Profile:
    """Makes the reference of a bundle.

    Args:
        features: float32 (items, F) of `item_features` over items the model did not learn from.
        names: F names.
        class_counts: Verdicts on those items.
    """
    quantiles = np.arange(1, BINS) / BINS
    edges, counts = [], []
    for column in features.T.astype(np.float64):
        known = column[np.isfinite(column)]
        row = np.quantile(known, quantiles) if known.size else np.zeros(BINS - 1)
        edges.append(tuple(float(e) for e in row))
        counts.append(tuple(int(c) for c in _bin_counts(known, row)))
    return Profile(
        features=names,
        edges=tuple(edges),
        counts=tuple(counts),
        class_counts=dict(class_counts),
        items=len(features),
    )


def _bin_counts(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values, side="left"), minlength=BINS)


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


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Ten seconds of one line. All counts add, and `merge` adds them."""

    schema_version: Literal[1] = 1
    started_ms: Count
    """Wall clock of the agent, milliseconds since 1970, UTC. Order windows by (boot_id, seq), never by this."""
    duration_ms: Count
    bundle: Annotated[str, msgspec.Meta(max_length=64)]
    """Digest of the bundle that judged; empty when none is loaded."""
    lot: Annotated[str, msgspec.Meta(max_length=64)] = ""
    variety: Annotated[str, msgspec.Meta(max_length=64)] = ""
    simulated: bool = False
    frames: Count = 0
    frames_dropped: Count = 0
    frames_bad: Count = 0
    """Corrupt, frozen or wrongly sized frames that were refused."""
    items: Count = 0
    """Items that got a verdict."""
    items_unjudged: Count = 0
    """Items that left the field of view without a verdict (no bundle, no whole view)."""
    verdicts_late: Count = 0
    """Verdicts that came after the last moment to eject: they took the late outlet."""
    lanes: tuple[Count, ...] = ()
    """Items with a verdict per lane."""
    classes: dict[Label, Count] = {}
    grades: dict[Label, Count] = {}
    """As the recipe graded them; `unsure` are those on which the line abstained."""
    outlets: dict[Label, Count] = {}
    views: Count = 0
    latency_ms: Histogram = msgspec.field(default_factory=Histogram)
    """From the exposure of the frame that an item's last view was cut from to its verdict."""
    inference_ms: Histogram = msgspec.field(default_factory=Histogram)
    """One run of the model, whatever the size of the batch."""
    features: Annotated[bytes, msgspec.Meta(max_length=64 * BINS * 4)] = b""
    """Counts (F, 16) in the bins of the bundle's profile, uint32 little-endian."""
    nulls: tuple[Count, ...] = ()
    """Per feature, items for which it is not known."""
    ejections: dict[Label, Count] = {}
    """Fired, and where the truth or a confirmation sensor is known: on_time, late, wrong, gap."""
    ejectors: dict[Label, Count] = {}
    """Per ejector, `lane/outlet/what`: fired, and with a photo-eye confirmed, missed, double, unexpected."""
    shots: dict[Label, Count] = {}
    """What became of the shots: fired; late (the verdict came behind the last moment), close (by the rule for items
    nearer than the ejector's pitch), refused (queue full): these items took the late outlet; overdue (dropped behind
    the fire window), failed (the driver broke)."""
    lead_ms: dict[Label, float] = {}
    """Per ejector, `lane/outlet`, the learnt time from command to effect at the end of the window."""
    jitter_ms: Histogram = msgspec.field(default_factory=Histogram)
    """How late after its place each ejection was commanded."""
    truth: dict[Label, Count] = {}
    """Where the truth is known (simulation, challenge items): `kind>outlet` -> items."""
    camera: dict[Label, Count] = {}
    """Faults named, by code (`camera.frozen`); `blind_ms` and `blind_mm` of belt nobody saw; `blind_shots` of the
    fail-safe, those that came too late (`blind_shots_late`), and belt it gave up (`blind_missed_mm`)."""
    shadow: dict[Label, Count] = {}
    """Outlets `champion>challenger` of items a challenger judged too; `skipped` and `failed` beside them."""
    shadow_bundle: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Digest of the challenger."""
    lifetime_items: Count = 0
    """Items judged since the agent was installed: survives lost windows."""

    def feature_counts(self) -> NDArray[np.int64]:
        """int64 (F, 16).

        Raises:
            MessageError: `window.inconsistent` when bytes, nulls and items do not fit.
        """
        row_bytes = BINS * 4
        if len(self.features) % row_bytes or len(self.features) // row_bytes != len(self.nulls):
            raise _window_error(f"{len(self.nulls)} rows of {row_bytes} bytes", len(self.features))
        counts = np.frombuffer(self.features, "<u4").reshape(-1, BINS).astype(np.int64)
        totals = counts.sum(axis=1) + np.asarray(self.nulls, np.int64)
        if len(totals) and (totals != self.items).any():
            raise _window_error(f"{self.items} items in each row", totals.tolist())
        return counts

    @property
    def shadow_compared(self) -> int:
        """Items that champion and challenger both judged."""
        return sum(count for pair, count in self.shadow.items() if ">" in pair)

    @property
    def shadow_disagreed(self) -> int:
        """Items of those that the challenger would have sent to another outlet."""
        pairs = ((pair.split(">", 1), count) for pair, count in self.shadow.items() if ">" in pair)
        return sum(count for (champion, challenger), count in pairs if champion != challenger)

    def check(self) -> None:
        """Refuses counts that contradict each other.

        Raises:
            MessageError: `window.inconsistent`.
        """
        self.feature_counts()
        for name, total in (
            ("classes", sum(self.classes.values())),
            ("outlets", sum(self.outlets.values())),
            ("lanes", sum(self.lanes)),
            *((("grades", sum(self.grades.values())),) if self.grades else ()),
        ):
            if total != self.items:
                raise _window_error(f"{self.items} items in {name}", total)
        for histogram in (self.latency_ms, self.inference_ms, self.jitter_ms):
            if len(histogram.buckets) > MAX_BUCKETS:
                raise _window_error(f"<= {MAX_BUCKETS} buckets", len(histogram.buckets))
            strange = [index for index in histogram.buckets if not LEAST_BUCKET <= index <= LAST_BUCKET]
            if strange:
                raise _window_error(f"buckets from {LEAST_BUCKET} to {LAST_BUCKET}", strange[:5])


def _window_error(expected: object, got: object) -> MessageError:
    return MessageError("window.inconsistent", "A window's counts contradict each other.", expected=expected, got=got)


_TABLES: Final = ("classes", "grades", "outlets", "ejections", "ejectors", "shots", "camera", "shadow", "truth")


def merge(a: Window, b: Window) -> Window:
    """The window of both spans: every count is the sum. Identity fields are those of `a`.

    Raises:
        MessageError: `window.not_mergeable` when they were judged by different bundles, or count more than fits.
    """
    if a.bundle != b.bundle or (a.nulls and b.nulls and len(a.nulls) != len(b.nulls)):
        raise MessageError(
            "window.not_mergeable",
            "Windows of different bundles do not add.",
            expected=a.bundle,
            got=b.bundle,
        )
    summed = {
        name: getattr(a, name) + getattr(b, name)
        for name in (
            "duration_ms",
            "frames",
            "frames_dropped",
            "frames_bad",
            "items",
            "items_unjudged",
            "verdicts_late",
            "views",
        )
    }
    tables = {name: _add(getattr(a, name), getattr(b, name)) for name in _TABLES}
    counts_a, counts_b = a.feature_counts(), b.feature_counts()
    counts = counts_a + counts_b if len(counts_a) and len(counts_b) else (counts_a if len(counts_a) else counts_b)
    if len(counts) and counts.max() > _MOST_COUNTED:
        raise MessageError(
            "window.not_mergeable",
            "Windows count more than fits.",
            expected=f"<= {_MOST_COUNTED}",
            got=int(counts.max()),
        )
    # A window that says nothing of features has items all the same: their features are not known.
    rows = len(counts)
    nulls = _add_rows(a.nulls or (a.items,) * rows, b.nulls or (b.items,) * rows)
    return msgspec.structs.replace(
        a,
        **summed,
        **tables,
        started_ms=min(a.started_ms, b.started_ms),
        lanes=_add_rows(a.lanes, b.lanes),
        nulls=nulls,
        latency_ms=a.latency_ms.merged(b.latency_ms),
        inference_ms=a.inference_ms.merged(b.inference_ms),
        jitter_ms=a.jitter_ms.merged(b.jitter_ms),
        features=counts.astype("<u4").tobytes(),
        lead_ms={**a.lead_ms, **b.lead_ms},
        simulated=a.simulated or b.simulated,
        lifetime_items=max(a.lifetime_items, b.lifetime_items),
    )


def _add(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in (*a, *(k for k in b if k not in a))}


def _add_rows(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    size = max(len(a), len(b))
    return tuple(x + y for x, y in zip(a + (0,) * (size - len(a)), b + (0,) * (size - len(b)), strict=True))


class FeatureCounter:
    """Counts item features in the bins of a profile, one item at a time, without allocating per item."""

    def __init__(self, profile: Profile) -> None:
        self._edges = profile.edge_array()
        self._rows = np.arange(len(self._edges))
        self._counts = np.zeros((len(self._edges), BINS), np.uint32)
        self._nulls = np.zeros(len(self._edges), np.int64)

    def __len__(self) -> int:
        return len(self._edges)

    def add(self, features: NDArray[np.float32]) -> None:
        """Counts one item; float32 (F,), NaN = not known."""
        known = np.isfinite(features)
        bins = (self._edges < features[:, None]).sum(axis=1)
        self._counts[self._rows[known], bins[known]] += 1
        self._nulls += ~known

    def take(self) -> tuple[bytes, tuple[int, ...]]:
        """The counts so far as (`Window.features`, `Window.nulls`); starts again at zero."""
        packed, nulls = self._counts.astype("<u4").tobytes(), tuple(int(n) for n in self._nulls)
        self._counts[:] = 0
        self._nulls[:] = 0
        return packed, nulls


def stability_index(reference: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """Population stability index per feature, with its expected sampling noise removed.

    Half a count is added to every bin, so an empty bin stays finite. From the plain index
    `sum((q - p) * ln(q / p))` its expectation under no drift, `(bins - 1) * (1/n + 1/m)` (Yurdakul 2018), is
    subtracted, and the result is cut at 0: small windows do not look like drift.

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
