"""Leases with a fencing number: one replica at a time does a duty."""

from datetime import datetime, timedelta
from typing import Final

from sqlmodel import Session, col, select

from control_plane.database.tables.leases import Lease

CLOCK_SLACK: Final = timedelta(seconds=5)
"""How far the clocks of two replicas may differ before a lease of the one is void to the other."""
LONGEST: Final = timedelta(seconds=600)
"""No lease is taken for longer (`rollouts.lease_s`)."""


def take_lease(session: Session, name: str, holder: str, *, seconds: float, now: datetime) -> int | None:
    """Takes or renews a lease, in the caller's writing transaction.

    A lease that runs further ahead than a lease of this length can (the clock was set back since it was taken) is void:
    it would keep every process out until the clock is there again.

    Returns:
        The fencing number, or None while another process holds the lease.
    """
    lease = session.get(Lease, name, with_for_update=True)
    until = now + timedelta(seconds=seconds)
    if lease is None:
        session.add(Lease(name=name, holder=holder, fence=1, until=until))
        return 1
    if lease.holder != holder:
        if now < lease.until <= until + CLOCK_SLACK:
            return None
        lease.holder, lease.fence = holder, lease.fence + 1
    lease.until = until
    session.add(lease)
    return lease.fence


def holds_lease(session: Session, name: str, holder: str, fence: int) -> bool:
    """Returns whether this holder's lease with this fencing number is the current one; locks it for the transaction.

    A process that slept beyond its lease finds a higher number here and must write nothing.
    """
    lease = session.get(Lease, name, with_for_update=True)
    return lease is not None and lease.holder == holder and lease.fence == fence


def leases_ahead(session: Session, now: datetime) -> list[str]:
    """Returns the leases that run further ahead than any lease can: this clock, or a replica's, was set wrongly."""
    query = select(Lease.name).where(col(Lease.until) > now + LONGEST + CLOCK_SLACK)
    return list(session.exec(query.order_by(col(Lease.name))))
