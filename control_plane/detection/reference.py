"""What is usual for a bundle and a variety, learnt from lots: how lots differ from each other, and how far that goes.

The unit is the lot, never the item: thirty items already equal the spread between lots, so more items of one lot prove
nothing. Lots of all lines that run the bundle are pooled, each line about its own mean.

Fitted are the dependence of the moments on the class mix (ridge regression, so that a lot with more defects is not
taken for other fruit), the covariance of what is left, shrunk to its diagonal, and the same for the class mix. The
thresholds are the largest values that the channels reach on lots that were *not* used for the fit (the older half
is judged by the newer and the reverse), times a margin.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from control_plane.detection.moments import Floats, angles
from control_plane.detection.sequential import Array, weight

MIN_LOTS: Final = 40
"""Distinct lots from which a reference is used. With 44 lots the false alarms stayed within the budget (measured)."""
BORROW_LOTS: Final = 6
"""From so many lots a variety has a mean of its own and borrows the spread of another variety of its bundle."""
MAX_LOTS: Final = 600
"""The reference is final: what came slowly would otherwise be learnt as usual."""
MARGIN: Final = 1.3
"""Threshold / largest held-out value."""
BORROWED_MARGIN: Final = 1.6
FAST_S: Final = 330.0
"""Memory of the smoothing before the clip."""
SLOW_S: Final = 8300.0
"""Memory of the mean over lots, 2.3 h."""
_GROWTH: Final = 1.4
"""A reference is fitted again when its lots have grown by so much."""
_RIDGE: Final = 1e-2
_SHRINK: Final = 0.05
_OWN_MEAN: Final = 6.0
"""Lots of a line that weigh as much as the mean of all lines."""
_FIRST: Final = 1e-4


class LotRecord(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One lot on one line, summed."""

    line: str
    lot: str
    duration_s: float
    items: int
    z: Array
    """(2F,) moments."""
    shares: Array
    """(K,) class shares."""
    weight: float = math.nan
    """Mean logarithm of the measured weight, grams; NaN where it is not measured."""
    size: float = math.nan
    """What the weight is compared with: mean logarithm of the length, or the location of the item's area."""


class Spread(msgspec.Struct, kw_only=True, eq=False):
    """Mean and spread of a vector between lots, with the clip and the threshold of its channel."""

    whiten: Array
    """(D, D): `whiten @ v` has about unit variance in every direction between the lots of the reference."""
    clip: float
    """Median norm of held-out lots; longer vectors are shortened to it (Huber)."""
    largest: float
    """Largest squared norm of the channel's slow mean on held-out lots."""
    odd: float
    """Largest squared norm of a single held-out lot."""


class Fit(msgspec.Struct, kw_only=True, eq=False):
    """The fitted reference of one bundle and variety."""

    mean: Array
    line_means: dict[str, Array]
    share_mean: Array
    share_line_means: dict[str, Array]
    mix: Array
    """(K, 2F): change of the moments per change of the class shares."""
    covariate: Spread
    label: Spread
    weight_slope: float = math.nan
    weight_means: dict[str, float] = {}
    weight_largest: float = math.nan
    """Largest held-out slow mean of the relative difference of weight from what the size lets expect."""
    lots: int
    margin: float = MARGIN

    def residual(self, line: str, z: Floats, shares: Floats) -> Floats:
        """Returns float64 (2F,): how the moments differ from the line's mean beyond what the class mix explains."""
        mean = self.line_means.get(line, self.mean)
        return np.asarray(z - mean - (shares - self.shares_of(line)) @ self.mix)

    def shares_of(self, line: str) -> Floats:
        """Returns float64 (K,): the usual class shares of the line."""
        return self.share_line_means.get(line, self.share_mean)

    def label_residual(self, line: str, shares: Floats) -> Floats:
        """Returns float64 (K,): how the class mix differs from the line's usual one, in angles."""
        return np.asarray(angles(shares) - angles(self.shares_of(line)))

    def weight_residual(self, line: str, weight_log: float, size: float) -> float:
        """Returns the logarithm of measured weight / expected weight; NaN where either is not known."""
        return weight_log - self.weight_slope * size - self.weight_means.get(line, math.nan)


class LotReference(msgspec.Struct, kw_only=True, eq=False):
    """Collects lots of one bundle and variety and fits them."""

    records: list[LotRecord] = []
    fit: Fit | None = None
    fitted_lots: int = 0

    @property
    def lots(self) -> int:
        """Number of distinct lots collected."""
        return len({record.lot for record in self.records})

    def add(self, record: LotRecord) -> None:
        """Collects a finished lot and fits when enough have come; a final reference stays as it is."""
        if self.fitted_lots >= MAX_LOTS:
            return
        self.records.append(record)
        lots = self.lots
        if lots >= MIN_LOTS and lots >= min(_GROWTH * self.fitted_lots, MAX_LOTS):
            self.fit, self.fitted_lots = fit(self.records), lots
            if lots >= MAX_LOTS:
                self.records = []

    def borrowed(self, lender: Fit) -> Fit | None:
        """Returns the lender's spread about this variety's own means; None with too few lots."""
        if self.lots < BORROW_LOTS:
            return None
        z, shares = _stack(self.records)
        lines = [record.line for record in self.records]
        adjusted = z - (shares - shares.mean(axis=0)) @ lender.mix
        weights = _weight_means(self.records, lender.weight_slope)
        return msgspec.structs.replace(
            lender,
            mean=adjusted.mean(axis=0),
            line_means=_line_means(adjusted, lines),
            share_mean=shares.mean(axis=0),
            share_line_means=_line_means(shares, lines),
            weight_means=weights,
            lots=self.lots,
            margin=BORROWED_MARGIN,
        )


def fit(records: Sequence[LotRecord]) -> Fit:
    """Fits a reference.

    Args:
        records: Lots in the order of time, of at least two distinct names.

    Raises:
        ValueError: Fewer than two distinct lots.
    """
    names = list(dict.fromkeys(record.lot for record in records))
    if len(names) < 2:
        raise ValueError(f"a reference needs at least two lots, got {len(names)}")
    older = set(names[: len(names) // 2])
    halves = [[r for r in records if (r.lot in older) is first] for first in (True, False)]
    whole = _fit_part(records)
    for kept, held_out in (halves, halves[::-1]):
        _judge(whole, _fit_part(kept), held_out)
    return whole


def _stack(records: Sequence[LotRecord]) -> tuple[Floats, Floats]:
    return np.array([record.z for record in records]), np.array([record.shares for record in records])


def _line_means(values: Floats, lines: Sequence[str]) -> dict[str, Array]:
    """Returns the mean of each line, drawn to the mean of all where a line has few lots."""
    grand = values.mean(axis=0)
    names = np.asarray(lines)
    found = {}
    for line in dict.fromkeys(lines):
        own = values[names == line]
        found[line] = (own.sum(axis=0) + _OWN_MEAN * grand) / (len(own) + _OWN_MEAN)
    return found


def _centred(values: Floats, lines: Sequence[str], means: dict[str, Array]) -> Floats:
    return np.asarray(values - np.array([means.get(line, values.mean(axis=0)) for line in lines]))


def _fit_part(records: Sequence[LotRecord]) -> Fit:
    z, shares = _stack(records)
    lines = [record.line for record in records]
    share_means = _line_means(shares, lines)
    first = _centred(z, lines, _line_means(z, lines))
    mixes = _centred(shares, lines, share_means)
    gram = mixes.T @ mixes + _RIDGE * max(float(np.trace(mixes.T @ mixes)), _FIRST) * np.eye(shares.shape[1])
    mix = np.linalg.solve(gram, mixes.T @ first)
    line_means = _line_means(z, lines)
    residuals = _centred(z, lines, line_means) - mixes @ mix
    labels = np.array([angles(s) - angles(share_means[line]) for s, line in zip(shares, lines, strict=True)])
    slope = _weight_slope(records)
    return Fit(
        mean=z.mean(axis=0),
        line_means=line_means,
        share_mean=shares.mean(axis=0),
        share_line_means=share_means,
        mix=mix,
        covariate=_spread(residuals),
        label=_spread(labels),
        weight_slope=slope,
        weight_means=_weight_means(records, slope),
        lots=len({record.lot for record in records}),
    )


def _spread(residuals: Floats) -> Spread:
    """Covariance between lots, shrunk to its diagonal: by 5 %, and by more where lots are few beside dimensions."""
    rows, size = residuals.shape
    covariance = residuals.T @ residuals / max(rows - 1, 1)
    shrink = min(max(_SHRINK, size / (size + 2.0 * rows)), 1.0)
    diagonal = np.diag(covariance)
    floor = max(float(diagonal.mean()) * 1e-3, 1e-9)
    covariance = (1.0 - shrink) * covariance + shrink * np.diag(diagonal) + floor * np.eye(size)
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    return Spread(whiten=whiten, clip=0.0, largest=0.0, odd=0.0)


def _judge(whole: Fit, part: Fit, held_out: Sequence[LotRecord]) -> None:
    """Runs the slow channels over lots that the fit has not seen, and keeps their largest values."""
    covariate = [part.covariate.whiten @ part.residual(r.line, r.z, r.shares) for r in held_out]
    label = [part.label.whiten @ part.label_residual(r.line, r.shares) for r in held_out]
    weights = [part.weight_residual(r.line, r.weight, r.size) for r in held_out]
    for spread, vectors in ((whole.covariate, covariate), (whole.label, label)):
        norms = np.linalg.norm(vectors, axis=1)
        # Both halves' medians make the clip.
        median = float(np.median(norms))
        spread.clip = (spread.clip + median) / 2.0 if spread.clip else median
        spread.odd = max(spread.odd, float(norms.max() ** 2))
        spread.largest = max(spread.largest, _slow_maximum(held_out, vectors, median))
    found = _slow_scalar_maximum(held_out, weights)
    if not math.isnan(found):
        whole.weight_largest = found if math.isnan(whole.weight_largest) else max(whole.weight_largest, found)


def clipped(vector: Floats, limit: float) -> Floats:
    """Returns the vector, shortened to the limit where it is longer."""
    norm = float(np.linalg.norm(vector))
    return vector * (limit / norm) if norm > limit > 0.0 else vector


def _slow_maximum(records: Sequence[LotRecord], vectors: Sequence[Floats], clip: float) -> float:
    largest = 0.0
    state: dict[str, Floats] = {}
    for record, vector in zip(records, vectors, strict=True):
        slow = state.get(record.line, np.zeros_like(vector))
        slow = slow + weight(record.duration_s, SLOW_S) * (clipped(vector, clip) - slow)
        state[record.line] = slow
        largest = max(largest, float(slow @ slow))
    return largest


def _slow_scalar_maximum(records: Sequence[LotRecord], values: Sequence[float]) -> float:
    largest = math.nan
    state: dict[str, float] = {}
    for record, value in zip(records, values, strict=True):
        if math.isnan(value):
            continue
        slow = state.get(record.line, 0.0)
        slow += weight(record.duration_s, SLOW_S) * (value - slow)
        state[record.line] = slow
        largest = abs(slow) if math.isnan(largest) else max(largest, abs(slow))
    return largest


def _weight_slope(records: Sequence[LotRecord]) -> float:
    """Slope of the logarithm of weight on size within the lines; NaN with weights of fewer than eight lots."""
    rows = [(r.line, r.weight, r.size) for r in records if math.isfinite(r.weight) and math.isfinite(r.size)]
    if len(rows) < 8:
        return math.nan
    lines = [line for line, _, _ in rows]
    values = np.array([(w, s) for _, w, s in rows])
    centred = _centred(values, lines, _line_means(values, lines))
    spread = float(centred[:, 1] @ centred[:, 1])
    return float(centred[:, 0] @ centred[:, 1]) / spread if spread > 0.0 else 0.0


def _weight_means(records: Sequence[LotRecord], slope: float) -> dict[str, float]:
    rows = [r for r in records if math.isfinite(r.weight) and math.isfinite(r.size)]
    if math.isnan(slope) or not rows:
        return {}
    values = np.array([[r.weight - slope * r.size] for r in rows])
    return {line: float(mean[0]) for line, mean in _line_means(values, [r.line for r in rows]).items()}
