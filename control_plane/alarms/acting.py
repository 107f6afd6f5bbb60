"""What people do to alarms: acknowledge, silence, resolve, comment, take over. Each is kept in the audit trail."""

from datetime import datetime, timedelta
from typing import Final

from sqlmodel import Session

from control_plane.alarms.lifecycle import Event
from control_plane.alarms.raising import Announce, Register, move
from control_plane.database.audit import actor_name, audit
from control_plane.database.tables.alarms import Alarm, AlarmComment
from models.errors import InputError

MAX_SILENCE: Final = timedelta(days=7)
"""A silence ends; what nobody may ever hear of is a setting, not an alarm."""
MAX_COMMENT: Final = 2000


def get_alarm(session: Session, alarm_id: int, *, lock: bool = False) -> Alarm:
    """Returns one alarm.

    Raises:
        InputError: `alarm.unknown`.
    """
    alarm = session.get(Alarm, alarm_id, with_for_update=lock)
    if alarm is None:
        raise InputError("alarm.unknown", "There is no such alarm.", expected="an alarm id", got=alarm_id)
    return alarm


def acknowledge(
    session: Session, alarm_id: int, *, actor: str, reason: str, now: datetime, announce: Announce
) -> Alarm:
    """Somebody answers for the alarm; it is escalated no further, and theirs where nobody owns it.

    Raises:
        InputError: `alarm.unknown`.
        ConflictError: `alarm.not_allowed`.
    """
    alarm = get_alarm(session, alarm_id, lock=True)
    move(session, alarm, Event.ACKNOWLEDGE, actor=actor, reason=reason, now=now)
    alarm.acknowledged_at, alarm.silenced_until, alarm.owner = now, None, alarm.owner or actor
    announce(session, alarm, "acknowledged", now)
    return alarm


def silence(
    session: Session, alarm_id: int, until: datetime, *, actor: str, reason: str, now: datetime, announce: Announce
) -> Alarm:
    """Keeps an alarm quiet until a time, unless it becomes worse.

    Raises:
        InputError: `alarm.unknown`, `alarm.bad_silence`.
        ConflictError: `alarm.not_allowed`.
    """
    if not now < until <= now + MAX_SILENCE:
        raise InputError(
            "alarm.bad_silence",
            "A silence ends in the future, within seven days.",
            expected=f"{now.isoformat(timespec='seconds')} to {(now + MAX_SILENCE).isoformat(timespec='seconds')}",
            got=until.isoformat(timespec="seconds"),
        )
    alarm = get_alarm(session, alarm_id, lock=True)
    move(session, alarm, Event.SILENCE, actor=actor, reason=reason, now=now)
    alarm.silenced_until = until
    announce(session, alarm, "silenced", now)
    return alarm


def resolve(session: Session, alarm_id: int, *, actor: str, reason: str, now: datetime, register: Register) -> Alarm:
    """Ends an alarm. Where its cause is still there, the next look raises a new one.

    Raises:
        InputError: `alarm.unknown`.
        ConflictError: `alarm.not_allowed`.
    """
    alarm = get_alarm(session, alarm_id, lock=True)
    register.end(session, alarm, Event.RESOLVE, actor=actor, reason=reason or "resolved by a person", now=now)
    return alarm


def comment(session: Session, alarm_id: int, text: str, *, actor: str, now: datetime) -> Alarm:
    """Adds a comment, also to an alarm that is over.

    Raises:
        InputError: `alarm.unknown`, `alarm.bad_comment`.
    """
    words = text.strip()
    if not 1 <= len(words) <= MAX_COMMENT:
        raise InputError(
            "alarm.bad_comment", "A comment has some text.", expected=f"1 to {MAX_COMMENT} characters", got=len(words)
        )
    alarm = get_alarm(session, alarm_id, lock=True)
    session.add(AlarmComment(alarm_id=alarm_id, at=now, actor=actor, text=words))
    alarm.updated_at = now
    session.add(alarm)
    audit(session, actor, "alarm.comment", str(alarm_id), {"text": words[:200]}, now)
    return alarm


def assign_owner(session: Session, alarm_id: int, owner: str, *, actor: str, now: datetime) -> Alarm:
    """Names the person who looks after an alarm; an empty name = nobody.

    Raises:
        InputError: `alarm.unknown`, `api.bad_actor`.
    """
    alarm = get_alarm(session, alarm_id, lock=True)
    before, alarm.owner = alarm.owner, actor_name(owner)
    alarm.updated_at = now
    session.add(alarm)
    audit(session, actor, "alarm.owner", str(alarm_id), {"from": before, "to": alarm.owner}, now)
    return alarm
