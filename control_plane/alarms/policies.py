"""What an alarm may start: each request is a stored decision with its reason, also the one that was withheld.

Rules: a policy asks once when an alarm is raised and once each time it worsens; within its cool-down it asks nothing
more for the same line, and beyond its daily budget of items nothing more at all; while a fault of the camera or the
light is open on a line, its pictures are proposed for no training. Where a policy wants confirmation, a person makes
the request stand or declines it. Those who carry requests out read the decisions in state `requested`.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlmodel import Session, col, select

from control_plane.config import AlarmPolicyConfig
from control_plane.database.audit import audit
from control_plane.database.tables.alarms import Alarm, AlarmDecision, DecisionState
from control_plane.detection.finding import Cause, Severity
from models.errors import ConflictError, InputError

_ACTOR: Final = "sortline"
_DAY: Final = timedelta(hours=24)
SPOILS_TRAINING: Final = frozenset(
    {
        Cause.CAMERA_DIRTY,
        Cause.CAMERA_BLURRED,
        Cause.CAMERA_MOVED,
        Cause.LIGHT_LEVEL,
        Cause.LIGHT_COLOUR,
        Cause.FLICKER,
        Cause.FROZEN,
    }
)
"""A model that learnt from such pictures would learn the fault."""
_STANDING: Final = (DecisionState.AWAITING_CONFIRMATION, DecisionState.REQUESTED)


def decide(session: Session, alarm: Alarm, policies: Sequence[AlarmPolicyConfig], now: datetime) -> list[AlarmDecision]:
    """Stores what the policies let this alarm ask for, in the caller's transaction; returns the decisions."""
    found = []
    for policy in policies:
        if policy.cause != alarm.cause or Severity(alarm.severity).rank < Severity(policy.severity).rank:
            continue
        reason = _withheld(session, alarm, policy, now)
        if reason:
            state = DecisionState.WITHHELD
        elif policy.confirmation:
            state, reason = DecisionState.AWAITING_CONFIRMATION, "a person must confirm it"
        else:
            state, reason = DecisionState.REQUESTED, "the policy asks without confirmation"
        decision = AlarmDecision(
            alarm_id=alarm.id or 0,
            request=policy.request,
            state=state,
            details={
                "cause": alarm.cause,
                "site": alarm.site,
                "line": alarm.line,
                "lane": alarm.lane,
                "lots": alarm.lots[-10:],
                "items": policy.items,
            },
            reason=reason,
            at=now,
        )
        session.add(decision)
        session.flush()
        details = {"decision": decision.id, "request": policy.request, "state": str(state), "reason": reason}
        audit(session, _ACTOR, "alarm.request", str(alarm.id), details, now)
        found.append(decision)
    return found


def _withheld(session: Session, alarm: Alarm, policy: AlarmPolicyConfig, now: datetime) -> str:
    """Returns why the request is withheld; empty = it is not."""
    if policy.request == "retraining-proposal":
        spoilt = select(Alarm.id, Alarm.cause).where(
            col(Alarm.active_key).is_not(None),
            Alarm.line == alarm.line,
            Alarm.site == alarm.site,
            col(Alarm.cause).in_([str(cause) for cause in SPOILS_TRAINING]),
        )
        if (blocking := session.exec(spoilt.limit(1)).first()) is not None:
            return f"alarm {blocking[0]} ({blocking[1]}) is open: these pictures must train no model"
    since = now - max(_DAY, timedelta(hours=policy.cool_down_h))
    query = select(AlarmDecision).where(
        AlarmDecision.request == policy.request,
        col(AlarmDecision.at) > since,
        col(AlarmDecision.state).in_(_STANDING),
    )
    mine = [one for one in session.exec(query) if one.details.get("cause") == policy.cause]
    cool = now - timedelta(hours=policy.cool_down_h)
    for one in mine:
        same = (one.details.get("site"), one.details.get("line")) == (alarm.site, alarm.line)
        if same and one.at > cool:
            return f"cool-down: asked at {one.at:%Y-%m-%d %H:%M} UTC already, and again after {policy.cool_down_h:g} h"
    spent = sum(int(one.details.get("items", 0)) for one in mine if one.at > now - _DAY)
    if spent + policy.items > policy.budget_items_per_day:
        return f"budget: {spent} of {policy.budget_items_per_day} items of the last 24 h are asked for"
    return ""


def settle(
    session: Session, alarm_id: int, decision_id: int, *, confirm: bool, actor: str, reason: str, now: datetime
) -> AlarmDecision:
    """A person confirms a request or declines it.

    Raises:
        InputError: `decision.unknown`.
        ConflictError: `decision.settled`: it does not wait for confirmation.
    """
    decision = session.get(AlarmDecision, decision_id, with_for_update=True)
    if decision is None or decision.alarm_id != alarm_id:
        raise InputError(
            "decision.unknown", "This alarm has no such request.", expected="a request of the alarm", got=decision_id
        )
    if decision.state is not DecisionState.AWAITING_CONFIRMATION:
        raise ConflictError(
            "decision.settled",
            "This request does not wait for confirmation.",
            expected=str(DecisionState.AWAITING_CONFIRMATION),
            got=str(decision.state),
        )
    decision.state = DecisionState.REQUESTED if confirm else DecisionState.DECLINED
    decision.reason = reason or ("confirmed" if confirm else "declined")
    decision.decided_by, decision.decided_at = actor, now
    session.add(decision)
    details = {"decision": decision_id, "request": decision.request, "reason": decision.reason}
    audit(session, actor, "alarm.confirm" if confirm else "alarm.decline", str(alarm_id), details, now)
    return decision
