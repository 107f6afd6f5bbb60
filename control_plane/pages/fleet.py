"""The page of the fleet: one row an agent, the worst first, live."""

from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from control_plane.monitoring.status import State
from control_plane.pages.live import RowFeed, stream
from control_plane.pages.rendering import compressed, page
from control_plane.services import services_of

router = APIRouter(include_in_schema=False)
_INLINE: Final = 100
"""Rows in the document itself; of a larger fleet the rest comes with the stream, so the first row is there at once."""


def feed_of(request: Request) -> RowFeed:
    """Returns the feed of this application; one for every prefix under which it is reached."""
    services, root = services_of(request), str(request.scope.get("root_path", ""))
    feeds: dict[str, RowFeed] = request.app.state.feeds
    if root not in feeds:
        if len(feeds) > 8:  # prefixes come from the configuration or a proxy, so they are few
            feeds.clear()
        feeds[root] = RowFeed(services, root)
    return feeds[root]


@router.get("/", response_class=HTMLResponse)
def fleet(request: Request) -> HTMLResponse:
    """Shows the fleet, the worst first."""
    feed = feed_of(request)
    shown = feed.shown()
    counts = {state: sum(row.state is state for row in shown.rows) for state in State}
    whole = len(shown.rows) <= _INLINE
    return compressed(
        request,
        page(
            request,
            "fleet.html",
            "Fleet",
            rows=[row.html for row in shown.rows[:_INLINE]],
            total=len(shown.rows),
            rows_version=shown.version if whole else "",
            counts=counts,
            classes=shown.classes,
        ),
    )


@router.get("/events")
def events(request: Request, since: str = "") -> StreamingResponse:
    """Streams the parts of rows that changed, once a second; `since` is the version a page has already."""
    known = request.headers.get("last-event-id") or since
    return stream(request, feed_of(request), known)
