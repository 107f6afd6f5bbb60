"""What the loop does to alarms: raises, updates, worsens, clears, ends silences, escalates; all in one transaction.

Rules: a finding whose key is not over updates its alarm and makes no second one; a severity grows and never shrinks;
an alarm is cleared when its finding stayed absent for the hold time *while its line was heard*, so a line that is
offline clears nothing; a silence ends by time or by a worse finding; an alarm without an answer is escalated. Messages
to receivers are stored by `announce`, in the same transaction.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlmodel import Session, col, delete, select

from control_plane.alarms.exhibits import storable
from control_plane.alarms.grouping import grouping_of, leader_among, must_be_announced
from control_plane.alarms.lifecycle import Event, next_state
from control_plane.config import AlarmsConfig
from control_plane.database.audit import audit
from control_plane.database.tables.alarms import Alarm, AlarmComment, AlarmDecision, AlarmDelivery, AlarmState
from control_plane.detection.finding import Finding, Level, Severity

ACTOR: Final = "sortline"
"""Who acts where no person does."""
_LOTS: Final = 50
"""Most lots an alarm remembers."""
Announce = Callable[[Session, Alarm, str, datetime], None]
"""Stores the messages about an event of an alarm: session, alarm, event, time."""
Cost = Callable[[Finding], dict[str, Any]]
"""Returns the cost of waiting of a finding: `per_h` and `basis`; empty where it is not known."""


def unannounced(session: Session, alarm: Alarm, event: str, now: datetime) -> None:
    """Stores no message; for alarms without receivers."""
    del session, alarm, event, now


def unknown_cost(finding: Finding) -> dict[str, Any]:
    """Returns that the cost of waiting is not known."""
    del finding
    return {}


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the fleet found.

    Attributes:
        findings: What is present now; of equal keys the worst counts.
        heard: Lines of which something was heard since the look before.
        now: Aware time of the look.
    """

    findings: Sequence[Finding]
    heard: frozenset[str]
    now: datetime


class Register:
    """Applies looks to the alarms.

    Args:
        config: Hold time and escalation.
        announce: Stores messages to receivers.
        cost: Says what waiting costs.
        levels: Highest `after_escalations` of the receivers; at least one escalation is made, for pages and metrics.
    """

    def __init__(
        self, config: AlarmsConfig, *, announce: Announce = unannounced, cost: Cost = unknown_cost, levels: int = 1
    ) -> None:
        self._config, self._announce, self._cost = config, announce, cost
        self._levels = max(1, levels)

    def apply(self, session: Session, look: Look) -> list[Alarm]:
        """Brings the alarms up to date, in the caller's transaction; returns those that were raised or worsened."""
        active = active_alarms(session, lock=True)
        present = _worst(look.findings)
        changed: list[Alarm] = []
        for key, finding in present.items():
            alarm = active.get(key)
            if alarm is None:
                alarm = self._raise(session, finding, list(active.values()), look.now)
                active[key] = alarm
                changed.append(alarm)
            elif self._update(session, alarm, finding, look.now):
                changed.append(alarm)
        for key, alarm in active.items():
            if key in present:
                continue
            wider = _wider(alarm, active, present)
            if wider is None:
                self._absent(session, alarm, look)
            else:
                reason = f"part of alarm {wider.id}, which concerns more lines"
                self.end(session, alarm, Event.CLEAR, actor=ACTOR, reason=reason, now=look.now)
        for alarm in active.values():
            self._grow_older(session, alarm, look.now)
        return changed

    def _raise(self, session: Session, finding: Finding, others: Sequence[Alarm], now: datetime) -> Alarm:
        severity = Severity(finding.severity)
        alarm = Alarm(
            key=finding.key,
            active_key=finding.key,
            grouping=grouping_of(finding),
            severity=str(severity),
            detector=str(finding.detector),
            cause=str(finding.cause),
            level=str(finding.level),
            site=finding.site,
            line=finding.line,
            lane=finding.lane,
            delay_items=finding.delay_items,
            delay_s=finding.delay_s,
            raised_at=now,
            seen_at=now,
            waiting_since=now,
            updated_at=now,
        )
        group = sorted((a for a in others if a.grouping == alarm.grouping), key=lambda a: a.id or 0)
        leader = leader_among([a for a in group if a.state is not AlarmState.RESOLVED])
        alarm.leader_id = leader.id if leader is not None else None
        self._copy(alarm, finding)
        session.add(alarm)
        session.flush()
        details = {"key": alarm.key, "severity": alarm.severity, "effect": alarm.effect, "unit": alarm.effect_unit}
        audit(session, ACTOR, "alarm.raise", str(alarm.id), details, now)
        if must_be_announced(severity, [a for a in group if a.state is not AlarmState.RESOLVED]):
            self._announce(session, alarm, "raised", now)
        return alarm

    def _update(self, session: Session, alarm: Alarm, finding: Finding, now: datetime) -> bool:
        """Updates an alarm whose finding is present; returns whether it became worse."""
        alarm.seen, alarm.seen_at, alarm.absent_since = alarm.seen + 1, now, None
        worse = Severity(finding.severity).rank > Severity(alarm.severity).rank
        self._copy(alarm, finding)
        alarm.updated_at = now
        if worse:
            before, alarm.severity = alarm.severity, str(finding.severity)
            move(session, alarm, Event.WORSEN, actor=ACTOR, reason=f"worse than before ({before})", now=now)
            alarm.waiting_since, alarm.escalation = now, 0
            self._announce(session, alarm, "worsened", now)
        session.add(alarm)
        return worse

    def _copy(self, alarm: Alarm, finding: Finding) -> None:
        """Takes over what the newest finding says; lots add up."""
        alarm.effect, alarm.effect_unit, alarm.items = finding.effect, finding.effect_unit, finding.items
        alarm.interval = list(finding.interval or ())
        alarm.evidence, alarm.action = storable(finding.evidence), finding.action
        alarm.lots = list(dict.fromkeys([*alarm.lots, *finding.lots]))[-_LOTS:]
        alarm.cost = self._cost(finding) or alarm.cost

    def _absent(self, session: Session, alarm: Alarm, look: Look) -> None:
        """Clears an alarm whose finding has been absent for the hold time while its line was heard."""
        local = alarm.level in {Level.LANE, Level.LINE}
        if local and alarm.line not in look.heard:
            return
        if alarm.absent_since is None:
            alarm.absent_since = alarm.updated_at = look.now
        elif look.now - alarm.absent_since >= timedelta(seconds=self._config.hold_s):
            self.end(session, alarm, Event.CLEAR, actor=ACTOR, reason="cause gone", now=look.now)
        session.add(alarm)

    def _grow_older(self, session: Session, alarm: Alarm, now: datetime) -> None:
        """Ends a silence whose time is over, and escalates what nobody answers."""
        if alarm.state is AlarmState.SILENCED and alarm.silenced_until is not None and now >= alarm.silenced_until:
            move(session, alarm, Event.EXPIRE, actor=ACTOR, reason="the silence is over", now=now)
            alarm.waiting_since, alarm.escalation = now, 0
            self._announce(session, alarm, "reopened", now)
        after_s = self._config.escalate_after_s
        if alarm.state is not AlarmState.OPEN or not after_s or alarm.severity == Severity.INFO:
            return
        due = alarm.waiting_since + timedelta(seconds=after_s * (alarm.escalation + 1))
        if now >= due and alarm.escalation < self._levels:
            alarm.escalation, alarm.updated_at = alarm.escalation + 1, now
            session.add(alarm)
            details = {"escalation": alarm.escalation, "waiting_s": round((now - alarm.waiting_since).total_seconds())}
            audit(session, ACTOR, "alarm.escalate", str(alarm.id), details, now)
            self._announce(session, alarm, "escalated", now)

    def end(self, session: Session, alarm: Alarm, event: Event, *, actor: str, reason: str, now: datetime) -> None:
        """Resolves an alarm, and hands the lead of its group to the oldest that lasts.

        Raises:
            ConflictError: `alarm.not_allowed`.
        """
        move(session, alarm, event, actor=actor, reason=reason, now=now)
        alarm.active_key, alarm.resolved_at, alarm.resolved_by = None, now, actor
        alarm.silenced_until = None
        session.add(alarm)
        session.flush()
        self._announce(session, alarm, "resolved", now)
        if alarm.leader_id is not None:
            return
        query = select(Alarm).where(Alarm.grouping == alarm.grouping, col(Alarm.active_key).is_not(None))
        members = session.exec(query.order_by(col(Alarm.id))).all()
        for place, member in enumerate(members):
            member.leader_id = members[0].id if place else None
            session.add(member)
        if members:
            self._announce(session, members[0], "raised", now)


def _wider(alarm: Alarm, active: Mapping[str, Alarm], present: Mapping[str, Finding]) -> Alarm | None:
    """Returns the alarm of a site or the fleet that has taken this line in; None where there is none."""
    for key, finding in present.items():
        members = finding.evidence.get("members")
        wide = finding.level in {Level.SITE, Level.FLEET} and key != alarm.key and str(finding.cause) == alarm.cause
        if wide and isinstance(members, list | tuple) and (alarm.line or alarm.site) in members:
            return active[key]
    return None


def _worst(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Returns the worst finding of each key."""
    found: dict[str, Finding] = {}
    for finding in findings:
        known = found.get(finding.key)
        if known is None or Severity(finding.severity).rank > Severity(known.severity).rank:
            found[finding.key] = finding
    return found


def active_alarms(session: Session, *, lock: bool = False) -> dict[str, Alarm]:
    """Returns the alarms that are not over, by key, oldest first."""
    query = select(Alarm).where(col(Alarm.active_key).is_not(None)).order_by(col(Alarm.id))
    return {alarm.key: alarm for alarm in session.exec(query.with_for_update() if lock else query)}


def move(session: Session, alarm: Alarm, event: Event, *, actor: str, reason: str, now: datetime) -> None:
    """Takes a transition of the table, with its entry in the audit trail.

    Raises:
        ConflictError: `alarm.not_allowed`.
    """
    before, alarm.state = alarm.state, next_state(AlarmState(alarm.state), event)
    alarm.reason, alarm.updated_at = reason, now
    if alarm.state is AlarmState.OPEN:
        alarm.silenced_until = None
    session.add(alarm)
    details = {"from": str(before), "to": str(alarm.state), "reason": reason}
    audit(session, actor, f"alarm.{event}", str(alarm.id), details, now)


def forget_old(session: Session, before: datetime, limit: int = 500) -> int:
    """Deletes alarms resolved before a time, with all that belongs to them; returns how many, at most `limit`."""
    query = select(Alarm.id).where(Alarm.state == AlarmState.RESOLVED, col(Alarm.resolved_at) < before)
    ids = [found for found in session.exec(query.order_by(col(Alarm.id)).limit(limit)) if found is not None]
    if ids:
        for table in (AlarmComment, AlarmDelivery, AlarmDecision):
            session.exec(delete(table).where(col(table.alarm_id).in_(ids)))
        session.exec(delete(Alarm).where(col(Alarm.id).in_(ids)))
    return len(ids)
