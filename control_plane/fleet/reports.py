"""An agent's row as typed facts: its last report, and what its signs of life say of the connection.

This is the only place that turns the stored JSON of a report back into `models.messages.Reported`; every
field of a report is read here, so that a misspelt field is an error of the type checker and not a silent default.
"""

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from control_plane.database.tables.agents import Agent
from models.messages import KEEP_ALIVE_S, Reported

log = logging.getLogger("sortline.fleet")
NO_REPORT: Final = Reported(boot_id="", at_ms=0)
"""Stands for an agent that has reported nothing yet: no bundle, no running line, generation 0."""
LATE_S: Final = 2.0 * KEEP_ALIVE_S
"""Reports come every 10 s: without any sign of life for this long at least one was lost."""
SILENT_S: Final = 3.0 * KEEP_ALIVE_S
OFFLINE_S: Final = 4.0 * SILENT_S


def report_of(agent: Agent) -> Reported:
    """Returns the agent's last report; `NO_REPORT` where it has sent none that this program can read."""
    return parse_report(agent.reported)


def parse_report(stored: Mapping[str, Any]) -> Reported:
    """Returns a stored report; `NO_REPORT` for an empty one, and for one that another version of the program wrote."""
    if not stored:
        return NO_REPORT
    try:
        return msgspec.convert(stored, Reported)
    except msgspec.ValidationError as error:
        log.warning("a stored report is not readable and counts as none: %s", error)
        return NO_REPORT


def parse_report_text(stored: str | None) -> Reported:
    """Returns a stored report from its JSON text, as `parse_report`; for readers of thousands of agents."""
    if not stored or stored == "{}":
        return NO_REPORT
    try:
        return msgspec.json.decode(stored, type=Reported)
    except msgspec.DecodeError as error:
        log.warning("a stored report is not readable and counts as none: %s", error)
        return NO_REPORT


def age_s(at: datetime | None, now: datetime) -> float | None:
    """Returns the seconds since then, never negative; None when there is no such time."""
    return None if at is None else max(0.0, (now - at).total_seconds())


def connection_of(seen_s: float | None, *, online: bool) -> str:
    """Names the connection by the age of the last sign of life: live, late, silent, offline or never.

    Args:
        seen_s: Age of the last message that was not a retained one, in seconds; None = there was none.
        online: What presence said last.
    """
    if seen_s is None:
        return "never"
    if not online or seen_s > OFFLINE_S:
        return "offline"
    if seen_s > SILENT_S:
        return "silent"
    return "late" if seen_s > LATE_S else "live"
