"""Names a lot to an agent, and keeps its response.

A command is for now: it is not retained, lives a minute, and is refused here when the agent is not connected. What was
asked last and what came of it stands with the agent, so that every replica shows the same; who asked and why stands in
the audit trail. What runs is only what the agent reports.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlmodel import Session

from control_plane.database.audit import audit
from control_plane.database.lookup import get_agent
from control_plane.database.tables.agents import Agent
from control_plane.fleet.reports import age_s, connection_of, report_of
from control_plane.registry.store import Store
from models.bundle import RECIPE
from models.errors import ConflictError, SortlineError
from models.messages import CLOCK_SLACK_MS, Command, CommandKind, Response
from models.recipe import parse_recipe

LIFE: Final = timedelta(seconds=60)


def ask(
    session: Session, agent_id: str, lot: str, variety: str, *, actor: str, reason: str, request_id: str, now: datetime
) -> Command:
    """Stores the request and returns its command; commit, then publish it.

    Args:
        session: Writing; the caller commits.
        agent_id: The agent.
        lot: Name of the lot that shall run; empty = not known.
        variety: What it is; empty = not known.
        actor: The person who asks.
        reason: The reason that person gives.
        request_id: 32 hexadecimal digits, never used before.
        now: Aware.

    Raises:
        InputError: `agent.unknown`.
        ConflictError: `agent.not_connected`: the agent would not receive it now, and later it might be wrong.
    """
    agent = get_agent(session, agent_id, lock=True)
    connection = connection_of(age_s(agent.seen_at, now), online=agent.online)
    if connection not in {"live", "late"}:
        raise ConflictError(
            "agent.not_connected",
            "The agent is not connected, and a lot is for now: name it at the line (`sortline-agent lot`).",
            expected="a connected agent",
            got=connection,
        )
    # Two replicas' clocks differ: what is asked later must also say so. What a clock far ahead said does not count.
    now_ms, before_ms = round(now.timestamp() * 1000), int(agent.lot_asked.get("issued_at_ms", 0))
    issued_ms = max(now_ms, before_ms + 1) if before_ms - now_ms <= CLOCK_SLACK_MS else now_ms
    command = Command(
        request_id=request_id,
        issued_at_ms=issued_ms,
        expires_at_ms=issued_ms + round(LIFE.total_seconds() * 1000),
        kind=CommandKind.SET_LOT,
        lot=lot,
        variety=variety,
    )
    said = {"lot": lot, "variety": variety, "request_id": request_id, "reason": reason}
    agent.lot_asked = {**said, "actor": actor, "issued_at_ms": issued_ms, "answered_at": None, "fault": None}
    session.add(agent)
    audit(session, actor, "agent.lot", agent_id, said, now)
    return command


def record_response(agent: Agent, response: Response, now: datetime) -> bool:
    """Keeps a response with its request; returns False when it belongs to an older request or to none."""
    asked = agent.lot_asked
    if asked.get("request_id") != response.request_id or asked.get("answered_at") is not None:
        return False
    fault = response.fault
    refusal = None if fault is None else {"code": fault.code, "message": fault.message}
    agent.lot_asked = {**asked, "answered_at": now.isoformat(), "fault": refusal}
    return True


def lot_status(asked: dict[str, Any], now: datetime) -> dict[str, Any]:
    """Returns what was asked last, with its age and `state`: waiting, accepted, refused or unanswered."""
    if not asked:
        return {}
    at = datetime.fromtimestamp(asked["issued_at_ms"] / 1000.0, UTC)
    if asked["answered_at"] is not None:
        state = "accepted" if asked["fault"] is None else "refused"
    else:
        state = "waiting" if now <= at + LIFE else "unanswered"
    return {**asked, "state": state, "age_s": max(0.0, (now - at).total_seconds())}


def terms_of(store: Store, agent: Agent, lot: str, variety: str) -> str:
    """Returns whose terms of the running recipe would hold; empty where the bundle is not known here."""
    active = report_of(agent).active
    try:
        return parse_recipe(store.part(active, RECIPE)).terms_source(variety, lot) if active else ""
    except SortlineError:
        return ""
