"""C1 and lanes: one of several that see the same lot against the others.

What a lot is like is common to all who see it, so the difference from the median of the siblings is free of the
spread between lots (0.018 instead of 0.19 standard deviations of an item, measured), and faults of one camera or lane
show at once. The members' lasting differences are learnt: no two cameras are alike.

The differences are followed at three speeds. `A` is the largest of the three squared norms, each whitened by the
covariance of the followed differences and divided by its largest reference value. A member stands out by
`r = A / (1 + largest A of its siblings)`: where all differ, none is the culprit. The reference has three parts in
the order of time, and each is judged by the ones before: the covariance, then the largest values of each speed, then
the largest `r`. The maximum is taken over members, features and speeds at once, so the threshold holds for all of
them together (Westfall & Young 1993).
"""

from typing import Final

import msgspec
import numpy as np

from control_plane.detection.moments import Floats
from control_plane.detection.sequential import Array, Latch, weight

MEMORIES_S: Final = (45.0, 330.0, 2500.0)
LEARN_S: Final = (230_000.0, 115_000.0, 230_000.0)
"""Member-seconds of the three parts of the reference: 64, 32 and 64 hours."""
LEARN_LOTS: Final = (12, 6, 12)
MEMBER_S: Final = 14_400.0
MEMBER_LOTS: Final = 4
"""A member that joins a known group learns its own lasting difference for so long."""
MARGIN: Final = 1.5
"""A fruit that no lot was like changes the differences between cameras, too; 1.3 was too little for that (measured)."""
_SHRINK: Final = 0.05
_LEARNING, _SCALING, _RANGING, READY = range(4)


class Member(msgspec.Struct, kw_only=True, eq=False):
    """One camera or lane in its group."""

    seconds: float = 0.0
    lots: int = 0
    lot: str = ""
    total: Array
    """(D,) sum of the differences, weighted by seconds."""
    fast: Array
    """(3, D) the followed differences about the lasting one; zeros until that is known."""
    strength: float = 0.0
    """`A` of the last step."""
    speed: int = 0
    """The speed that shows it."""
    latch: Latch = msgspec.field(default_factory=Latch)

    @property
    def mean(self) -> Floats:
        """Returns float64 (D,): the lasting difference."""
        return self.total / max(self.seconds, 1.0)

    @property
    def known(self) -> bool:
        """Whether the lasting difference can be used."""
        return self.seconds >= MEMBER_S and self.lots >= MEMBER_LOTS


class ContrastReference(msgspec.Struct, kw_only=True, eq=False):
    """What is usual among siblings that run one bundle; pooled over all groups of the fleet."""

    stage: int = _LEARNING
    seconds: float = 0.0
    """Member-seconds of the present stage."""
    lots: int = 0
    outer: Array
    """(3, D, D) sums of squares of the followed differences."""
    count: int = 0
    whiten: Array
    """(3, D, D)."""
    scale: Array
    """(3,) largest squared norm of each speed."""
    largest: float = 0.0
    """Largest `r`."""

    @property
    def ready(self) -> bool:
        """Whether thresholds are known."""
        return self.stage == READY


def new_reference(size: int) -> ContrastReference:
    """Returns a reference that knows nothing, for differences of this many numbers."""
    speeds = len(MEMORIES_S)
    return ContrastReference(
        outer=np.zeros((speeds, size, size)), whiten=np.zeros((speeds, size, size)), scale=np.zeros(speeds)
    )


def new_member(size: int) -> Member:
    """Returns a member of which nothing is known."""
    speeds = len(MEMORIES_S)
    return Member(total=np.zeros(size), fast=np.zeros((speeds, size)))


def differences(z: Floats) -> Floats:
    """Returns each row less the median of the other rows.

    Args:
        z: (M, D) moments of M >= 3 members on the same lot.
    """
    count = len(z)
    others = np.array([[j for j in range(count) if j != k] for k in range(count)])
    ordered = np.sort(z[others], axis=1)
    return np.asarray(z - (ordered[:, (count - 2) // 2] + ordered[:, (count - 1) // 2]) / 2.0)


def step(
    reference: ContrastReference, members: list[Member], z: Floats, *, span_s: float, lot: str
) -> list[tuple[float, Floats, Floats]]:
    """Follows the differences of one group over a span.

    Args:
        reference: Of the bundle; learns until it is ready.
        members: M, in the order of the rows; their states are updated.
        z: (M, D) moments of the span.
        span_s: Its length.
        lot: The lot they all saw.

    Returns:
        For each member `r` / threshold (0 while learning), its followed difference at the speed that shows most, in
        standard deviations of an item, and what each number contributes to the squared norm.
    """
    memory = np.array([weight(span_s, m) for m in MEMORIES_S])[:, None]
    changed = members[0].lot != lot
    for member, difference in zip(members, differences(z), strict=True):
        if reference.stage < _RANGING or not member.known:
            member.total += span_s * difference
            member.seconds += span_s
            member.lots += member.lot != lot
            member.lot = lot
        if member.known:
            member.fast += memory * (difference - member.mean - member.fast)
    if reference.stage == _LEARNING:
        _gather(reference, members)
    else:
        _measure(reference, members)
    found = _outstanding(reference, members)
    # What is not about a known lasting difference yet has taught nothing.
    _advance(reference, span_s * sum(member.known for member in members), new_lot=changed)
    return found


def _gather(reference: ContrastReference, members: list[Member]) -> None:
    for member in members:
        if member.known:
            reference.outer += member.fast[:, :, None] * member.fast[:, None, :]
            reference.count += 1


def _measure(reference: ContrastReference, members: list[Member]) -> None:
    for member in members:
        whitened = np.einsum("lij,lj->li", reference.whiten, member.fast)
        squares = (whitened**2).sum(axis=1)
        if reference.stage == _SCALING and member.known:
            reference.scale = np.maximum(reference.scale, squares)
        scaled = squares / np.maximum(reference.scale, 1e-12)
        member.speed = int(scaled.argmax())
        member.strength = float(scaled.max()) if reference.stage > _SCALING and member.known else 0.0


def _outstanding(reference: ContrastReference, members: list[Member]) -> list[tuple[float, Floats, Floats]]:
    found = []
    for k, member in enumerate(members):
        others = max((m.strength for j, m in enumerate(members) if j != k), default=0.0)
        r = member.strength / (1.0 + others)
        if reference.stage == _RANGING:
            reference.largest = max(reference.largest, r)
        ratio = r / (MARGIN * reference.largest) if reference.ready and reference.largest > 0.0 else 0.0
        difference, whiten = member.fast[member.speed], reference.whiten[member.speed]
        found.append((ratio, difference, difference * (whiten.T @ (whiten @ difference))))
    return found


def _advance(reference: ContrastReference, member_s: float, *, new_lot: bool) -> None:
    if reference.ready:
        return
    reference.seconds += member_s
    reference.lots += new_lot
    if reference.seconds < LEARN_S[reference.stage] or reference.lots < LEARN_LOTS[reference.stage]:
        return
    if reference.stage == _LEARNING:
        reference.whiten = _whiten(reference.outer / max(reference.count, 1))
    reference.stage += 1
    reference.seconds, reference.lots = 0.0, 0


def _whiten(covariance: Floats) -> Floats:
    found = np.empty_like(covariance)
    for speed, matrix in enumerate(covariance):
        diagonal = np.diag(matrix)
        floor = max(float(diagonal.mean()) * 1e-3, 1e-12)
        shrunk = (1.0 - _SHRINK) * matrix + np.diag(_SHRINK * diagonal + floor)
        found[speed] = np.linalg.inv(np.linalg.cholesky(shrunk))
    return found
