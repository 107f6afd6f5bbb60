"""Statistics that add: what an agent reports every 10 s and what the control plane compares it with.

Every count here is exact under merging (`a + b == whole`): features are counted in fixed bins whose inner edges
are quantiles of the bundle's reference items, latencies in a base-2 exponential histogram (OpenTelemetry's layout,
scale 4: a bucket is 2**(1/16) wide, so a quantile is off by 2.2 % at most).

The population stability index is shown as an effect size beside its sampling noise; it is no alarm by itself
(its expectation without any drift is about (bins - 1) * (1/n + 1/m)).
"""

from collections.abc import Mapping
from functools import reduce
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import MessageError
from models.histogram import (
    LAST_BUCKET,
    LEAST_BUCKET,
    MAX_BUCKETS,
    MOST_COUNTED,
    Count,
    Histogram,
    pack_counts,
    unpack_counts,
)
from models.profile import BINS, Label
from models.statistics import Moments

MAX_WINDOW_BYTES: Final = 16 * 1024
MAX_LANES: Final = 64
MAX_FEATURES: Final = 64
DIRT_ROWS: Final = 12
DIRT_COLUMNS: Final = 16
_DIRT_CELLS: Final = DIRT_ROWS * DIRT_COLUMNS
QUANTITIES: Final = (
    "sharpness",
    "exposure",
    "red_to_green",
    "blue_to_green",
    "flicker",
    "shift_x_px",
    "shift_y_px",
)
"""What `CameraCounts` has moments of."""
_NO_BINS: Final = (0,) * BINS
BinCounts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=BINS, max_length=BINS)]


class LaneCounts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The judged items of one lane. Every table sums to `items`, and over the lanes to the table of the line."""

    items: Count = 0
    classes: dict[Label, Count] = {}
    grades: dict[Label, Count] = {}
    outlets: dict[Label, Count] = {}
    features: Annotated[bytes, msgspec.Meta(max_length=MAX_FEATURES * BINS * 4)] = b""
    """Counts (F, 16) in the bins of the bundle's profile, packed by `pack_counts`; empty where `items` is 0."""
    nulls: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_FEATURES)] = ()
    """Per feature, items for which it is not known; empty where `items` is 0."""
    scalars: dict[Label, BinCounts] = {}
    """As `Window.scalars`, of this lane alone."""

    def feature_counts(self) -> NDArray[np.int64]:
        """Returns int64 (F, 16).

        Raises:
            MessageError: `window.inconsistent` when bytes, nulls and items do not fit.
        """
        counts = unpack_counts(self.features, len(self.nulls) * BINS).reshape(-1, BINS)
        return _checked_rows(counts, self.nulls, self.items)


class CameraCounts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the camera's own picture said of the camera, in looks of about one a second between the items."""

    looks: Count = 0
    sharpness: Moments = Moments()
    """Natural logarithm of the variance of the Laplacian of the empty belt (grey levels squared)."""
    exposure: Moments = Moments()
    """Mean grey level of the empty belt or the reference patch, 0..255."""
    red_to_green: Moments = Moments()
    """Mean red through mean green of the same pixels."""
    blue_to_green: Moments = Moments()
    flicker: Moments = Moments()
    """Modulation of the light from frame to frame and along the rows, as a share of the mean (0..1)."""
    shift_x_px: Moments = Moments()
    """How far what does not move stands from its learnt place, pixels; positive = to the right."""
    shift_y_px: Moments = Moments()
    """The same downwards."""
    repeated: Count = 0
    """Frames that repeated the frame before."""
    dirt_looks: Count = 0
    """Looks for which the dirt map was known: the belt had moved enough."""
    dirt: Annotated[bytes, msgspec.Meta(max_length=_DIRT_CELLS * 4)] = b""
    """Per cell of a grid of 12 rows and 16 columns over the picture, row by row, looks in which it was dirty; packed by
    `pack_counts`; empty = no cell in any look."""
    outside: dict[Label, Count] = {}
    """Quantity, or `dirt` -> looks in which it was outside the band that the agent has learnt."""
    corrected_wb: Count = 0
    """Corrections of the white balance that were sent to the camera."""
    corrected_gain: Count = 0
    levels: dict[Label, Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]] = {}
    """No counts: the level of each quantity that the agent has learnt, thousandths, at the end of the window."""

    def dirt_counts(self) -> NDArray[np.int64]:
        """Returns int64 (12, 16).

        Raises:
            MessageError: `window.inconsistent`.
        """
        packed = self.dirt or bytes(_DIRT_CELLS)
        return unpack_counts(packed, _DIRT_CELLS).reshape(DIRT_ROWS, DIRT_COLUMNS)

    def check(self) -> None:
        """Refuses counts that contradict each other.

        Raises:
            MessageError: `window.inconsistent`.
        """
        for name in QUANTITIES:
            moments: Moments = getattr(self, name)
            if moments.count > self.looks or not moments.possible:
                raise _window_error(f"moments of at most {self.looks} looks in {name}", moments)
        most = max(int(self.dirt_counts().max()), *self.outside.values(), 0, 0)
        if most > self.looks or self.dirt_looks > self.looks or int(self.dirt_counts().max()) > self.dirt_looks:
            raise _window_error(f"at most {self.looks} looks", max(most, self.dirt_looks))

    def merged(self, other: "CameraCounts") -> "CameraCounts":
        """Returns the counts of both spans; the levels are those of the later one, `other`."""
        dirt = self.dirt_counts() + other.dirt_counts()
        sums = {name: getattr(self, name) + getattr(other, name) for name in (*QUANTITIES, *_CAMERA_SUMS)}
        if not all(sums[name].possible for name in QUANTITIES) or dirt.max() > MOST_COUNTED:
            raise MessageError(
                "window.not_mergeable", "Windows count more than fits.", expected="sums of 63 bits", got=sums
            )
        return CameraCounts(
            **sums,
            dirt=pack_counts(dirt) if dirt.any() else b"",
            outside=_add(self.outside, other.outside),
            levels={**self.levels, **other.levels},
        )


_CAMERA_SUMS: Final = ("looks", "repeated", "dirt_looks", "corrected_wb", "corrected_gain")


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
    lanes: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_LANES)] = ()
    """Items with a verdict per lane."""
    by_lane: Annotated[tuple[LaneCounts, ...], msgspec.Meta(max_length=MAX_LANES)] = ()
    """The counts of each lane of `lanes`; empty = not known, because the agent or part of the span is older."""
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
    scalars_missing: dict[Label, Count] = {}
    """Scalar that the bundle declares, such as `weight_g` -> items that were judged without it."""
    scalars: dict[Label, BinCounts] = {}
    """Scalar that the bundle's profile has bins for, such as `weight_g` -> items in each of the 16 bins; items that
    were not measured are in none."""
    shadow: dict[Label, Count] = {}
    """Outlets `champion>challenger` of items a challenger judged too; `skipped` and `failed` beside them."""
    shadow_bundle: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Digest of the challenger."""
    camera_health: CameraCounts = CameraCounts()
    """The camera as a sensor."""
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
        return _checked_rows(counts, self.nulls, self.items)

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
        counts = self.feature_counts()
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
        for name, bins in self.scalars.items():
            if sum(bins) > self.items:
                raise _window_error(f"at most {self.items} items in {name}", sum(bins))
        if self.by_lane:
            self._check_lanes(counts)
        self.camera_health.check()

    def _check_lanes(self, counts: NDArray[np.int64]) -> None:
        """Compares the sum of the lanes with the line, table by table."""
        lanes = self.by_lane
        if tuple(lane.items for lane in lanes) != self.lanes:
            raise _window_error(f"items by lane {self.lanes}", tuple(lane.items for lane in lanes))
        for name in ("classes", "grades", "outlets"):
            line, tables = getattr(self, name), [getattr(lane, name) for lane in lanes]
            if any(sum(t.values()) != lane.items for t, lane in zip(tables, lanes, strict=True) if line):
                raise _window_error(f"items of each lane in {name}", tables)
            if _without_zeros(reduce(_add, tables)) != _without_zeros(line):
                raise _window_error(f"lanes that sum to {name} of the line: {line}", tables)
        scalars = reduce(_add_bins, [lane.scalars for lane in lanes])
        if any(scalars.get(name, _NO_BINS) != self.scalars.get(name, _NO_BINS) for name in {*scalars, *self.scalars}):
            raise _window_error("lanes that sum to the scalars of the line", scalars)
        features, nulls = _lane_features(lanes, len(self.nulls))
        _checked_rows(features.reshape(-1, BINS), nulls.ravel(), np.repeat(self.lanes, len(self.nulls)))
        if (features.sum(axis=0) != counts).any():
            raise _window_error("lanes that sum to the features of the line", self.lanes)


def _window_error(expected: object, got: object) -> MessageError:
    return MessageError("window.inconsistent", "A window's counts contradict each other.", expected=expected, got=got)


def _checked_rows(
    counts: NDArray[np.int64], nulls: tuple[int, ...] | NDArray[np.int64], items: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the counts (F, 16), each of whose rows must sum to the items with its nulls."""
    totals = counts.sum(axis=1) + np.asarray(nulls, np.int64)
    if len(totals) and (totals != items).any():
        raise _window_error(f"{items} items in each row", totals.tolist())
    return counts


def _lane_features(lanes: tuple[LaneCounts, ...], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the counts (L, F, 16) and nulls (L, F) of lanes that count `rows` features.

    Raises:
        MessageError: `window.inconsistent`: a lane with items counts other features.
    """
    counts, nulls = np.zeros((len(lanes), rows, BINS), np.int64), np.zeros((len(lanes), rows), np.int64)
    for k, lane in enumerate(lanes):
        if lane.items or lane.nulls or lane.features:
            if len(lane.nulls) != rows:
                raise _window_error(f"{rows} features in each lane", len(lane.nulls))
            counts[k].flat = unpack_counts(lane.features, rows * BINS)
            nulls[k] = lane.nulls
    return counts, nulls


def _without_zeros(table: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in table.items() if value}


_TABLES: Final = (
    "classes",
    "grades",
    "outlets",
    "ejections",
    "ejectors",
    "shots",
    "camera",
    "scalars_missing",
    "shadow",
    "truth",
)


def merge(a: Window, b: Window) -> Window:
    """Returns the window of both spans: every count is the sum. Identity fields are those of `a`.

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
    counts, nulls = _add_features(a, b)
    lanes = _add_rows(a.lanes, b.lanes)
    return msgspec.structs.replace(
        a,
        **summed,
        **tables,
        started_ms=min(a.started_ms, b.started_ms),
        lanes=lanes,
        by_lane=_add_lanes(a, b, len(lanes)),
        scalars=_add_bins(a.scalars, b.scalars),
        camera_health=a.camera_health.merged(b.camera_health),
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


def _add_features(a: Window, b: Window) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Adds feature counts; where one side says nothing of features, its items are not known in any of them."""
    counts_a, counts_b = a.feature_counts(), b.feature_counts()
    counts = counts_a + counts_b if len(counts_a) and len(counts_b) else (counts_a if len(counts_a) else counts_b)
    if len(counts) and counts.max() > MOST_COUNTED:
        raise MessageError(
            "window.not_mergeable",
            "Windows count more than fits.",
            expected=f"<= {MOST_COUNTED}",
            got=int(counts.max()),
        )
    rows = len(counts)
    return counts, _add_rows(a.nulls or (a.items,) * rows, b.nulls or (b.items,) * rows)


def _add_bins(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: _add_rows(a.get(key, ()), b.get(key, ())) for key in (*a, *(k for k in b if k not in a))}


def _add_lanes(a: Window, b: Window, lanes: int) -> tuple[LaneCounts, ...]:
    """Adds lane by lane. A sum is known where every part is: a part with items and without lanes makes it unknown."""
    if not (a.by_lane or b.by_lane) or any(part.items and not part.by_lane for part in (a, b)):
        return ()
    padded = [part.by_lane + (LaneCounts(),) * (lanes - len(part.by_lane)) for part in (a, b)]
    rows = max(len(a.nulls), len(b.nulls))
    counts, nulls = np.zeros((lanes, rows, BINS), np.int64), np.zeros((lanes, rows), np.int64)
    for window, part in zip((a, b), padded, strict=True):
        if window.nulls or not window.items:
            more, unknown = _lane_features(part, rows)
        else:
            more, unknown = np.zeros_like(counts), np.repeat([[lane.items] for lane in part], rows, axis=1)
        counts, nulls = counts + more, nulls + unknown
    packed = [pack_counts(found) for found in counts]
    return tuple(
        LaneCounts(
            items=x.items + y.items,
            classes=_add(x.classes, y.classes),
            grades=_add(x.grades, y.grades),
            outlets=_add(x.outlets, y.outlets),
            features=found if x.items + y.items else b"",
            nulls=tuple(unknown) if x.items + y.items else (),
            scalars=_add_bins(x.scalars, y.scalars),
        )
        for x, y, found, unknown in zip(*padded, packed, nulls.tolist(), strict=True)
    )
