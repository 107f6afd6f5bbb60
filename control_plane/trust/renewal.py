"""Keeps the signed metadata fresh: looks every half minute, signs every hour, publishes what others signed."""

import logging
import threading
from datetime import datetime
from typing import Final

from sqlalchemy import Engine

from control_plane.database.engine import writing
from control_plane.database.leases import take_lease
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.connection import FleetLink
from models.errors import SortlineError

log = logging.getLogger("sortline.trust")
_PERIOD_S: Final = 30.0
_RETRY_S: Final = 3.0
_LEASE_S: Final = 90.0


class Renewal:
    """Signs again in time, on one of the replicas.

    Args:
        engine: Database.
        fleet: Publishes.
        holder: Who we are in the lease.
    """

    def __init__(self, engine: Engine, fleet: FleetLink, holder: str) -> None:
        self._engine, self._fleet, self._holder = engine, fleet, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trust", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it at once, or after the signing it is in."""
        self._stop.set()
        self._thread.join(3.0)

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            pause_s = _PERIOD_S
            try:
                self.step()
            except Exception:
                pause_s = _RETRY_S
                self._fleet.counters["trust_renewal_failed"] += 1
                log.exception("signing again failed; it is tried again")

    def _take_folder(self, now: datetime) -> None:
        """What a ceremony left in the folder since; bad metadata there stops nothing else."""
        with writing(self._engine) as session:
            try:
                self._fleet.assignments.take_folder(session, now)
            except SortlineError as error:
                self._fleet.counters["trust_folder_refused"] += 1
                log.warning("metadata in the trust folder is not taken in: %s", error)
                return
            session.commit()

    def step(self) -> bool:
        """Signs when it is time and publishes; returns whether anything was signed."""
        now = utc_now()
        self._take_folder(now)
        with writing(self._engine) as session:
            leading = take_lease(session, "trust", self._holder, seconds=_LEASE_S, now=now)
            signed = leading is not None and self._fleet.assignments.sign_changes(session, now)
            self._fleet.assignments.look(session, now)
            session.commit()
        self._fleet.publish_trust()
        return signed
