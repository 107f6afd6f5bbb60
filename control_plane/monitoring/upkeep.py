"""Keeps the tables of what agents send in bounds: folds what silent agents left open, archives closed days, deletes.

One of all replicas does it, by a lease in the database; every step proves anew that this process holds it.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from sqlalchemy import Engine
from sqlmodel import Session, col, func, select

from control_plane.config import RetentionConfig
from control_plane.database.engine import reading, writing
from control_plane.database.leases import holds_lease, take_lease
from control_plane.database.tables.agents import WindowRow
from control_plane.database.tables.columns import utc_now
from control_plane.monitoring.closed_days import Archive
from control_plane.monitoring.retention import ROWS_AT_ONCE, Step, database_bytes, steps_of
from control_plane.monitoring.rollups import fold_all

log = logging.getLogger("sortline.upkeep")
LEASE: Final = "upkeep"
_LEASE_S: Final = 300.0
_OPEN_FOR: Final = timedelta(hours=1)
"""An agent without windows for so long has its open minutes and hours folded."""
_FOLDED_AT_ONCE: Final = 500
_DAYS_AT_ONCE: Final = 3
_LONGEST_TURN_S: Final = 20.0
"""After so long the rest is left to the next turn."""
_REST: Final = 2.0
"""A step is followed by a pause of so many times its length: ingest must find the database free."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the last look found.

    Attributes:
        database_bytes: Size of the database.
        oldest_window_s: Age of the oldest window, seconds; None without windows.
        overdue_s: How far the oldest window is past its time, seconds; 0 when nothing is left to delete.
        at: When that was.
    """

    database_bytes: int
    oldest_window_s: float | None
    overdue_s: float
    at: datetime


class Upkeep:
    """Deletes by policy on one of the replicas.

    Args:
        engine: Database.
        policy: How long each kind is kept.
        counters: Gets `deleted_windows`, `deleted_minutes`, ..., `folded_late`, `archived_days`, `archive_failed`,
            `upkeep_failed`.
        holder: This process's name in the lease.

    Raises:
        ConfigError: `retention.no_library` where an archive is wanted and DuckDB is not installed.
    """

    def __init__(self, engine: Engine, policy: RetentionConfig, counters: Counter[str], holder: str) -> None:
        self._engine, self._policy, self._counters, self._holder = engine, policy, counters, holder
        self._archive = Archive(engine, Path(policy.archive).resolve()) if policy.archive else None
        self._steps = steps_of(policy, lambda s: None if self._archive is None else self._archive.kept_from(s))
        self._fence: int | None = None
        self._usage: Usage | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    @property
    def usage(self) -> Usage:
        """What the last look found; of now where there was none yet."""
        if self._usage is None:
            self._look(utc_now())
        assert self._usage is not None  # noqa: S101  `_look` has set it
        return self._usage

    @property
    def policy(self) -> RetentionConfig:
        """How long each kind is kept."""
        return self._policy

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that is under way."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._policy.period_s):
            try:
                self.turn(utc_now())
            except Exception:
                self._counters["upkeep_failed"] += 1
                log.exception("a turn of the upkeep failed; it is tried again")

    def turn(self, now: datetime) -> int:
        """Does what is due, or as much as fits into one turn.

        Returns:
            How many rows were deleted or folded.
        """
        begun_s = time.monotonic()
        with writing(self._engine) as session:
            self._fence = take_lease(session, LEASE, self._holder, seconds=_LEASE_S, now=now)
            session.commit()
        done = 0
        if self._fence is not None:
            done += self._until_done("folded_late", self._fold, now, _FOLDED_AT_ONCE, begun_s)
            self._archive_due(now)
            for name, step in self._steps.items():
                done += self._until_done(f"deleted_{name}", step, now, ROWS_AT_ONCE, begun_s)
        self._look(now)
        return done

    def _until_done(self, counter: str, step: Step, now: datetime, most: int, begun_s: float) -> int:
        done = 0
        while not self._stop.is_set() and time.monotonic() - begun_s < _LONGEST_TURN_S:
            step_s = time.monotonic()
            with writing(self._engine) as session:
                if not holds_lease(session, LEASE, self._holder, self._fence or 0):
                    return done
                rows = step(session, now, most)
                session.commit()
            done += rows
            self._counters[counter] += rows
            if rows < most:
                return done
            self._stop.wait(min(1.0, _REST * (time.monotonic() - step_s)))
        return done

    def _archive_due(self, now: datetime) -> None:
        """Archives what is due; while that fails, minutes stay and everything else goes on."""
        if self._archive is None:
            return
        try:
            self._counters["archived_days"] += self._archive.write_due(now, _DAYS_AT_ONCE)
        except Exception:
            self._counters["archive_failed"] += 1
            log.exception("a day was not archived; it is tried again")

    @staticmethod
    def _fold(session: Session, now: datetime, most: int) -> int:
        return fold_all(session, now - _OPEN_FOR, most)

    def _look(self, now: datetime) -> None:
        with reading(self._engine) as session:
            oldest = session.exec(select(func.min(col(WindowRow.received_at)))).one()
        age_s = None if oldest is None else max(0.0, (now - oldest).total_seconds())
        overdue_s = max(0.0, (age_s or 0.0) - self._policy.windows_days * 86_400.0)
        self._usage = Usage(database_bytes(self._engine), age_s, overdue_s, now)


def gauges_of(upkeep: Upkeep) -> dict[str, tuple[str, float]]:
    """Returns the gauges of what the tables take: name -> what it says, and its value."""
    found = upkeep.usage
    return {
        "sortline_database_bytes": ("Size of the database", float(found.database_bytes)),
        "sortline_oldest_window_age_seconds": ("Age of the oldest window that is kept", found.oldest_window_s or 0.0),
        "sortline_retention_overdue_seconds": ("How far the oldest window is past its time", found.overdue_s),
    }
