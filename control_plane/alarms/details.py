"""What API, pages and receivers show of alarms."""

from collections import Counter
from datetime import datetime
from typing import Any, Final

from sqlalchemy import case
from sqlmodel import Session, col, desc, func, select

from control_plane.alarms.lifecycle import allowed
from control_plane.database.tables.alarms import Alarm, AlarmComment, AlarmDecision, AlarmDelivery, AlarmState
from control_plane.detection.finding import Severity
from models.errors import InputError

_TIMES: Final = ("raised_at", "seen_at", "silenced_until", "acknowledged_at", "resolved_at", "updated_at")
_PLAIN: Final = (
    "id",
    "key",
    "grouping",
    "leader_id",
    "severity",
    "detector",
    "cause",
    "level",
    "site",
    "line",
    "lane",
    "lots",
    "effect",
    "effect_unit",
    "interval",
    "items",
    "delay_items",
    "delay_s",
    "action",
    "cost",
    "owner",
    "seen",
    "escalation",
    "resolved_by",
    "reason",
)
_MOST_RELATED: Final = 200
"""Comments, messages and requests shown of one alarm, newest last."""


def facts_of(alarm: Alarm) -> dict[str, Any]:
    """Returns an alarm without its evidence, as lists and receivers show it."""
    found = {name: getattr(alarm, name) for name in _PLAIN} | {"state": str(alarm.state)}
    return found | {name: _iso(getattr(alarm, name)) for name in _TIMES}


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def list_alarms(
    session: Session,
    *,
    state: str = "active",
    severity: str = "",
    cause: str = "",
    site: str = "",
    line: str = "",
    before: int | None = None,
    limit: int = 50,
) -> list[Alarm]:
    """Returns alarms, newest first.

    Args:
        session: Reads.
        state: A state, `active` for all that are not over, or `all`.
        severity: Only of this severity; empty = any.
        cause: Only of this cause; empty = any.
        site: Only of this site; empty = any.
        line: Only of this line; empty = any.
        before: Only alarms with a lower id: the last one of the page before.
        limit: Most rows.
    """
    query = select(Alarm)
    if state == "active":
        query = query.where(col(Alarm.active_key).is_not(None))
    elif state != "all":
        query = query.where(Alarm.state == AlarmState(state))
    for column, value in ((Alarm.severity, severity), (Alarm.cause, cause), (Alarm.site, site), (Alarm.line, line)):
        if value:
            query = query.where(col(column) == value)
    if before is not None:
        query = query.where(col(Alarm.id) < before)
    return list(session.exec(query.order_by(desc(Alarm.id)).limit(limit)).all())


def describe_alarm(session: Session, alarm: Alarm) -> dict[str, Any]:
    """Returns an alarm with evidence, comments, messages, requests, its group, and what people may do now."""
    group = select(Alarm).where(
        Alarm.grouping == alarm.grouping, col(Alarm.active_key).is_not(None), Alarm.id != alarm.id
    )
    related: dict[str, Any] = {}
    for name, table in (("comments", AlarmComment), ("deliveries", AlarmDelivery), ("decisions", AlarmDecision)):
        query = select(table).where(table.alarm_id == alarm.id).order_by(desc(table.id))
        rows: list[Any] = list(session.exec(query.limit(_MOST_RELATED)))
        related[name] = [row.model_dump(mode="json", exclude={"payload", "alarm_id"}) for row in reversed(rows)]
    return facts_of(alarm) | {
        "evidence": alarm.evidence,
        "group": [facts_of(one) for one in session.exec(group.order_by(col(Alarm.id)).limit(_MOST_RELATED))],
        "actions": [str(event) for event in allowed(AlarmState(alarm.state))],
        **related,
    }


def parse_state(text: str) -> str:
    """Returns the filter of a list.

    Raises:
        InputError: `alarm.bad_filter`.
    """
    words = ["active", "all", *map(str, AlarmState)]
    if text not in words:
        raise InputError("alarm.bad_filter", "This is no state of an alarm.", expected=", ".join(words), got=text[:40])
    return text


_RANK: Final = case({str(s): s.rank for s in Severity}, value=col(Alarm.severity), else_=-1)


def worst_first(session: Session, limit: int = 200) -> list[Alarm]:
    """Returns the alarms that are not over: open before acknowledged before silenced, critical first, oldest first."""
    states = {str(s): place for place, s in enumerate((AlarmState.OPEN, AlarmState.ACKNOWLEDGED, AlarmState.SILENCED))}
    place = case(states, value=col(Alarm.state), else_=9)
    query = select(Alarm).where(col(Alarm.active_key).is_not(None))
    return list(session.exec(query.order_by(place, desc(_RANK), col(Alarm.id)).limit(limit)).all())


def count_alarms(session: Session) -> Counter[tuple[str, str, str]]:
    """Returns the number of alarms that are not over, by severity, cause and state."""
    query = select(Alarm.severity, Alarm.cause, Alarm.state, func.count()).where(col(Alarm.active_key).is_not(None))
    rows = session.exec(query.group_by(Alarm.severity, Alarm.cause, Alarm.state)).all()
    return Counter({(severity, cause, str(state)): number for severity, cause, state, number in rows})


def worst_of_lines(session: Session) -> dict[str, tuple[int, str, str]]:
    """Returns the worst alarm of each line that is open or acknowledged: id, severity, cause."""
    query = select(Alarm.line, Alarm.id, Alarm.severity, Alarm.cause).where(
        col(Alarm.active_key).is_not(None), col(Alarm.state) != AlarmState.SILENCED, Alarm.line != ""
    )
    found: dict[str, tuple[int, str, str]] = {}
    for line, number, severity, cause in session.exec(query.order_by(_RANK, desc(Alarm.id))):
        found[line] = (number or 0, severity, cause)  # the worst, and of equals the oldest, comes last
    return found
