"""A stored report is read into one type, and nothing else of the program looks into its JSON."""

import msgspec
import pytest

from control_plane.database.tables.agents import Agent
from control_plane.fleet.reports import NO_REPORT, connection_of, parse_report, report_of
from models.messages import Phase, Reported

BOOT = "0123456789abcdef"


def test_a_report_survives_being_stored() -> None:
    reported = Reported(boot_id=BOOT, at_ms=7, generation=3, phase=Phase.TRIAL, active="a" * 64, lanes=2)
    assert report_of(Agent(id="line-1", reported=msgspec.to_builtins(reported))) == reported


@pytest.mark.parametrize("stored", [{}, {"boot_id": "short", "at_ms": 1}, {"boot_id": BOOT, "at_ms": 1, "phase": "x"}])
def test_a_malformed_report_counts_as_none(stored: dict[str, object]) -> None:
    assert parse_report(stored) is NO_REPORT
    assert (NO_REPORT.generation, NO_REPORT.active, NO_REPORT.line_running) == (0, "", False)


@pytest.mark.parametrize(
    ("seen_s", "online", "name"),
    [(None, True, "never"), (3, True, "live"), (30, True, "late"), (100, True, "silent"), (200, True, "offline")],
)
def test_the_connection_is_named_by_the_age_of_the_last_sign_of_life(seen_s: float, online: bool, name: str) -> None:
    assert connection_of(seen_s, online=online) == name
    assert connection_of(3, online=False) == "offline"
