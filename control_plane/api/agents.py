"""Routes of agents: status, labels, lots, events."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from control_plane.api.actor import Acting
from control_plane.api.schemas import Forget, NewLabels, NewLot, NewSafeState
from control_plane.database.audit import audit
from control_plane.database.engine import reading, writing
from control_plane.database.lookup import events_of, get_agent, unknown_agent
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.desired_state import DesiredChange, assign
from control_plane.fleet.forgetting import forget
from control_plane.fleet.labels import check_assigned, effective
from control_plane.fleet.lot_commands import ask, lot_status, terms_of
from control_plane.fleet.reports import report_of
from control_plane.monitoring.status import ORDER
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1", tags=["agents"])
Given = Annotated[Services, Depends(services_of)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/agents")
def list_agents(services: Given) -> list[dict[str, Any]]:
    """Returns all agents, worst state first, with the figures of their windows of the last five minutes."""
    services.live.watch()
    found = sorted(services.board.all(), key=lambda status: (ORDER[status.state], status.id))
    worst = services.alarms.worst()
    return [status.as_dict() | {"alarm": _alarm(worst.get(status.id))} for status in found]


def _alarm(found: tuple[int, str, str] | None) -> dict[str, Any] | None:
    """Returns the worst alarm of a line as the API shows it; None where there is none."""
    return None if found is None else dict(zip(("id", "severity", "cause"), found, strict=True))


@router.get("/agents/{agent_id}")
def show_agent(agent_id: str, services: Given) -> dict[str, Any]:
    """Returns the status and the last report of one agent."""
    services.live.watch()
    status = services.board.one(agent_id)
    if status is None:
        raise unknown_agent(agent_id)
    with reading(services.engine) as session:
        agent = session.get(Agent, agent_id)
        reported = agent.reported if agent else {}
    alarm = _alarm(services.alarms.worst().get(agent_id))
    return status.as_dict() | {"reported": reported, "alarm": alarm}


@router.put("/agents/{agent_id}/labels")
def label_agent(agent_id: str, body: NewLabels, services: Given, actor: Acting) -> dict[str, Any]:
    """Replaces the labels that people assigned; each holds over one of the same name that the agent reports."""
    labels = check_assigned(body.labels)
    with writing(services.engine) as session:
        agent = get_agent(session, agent_id)
        agent.labels_assigned, agent.labels = labels, effective(report_of(agent).labels, labels)
        session.add(agent)
        audit(session, actor, "agent.labels", agent_id, labels, utc_now())
        session.commit()
        return agent.model_dump(mode="json")


@router.post("/agents/{agent_id}/forget")
def forget_agent(agent_id: str, body: Forget, services: Given, actor: Acting) -> dict[str, Any]:
    """Removes an agent that is gone for good; the answer is the record that the audit trail keeps.

    Rollouts keep its part in their history and wait for it no longer. Windows and events stay until their own
    retention ends.
    """
    now = utc_now()
    with writing(services.engine) as session:
        facts = forget(session, agent_id, actor=actor, reason=body.reason, now=now)
        services.signer.sign_changes(session, now)
        session.commit()
    services.outbox.clear_agent(agent_id)
    services.outbox.publish_trust()
    services.rollouts.wake()
    return {"agent": agent_id} | facts


@router.post("/agents/{agent_id}/safe-state")
def set_safe_state(agent_id: str, body: NewSafeState, services: Given, actor: Acting) -> dict[str, Any]:
    """Recalls one agent into a safe state, or, with an empty one, out of it; signed like every desired state.

    What is fetched or tried there is given up. It takes the agent over from every rollout.
    """
    now = utc_now()
    with writing(services.engine) as session:
        generation = assign(session, agent_id, DesiredChange(bundle="", safe_state=body.safe_state))
        details = {"safe_state": str(body.safe_state), "reason": body.reason}
        audit(session, actor, "agent.safe_state", agent_id, details, now)
        services.signer.sign_changes(session, now)
        session.commit()
        agent = get_agent(session, agent_id)
    services.outbox.publish_desired(agent)
    return {"agent": agent_id, "generation": generation, "safe_state": str(body.safe_state)}


@router.post("/agents/{agent_id}/lot", status_code=202)
def set_lot(agent_id: str, body: NewLot, services: Given, actor: Acting) -> dict[str, Any]:
    """Sets the lot that runs from now on; `lot_asked` of the agent is its answer, `lot` the lot it runs.

    `terms` says which terms of the recipe hold for it: of this `lot`, of its `variety`, or of the `recipe`, which has
    terms for neither; empty = the bundle is not known here.
    """
    services.connection.check_connected()
    now, request_id = utc_now(), secrets.token_hex(16)
    with writing(services.engine) as session:
        command = ask(
            session,
            agent_id,
            body.lot,
            body.variety,
            actor=actor,
            reason=body.reason,
            request_id=request_id,
            now=now,
        )
        session.commit()
        agent = session.get_one(Agent, agent_id)
        asked, terms = lot_status(agent.lot_asked, now), terms_of(services.store, agent, body.lot, body.variety)
    services.outbox.command(agent_id, command)
    return asked | {"agent": agent_id, "terms": terms}


@router.get("/agents/{agent_id}/events")
def list_events(agent_id: str, services: Given, limit: Limit = 100) -> list[dict[str, Any]]:
    """Returns state changes and faults, newest first."""
    with reading(services.engine) as session:
        return [row.model_dump(mode="json") for row in events_of(session, agent_id, limit)]
