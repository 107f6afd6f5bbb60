"""Which alarms a person meets as one: the same cause on one line, or on one site where lines share what causes it.

Of the alarms of a group that are not over, one leads: it is announced for all. A member is announced as well when it is
worse than everything announced before it. When the leader is over, the oldest member leads and is announced, so no
group is silent while one of its alarms lasts.
"""

from collections.abc import Sequence
from typing import Final

from control_plane.database.tables.alarms import Alarm
from control_plane.detection.finding import Cause, Finding, Level, Severity

SHARED_BY_A_SITE: Final = frozenset(
    {
        Cause.LIGHT_LEVEL,
        Cause.LIGHT_COLOUR,
        Cause.FLICKER,
        Cause.PRIOR_SHIFT,
        Cause.NEW_VARIETY,
        Cause.COVARIATE_SHIFT,
        Cause.CONCEPT_DRIFT,
        Cause.CLOCK,
        Cause.INCOMPLETE,
    }
)
"""The mains, the harvest and the network concern every line of a site; a dirty lens concerns one line."""


def grouping_of(finding: Finding) -> str:
    """Returns the name of the group, such as `site north/light-level` or `line line-3/camera-dirty`."""
    if finding.level is Level.FLEET:
        return f"fleet/{finding.cause}"
    if finding.level is Level.SITE or (finding.cause in SHARED_BY_A_SITE and finding.site):
        return f"site {finding.site}/{finding.cause}"
    return f"line {finding.line}/{finding.cause}"


def leader_among(others: Sequence[Alarm]) -> Alarm | None:
    """Returns the alarm that leads these alarms of one group; None where there is none.

    Args:
        others: The alarms of the group that are not over, oldest first.
    """
    return next((alarm for alarm in others if alarm.leader_id is None), others[0] if others else None)


def must_be_announced(severity: Severity, others: Sequence[Alarm]) -> bool:
    """Returns whether an alarm is worse than everything that was announced of its group."""
    return all(severity.rank > Severity(other.severity).rank for other in others)
