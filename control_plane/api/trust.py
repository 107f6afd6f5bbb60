"""Routes of trust: who signs, what is released; takes what offline keys signed, gives what a USB stick needs."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from control_plane.api.actor import Acting
from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.tables.columns import utc_now
from control_plane.services import Services, services_of
from control_plane.trust.ceremony import released_changes
from models.errors import InputError
from models.signed_set import parse_set, version_of

router = APIRouter(prefix="/api/v1", tags=["trust"])
Given = Annotated[Services, Depends(services_of)]


@router.get("/trust")
def show_trust(services: Given) -> dict[str, Any]:
    """Roles with keys, versions and expiry, how full what travels is, and the released bundles."""
    found = services.signer
    with reading(services.engine) as session:
        roles = found.status(session, utc_now())
        return {
            "kind": found.kind,
            "development": found.development(session),
            "roles": [asdict(role) for role in roles],
            "fill": found.fill,
            "released": found.released(session) if roles else {},
            "withdrawn": found.withdrawn(session),
        }


@router.get("/trust/set", response_class=Response)
def get_set(services: Given) -> Response:
    """The signed metadata that all agents get, as they get it."""
    with reading(services.engine) as session:
        return _bytes(services.signer.current_set(session), "signed metadata")


@router.post("/trust/set")
async def take_set(request: Request, services: Given, actor: Acting) -> dict[str, Any]:
    """Takes in roots and targets that offline keys signed; other parts are ignored. All or nothing.

    Targets must be built on the present ones. The answer lists what they release and withdraw.
    """
    return await run_in_threadpool(_take, services, await request.body(), actor)


def _take(services: Services, data: bytes, actor: str) -> dict[str, Any]:
    given = parse_set(data)
    found, now, taken = services.signer, utc_now(), []
    with writing(services.engine) as session:
        for root in map(bytes, given.roots):
            if version_of(root) > version_of(found.part(session, "root")):
                found.take_root(session, root, now)
                taken.append(f"root {version_of(root)}")
        targets, before = given.part("targets"), found.part(session, "targets")
        changes: tuple[list[str], list[str]] = ([], [])
        if targets and targets != before:
            found.take_targets(session, targets, now)
            changes = released_changes(before, targets)
            taken.append(f"targets {version_of(targets)}")
        if taken:
            details = {"taken": taken, "released": changes[0], "withdrawn": changes[1]}
            audit(session, actor, "trust.take", ", ".join(taken), details, now)
        found.sign_changes(session, now)
        session.commit()
    services.outbox.publish_trust()
    return {"taken": taken, "released": changes[0], "withdrawn": changes[1]}


@router.get("/agents/{agent_id}/assignment", response_class=Response)
def get_assignment(agent_id: str, services: Given) -> Response:
    """What one agent shall run, exactly as it was signed."""
    with reading(services.engine) as session:
        return _bytes(services.signer.document(session, agent_id), "assignment of this agent")


@router.get("/agents/{agent_id}/bin", response_class=Response)
def get_bin(agent_id: str, services: Given) -> Response:
    """The signed list of assignments that this agent's is in, as the agent gets it."""
    with reading(services.engine) as session:
        return _bytes(services.signer.bin(session, agent_id), "assignment of this agent")


@router.get("/blobs/{digest}", response_class=Response)
def get_blob(digest: str, services: Given) -> Response:
    """Stored bytes by their sha256: manifests and files of bundles."""
    return _bytes(services.store.get(digest), "content")


def _bytes(data: bytes, what: str) -> Response:
    if not data:
        raise InputError("trust.unknown", f"There is no {what}.", expected=what, got="nothing")
    return Response(data, media_type="application/octet-stream")
