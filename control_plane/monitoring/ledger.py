"""Counts records in the transaction that stores them: the one hand that the ingest of the fleet gets from here."""

from collections import Counter
from collections.abc import Sequence

from sqlmodel import Session

from control_plane.fleet.spooled import Arrival, ReportArrival
from control_plane.monitoring.fidelity import FidelityCounts
from control_plane.monitoring.rollups import add_windows, lock_agents


class WindowLedger:
    """Adds windows up and counts what arrived.

    Args:
        counters: Gets `windows_summed`, and `windows_by_arrival` for those whose clock was implausible.
    """

    def __init__(self, counters: Counter[str]) -> None:
        self._counters, self._fidelity = counters, FidelityCounts()

    def record(self, session: Session, arrivals: Sequence[Arrival], reports: Sequence[ReportArrival]) -> None:
        """Counts these in the caller's transaction; what is not new is counted as a duplicate and nowhere else."""
        if any(arrival.new and arrival.is_window for arrival in arrivals):
            lock_agents(session, {arrival.agent_id for arrival in arrivals})
            self._counters["windows_summed"] += add_windows(session, arrivals)
            self._counters["windows_by_arrival"] += sum(a.new and a.is_window and a.by_arrival for a in arrivals)
        self._fidelity.record(session, arrivals, reports)
