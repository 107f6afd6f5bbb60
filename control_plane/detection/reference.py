"""What is usual for a bundle and a variety, learnt from lots: how lots differ from each other, and how far that goes.

The unit is the lot, never the item: thirty items already equal the spread between lots, so more items of one lot prove
nothing. Lots of all lines that run the bundle are pooled, each line about its own mean.

Fitted are the dependence of the moments on the class mix (ridge regression, so that a lot with more defects is not
taken for other fruit), the covariance of what is left, shrunk to its diagonal, and the same for the class mix. The
thresholds follow from a budget of false alarms: lots that were *not* used for the fit (each fifth of the time is
judged by the other four) are drawn again and again into months of production, and four in five of these months stay
below the threshold. The largest value of the real sequence counts where it is higher.
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
MARGIN: Final = 1.15
"""Threshold / value of the budget: lots that follow each other are more alike than lots drawn at random."""
BORROWED_MARGIN: Final = 1.5
CLIP: Final = 0.8
"""The median, which serves in many dimensions, leaves too little beyond it in one or two."""
MONTH_S: Final = 30 * 16 * 3600.0
"""A month of production."""
QUIET_MONTHS: Final = 0.8
"""Share of the months that stay below the threshold: with one alarm or none a month, 0.2 alarms a month and line."""
FAST_S: Final = 330.0
"""Memory of the smoothing before the clip."""
SLOW_S: Final = 8300.0
"""Memory of the mean over lots, 2.3 h."""
FOLDS: Final = 5
_GROWTH: Final = 1.4
"""A reference is fitted again when its lots have grown by so much."""
_RIDGE: Final = 1e-2
_SHRINK: Final = 0.05
_OWN_MEAN: Final = 6.0
"""Lots of a line that weigh as much as the mean of all lines."""
_FIRST: Final = 1e-4
_CHAINS: Final = 200
_SEED: Final = 30


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
    """The 0.8 quantile of the norms of held-out lots; longer vectors are shortened to it (Huber)."""
    largest: float
    """Squared norm of the channel's slow mean that the budget of false alarms allows."""
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
    """The same for the slow mean of the logarithm of weight / what the size lets expect."""
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
        records: Lots in the order of time, of at least five distinct names.

    Raises:
        ValueError: Fewer than five distinct lots.
    """
    names = list(dict.fromkeys(record.lot for record in records))
    if len(names) < FOLDS:
        raise ValueError(f"a reference needs at least {FOLDS} lots, got {len(names)}")
    # Blocks in the order of time: neighbouring lots are alike and must not judge each other.
    block = {name: k * FOLDS // len(names) for k, name in enumerate(names)}
    parts = [_fit_part([r for r in records if block[r.lot] != fold]) for fold in range(FOLDS)]
    whole = _fit_part(records)
    _judge(whole, [parts[block[r.lot]] for r in records], records)
    # A line's mean is known from its lots alone, and its error stays in every later residual.
    own = len(records) / len({record.line for record in records})
    followed = 2.0 * SLOW_S / max(float(np.mean([record.duration_s for record in records])), 60.0)
    whole.margin = MARGIN * (1.0 + followed / own)
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
    mix = np.asarray(np.linalg.solve(gram, mixes.T @ first), np.float64)
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


def _judge(whole: Fit, parts: Sequence[Fit], records: Sequence[LotRecord]) -> None:
    """Runs the slow channels over the lots, each as a fit without it sees it, and keeps their largest values."""
    pairs = list(zip(parts, records, strict=True))
    covariate = [part.covariate.whiten @ part.residual(r.line, r.z, r.shares) for part, r in pairs]
    label = [part.label.whiten @ part.label_residual(r.line, r.shares) for part, r in pairs]
    for spread, vectors in ((whole.covariate, covariate), (whole.label, label)):
        norms = np.linalg.norm(vectors, axis=1)
        spread.clip = float(np.quantile(norms, CLIP))
        spread.odd = float(norms.max() ** 2)
        clips = [clipped(vector, spread.clip) for vector in vectors]
        spread.largest = max(_slow_maximum(records, clips), _budget(np.array(clips), [r.duration_s for r in records]))
    weights = [(r, np.array([part.weight_residual(r.line, r.weight, r.size)])) for part, r in pairs]
    weights = [(r, value) for r, value in weights if np.isfinite(value).all()]
    if weights:
        weighed, values = [r for r, _ in weights], [value for _, value in weights]
        largest = max(_slow_maximum(weighed, values), _budget(np.array(values), [r.duration_s for r in weighed]))
        whole.weight_largest = math.sqrt(largest)


def clipped(vector: Floats, limit: float) -> Floats:
    """Returns the vector, shortened to the limit where it is longer."""
    norm = float(np.linalg.norm(vector))
    return vector * (limit / norm) if norm > limit > 0.0 else vector


def _slow_maximum(records: Sequence[LotRecord], vectors: Sequence[Floats]) -> float:
    largest = 0.0
    state: dict[str, Floats] = {}
    for record, vector in zip(records, vectors, strict=True):
        slow = state.get(record.line, np.zeros_like(vector))
        slow = slow + weight(record.duration_s, SLOW_S) * (vector - slow)
        state[record.line] = slow
        largest = max(largest, float(slow @ slow))
    return largest


def _budget(vectors: Floats, durations_s: Sequence[float]) -> float:
    """Returns the squared norm that the slow mean exceeds in one of five months of lots drawn at random.

    Args:
        vectors: (L, D) held-out lots, whitened and clipped.
        durations_s: Their lengths.
    """
    rng = np.random.default_rng(_SEED)
    weights = np.array([weight(seconds, SLOW_S) for seconds in durations_s])
    steps = math.ceil(MONTH_S / max(float(np.mean(durations_s)), 60.0))
    slow, largest = np.zeros((_CHAINS, vectors.shape[1])), np.zeros(_CHAINS)
    for _ in range(steps):
        drawn = rng.integers(len(vectors), size=_CHAINS)
        slow += weights[drawn, None] * (vectors[drawn] - slow)
        largest = np.maximum(largest, np.einsum("cd,cd->c", slow, slow))
    return float(np.quantile(largest, QUIET_MONTHS))


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
