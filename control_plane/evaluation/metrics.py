"""Figures with intervals over items. Views of one item are near-copies, so the item is the unit of every interval."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import confusion_matrix

DRAWS: Final = 400
_MIN_ITEMS: Final = 5
_MIN_FOLDS: Final = 3


def auc(bad: NDArray[np.bool_], score: NDArray[np.floating]) -> float:
    """Returns the area under the ROC of "not good" by ranks (Mann-Whitney); NaN when one side is empty.

    Ranks take a tenth of the time of scikit-learn's curve, and a bootstrap computes hundreds of areas.
    """
    ill = int(np.count_nonzero(bad))
    well = len(bad) - ill
    if not ill or not well:
        return float("nan")
    return float((stats.rankdata(score)[bad].sum() - ill * (ill + 1) / 2) / (ill * well))


def auc_within_folds(
    bad: NDArray[np.bool_], score: NDArray[np.floating], folds: Sequence[NDArray[np.intp]]
) -> dict[str, Any]:
    """Returns the mean over the folds of the AUC among the views each fold held out.

    Pooling ranks answers of different models against each other, which none of them was trained for; the mean over
    folds measures one model (Forman & Scholz 2010, "Apples-to-apples in cross-validation studies"). It is blind
    to offsets between folds, so it stands beside the pooled figure, not in its place.

    Args:
        bad: (N,).
        score: (N,) defect probability.
        folds: Rows that each fold held out.

    Returns:
        `{value, low, high, folds}`: Student's 95 % interval over the folds that hold both kinds.
    """
    found = np.array([auc(bad[rows], score[rows]) for rows in folds])
    found = found[np.isfinite(found)]
    if len(found) < _MIN_FOLDS:
        return {"value": None, "low": None, "high": None, "reason": f"only {len(found)} folds hold good and bad views"}
    half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    low, high = max(0.0, found.mean() - half), min(1.0, found.mean() + half)
    return {
        "value": round(float(found.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "folds": len(found),
    }


def balanced_accuracy(truth: NDArray[np.integer], found: NDArray[np.integer]) -> float:
    """Returns the mean over the classes present of the share that was found."""
    present = np.unique(truth)
    return float(np.mean([(found[truth == k] == k).mean() for k in present])) if len(present) else float("nan")


def calibration_error(bad: NDArray[np.bool_], score: NDArray[np.floating], bins: int = 10) -> float:
    """Returns the expected calibration error of the defect probability, equal-width bins (Naeini et al. 2015)."""
    at = np.minimum((score * bins).astype(int), bins - 1)
    gaps = [abs(score[at == k].mean() - bad[at == k].mean()) * (at == k).mean() for k in range(bins) if (at == k).any()]
    return float(np.sum(gaps))


def measure(
    truth: NDArray[np.integer],
    probabilities: NDArray[np.floating],
    items: NDArray[np.generic],
    classes: tuple[str, ...],
    *,
    threshold: float = 0.5,
    called: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns all figures of one level (views, or items with one row each).

    Args:
        truth: (N,) class, 0 = good.
        probabilities: (N, C).
        items: (N,) item of each row: the bootstrap draws items with replacement (Efron & Tibshirani 1993).
        classes: Names of the C classes.
        threshold: Defect probability from which a row is called bad.
        called: bool (N,), True for rows that a recipe calls bad; None = decided by the threshold.
        seed: Seed of the bootstrap.

    Returns:
        `auc` (good against the rest), `balanced_accuracy` (good against the rest at the threshold), each
        `{value, low, high}` with a 95 % interval or a `reason` why there is none; `class_balanced_accuracy` where
        there are more than two classes; `calibration_error`; `confusion` (counts, rows are the truth) and
        `confusion_shares` (each cell's share of its row, with its interval); counts.
    """
    score = 1.0 - probabilities[:, 0]
    bad = truth > 0
    called = score >= threshold if called is None else called
    names, place = np.unique(items, return_inverse=True)
    found = np.where(called, 1 + probabilities[:, 1:].argmax(axis=1), 0)
    facts: dict[str, Any] = {
        "rows": len(truth),
        "items": len(names),
        "auc": with_interval(lambda rows: auc(bad[rows], score[rows]), place, len(names), seed),
        "balanced_accuracy": with_interval(
            lambda rows: balanced_accuracy(bad[rows].astype(int), called[rows].astype(int)), place, len(names), seed
        ),
        "calibration_error": round(calibration_error(bad, score), 4),
        "confusion": confusion_matrix(truth, found, labels=range(len(classes))).tolist(),
        "confusion_shares": _confusion_shares(truth, found, place, len(classes), seed),
        "classes": list(classes),
        "threshold": threshold,
    }
    if len(classes) > 2:
        facts["class_balanced_accuracy"] = with_interval(
            lambda rows: balanced_accuracy(truth[rows], found[rows]), place, len(names), seed
        )
    return facts


def with_interval(figure: Any, place: NDArray[np.intp], count: int, seed: int) -> dict[str, Any]:
    """Computes a figure and its 95 % interval by a bootstrap over items.

    Args:
        figure: Function of the rows (n,) that counts them as often as they occur.
        place: (N,) number of the item of each row, 0..count-1.
        count: Number of items.
        seed: Seed of the bootstrap.
    """
    value = figure(np.arange(len(place)))
    if not np.isfinite(value):
        return _figure(value, None, "only one class is present")
    if count < _MIN_ITEMS:
        return _figure(value, None, f"only {count} items")
    rows_of = [np.flatnonzero(place == k) for k in range(count)]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(DRAWS if len(place) * count < 5_000_000 else DRAWS // 4):
        drawn = figure(np.concatenate([rows_of[k] for k in rng.integers(0, count, count)]))
        if np.isfinite(drawn):
            draws.append(drawn)
    return _figure(value, np.asarray(draws), "too few items of one class")


def _figure(value: float, draws: NDArray[np.floating] | None, reason: str) -> dict[str, Any]:
    """Returns a value with its 95 % interval from bootstrap draws, or the reason why there is none."""
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None, "reason": reason}
    if draws is None or len(draws) < DRAWS // 8:
        return {"value": round(float(value), 4), "low": None, "high": None, "reason": reason}
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def _confusion_shares(
    truth: NDArray[np.integer], found: NDArray[np.integer], place: NDArray[np.intp], classes: int, seed: int
) -> list[list[dict[str, Any]]]:
    """Returns the share of each true class that received each verdict, with intervals."""
    cells = np.zeros((int(place.max(initial=-1)) + 1, classes, classes))
    np.add.at(cells, (place, truth, found), 1.0)
    value = _row_shares(cells.sum(axis=0))
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(cells), np.full(len(cells), 1.0 / len(cells)), size=DRAWS)
    drawn = _row_shares(np.tensordot(times.astype(float), cells, axes=1))

    def cell(row: int, column: int) -> dict[str, Any]:
        if not np.isfinite(value[row, column]):
            return _figure(np.nan, None, "no item of this class")
        if len(cells) < _MIN_ITEMS:
            return _figure(value[row, column], None, f"only {len(cells)} items")
        of_row = drawn[:, row, column]
        return _figure(value[row, column], of_row[np.isfinite(of_row)], "too few items of this class")

    return [[cell(row, column) for column in range(classes)] for row in range(classes)]


def _row_shares(counts: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns each row divided by its sum; NaN where a class is absent."""
    sums = counts.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(counts, sums, out=np.full_like(counts, np.nan), where=sums > 0), np.float64)


def item_truth(labels: NDArray[np.integer], doubt: NDArray[np.bool_]) -> int:
    """Returns the class of an item from the labels of its views.

    An item is bad when a view without doubt shows a defect (a defective apple also has sound sides); then it has the
    most frequent class among those views. Views in doubt decide only when there are no others.
    """
    sure = labels[~doubt] if (~doubt).any() else labels
    defects = sure[sure > 0]
    return int(np.bincount(defects).argmax()) if len(defects) else 0
