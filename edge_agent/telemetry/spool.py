"""Records that wait for the control plane: durable, bounded, deleted only when they are acknowledged.

SQLite in WAL mode with full synchronisation. The key of a record, (boot_id, seq), never repeats, so sending twice
changes nothing. Beyond the byte budget the least important records go first, the oldest of them first; which numbers
went is kept exactly and sent as `Gap` records. A ballast file is released when the disk is full, so that deleting
still works.

Law: every number a boot has used is waiting, acknowledged, or in a gap.
"""

import contextlib
import itertools
import logging
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.state_directory import StateDirectory
from models.errors import CapacityError
from models.messages import MAX_BATCH_BYTES, MAX_GAP_RANGES, Gap, GapRange, Record, RecordKind, wall_ms

log = logging.getLogger("sortline.spool")
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS record (
  id INTEGER PRIMARY KEY AUTOINCREMENT, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL,
  payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_kind ON record (kind, id);
CREATE TABLE IF NOT EXISTS gap (
  boot_id TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (boot_id, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gap_count (
  boot_id TEXT NOT NULL, kind TEXT NOT NULL, records INTEGER NOT NULL, PRIMARY KEY (boot_id, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
_DROP_AT_ONCE: Final = 256
_LOG_BYTES: Final = 4 * 1024 * 1024
EVICTION: Final = (RecordKind.EVIDENCE, RecordKind.EVENT, RecordKind.WINDOW)
"""Least important first: a picture only illustrates, and the counts of a lot cannot be obtained again. Gaps are never
dropped."""
_KEPT_SHARE: Final = 1.0 / 16.0
"""Share of the budget that a less important kind keeps, so that a day of windows never pushes out the last alarms."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring records of one boot."""

    first_id: int
    last_id: int
    records: tuple[Record, ...]


class Spool:
    """The spool of one agent. One thread uses it.

    Args:
        directory: The agent's state directory.
        boot_id: Identifies this start; sequence numbers count from 0 in it.
        max_bytes: Budget on disk.
        ballast_bytes: Size of the ballast file.
        wall_ms: Milliseconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        boot_id: str,
        *,
        max_bytes: int,
        ballast_bytes: int,
        wall_ms: Callable[[], int] = wall_ms,
    ) -> None:
        places = StateDirectory(directory)
        self._path, self._ballast = places.spool, places.ballast
        self._boot_id, self._seq = boot_id, 0
        self._max_bytes, self._ballast_bytes, self._wall_ms = max_bytes, ballast_bytes, wall_ms
        self._unwritten: list[tuple[RecordKind, int]] = []
        """Records that could not be written at all: their numbers are reported as a gap once there is room."""
        self.quarantined = False
        """The file found at start was broken and was set aside."""
        self._database = self._open()
        self._bytes: Counter[str] = Counter(
            dict(self._database.execute("SELECT kind, SUM(LENGTH(payload)) FROM record GROUP BY kind").fetchall())
        )
        self._claim_ballast()

    def _open(self) -> sqlite3.Connection:
        """Opens the file; a broken one is set aside. On a full disk the ballast makes the room that opening needs."""
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            self._ballast.unlink(missing_ok=True)
            try:
                return self._connect()
            except sqlite3.OperationalError:
                raise CapacityError(
                    "spool.unusable", "The spool cannot be opened; make room on the disk.", got=error
                ) from error
        except sqlite3.DatabaseError:
            log.exception("the spool is broken; it is set aside and a new one begins")
            for path in self._path.parent.glob(f"{self._path.name}*"):
                if ".broken-" not in path.name:
                    path.rename(path.with_name(f"{path.name}.broken-{self._wall_ms()}"))
            self.quarantined = True
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            # Without this setting the log file keeps its largest size.
            database.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
            if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            database.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def _claim_ballast(self) -> None:
        """Puts the ballast back as soon as there is plenty of room."""
        if not self._ballast_bytes or self._ballast.exists():
            return
        with contextlib.suppress(OSError):
            if shutil.disk_usage(self._path.parent).free < 4 * self._ballast_bytes:
                return
            descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, self._ballast_bytes)
            finally:
                os.close(descriptor)

    # -- writing ----------------------------------------------------------------------------------------------

    def append(self, kind: RecordKind, payload: bytes, *, lifetime_items: int | None = None) -> None:
        """Stores a record; makes room first when the budget is used up.

        Raises:
            CapacityError: `spool.full` when the disk refuses even without ballast; the record's number is in the gap
                that is reported as soon as there is room.
        """
        try:
            if self.used_bytes() > self._max_bytes:
                self._evict()
            self._insert(kind, payload, lifetime_items)
        except sqlite3.OperationalError as error:
            self._ballast.unlink(missing_ok=True)
            try:
                self._evict()
                self._insert(kind, payload, lifetime_items)
            except sqlite3.OperationalError:
                self._unwritten.append((kind, self._seq))
                self._seq += 1
                raise CapacityError(
                    "spool.full", "The disk takes no more records; the line sorts on.", got=error
                ) from error

    def _insert(self, kind: RecordKind, payload: bytes, lifetime_items: int | None) -> None:
        with self._transaction():
            for lost, number in self._unwritten:
                self._add_to_gap(self._boot_id, lost, [number])
            self._add(kind, payload)
            if self._unwritten:
                self._set("dropped", self.dropped)
            if lifetime_items is not None:
                self._set("lifetime_items", lifetime_items)
        self._unwritten.clear()
        self._seq += 1
        self._bytes[kind] += len(payload)

    def _add(self, kind: RecordKind, payload: bytes) -> None:
        self._database.execute(
            "INSERT INTO record (boot_id, seq, kind, payload) VALUES (?, ?, ?, ?)",
            (self._boot_id, self._seq, str(kind), payload),
        )

    def _evict(self) -> None:
        """Drops the oldest records of the least important kind that has more than its share."""
        share = self._max_bytes * _KEPT_SHARE
        kind = next((k for k in EVICTION if self._bytes[k] > share), EVICTION[-1])
        with self._transaction():
            rows = self._database.execute(
                "SELECT id, boot_id, seq, LENGTH(payload) FROM record WHERE kind = ? ORDER BY id LIMIT ?",
                (str(kind), _DROP_AT_ONCE),
            ).fetchall()
            self._database.executemany("DELETE FROM record WHERE id = ?", [(row[0],) for row in rows])
            for boot_id, group in itertools.groupby(rows, key=lambda row: row[1]):
                self._add_to_gap(boot_id, kind, [row[2] for row in group])
            self._set("dropped", self._fact("dropped", 0) + len(rows))
        self._bytes[kind] -= sum(row[3] for row in rows)

    def _add_to_gap(self, boot_id: str, kind: RecordKind, numbers: Sequence[int]) -> None:
        """Joins the numbers with the ranges that are known already."""
        for first, last in _runs(numbers):
            for neighbour in self._database.execute(
                "SELECT first, last FROM gap WHERE boot_id = ? AND (last = ? OR first = ?)",
                (boot_id, first - 1, last + 1),
            ).fetchall():
                self._database.execute("DELETE FROM gap WHERE boot_id = ? AND first = ?", (boot_id, neighbour[0]))
                first, last = min(first, neighbour[0]), max(last, neighbour[1])  # noqa: PLW2901  the range grows
            self._database.execute("INSERT INTO gap VALUES (?, ?, ?)", (boot_id, first, last))
        self._database.execute(
            "INSERT INTO gap_count VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET records = records + excluded.records",
            (boot_id, str(kind), len(numbers)),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            # A commit that fails may leave the transaction open, or not.
            with contextlib.suppress(sqlite3.OperationalError):
                self._database.execute("ROLLBACK")
            raise

    # -- reading and deleting -------------------------------------------------------------------------------

    def seal_gaps(self) -> None:
        """Turns the ranges of dropped records into `Gap` records, which are sent like any other."""
        boots = self._database.execute("SELECT DISTINCT boot_id FROM gap").fetchall()
        for (boot_id,) in boots:
            with self._transaction():
                ranges = self._database.execute(
                    "SELECT first, last FROM gap WHERE boot_id = ? ORDER BY first LIMIT ?", (boot_id, MAX_GAP_RANGES)
                ).fetchall()
                counts = self._database.execute(
                    "SELECT kind, records FROM gap_count WHERE boot_id = ?", (boot_id,)
                ).fetchall()
                gap = Gap(
                    at_ms=self._wall_ms(),
                    boot_id=boot_id,
                    ranges=tuple(GapRange(first, last) for first, last in ranges),
                    records=dict(counts),
                )
                self._add(RecordKind.GAP, msgspec.msgpack.encode(gap))
                self._database.execute("DELETE FROM gap WHERE boot_id = ? AND first <= ?", (boot_id, ranges[-1][0]))
                self._database.execute("DELETE FROM gap_count WHERE boot_id = ?", (boot_id,))
            self._seq += 1

    @property
    def has_gaps(self) -> bool:
        """Whether records were dropped that no `Gap` record names yet."""
        return self._database.execute("SELECT 1 FROM gap LIMIT 1").fetchone() is not None

    @property
    def last_id(self) -> int:
        """Place of the newest record; 0 when there was none."""
        return int(self._database.execute("SELECT COALESCE(MAX(id), 0) FROM record").fetchone()[0])

    def read(self, *, after: int, through: int | None = None, most: int) -> Slice | None:
        """Returns the next neighbouring records of one boot within the limits of one batch; None when there are none.

        Args:
            after: Place the slice begins behind.
            through: Last place it may contain.
            most: Records.
        """
        rows = self._database.execute(
            "SELECT id, boot_id, seq, kind, payload FROM record WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
            (after, 2**62 if through is None else through, most),
        ).fetchall()
        records: list[Record] = []
        size = last_id = 0
        for place, boot_id, seq, kind, payload in rows:
            size += len(payload) + 64
            if records and (size > MAX_BATCH_BYTES // 2 or boot_id != records[0].boot_id):
                break
            records.append(Record(boot_id=boot_id, seq=seq, kind=RecordKind(kind), payload=payload))
            last_id = place
        return Slice(rows[0][0], last_id, tuple(records)) if records else None

    def forget(self, boot_id: str, first: int, last: int, *, first_id: int, last_id: int) -> int:
        """Deletes records that the control plane has; returns how many.

        Args:
            boot_id: Their boot.
            first: Their lowest number.
            last: Their highest.
            first_id: Place where the slice they were sent in begins: no index by number is kept, it would cost a
                tenth of the budget.
            last_id: Place where it ends.
        """
        which = "WHERE id BETWEEN ? AND ? AND boot_id = ? AND seq BETWEEN ? AND ?"
        values = (first_id, last_id, boot_id, first, last)
        with self._transaction():
            for kind, size in self._database.execute(
                f"SELECT kind, SUM(LENGTH(payload)) FROM record {which} GROUP BY kind",  # noqa: S608  constant
                values,
            ).fetchall():
                self._bytes[kind] -= size
            deleted = self._database.execute(f"DELETE FROM record {which}", values).rowcount  # noqa: S608  constant
        self._claim_ballast()
        return int(deleted)

    @property
    def depth(self) -> int:
        """The number of records that wait."""
        return int(self._database.execute("SELECT COUNT(*) FROM record").fetchone()[0])

    @property
    def dropped(self) -> int:
        """Records dropped for lack of room since the agent was installed."""
        return self._fact("dropped", 0) + len(self._unwritten)

    @property
    def lifetime_items(self) -> int:
        """Items judged since the agent was installed, as of the last stored window."""
        return self._fact("lifetime_items", 0)

    def used_bytes(self) -> int:
        """Returns the number of pages in use (free ones are used again)."""
        count, free, size = (
            int(self._database.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (count - free) * size

    def _fact(self, name: str, default: int) -> int:
        row = self._database.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else default

    def _set(self, name: str, value: int) -> None:
        self._database.execute("INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)", (name, value))

    def close(self) -> None:
        """Closes the database file."""
        self._database.close()


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Returns ascending numbers as ranges (first, last)."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
