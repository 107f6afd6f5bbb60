"""Routes for people: invite, list, revoke, approve. What agents call is in `enrolment`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from control_plane.api.actor import Acting, approving
from control_plane.api.schemas import NewToken, Revoke
from control_plane.database.tables.columns import utc_now
from control_plane.identity.enrolment import Enrolment
from control_plane.services import Services, services_of
from models.errors import ConflictError

router = APIRouter(prefix="/api/v1", tags=["identities"])


Site = Annotated[Services, Depends(services_of)]


def _enrolment(services: Site) -> Enrolment:
    if services.enrolment is None:
        raise ConflictError(
            "ca.absent",
            "This site has no certificate authority; make one with `sortline ca init` and start the server again.",
            expected=services.config.identity_folder,
            got="nothing",
        )
    return services.enrolment


Given = Annotated[Enrolment, Depends(_enrolment)]


@router.get("/identities")
def list_identities(enrolment: Given) -> list[dict[str, Any]]:
    """Every identity: its state, how long its certificate lasts, whether a person is waited for."""
    return enrolment.identities(utc_now())


@router.post("/agents/{agent_id}/enrolment", status_code=201)
def invite(
    agent_id: str, _body: NewToken, enrolment: Given, actor: Acting, request: Request, services: Site
) -> dict[str, Any]:
    """A one-time token for this agent, good for an hour, and the address where the box uses it.

    The token is shown once and not kept.
    """
    token = enrolment.invite(agent_id, actor=actor, now=utc_now())
    url = _enrolment_url(services, enrolment, request.url.hostname or "")
    return {"agent": agent_id, "token": str(token), "hours": 1, "url": url}


_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def _enrolment_url(services: Services, enrolment: Enrolment, called_by: str) -> str:
    """Returns where agents enrol: by a name that stands in the certificate, preferably one other machines can use."""
    names = enrolment.authority.names
    host = next((name for name in names if name not in _LOCAL), called_by if called_by in names else names[0])
    return f"https://{f'[{host}]' if ':' in host else host}:{services.config.identity.port}"


@router.post("/agents/{agent_id}/revoke")
def revoke(agent_id: str, body: Revoke, enrolment: Given, actor: Acting) -> dict[str, Any]:
    """Ends the identity: no data from now on, no new connection, no renewal."""
    count = enrolment.revoke(agent_id, reason=body.reason, actor=actor, now=utc_now())
    return {"agent": agent_id, "state": "revoked", "certificates": count}


@router.post("/agents/{agent_id}/approve-renewal")
def approve_renewal(agent_id: str, _body: NewToken, enrolment: Given, actor: Acting) -> dict[str, Any]:
    """Lets an agent whose certificate is past its time renew it once, within a day."""
    enrolment.approve_renewal(agent_id, actor=approving(actor), now=utc_now())
    return {"agent": agent_id, "approved": True}
