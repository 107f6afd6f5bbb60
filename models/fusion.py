"""Fuses the views of one item into one verdict.

A defect turns in and out of sight while the item rolls, so two views must suffice to reject an item, and one bad
crop must not. The evidence of an item is the mean of its `top_k` largest view log-odds of "not good": a defect
seen in two of eight views counts fully, a single outlier is halved. A two-parameter sigmoid (Platt 1999), learnt
on items the model never saw, turns evidence into a calibrated probability.

Laws: the order of the views does not matter; item probabilities are finite, non-negative and sum to 1.
"""

from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import InputError

_CLIP = 1e-6


class FusionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the fusion, a part of `recipe.json`."""

    method: Literal["top_k_log_odds"] = "top_k_log_odds"
    top_k: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    scale: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
    offset: Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)] = 0.0
    prior: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 0.5
    """Share of defective items at which the probabilities are calibrated."""
    calibration_items: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Held-out items that `top_k`, `scale` and `offset` were learnt on; 0 = not learnt (identity)."""


def view_evidence(probabilities: NDArray[np.floating], good: int) -> NDArray[np.float64]:
    """Returns the log-odds that each view shows a defect.

    Args:
        probabilities: (V, C), rows sum to 1.
        good: Column of the good class.

    Returns:
        float64 (V,).
    """
    bad = np.clip(1.0 - probabilities[:, good].astype(np.float64), _CLIP, 1.0 - _CLIP)
    return np.asarray(np.log(bad) - np.log1p(-bad), np.float64)


def item_evidence(probabilities: NDArray[np.floating], good: int, top_k: int) -> float:
    """Returns the mean of the `top_k` largest view log-odds, or of all where there are fewer."""
    evidence = np.sort(view_evidence(probabilities, good))
    return float(evidence[-top_k:].mean())


def fuse(probabilities: NDArray[np.floating], spec: FusionSpec, good: int) -> NDArray[np.float64]:
    """Returns one probability per class for the item.

    The defect probability is the calibrated evidence; it is shared among the defect classes in proportion to the
    probability they received in the views, weighted towards the views that show a defect.

    Args:
        probabilities: (V, C) with V >= 1: calibrated class probabilities of the item's views.
        spec: Parameters from the bundle.
        good: Column of the good class.

    Returns:
        float64 (C,), sums to 1.

    Raises:
        InputError: `fusion.no_views`, `fusion.not_finite`.
    """
    if probabilities.ndim != 2 or probabilities.shape[0] == 0:
        raise InputError(
            "fusion.no_views",
            "An item needs at least one view.",
            expected="(V >= 1, C)",
            got=probabilities.shape,
        )
    if not np.isfinite(probabilities).all():
        raise InputError("fusion.not_finite", "A view has no finite probability.", expected="finite", got="nan or inf")
    score = spec.scale * item_evidence(probabilities, good, spec.top_k) + spec.offset
    defect = float(np.exp(-np.logaddexp(0.0, -score)))
    weights = 1.0 - probabilities[:, good].astype(np.float64)
    shares = weights @ probabilities.astype(np.float64)
    shares[good] = 0.0
    total = shares.sum()
    if total <= 0.0:
        shares[:] = 1.0
        shares[good] = 0.0
        total = shares.sum()
    fused = defect * shares / total
    fused[good] = 1.0 - defect
    return np.asarray(fused, np.float64)
