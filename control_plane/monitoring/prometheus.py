"""`/metrics` in Prometheus' text form: base units, `_total` on counters, labels that stay few."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)

from control_plane.monitoring.board import FleetBoard
from control_plane.monitoring.status import AgentStatus, State
from control_plane.trust.online_signer import OnlineSigner

_MAX_AGE_S: Final = 1.0
_OF_AGENTS: Final[dict[str, tuple[str, Callable[[AgentStatus], float | None]]]] = {
    "sortline_items_per_second": ("Judged items per second, recent windows", lambda s: s.figures.items_per_s),
    "sortline_latency_p99_seconds": (
        "Frame to verdict, 99th percentile, recent windows",
        lambda s: None if s.figures.p99_ms is None else s.figures.p99_ms / 1000.0,
    ),
    "sortline_drift_psi": ("Largest stability index of a feature, noise removed", lambda s: s.drift.drift_value),
    "sortline_unsure_share": (
        "Items on which the line abstained, share, recent windows",
        lambda s: s.figures.unsure_share,
    ),
    "sortline_reject_share": (
        "Items that the recipe did not let through, share, recent windows",
        lambda s: s.figures.reject_share,
    ),
    "sortline_spool_records": ("Records waiting on the agent", lambda s: float(s.spool_records)),
    "sortline_window_age_seconds": ("Age of the newest window; grows until the next", lambda s: s.link.window_age_s),
    "sortline_seen_age_seconds": ("Age of the last sign of life; grows until the next", lambda s: s.link.seen_age_s),
    "sortline_agent_resident_bytes": ("Resident memory of supervisor and line", lambda s: s.rss_mb * 1e6),
}
"""Gauge -> what it says, and how it is read off a status; None leaves it out."""


class FleetCollector:
    """Reads the board when it is scraped; keeps nothing.

    Args:
        board: How the agents are.
        signer: How full the signed metadata is.
        counters: What the fleet's side did.
        gauges: Name -> (what it says, value) of this process.
        alarms: Number of alarms that are not over, by severity, cause and state.
    """

    def __init__(
        self,
        board: FleetBoard,
        signer: OnlineSigner,
        counters: Counter[str],
        gauges: Mapping[str, tuple[str, float]],
        alarms: Mapping[tuple[str, str, str], int],
    ) -> None:
        self._board, self._signer, self._counters, self._gauges = board, signer, counters, gauges
        self._alarms = alarms

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics."""
        yield from self._fleet(self._board.snapshot(_MAX_AGE_S))
        yield self._alarms_active()
        yield from self._server()

    def _alarms_active(self) -> Metric:
        labels = ["severity", "cause", "state"]
        gauge = GaugeMetricFamily("sortline_alarms_active", "Alarms that are not over", labels=labels)
        for key, number in sorted(self._alarms.items()):
            gauge.add_metric(key, number)
        return gauge

    def _fleet(self, statuses: list[AgentStatus]) -> Iterator[Metric]:
        state = StateSetMetricFamily("sortline_agent_state", "NAMUR NE 107 state of an agent", labels=["agent"])
        model = InfoMetricFamily("sortline_model", "Bundle an agent runs", labels=["agent"])
        for status in statuses:
            state.add_metric([status.id], {str(s): s is status.state for s in State})
            model.add_metric([status.id], {"bundle": status.runs.active[:16], "phase": status.runs.phase})
        yield from (state, model)
        for name, (text, read) in _OF_AGENTS.items():
            gauge = GaugeMetricFamily(name, text, labels=["agent"])
            for status in statuses:
                if (value := read(status)) is not None:
                    gauge.add_metric([status.id], value)
            yield gauge

    def _server(self) -> Iterator[Metric]:
        counters = CounterMetricFamily("sortline_fleet_messages", "What the fleet's side did", labels=["what"])
        for name, value in sorted(self._counters.items()):
            counters.add_metric([name], value)
        yield counters
        full = GaugeMetricFamily("sortline_trust_fill_ratio", "Signed metadata / what brokers carry", labels=["part"])
        for part, share in sorted(self._signer.fill.items()):
            full.add_metric([part], share)
        yield full
        for name, (text, now) in self._gauges.items():
            gauge = GaugeMetricFamily(name, text)
            gauge.add_metric([], now)
            yield gauge


def render(
    board: FleetBoard,
    signer: OnlineSigner,
    counters: Counter[str],
    gauges: Mapping[str, tuple[str, float]],
    alarms: Mapping[tuple[str, str, str], int],
) -> bytes:
    """Returns the text of `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(board, signer, counters, gauges, alarms))
    return generate_latest(registry)
