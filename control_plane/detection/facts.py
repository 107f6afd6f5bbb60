"""What detection must know of a bundle: its bins, its classes, and how well it judged items whose truth was known."""

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from control_plane.detection.moments import Floats, basis
from models.profile import BINS, Profile


class AccuracyReference(msgspec.Struct, frozen=True, kw_only=True):
    """How a bundle judged held-out items: the basis of an estimate without labels."""

    feature: str
    """Monitored feature whose bins hold the confidence, such as `entropy`."""
    items: tuple[int, ...]
    """(16,) held-out items per bin of that feature."""
    right: tuple[int, ...]
    """(16,) of them, those that were judged right."""
    lot_error: float = 0.0
    """Standard deviation over held-out lots of estimate - truth, beyond what their numbers of items explain."""
    slopes: tuple[float, float] | None = None
    """Corruption regression: the change of accuracy per change of the binned estimate and of the share below the
    confidence threshold, fitted on corrupted held-out items; None = it was not made."""

    @property
    def accuracy(self) -> float:
        """Share of the held-out items that were judged right."""
        return sum(self.right) / max(sum(self.items), 1)


class BundleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one bundle."""

    features: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """(F, 16) reference items per bin."""
    classes: tuple[str, ...]
    """K classes; the order is the one of `confusion`."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """(K, K) held-out items, rows are the truth, columns the verdict; empty = not known."""
    varieties: tuple[str, ...] = ()
    """Varieties the bundle was trained on; empty = not known."""
    scalar_edges: dict[str, tuple[float, ...]] = {}
    """Scalar -> 15 inner edges of its bins."""
    outlets: dict[str, str] = {}
    """True kind of an item -> outlet where it belongs; items of known truth are judged by it."""
    accuracy: AccuracyReference | None = None

    def functions(self) -> Floats:
        """Returns float64 (F, 16, 2), the moments' functions of the bin."""
        return basis(self.count_array())

    def count_array(self) -> NDArray[np.int64]:
        """Returns int64 (F, 16)."""
        return np.asarray(self.counts, np.int64).reshape(len(self.features), BINS)


def facts_of(
    profile: Profile,
    *,
    confusion: tuple[tuple[int, ...], ...] = (),
    varieties: tuple[str, ...] | None = None,
    scalar_edges: Mapping[str, tuple[float, ...]] | None = None,
    outlets: Mapping[str, str] | None = None,
    accuracy: AccuracyReference | None = None,
) -> BundleFacts:
    """Returns the facts of a bundle.

    Args:
        profile: Of the bundle: bins, classes, and unless given here its varieties and bins of scalars.
        confusion: See `BundleFacts`; so are the others.
        varieties: None = those of the profile.
        scalar_edges: None = those of the profile.
        outlets: Empty = items of known truth are not judged.
        accuracy: None = no accuracy is estimated.
    """
    edges = {name: bins.edges for name, bins in profile.scalars.items()} if scalar_edges is None else scalar_edges
    return BundleFacts(
        features=profile.features,
        counts=profile.counts,
        classes=tuple(profile.class_counts),
        confusion=confusion,
        varieties=tuple(profile.varieties) if varieties is None else varieties,
        scalar_edges=dict(edges),
        outlets=dict(outlets or {}),
        accuracy=accuracy,
    )
