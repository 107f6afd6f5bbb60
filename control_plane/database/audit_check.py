"""Whether the audit trail is whole, found step by step: no read pays for a hundred thousand entries.

Every entry is checked against the one before it. New entries are checked when somebody looks; a long backlog after a
start is checked by a thread of its own, a few hundred entries at a time. When the end is reached, each look also
checks a few old entries again, in turn, so that a change of what was checked before is found as well.
"""

import logging
import threading
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, desc, select

from control_plane.database.audit import GENESIS, hash_of
from control_plane.database.engine import reading
from control_plane.database.tables.audit import Audit

log = logging.getLogger("sortline.database")
_AT_A_TIME: Final = 300
"""Entries checked in one look: about 20 ms."""
_AGAIN: Final = 50
_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class AuditStatus:
    """What is known of the trail."""

    broken_entry: int | None
    """Id of the first entry that does not follow from the one before; None = none was found."""
    checked_through: int
    """Every entry up to this id was checked since this process started."""
    newest: int
    """Id of the newest entry; 0 = there is none."""


class AuditCheck:
    """Checks the trail of one database.

    Args:
        engine: The database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._end = (0, GENESIS)
        """Id and hash of the last entry that was checked."""
        self._again = (0, GENESIS)
        self._broken: int | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def look(self, session: Session) -> AuditStatus:
        """Checks what is new, a bounded number of entries, and returns what is known."""
        newest = session.exec(select(Audit.id).order_by(desc(Audit.id)).limit(1)).first() or 0
        with self._lock:
            self._end = self._advance(session, self._end, _AT_A_TIME)
            if self._end[0] >= newest:
                self._again = self._advance(session, self._again, _AGAIN)
                if self._again[0] >= self._end[0]:
                    self._again = (0, GENESIS)
            found = AuditStatus(self._broken, self._end[0], newest)
        if found.checked_through < newest and found.broken_entry is None:
            self._check_backlog()
        return found

    def stop(self) -> None:
        """Ends the thread within a fraction of a second."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _advance(self, session: Session, after: tuple[int, str], limit: int) -> tuple[int, str]:
        if self._broken is not None:
            return after
        query = select(Audit).where(col(Audit.id) > after[0]).order_by(col(Audit.id)).limit(limit)
        number, previous = after
        for entry in session.exec(query):
            if entry.previous != previous or entry.hash != hash_of(entry):
                self._broken = entry.id
                log.error("entry %s of the audit trail does not follow from the one before it", entry.id)
                break
            number, previous = entry.id or 0, entry.hash
        return number, previous

    def _check_backlog(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(_PAUSE_S):
                with self._lock, reading(self._engine) as session:
                    before, self._end = self._end, self._advance(session, self._end, _AT_A_TIME)
                    if before == self._end:
                        return
        except SQLAlchemyError as error:
            log.warning("the audit trail is checked further at the next look: %s", error)
