"""The pages of alarms: the list, live, worst first; and one alarm with its evidence. Buttons are calls of the API."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Final

import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from control_plane.alarms.acting import get_alarm
from control_plane.alarms.details import describe_alarm, facts_of, list_alarms, worst_first
from control_plane.alarms.exhibits import histograms_of, is_picture, named_features, pictures_of
from control_plane.database.engine import reading
from control_plane.database.tables.alarms import Alarm
from control_plane.database.tables.columns import utc_now
from control_plane.pages.evidence_charts import dirt_map, figure_rows, histogram, other_facts, share_bars
from control_plane.pages.rendering import age, environment, page
from control_plane.services import Services, services_of
from models.errors import InputError

router = APIRouter(include_in_schema=False)
_TICK_S: Final = 1.0
_OVER_SHOWN: Final = 20
_JPEG: Final = b"\xff\xd8\xff"
SYMBOLS: Final = {"critical": "failure", "warning": "check", "info": "maintenance"}
"""Severity -> the class of its colour."""
_ACTIONS: Final = {"acknowledge": "Acknowledge", "silence": "Silence", "resolve": "Resolve"}


def money(cost: dict[str, Any]) -> str:
    """Returns a cost of waiting as text; empty where it is not known."""
    return f"{cost['per_h']:,.0f} per hour" if cost else ""


def place_of(alarm: dict[str, Any]) -> str:
    """Returns where an alarm is: `line-3, lane 2`."""
    where = alarm["line"] or alarm["site"] or "the fleet"
    return where if alarm["lane"] is None else f"{where}, lane {alarm['lane']}"


def at_ms(text: str | None) -> int:
    """Returns an ISO time as milliseconds since 1970; 0 for none."""
    return 0 if not text else int(datetime.fromisoformat(text).timestamp() * 1000)


environment.globals.update(alarm_money=money, alarm_place=place_of, alarm_class=SYMBOLS, alarm_ms=at_ms)


class AlarmRows:
    """The rows of the list as HTML, rendered once a second for all who look.

    Args:
        services: Of the application.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, dict[int, str]]] = {}

    def render(self, root: str) -> dict[int, str]:
        """Returns the rows by alarm, worst first, those that are over at the end. Blocks: not for the event loop."""
        with self._lock:
            kept = self._kept.get(root)
            if kept is not None and time.monotonic() - kept[0] < _TICK_S / 2.0:
                return kept[1]
            with reading(self._services.engine) as session:
                found = worst_first(session) + list_alarms(session, state="resolved", limit=_OVER_SHOWN)
            rows = {alarm.id or 0: _row(alarm, root) for alarm in found}
            self._kept[root] = (time.monotonic(), rows)
            return rows


def _row(alarm: Alarm, root: str) -> str:
    return str(environment.get_template("_alarm.html").render(a=facts_of(alarm), root=root)).strip()


def _rows_of(request: Request) -> AlarmRows:
    """The rows of this application, made at the first look."""
    state = request.app.state
    if not hasattr(state, "alarm_rows"):
        state.alarm_rows = AlarmRows(services_of(request))
    found: AlarmRows = state.alarm_rows
    return found


@router.get("/alarms", response_class=HTMLResponse)
def alarms(request: Request) -> HTMLResponse:
    """Shows the alarms that are not over, worst first, and those that were resolved last."""
    rows = _rows_of(request).render(request.scope.get("root_path", ""))
    return page(request, "alarms.html", "Alarms", rows=rows)


@router.get("/alarms/events")
def events(request: Request) -> StreamingResponse:
    """Streams the rows when one changed, once a second."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(request), media_type="text/event-stream", headers=headers)


async def _stream(request: Request) -> AsyncIterator[str]:
    rows_of, root = _rows_of(request), request.scope.get("root_path", "")
    sent: dict[int, str] | None = None
    while not await request.is_disconnected():
        rows = await anyio.to_thread.run_sync(rows_of.render, root)
        if rows != sent:
            known = sent or {}
            changed = [{"id": k, "html": html} for k, html in rows.items() if known.get(k) != html]
            yield f"event: alarms\ndata: {json.dumps({'order': list(rows), 'rows': changed})}\n\n"
            sent = rows
        yield f"event: tick\ndata: {time.time_ns() // 1_000_000}\n\n"
        await asyncio.sleep(_TICK_S)


@router.get("/alarms/{alarm_id}", response_class=HTMLResponse)
def alarm(alarm_id: Annotated[int, Path(ge=1, le=2**31 - 1)], request: Request) -> HTMLResponse:
    """Shows one alarm: what to do, what was found, what people and messages did."""
    services, now = services_of(request), utc_now()
    with reading(services.engine) as session:
        row = get_alarm(session, alarm_id)
        facts = describe_alarm(session, row)
        features = named_features(row.evidence)
        tables = histograms_of(session, row, features, services.board.profile(_bundle_of(services, row)))
        pictures = pictures_of(session, row, now)
    root = str(request.scope.get("root_path", ""))
    evidence = facts["evidence"]
    dirt = evidence.get("dirt") or evidence.get("explains", {}).get("dirt", {}).get("dirt")
    picture = next((p["sha256"] for p in pictures if p["side"] in {"now", "after"}), "")
    return page(
        request,
        "alarm.html",
        "Alarms",
        a=facts,
        buttons=[(name, _ACTIONS[name]) for name in facts["actions"]],
        lasted=age(((row.resolved_at or now) - row.raised_at).total_seconds()),
        dirt=dirt_map(dirt, f"{root}/alarms/pictures/{picture}" if picture else ""),
        figures=figure_rows(evidence),
        shares=share_bars(_table(evidence, "usual_shares"), _table(evidence, "shares")),
        histograms=[(n, histogram(t["before"], t["since"], n)) for n, t in tables.items() if any(t["since"])],
        strengths=_table(evidence, "features"),
        others=other_facts(evidence),
        pictures=pictures,
    )


def _table(evidence: dict[str, Any], name: str) -> dict[str, Any]:
    found = evidence.get(name)
    return found if isinstance(found, dict) else {}


def _bundle_of(services: Services, row: Alarm) -> str:
    status = services.board.one(row.line) if row.line else None
    return status.runs.active if status is not None else ""


@router.get("/alarms/pictures/{digest}")
def picture_of(request: Request, digest: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]) -> Response:
    """Returns a stored picture that an agent named as evidence; nothing else of the store."""
    services = services_of(request)
    with reading(services.engine) as session:
        known = is_picture(session, digest)
    data = services.store.get(digest) if known else b""
    if not data.startswith(_JPEG):
        raise InputError("picture.unknown", "There is no such picture.", expected="a picture of an alarm", got=digest)
    headers = {"cache-control": "private, max-age=86400", "content-security-policy": "default-src 'none'"}
    return Response(data, media_type="image/jpeg", headers=headers)
