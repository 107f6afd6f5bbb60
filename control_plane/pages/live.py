"""The fleet's rows, live: one look and one rendering per tick however many people watch; each gets what changed."""

import json
import time
from collections.abc import AsyncIterator
from threading import Lock
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from control_plane.monitoring.status import DRIFT_LIMIT, LATENCY_BUDGET_MS, ORDER, AgentStatus, State
from control_plane.pages.rendering import environment
from control_plane.services import Services, services_of

_TICK_S = 1.0
WORDS = {
    State.GOOD: "Good",
    State.MAINTENANCE: "Maintenance",
    State.OUT_OF_SPEC: "Out of spec",
    State.CHECK: "Check",
    State.FAILURE: "Failure",
    State.OFFLINE: "Offline",
}
router = APIRouter(include_in_schema=False)


def fleet_row(status: AgentStatus) -> dict[str, Any]:
    """What the fleet table shows of an agent; times as milliseconds, so that ages grow by themselves."""
    live = status.live or {}

    def at(age: float | None) -> int:
        return 0 if age is None else round(status.at_ms - age * 1000)

    total = sum(status.classes.values())
    rejected = sum(count for outlet, count in status.outlets.items() if outlet != "pass")
    return {
        "id": status.id,
        "status": status,
        "word": WORDS[status.state],
        "order": f"{ORDER[status.state]}-{status.id}",
        "items_per_s": live.get("items_per_s", 0.0) if status.connection == "live" else 0.0,
        "reject_share": rejected / total if total else None,
        "seen_ms": at(status.seen_age_s),
        "window_ms": at(status.window_age_s),
        "budget_ms": LATENCY_BUDGET_MS,
        "drift_limit": DRIFT_LIMIT,
    }


def fleet_rows(services: Services) -> list[dict[str, Any]]:
    """All rows, worst first."""
    return _sorted(services.statuses.board(_TICK_S / 2))


def _sorted(statuses: list[AgentStatus]) -> list[dict[str, Any]]:
    return sorted(map(fleet_row, statuses), key=lambda row: str(row["order"]))


class Feed:
    """Rows as HTML, rendered once per look at the fleet.

    Args:
        services: Of the application.
        root: Prefix of links.
        max_age_s: Of a look that is shared.
    """

    def __init__(self, services: Services, root: str, *, max_age_s: float = _TICK_S / 2) -> None:
        self._services, self._root, self._max_age_s = services, root, max_age_s
        self._template = environment.get_template("_row.html")
        self._lock = Lock()
        self._statuses: list[AgentStatus] = []
        self._html: dict[str, str] = {}

    def rows(self) -> dict[str, str]:
        """Agent -> its row, worst first. Blocks: not for the event loop."""
        statuses = self._services.statuses.board(self._max_age_s)
        with self._lock:
            if statuses is not self._statuses:
                rows = _sorted(statuses)
                self._html = {row["id"]: self._template.render(row=row, root=self._root).strip() for row in rows}
                self._statuses = statuses
            return self._html


@router.get("/events")
def events(request: Request) -> StreamingResponse:
    """Changed rows, once a second."""
    services, root = services_of(request), request.scope.get("root_path", "")
    state = request.app.state
    if getattr(state, "feed", None) is None:
        state.feed = Feed(services, root)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(request, state.feed), media_type="text/event-stream", headers=headers)


async def _stream(request: Request, feed: Feed) -> AsyncIterator[str]:
    sent: dict[str, str] = {}
    while not await request.is_disconnected():
        html = await anyio.to_thread.run_sync(feed.rows)
        changed = [{"id": key, "html": text} for key, text in html.items() if sent.get(key) != text]
        sent = html
        if changed:
            yield f"event: rows\ndata: {json.dumps(changed)}\n\n"
        yield f"event: tick\ndata: {time.time_ns() // 1_000_000}\n\n"
        await anyio.sleep(_TICK_S)
