"""Routes for people: invite, list, revoke, approve. What agents call is in `devices`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from control_plane.api.actor import Acting, approving
from control_plane.api.schemas import NewToken, Revoke
from control_plane.database.tables.columns import utc_now
from control_plane.identity.enrolment import Enrolment
from control_plane.services import Services, services_of
from models.errors import ConflictError

router = APIRouter(prefix="/api/v1", tags=["identities"])


def _enrolment(services: Annotated[Services, Depends(services_of)]) -> Enrolment:
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
def invite(agent_id: str, _body: NewToken, enrolment: Given, actor: Acting) -> dict[str, Any]:
    """A one-time token for this agent, good for an hour. It is shown once and not kept."""
    token = enrolment.invite(agent_id, actor=actor, now=utc_now())
    return {"agent": agent_id, "token": str(token), "hours": 1}


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
