"""Brings what happens to alarms to receivers: at least once, in order per alarm, with an end.

A message is stored in the transaction of the event it reports, so a crash between any two steps loses none. Before an
attempt the database says when the next one is due; after it, that the message is delivered. A process that dies in
between sends it again, under the same idempotency key. A receiver that does not answer is left alone for a growing
while, and holds up no other receiver: each has a thread of its own. After `give_up_after_s` a message is given up, and
that is counted, shown and an alert of Prometheus.
"""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from sqlalchemy import Engine
from sqlmodel import Session, col, func, select, update

from control_plane.config import AlarmsConfig
from control_plane.database.engine import reading, writing
from control_plane.database.tables.alarms import Alarm, AlarmDelivery, DeliveryState
from control_plane.database.tables.columns import utc_now
from control_plane.detection.finding import Severity
from models.errors import SortlineError, UnavailableError

log = logging.getLogger("sortline.alarms")
_AT_ONCE: Final = 50
"""Messages of one receiver in one turn."""
_PATIENCE_S: Final = 60.0
"""Longest pause of a receiver that does not answer, before its next message is tried."""
_EVENTS_OF_A_LEVEL: Final = frozenset({"raised", "worsened", "reopened", "escalated"})
"""Events that a receiver hears when the alarm has reached its level; of the others it hears after one of these."""


class Sender(Protocol):
    """One receiver."""

    @property
    def name(self) -> str:
        """Its name among the receivers."""

    @property
    def severity(self) -> str:
        """Least severity that it hears of."""

    @property
    def after_escalations(self) -> int:
        """Escalations from which it hears of an alarm; 0 = at once."""

    def send(self, key: str, event: str, payload: dict[str, Any]) -> None:
        """Delivers one message within the receiver's time.

        Raises:
            UnavailableError: `alarms.no_answer`: nothing answers; other messages would fail as well.
            ConflictError: `alarms.refused`: the receiver refused this message.
        """


class Announcer:
    """Stores messages about alarms.

    Args:
        senders: The receivers.
        describe: Returns the document that receivers get of an alarm.
    """

    def __init__(self, senders: Sequence[Sender], describe: Callable[[Alarm], dict[str, Any]]) -> None:
        self._senders, self._describe = senders, describe

    @property
    def levels(self) -> int:
        """Escalations after which the last receiver has heard of an alarm."""
        return max((sender.after_escalations for sender in self._senders), default=0)

    def announce(self, session: Session, alarm: Alarm, event: str, now: datetime) -> None:
        """Stores one message to each receiver that hears of this event, in the caller's transaction."""
        told = _told(session, alarm)
        for sender in self._senders:
            enough = Severity(alarm.severity).rank >= Severity(sender.severity).rank
            reached = alarm.escalation >= sender.after_escalations
            first = event in _EVENTS_OF_A_LEVEL and enough and reached
            if not first and not (event not in _EVENTS_OF_A_LEVEL and sender.name in told):
                continue
            payload = {"schema_version": 1, "event": event, "at": now.isoformat(), "alarm": self._describe(alarm)}
            session.add(
                AlarmDelivery(
                    alarm_id=alarm.id or 0,
                    key=f"alarm-{secrets.token_hex(16)}",  # unique among all sites that share a receiver
                    receiver=sender.name,
                    event=event,
                    payload=payload,
                    created_at=now,
                    next_at=now,
                )
            )
        session.flush()


def _told(session: Session, alarm: Alarm) -> set[str]:
    """Returns the receivers that hear of this alarm already."""
    return set(session.exec(select(AlarmDelivery.receiver).where(AlarmDelivery.alarm_id == alarm.id).distinct()))


class Courier:
    """Delivers what is stored while this process leads.

    Args:
        engine: Database.
        senders: The receivers, each served by a thread of its own.
        config: Retries and their end.
        counters: Counts what happened.
        leading: Says whether this process leads the alarms; a second one that sends as well repeats messages, under
            the same keys.
    """

    def __init__(
        self,
        engine: Engine,
        senders: Sequence[Sender],
        config: AlarmsConfig,
        counters: Counter[str],
        leading: Callable[[], bool] = lambda: True,
    ) -> None:
        self._engine, self._config, self._counters, self._leading = engine, config, counters, leading
        self._stop = threading.Event()
        self._failures: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._run, args=(sender,), name=f"alarms-{sender.name}", daemon=True)
            for sender in senders
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads; an attempt under way is left to its own time, and its message comes again."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)

    def _run(self, sender: Sender) -> None:
        pause_s = 1.0
        while not self._stop.wait(pause_s):
            pause_s = 1.0
            if not self._leading():
                continue
            try:
                self.deliver(sender, utc_now())
            except Exception:
                self._counters["alarm_delivery_failed"] += 1
                log.exception("messages to %s wait; they are tried again", sender.name)
            if failures := self._failures[sender.name]:
                pause_s = min(_PATIENCE_S, self._config.first_retry_s * 2.0 ** min(failures - 1, 10))

    def deliver(self, sender: Sender, now: datetime) -> int:
        """Attempts what is due for one receiver, oldest first; returns how many messages were delivered."""
        self._give_up(sender.name, now)
        delivered = 0
        for number in self._due(sender.name, now):
            if self._stop.is_set():
                break
            outcome = self._attempt(sender, number, now)
            if outcome is None:
                self._failures[sender.name] += 1
                break
            self._failures[sender.name] = 0
            delivered += outcome
        return delivered

    def _due(self, receiver: str, now: datetime) -> list[int]:
        """Returns the messages to send now; of an alarm only the oldest that waits: its story keeps its order."""
        with reading(self._engine) as session:
            waiting = (AlarmDelivery.receiver == receiver, AlarmDelivery.state == DeliveryState.WAITING)
            heads = select(func.min(AlarmDelivery.id)).where(*waiting).group_by(col(AlarmDelivery.alarm_id))
            query = select(AlarmDelivery.id).where(col(AlarmDelivery.id).in_(heads), col(AlarmDelivery.next_at) <= now)
            found = session.exec(query.order_by(col(AlarmDelivery.id)).limit(_AT_ONCE))
            return [number for number in found if number is not None]

    def _attempt(self, sender: Sender, number: int, now: datetime) -> bool | None:
        """Sends one message; returns whether it was delivered, or None where the receiver does not answer."""
        with writing(self._engine) as session:
            row = session.get(AlarmDelivery, number, with_for_update=True)
            if row is None or row.state is not DeliveryState.WAITING:
                return False
            row.attempts += 1
            row.next_at = now + self._wait(row.attempts)
            session.add(row)
            session.commit()
            key, event, payload = row.key, row.event, row.payload
        self._counters["alarm_delivery_attempts"] += 1
        try:
            sender.send(key, event, payload)
        except SortlineError as error:
            self._counters["alarm_delivery_refused"] += 1
            log.warning("%s did not take %s: %s", sender.name, key, error)
            self._note(number, error=str(error)[:500])
            return None if isinstance(error, UnavailableError) else False
        self._note(number, state=DeliveryState.DELIVERED, ended_at=utc_now(), error="")
        self._counters["alarm_delivered"] += 1
        return True

    def _wait(self, attempts: int) -> timedelta:
        seconds = min(self._config.longest_retry_s, self._config.first_retry_s * 2.0 ** min(attempts - 1, 30))
        return timedelta(seconds=seconds)

    def _note(self, number: int, **values: Any) -> None:
        with writing(self._engine) as session:
            session.exec(update(AlarmDelivery).where(col(AlarmDelivery.id) == number).values(**values))
            session.commit()

    def _give_up(self, receiver: str, now: datetime) -> None:
        oldest = now - timedelta(seconds=self._config.give_up_after_s)
        late = (
            col(AlarmDelivery.receiver) == receiver,
            col(AlarmDelivery.state) == DeliveryState.WAITING,
            col(AlarmDelivery.created_at) < oldest,
            col(AlarmDelivery.attempts) > 0,
        )
        with reading(self._engine) as session:
            if session.exec(select(AlarmDelivery.id).where(*late).limit(1)).first() is None:
                return
        with writing(self._engine) as session:
            values = {"state": DeliveryState.GIVEN_UP, "ended_at": now}
            done = session.exec(update(AlarmDelivery).where(*late).values(**values))
            session.commit()
            self._counters["alarm_delivery_given_up"] += done.rowcount
        log.error("%s messages to %s were given up", done.rowcount, receiver)
