"""Leases with a fencing number: one replica at a time does a duty."""

from datetime import datetime, timedelta

from sqlmodel import Session

from control_plane.database.tables.leases import Lease


def take_lease(session: Session, name: str, holder: str, *, seconds: float, now: datetime) -> int | None:
    """Takes or renews a lease, in the caller's writing transaction.

    Returns:
        The fencing number, or None while somebody else holds it.
    """
    lease = session.get(Lease, name, with_for_update=True)
    until = now + timedelta(seconds=seconds)
    if lease is None:
        session.add(Lease(name=name, holder=holder, fence=1, until=until))
        return 1
    if lease.holder != holder:
        if lease.until > now:
            return None
        lease.holder, lease.fence = holder, lease.fence + 1
    lease.until = until
    session.add(lease)
    return lease.fence


def holds_lease(session: Session, name: str, holder: str, fence: int) -> bool:
    """Whether this holder's lease with this fencing number is the current one; locks it for the transaction.

    A process that slept beyond its lease finds a higher number here and must write nothing.
    """
    lease = session.get(Lease, name, with_for_update=True)
    return lease is not None and lease.holder == holder and lease.fence == fence
