"""Routes of what is known of a line over time: sums of its windows, fidelity of its data, and its state at a moment."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Response

from control_plane.database.engine import reading
from control_plane.database.lookup import get_agent
from control_plane.database.tables.columns import utc_now
from control_plane.monitoring.as_of import as_of
from control_plane.monitoring.fidelity import fidelity_of
from control_plane.monitoring.figures import figures_of
from control_plane.monitoring.sorting import Sorting
from control_plane.monitoring.windows import SPANS, LotSum, SpanSum, lots_of, page_of_spans
from control_plane.services import Services, services_of
from models.errors import InputError

router = APIRouter(prefix="/api/v1", tags=["statistics"])
Given = Annotated[Services, Depends(services_of)]
From = Annotated[datetime | None, Query(alias="from", description="Begin, ISO 8601; without a zone it is UTC.")]
Until = Annotated[datetime | None, Query(description="End, ISO 8601; empty = now.")]
Limit = Annotated[int, Query(ge=1, le=1000)]
_BACK: Final = {
    "minute": timedelta(hours=1),
    "hour": timedelta(days=1),
    "day": timedelta(days=30),
    "lot": timedelta(days=7),
}
"""How far the answer goes back where no begin is given."""
_LONGEST_LOTS: Final = timedelta(days=31)
"""Lots are read from the sums over hours: so much at a time."""


@router.get("/agents/{agent_id}/statistics", response_class=Response)
def show_statistics(
    agent_id: str,
    services: Given,
    span: Literal["minute", "hour", "day", "lot"] = "hour",
    since: From = None,
    until: Until = None,
    limit: Limit = 200,
    after: Annotated[str, Query(max_length=40, description="`next` of the page before.")] = "",
) -> Response:
    """Sums of the windows of one agent, oldest first, by bundle and lot within a span; or by lot.

    What arrived up to now is in them. A page holds whole spans, so it may be longer than `limit`; `next` is null on the
    last one.
    """
    end = _aware(until, utc_now() + timedelta(minutes=2))
    begin = _cursor(after) if after else _aware(since, end - _BACK[span])
    with reading(services.engine) as session:
        get_agent(session, agent_id)
        if span == "lot":
            rows: list[Any] = []
            following: datetime | None = begin
            while following is not None and not rows:
                stop = min(end, following + _LONGEST_LOTS)
                lots = lots_of(session, agent_id, following, stop + timedelta(days=1))
                rows = [one for one in lots if following <= one.first_at < stop]
                following = stop if stop < end else None
            if len(rows) > limit and (cut := rows[limit].first_at) > rows[0].first_at:
                rows, following = [one for one in rows if one.first_at < cut], cut
        else:
            rows, following = page_of_spans(session, agent_id, SPANS[span], begin, end, limit)
    cursor = None if following is None else following.astimezone(UTC).isoformat()
    # Encoded here: the framework walks through every value of hundreds of rows in Python.
    sortings = {bundle: services.board.sorting(bundle) for bundle in {one.bundle for one in rows}}
    body = msgspec.json.encode({"rows": [_sum(one, sortings[one.bundle]) for one in rows], "next": cursor})
    return Response(body, media_type="application/json")


@router.get("/agents/{agent_id}/fidelity")
def show_fidelity(
    agent_id: str, services: Given, since: From = None, until: Until = None, span: Literal["hour", "day"] = "hour"
) -> list[dict[str, Any]]:
    """How far the data of one agent can be trusted, oldest first: complete, timely, consistent, accurate.

    A span for which nothing arrived is left out.
    """
    end = _aware(until, utc_now() + timedelta(minutes=2))
    begin = _aware(since, end - timedelta(days=1 if span == "hour" else 30))
    with reading(services.engine) as session:
        get_agent(session, agent_id)
        found = fidelity_of(session, agent_id, max(begin, end - timedelta(days=400)), end, SPANS[span])
    return [msgspec.to_builtins(one) for one in found]


@router.get("/agents/{agent_id}/as-of")
def show_as_of(
    agent_id: str,
    services: Given,
    at: Annotated[datetime, Query(description="Moment, ISO 8601; without a zone it is UTC.")],
    lane: Annotated[int | None, Query(ge=0, le=63)] = None,
) -> dict[str, Any]:
    """What held on one line at a moment: bundle, recipe, terms, camera, lot, who approved it, and what the line saw."""
    with reading(services.engine) as session:
        found = as_of(session, services.store, agent_id, _aware(at, at), lane)
    return dict(msgspec.to_builtins(found))


def _aware(value: datetime | None, default: datetime) -> datetime:
    found = default if value is None else value
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def _cursor(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            "windows.bad_cursor", "This is no cursor of a page.", expected="`next` of the page before", got=text
        ) from error
    return _aware(found, found)


def _sum(one: SpanSum | LotSum, sorting: Sorting | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"start": one.start.isoformat()} if isinstance(one, SpanSum) else {}
    facts |= {
        "bundle": one.bundle,
        "lot": one.lot,
        "variety": one.variety,
        "challenger": one.challenger,
        "windows": one.windows,
        "left_out": one.left_out,
        "by_arrival": one.by_arrival,
        "first_at": one.first_at.isoformat(),
        "last_at": one.last_at.isoformat(),
    }
    return facts | msgspec.structs.asdict(figures_of(one.window, sorting))
