"""Routes of windows: what agents counted, ten seconds each."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query
from sqlmodel import desc, select

from control_plane.database.engine import reading
from control_plane.database.tables.agents import WindowRow
from control_plane.services import Services, services_of
from models.messages import decode_packed
from models.windows import Window

router = APIRouter(prefix="/api/v1", tags=["windows"])
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/agents/{agent_id}/windows")
def list_windows(agent_id: str, services: Given, limit: Limit = 60) -> list[dict[str, Any]]:
    """Newest first: what the agent counted, ten seconds each."""
    with reading(services.engine) as session:
        rows = session.exec(
            select(WindowRow)
            .where(WindowRow.agent_id == agent_id)
            .order_by(desc(WindowRow.received_at), desc(WindowRow.seq))
            .limit(limit)
        ).all()
    return [_window(row) for row in rows]


@router.get("/windows")
def query_windows(services: Given, bundle: str = "", limit: Limit = 60, offset: int = 0) -> list[dict[str, Any]]:
    """Windows of the whole fleet, newest first; of one bundle where that is given."""
    with reading(services.engine) as session:
        query = select(WindowRow).order_by(desc(WindowRow.received_at), desc(WindowRow.seq))
        if bundle:
            query = query.where(WindowRow.bundle == bundle)
        rows = session.exec(query.offset(max(offset, 0)).limit(limit)).all()
    return [_window(row) for row in rows]


def _window(row: WindowRow) -> dict[str, Any]:
    facts = row.model_dump(mode="json", exclude={"payload"})
    if row.refused:
        return facts
    window = decode_packed(row.payload, Window)
    body: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(window, features=b""))
    body["features"] = window.feature_counts().tolist()
    body["p50_ms"] = _number(window.latency_ms.quantile(0.5))
    body["p99_ms"] = _number(window.latency_ms.quantile(0.99))
    return body | facts


def _number(value: float) -> float | None:
    return None if value != value else round(value, 3)  # noqa: PLR0124  NaN is not equal to itself
