"""The page that shows what held on a line at a moment: what ran, what it saw, who decided, what happened around it."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from control_plane.database.engine import reading
from control_plane.database.tables.columns import utc_now
from control_plane.monitoring.as_of import as_of
from control_plane.pages.rendering import page
from control_plane.services import services_of
from models.errors import InputError

router = APIRouter(include_in_schema=False)


@router.get("/agents/{agent_id}/as-of", response_class=HTMLResponse)
def show(
    agent_id: str,
    request: Request,
    at: Annotated[str, Query(max_length=40)] = "",
    lane: Annotated[str, Query(max_length=3)] = "",
) -> HTMLResponse:
    """Shows one line at a moment; now where none is given."""
    services = services_of(request)
    moment = _moment(at) if at.strip() else utc_now()
    with reading(services.engine) as session:
        found = as_of(session, services.store, agent_id, moment, int(lane) if lane.isdecimal() else None)
    return page(request, "as_of.html", "Fleet", found=found)


def _moment(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise InputError(
            "api.malformed", "This is no moment.", expected="such as 2026-03-14T10:32, UTC", got=text
        ) from error
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
