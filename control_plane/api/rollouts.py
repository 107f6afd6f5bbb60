"""Routes of rollouts. They write what a person asks for; the executor carries it out."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query

from control_plane.api.actor import Acting, approving
from control_plane.api.schemas import Act, Exclude, NewRollout
from control_plane.database.engine import reading, writing
from control_plane.database.idempotency import MAX_KEY, carry_out_once
from control_plane.database.tables.columns import utc_now
from control_plane.registry.versions import find_version
from control_plane.rollouts.blast_radius import preview
from control_plane.rollouts.description import describe, summarise
from control_plane.rollouts.records import Order, act, create_rollout, exclude, get_rollout, newest_rollouts
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1/rollouts", tags=["rollouts"])
Given = Annotated[Services, Depends(services_of)]
Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=MAX_KEY,
        description="Names this request: it is carried out once, however often it comes.",
    ),
]
Limit = Annotated[int, Query(ge=1, le=1000)]
RolloutId = Annotated[int, Path(ge=1, le=2**31 - 1)]
_POLICY = (
    "jobExecutionsRolloutConfig",
    "abortConfig",
    "timeoutConfig",
    "jobExecutionsRetryConfig",
    "schedulingConfig",
    "waveConfig",
    "budgetConfig",
)


def order_of(body: NewRollout) -> Order:
    """Returns the request as an order."""
    return Order(
        reference=body.model,
        selector=body.selector,
        agents=tuple(body.agents),
        exclude=tuple(body.exclude),
        waves=tuple(body.waves),
        policy={name: value for name in _POLICY if (value := getattr(body, name)) is not None},
        mode=body.mode,
        min_items=body.min_items,
        trial_items=body.trial_items,
        trial_s=body.trial_s,
        swap=body.swap,
        swap_within_s=body.swap_within_s,
        dynamic=body.dynamic,
        needs_approval=body.needs_approval,
    )


@router.post("", status_code=201)
def new_rollout(body: NewRollout, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Starts a rollout to the agents that match now; with a start time it waits, with `needs_approval` too.

    With an `Idempotency-Key` a repeated request makes no second rollout: it is answered with the first one.
    """
    now = utc_now()

    def create() -> dict[str, Any]:
        # Checked first: PostgreSQL gives the number of a refused row to no other one.
        bundle = find_version(session, body.model)[1].bundle
        services.signer.check_released(session, bundle)
        services.blobs.check_room(bundle)
        return {"rollout": create_rollout(session, order_of(body), actor=actor, now=now).id}

    with writing(services.engine) as session:
        made = carry_out_once(session, key, ["rollouts", body.model_dump(mode="json"), actor], now, create)
        session.commit()
        facts = describe(session, get_rollout(session, made["rollout"]), now)
    services.rollouts.wake()
    return facts


@router.post("/preview")
def preview_rollout(body: NewRollout, services: Given) -> dict[str, Any]:
    """What such a rollout would touch, in lanes and items, before anything happens. Changes nothing."""
    with reading(services.engine) as session:
        return preview(session, order_of(body), utc_now())


@router.get("")
def list_rollouts(services: Given, limit: Limit = 50) -> list[dict[str, Any]]:
    """Returns the newest rollouts first, with counts and waves; `GET /rollouts/{id}` adds the agents one by one."""
    with reading(services.engine) as session:
        found = newest_rollouts(session, limit)
        return summarise(session, found)


@router.get("/{rollout_id}")
def show_rollout(rollout_id: RolloutId, services: Given) -> dict[str, Any]:
    """One rollout: state and reason, waves, agents, rate, and how near the abort criteria are."""
    with reading(services.engine) as session:
        return describe(session, get_rollout(session, rollout_id), utc_now())


@router.post("/{rollout_id}/exclude")
def exclude_agents(rollout_id: RolloutId, body: Exclude, services: Given, actor: Acting) -> dict[str, Any]:
    """Takes agents out of a rollout: they no longer hold it up, and get nothing more of it."""
    now = utc_now()
    with writing(services.engine) as session:
        rollout = exclude(session, rollout_id, body.agents, actor=actor, reason=body.reason, now=now)
        session.commit()
        facts = describe(session, rollout, now)
    services.rollouts.wake()
    return facts


@router.post("/{rollout_id}/{action}")
def act_on_rollout(
    rollout_id: RolloutId,
    action: Literal["approve", "pause", "resume", "finish", "abort", "rollback"],
    body: Act,
    services: Given,
    actor: Acting,
    key: Key = "",
) -> dict[str, Any]:
    """A person acts; what the state does not allow is refused with what it does allow.

    `approve` needs another person than the one who made it. `pause` gives the bundle to no further agent. `resume`
    goes on, also past the threshold at which the rollout paused itself. `finish` ends it where it is. `abort` recalls
    every agent that is not done. `rollback` sends every agent back to what it had committed before; the answer lists
    the agents that have no way back, which `safe_state` puts into a safe state.
    """
    if action == "approve":
        approving(actor)
    now = utc_now()
    with writing(services.engine) as session:

        def change() -> dict[str, Any]:
            act(
                session,
                rollout_id,
                action,
                actor=actor,
                reason=body.reason,
                now=now,
                safe_state=body.safe_state,
            )
            return {"rollout": rollout_id}

        asked = ["rollouts", rollout_id, action, body.model_dump(mode="json"), actor]
        carry_out_once(session, key, asked, now, change)
        session.commit()
        facts = describe(session, get_rollout(session, rollout_id), now)
    services.rollouts.wake()
    return facts
