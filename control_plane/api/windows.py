"""Routes of windows: what agents counted, ten seconds each."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query

from control_plane.database.engine import reading
from control_plane.monitoring.windows import StoredWindow, windows_of
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1", tags=["windows"])
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/agents/{agent_id}/windows")
def list_windows(agent_id: str, services: Given, limit: Limit = 60, before: str = "") -> list[dict[str, Any]]:
    """Newest first: what the agent counted, ten seconds each. `before` is the `cursor` of the last row of a page."""
    with reading(services.engine) as session:
        return [_window(stored) for stored in windows_of(session, agent_id=agent_id, before=before, limit=limit)]


@router.get("/windows")
def query_windows(services: Given, bundle: str = "", limit: Limit = 60, before: str = "") -> list[dict[str, Any]]:
    """Windows of the whole fleet, newest first; of one bundle where that is given.

    The next page begins after the `cursor` of the last row; rows that arrive meanwhile repeat and hide nothing.
    """
    with reading(services.engine) as session:
        return [_window(stored) for stored in windows_of(session, bundle=bundle, before=before, limit=limit)]


def _window(stored: StoredWindow) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "agent_id": stored.agent_id,
        "boot_id": stored.boot_id,
        "seq": stored.seq,
        "started_at": stored.started_at.isoformat(),
        "received_at": stored.received_at.isoformat(),
        "bundle": stored.bundle,
        "items": stored.items,
        "refused": stored.refused,
        "cursor": stored.cursor,
    }
    window = stored.window
    if window is None:
        return facts
    body: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(window, features=b""))
    body["features"] = window.feature_counts().tolist()
    body["p50_ms"] = _number(window.latency_ms.quantile(0.5))
    body["p99_ms"] = _number(window.latency_ms.quantile(0.99))
    return body | facts


def _number(value: float) -> float | None:
    return None if value != value else round(value, 3)  # noqa: PLR0124  NaN is not equal to itself
