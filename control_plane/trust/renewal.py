"""Keeps the signed metadata fresh: every half minute it takes in new ceremonies, signs what is due, and publishes."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Final

from sqlalchemy import Engine

from control_plane.database.engine import writing
from control_plane.database.leases import take_lease
from control_plane.database.tables.columns import utc_now
from control_plane.trust.online_signer import OnlineSigner
from models.errors import SortlineError

log = logging.getLogger("sortline.trust")
_PERIOD_S: Final = 30.0
_RETRY_S: Final = 3.0
_LEASE_S: Final = 90.0


class Renewal:
    """Signs again in time, on one of the replicas.

    Args:
        engine: Database.
        signer: Holds the online keys.
        publish: Publishes the signed metadata that is newer than what was published last.
        counters: Counts failures: `trust_renewal_failed`, `trust_folder_refused`.
        holder: This process's name in the lease.
    """

    def __init__(
        self,
        engine: Engine,
        signer: OnlineSigner,
        publish: Callable[[], None],
        counters: Counter[str],
        holder: str,
    ) -> None:
        self._engine, self._signer, self._publish = engine, signer, publish
        self._counters, self._holder = counters, holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trust", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread at once, or after the signing that is under way."""
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
                self._counters["trust_renewal_failed"] += 1
                log.exception("signing again failed; it is tried again")

    def _take_folder(self, now: datetime) -> None:
        """Takes in what a ceremony left in the folder; bad metadata there stops nothing else."""
        with writing(self._engine) as session:
            try:
                self._signer.take_folder(session, now)
            except SortlineError as error:
                self._counters["trust_folder_refused"] += 1
                log.warning("metadata in the trust folder is not taken in: %s", error)
                return
            session.commit()

    def step(self) -> bool:
        """Signs when it is time, and publishes.

        Returns:
            Whether anything was signed.
        """
        now = utc_now()
        self._take_folder(now)
        with writing(self._engine) as session:
            leading = take_lease(session, "trust", self._holder, seconds=_LEASE_S, now=now)
            signed = leading is not None and self._signer.sign_changes(session, now)
            self._signer.look(session, now)
            session.commit()
        self._publish()
        return signed
