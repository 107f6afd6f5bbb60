"""Routes of the audit trail."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from control_plane.database.audit import newest_entries
from control_plane.database.engine import reading
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1", tags=["audit"])
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Before = Annotated[
    int | None, Query(ge=1, le=2**63 - 1, description="Only entries older than this id: `next` of the page before.")
]


@router.get("/audit")
def list_audit(services: Given, limit: Limit = 100, before: Before = None) -> dict[str, Any]:
    """Newest entries first, page by page down to the oldest, and whether the chain of hashes is whole.

    `checked_through` is the newest entry whose chain was checked since the server started; `broken_entry` the first
    that does not follow from the one before it.
    """
    with reading(services.engine) as session:
        entries = newest_entries(session, limit, before)
        found = services.audit.look(session)
    return {
        "entries": [entry.model_dump(mode="json") for entry in entries],
        "next": entries[-1].id if len(entries) == limit else None,
        "broken_entry": found.broken_entry,
        "checked_through": found.checked_through,
        "newest": found.newest,
    }
