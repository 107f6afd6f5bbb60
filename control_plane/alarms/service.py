"""Puts the parts of the room together: receivers, the loop, deliveries, and what people do, each in one transaction."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Literal

from sqlalchemy import Engine
from sqlmodel import Session

from control_plane.alarms import acting
from control_plane.alarms.details import count_alarms, facts_of, worst_of_lines
from control_plane.alarms.detectors import FidelityChecks, KnownBundles, open_watch
from control_plane.alarms.lifecycle import Event
from control_plane.alarms.notify import Announcer, Courier, Sender
from control_plane.alarms.reported_faults import ReportedFaults
from control_plane.alarms.senders import Mail, Topic, Webhook
from control_plane.alarms.watcher import Watch, Watcher
from control_plane.config import ControlPlaneConfig
from control_plane.database.engine import reading
from control_plane.database.tables.alarms import Alarm
from control_plane.fleet.connection import BrokerConnection
from control_plane.registry.store import Store
from models.bundle import RECIPE
from models.errors import SortlineError
from models.profile import Profile
from models.recipe import Recipe, parse_recipe
from models.topics import ALARMS_TOPIC

_MAX_AGE_S: Final = 1.0
_CONFIRM_S: Final = 5.0
"""How long the broker may take to confirm a message."""


class Alarms:
    """The alarms of a control plane.

    Args:
        engine: Database.
        watcher: The loop.
        courier: Delivers messages.
        announcer: Stores messages.
    """

    def __init__(self, engine: Engine, watcher: Watcher, courier: Courier, announcer: Announcer) -> None:
        self._engine, self.watcher, self._courier, self._announcer = engine, watcher, courier, announcer
        self._lock = threading.Lock()
        self._known: tuple[float, dict[str, tuple[int, str, str]]] = (-1e9, {})

    def start(self) -> None:
        """Starts looking and delivering."""
        self.watcher.start()
        self._courier.start()

    def stop(self) -> None:
        """Ends both within some seconds; what waits is delivered by the next process."""
        self._courier.stop()
        self.watcher.stop()

    def act(
        self,
        session: Session,
        alarm_id: int,
        event: Literal[Event.ACKNOWLEDGE, Event.SILENCE, Event.RESOLVE],
        *,
        actor: str,
        reason: str,
        now: datetime,
        until: datetime | None = None,
    ) -> Alarm:
        """Does what a person asks for, in the caller's transaction.

        Raises:
            InputError: `alarm.unknown`, `alarm.bad_silence`.
            ConflictError: `alarm.not_allowed`.
        """
        announce = self._announcer.announce
        if event is Event.ACKNOWLEDGE:
            return acting.acknowledge(session, alarm_id, actor=actor, reason=reason, now=now, announce=announce)
        if event is Event.SILENCE:
            end = until or now + timedelta(hours=1)
            return acting.silence(session, alarm_id, end, actor=actor, reason=reason, now=now, announce=announce)
        register = self.watcher.register
        return acting.resolve(session, alarm_id, actor=actor, reason=reason, now=now, register=register)

    def counts(self) -> Mapping[tuple[str, str, str], int]:
        """Returns the number of alarms that are not over, by severity, cause and state."""
        with reading(self._engine) as session:
            return count_alarms(session)

    def worst(self) -> Mapping[str, tuple[int, str, str]]:
        """Returns the worst alarm of each line, as of at most a second ago: id, severity, cause."""
        with self._lock:
            if time.monotonic() - self._known[0] > _MAX_AGE_S:
                with reading(self._engine) as session:
                    self._known = (time.monotonic(), worst_of_lines(session))
            return self._known[1]


def open_alarms(
    config: ControlPlaneConfig,
    engine: Engine,
    store: Store,
    connection: BrokerConnection,
    counters: Counter[str],
    holder: str,
    profile: Callable[[str], Profile | None],
) -> Alarms:
    """Makes the alarms of this process; starts nothing yet.

    Args:
        config: Receivers, policies, times.
        engine: Database.
        store: Where recipes of bundles are.
        connection: To the broker.
        counters: Counts what happened.
        holder: This process's name in leases.
        profile: Returns the reference profile of a bundle; None where it is not known.
    """
    senders: list[Sender] = [Webhook(hook) for hook in config.alarms.webhooks]
    senders += [Mail(mail) for mail in config.alarms.mails]
    if config.alarms.topic and config.broker.enabled:
        senders.append(Topic(lambda payload: connection.publish_confirmed(ALARMS_TOPIC, payload, _CONFIRM_S)))
    base = config.server.public_origin + config.server.prefix if config.server.public_origin else ""

    def describe(alarm: Alarm) -> dict[str, Any]:
        return facts_of(alarm) | {"url": f"{base}/alarms/{alarm.id}" if base else ""}

    announcer = Announcer(senders, describe)
    facts = KnownBundles(profile, lambda bundle: _recipe(store, bundle))
    watches: dict[str, Callable[[bytes], Watch]] = {"reported": ReportedFaults, "detection": open_watch(facts)}
    watcher = Watcher(
        engine,
        holder,
        config.alarms,
        watches,
        checks=[FidelityChecks()],
        recipe=lambda bundle: _recipe(store, bundle),
        announce=announcer.announce,
        levels=announcer.levels,
        counters=counters,
    )
    courier = Courier(engine, senders, config.alarms, counters, leading=lambda: watcher.leading)
    return Alarms(engine, watcher, courier, announcer)


def _recipe(store: Store, bundle: str) -> Recipe | None:
    try:
        return _parsed(store, bundle) if bundle else None
    except SortlineError:
        return None  # never pushed here: what mistakes cost is not known


@lru_cache(maxsize=64)
def _parsed(store: Store, bundle: str) -> Recipe:
    return parse_recipe(store.part(bundle, RECIPE))
