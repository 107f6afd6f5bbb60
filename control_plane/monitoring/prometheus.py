"""`/metrics` in Prometheus' text form: base units, `_total` on counters, labels that stay few."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)

from control_plane.monitoring.status import AgentStatus, State

if TYPE_CHECKING:
    from control_plane.services import Services


_MAX_AGE_S = 1.0


class FleetCollector:
    """Reads the services when it is scraped; keeps nothing."""

    def __init__(self, services: "Services") -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        yield from self._fleet(self._services.statuses.board(_MAX_AGE_S))
        yield from self._server()

    def _fleet(self, statuses: list[AgentStatus]) -> Iterator[Metric]:
        state = StateSetMetricFamily("sortline_agent_state", "NAMUR NE 107 state of an agent", labels=["agent"])
        model = InfoMetricFamily("sortline_model", "Bundle an agent runs", labels=["agent"])
        gauges = {
            name: GaugeMetricFamily(name, text, labels=["agent"])
            for name, text in (
                ("sortline_items_per_second", "Judged items per second, recent windows"),
                ("sortline_latency_p99_seconds", "Frame to verdict, 99th percentile, recent windows"),
                ("sortline_drift_psi", "Largest stability index of a feature, noise removed"),
                ("sortline_unsure_share", "Items on which the line abstained, share, recent windows"),
                ("sortline_spool_records", "Records waiting on the agent"),
                ("sortline_window_age_seconds", "Age of the newest window"),
                ("sortline_agent_resident_bytes", "Resident memory of supervisor and line"),
            )
        }
        for status in statuses:
            state.add_metric([status.id], {str(s): s is status.state for s in State})
            model.add_metric([status.id], {"bundle": status.active[:16], "phase": status.phase})
            values = {
                "sortline_items_per_second": status.items_per_s,
                "sortline_latency_p99_seconds": None if status.p99_ms is None else status.p99_ms / 1000.0,
                "sortline_drift_psi": status.drift_value,
                "sortline_unsure_share": status.unsure_share,
                "sortline_spool_records": float(status.spool_records),
                "sortline_window_age_seconds": status.window_age_s,
                "sortline_agent_resident_bytes": status.rss_mb * 1e6,
            }
            for name, value in values.items():
                if value is not None:
                    gauges[name].add_metric([status.id], value)
        yield from (state, model, *gauges.values())

    def _server(self) -> Iterator[Metric]:
        counters = CounterMetricFamily("sortline_fleet_messages", "What the fleet link did", labels=["what"])
        for name, value in sorted(self._services.fleet.counters.items()):
            counters.add_metric([name], value)
        yield counters
        connected = GaugeMetricFamily("sortline_broker_connected", "Both connections to the broker stand")
        connected.add_metric([], float(self._services.fleet.connected))
        yield connected
        full = GaugeMetricFamily("sortline_trust_fill_ratio", "Signed metadata / what brokers carry", labels=["part"])
        for part, share in sorted(self._services.fleet.assignments.fill.items()):
            full.add_metric([part], share)
        yield full
        uptime = GaugeMetricFamily("sortline_uptime_seconds", "Since this process started")
        uptime.add_metric([], time.monotonic() - self._services.started_s)
        yield uptime


def render(services: "Services") -> bytes:
    """The text of `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(services))
    return generate_latest(registry)
