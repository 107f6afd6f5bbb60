"""Routes of the audit trail."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from sqlmodel import desc, select

from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import reading
from control_plane.database.tables.audit import Audit
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1", tags=["audit"])
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/audit")
def list_audit(services: Given, limit: Limit = 100) -> dict[str, Any]:
    """Newest entries, and whether the chain of hashes is whole."""
    with reading(services.engine) as session:
        entries = session.exec(select(Audit).order_by(desc(Audit.id)).limit(limit)).all()
        return {
            "entries": [entry.model_dump(mode="json") for entry in entries],
            "broken_entry": broken_audit_entry(session),
        }
