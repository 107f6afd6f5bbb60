"""Statistics that add: what an agent reports every 10 s and what the control plane compares it with.

Every count here is exact under merging (`a + b == whole`): features are counted in fixed bins whose inner edges
are quantiles of the bundle's reference items, latencies in a base-2 exponential histogram (OpenTelemetry's layout,
scale 4: a bucket is 2**(1/16) wide, so a quantile is off by 2.2 % at most).

The population stability index is shown as an effect size beside its sampling noise; it is no alarm by itself
(its expectation without any drift is about (bins - 1) * (1/n + 1/m)).
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import MessageError
from models.histogram import LAST_BUCKET, LEAST_BUCKET, MAX_BUCKETS, Count, Histogram
from models.profile import BINS, Label

MAX_WINDOW_BYTES: Final = 16 * 1024
_MOST_COUNTED: Final = 2**32 - 1


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
    scalars_missing: dict[Label, Count] = {}
    """Scalar that the bundle declares, such as `weight_g` -> items that were judged without it."""
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
