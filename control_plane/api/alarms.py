"""Routes of alarms: look at them, answer them, confirm what they ask for."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query
from pydantic import AwareDatetime, Field

from control_plane.alarms.acting import assign_owner, comment, get_alarm
from control_plane.alarms.details import describe_alarm, facts_of, list_alarms, parse_state
from control_plane.alarms.lifecycle import Event
from control_plane.alarms.policies import settle
from control_plane.api.actor import Acting
from control_plane.api.rollouts import Key
from control_plane.api.schemas import Actor, Strict
from control_plane.database.engine import reading, writing
from control_plane.database.idempotency import carry_out_once
from control_plane.database.tables.columns import utc_now
from control_plane.services import Services, services_of

router = APIRouter(prefix="/api/v1/alarms", tags=["alarms"])
Given = Annotated[Services, Depends(services_of)]
AlarmId = Annotated[int, Path(ge=1, le=2**31 - 1)]
Text = Annotated[str, Query(max_length=128)]
_EVENTS: Final[dict[str, Literal[Event.ACKNOWLEDGE, Event.SILENCE, Event.RESOLVE]]] = {
    "acknowledge": Event.ACKNOWLEDGE,
    "silence": Event.SILENCE,
    "resolve": Event.RESOLVE,
}


class Answer(Strict):
    """A person answers an alarm; the reason is kept with it and in the audit trail."""

    reason: str = Field(default="", max_length=500)
    actor: str = Actor


class Silence(Answer):
    """A person wants quiet until a time; without one for an hour."""

    until: AwareDatetime | None = Field(default=None, description="End, with its zone; at most seven days ahead.")
    minutes: float | None = Field(default=None, gt=0, le=7 * 24 * 60, description="Length, instead of an end.")

    def end(self, now: datetime) -> datetime | None:
        """Returns when the silence ends; None = the usual length."""
        return now + timedelta(minutes=self.minutes) if self.minutes is not None else self.until


class Comment(Strict):
    """What a person found or did."""

    text: str = Field(max_length=2000)
    actor: str = Actor


class Owner(Strict):
    """Who looks after an alarm."""

    owner: str = Field(max_length=200, description="Empty = nobody.")
    actor: str = Actor


@router.get("")
def list_of_alarms(
    services: Given,
    state: Text = "active",
    severity: Text = "",
    cause: Text = "",
    site: Text = "",
    line: Text = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    before: Annotated[int | None, Query(ge=1, le=2**31 - 1, description="`next` of the page before.")] = None,
) -> dict[str, Any]:
    """Alarms, newest first, page by page. `state` is one state, `active` for all that are not over, or `all`."""
    with reading(services.engine) as session:
        found = list_alarms(
            session,
            state=parse_state(state),
            severity=severity,
            cause=cause,
            site=site,
            line=line,
            before=before,
            limit=limit,
        )
    return {"alarms": [facts_of(alarm) for alarm in found], "next": found[-1].id if len(found) == limit else None}


@router.get("/{alarm_id}")
def show_alarm(alarm_id: AlarmId, services: Given) -> dict[str, Any]:
    """One alarm with its evidence, comments, messages, requests and group, and what people may do now."""
    with reading(services.engine) as session:
        return describe_alarm(session, get_alarm(session, alarm_id))


def _answer(services: Services, alarm_id: int, name: str, body: Answer, actor: str, key: str) -> dict[str, Any]:
    now = utc_now()

    def change(session: Any) -> dict[str, Any]:
        until = body.end(now) if isinstance(body, Silence) else None
        services.alarms.act(session, alarm_id, _EVENTS[name], actor=actor, reason=body.reason, now=now, until=until)
        return {"alarm": alarm_id}

    return _changed(services, alarm_id, [name, body.model_dump(mode="json"), actor], key, change)


def _changed(services: Services, alarm_id: int, asked: list[Any], key: str, change: Any) -> dict[str, Any]:
    """Carries a change out once per key; returns the alarm as it is then."""
    with writing(services.engine) as session:
        carry_out_once(session, key, ["alarms", alarm_id, *asked], utc_now(), lambda: change(session))
        session.commit()
        return describe_alarm(session, get_alarm(session, alarm_id))


@router.post("/{alarm_id}/acknowledge")
def acknowledge_alarm(alarm_id: AlarmId, body: Answer, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Somebody looks after it: it is escalated no further. Whoever acknowledges owns it where nobody does."""
    return _answer(services, alarm_id, "acknowledge", body, actor, key)


@router.post("/{alarm_id}/silence")
def silence_alarm(alarm_id: AlarmId, body: Silence, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Quiet until a time, unless it becomes worse."""
    return _answer(services, alarm_id, "silence", body, actor, key)


@router.post("/{alarm_id}/resolve")
def resolve_alarm(alarm_id: AlarmId, body: Answer, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Ends it. Where the cause is still there, the next look raises a new alarm."""
    return _answer(services, alarm_id, "resolve", body, actor, key)


@router.post("/{alarm_id}/comments", status_code=201)
def comment_alarm(alarm_id: AlarmId, body: Comment, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Adds a comment, also to an alarm that is over."""

    def change(session: Any) -> dict[str, Any]:
        comment(session, alarm_id, body.text, actor=actor, now=utc_now())
        return {"alarm": alarm_id}

    return _changed(services, alarm_id, ["comment", body.text, actor], key, change)


@router.post("/{alarm_id}/owner")
def own_alarm(alarm_id: AlarmId, body: Owner, services: Given, actor: Acting, key: Key = "") -> dict[str, Any]:
    """Names who looks after it."""

    def change(session: Any) -> dict[str, Any]:
        assign_owner(session, alarm_id, body.owner, actor=actor, now=utc_now())
        return {"alarm": alarm_id}

    return _changed(services, alarm_id, ["owner", body.owner, actor], key, change)


@router.post("/{alarm_id}/requests/{request_id}/{verdict}")
def settle_request(
    alarm_id: AlarmId,
    request_id: AlarmId,
    verdict: Literal["confirm", "decline"],
    body: Answer,
    services: Given,
    actor: Acting,
    key: Key = "",
) -> dict[str, Any]:
    """A person lets a request of the alarm stand, or declines it."""

    def change(session: Any) -> dict[str, Any]:
        now, confirm = utc_now(), verdict == "confirm"
        settle(session, alarm_id, request_id, confirm=confirm, actor=actor, reason=body.reason, now=now)
        return {"alarm": alarm_id}

    return _changed(services, alarm_id, ["request", request_id, verdict, body.reason, actor], key, change)
