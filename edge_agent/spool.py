"""Records that wait for the control plane: durable, bounded, deleted only when they are acknowledged.

SQLite in WAL mode with full synchronisation. The key of a record, (boot_id, seq), never repeats, so sending twice
changes nothing. Beyond the byte budget the oldest windows go first and exactly how many is kept as a gap record,
which is sent like any other. A ballast file is released when the disk is full, so that deleting still works.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from models.errors import CapacityError
from models.messages import MAX_BATCH_BYTES, Ack, Event, Record, RecordKind

log = logging.getLogger("sortline.spool")
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS record (
  id INTEGER PRIMARY KEY AUTOINCREMENT, boot_id TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL,
  payload BLOB NOT NULL, UNIQUE (boot_id, seq));
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
_DROP_AT_ONCE: Final = 256


class Spool:
    """The spool of one agent. One thread uses it.

    Args:
        directory: The agent's state directory.
        boot_id: Of this start; sequence numbers count from 0 in it.
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
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._path = directory / "spool.sqlite"
        self._ballast = directory / "ballast"
        self._boot_id, self._seq = boot_id, 0
        self._max_bytes, self._ballast_bytes, self._wall_ms = max_bytes, ballast_bytes, wall_ms
        self.failed = 0
        """Records that could not be written at all."""
        self.quarantined = False
        """The file found at start was broken and was set aside."""
        self._database = self._open()
        self._claim_ballast()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
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
            if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
            database.executescript(_SCHEMA)
        except sqlite3.DatabaseError:
            database.close()
            raise
        return database

    def _claim_ballast(self) -> None:
        if self._ballast_bytes and not self._ballast.exists():
            with contextlib.suppress(OSError), self._ballast.open("wb") as stream:
                stream.write(bytes(self._ballast_bytes))

    # -- writing ----------------------------------------------------------------------------------------------

    def append(self, kind: RecordKind, payload: bytes, *, lifetime_items: int | None = None) -> None:
        """Stores a record; makes room first when the budget is used up.

        Raises:
            CapacityError: `spool.full` when the disk refuses even without ballast; the record is counted as failed.
        """
        if self.used_bytes() > self._max_bytes:
            self._drop_oldest()
        try:
            self._insert(kind, payload, lifetime_items)
        except sqlite3.OperationalError as error:
            self._ballast.unlink(missing_ok=True)
            self._drop_oldest()
            try:
                self._insert(kind, payload, lifetime_items)
            except sqlite3.OperationalError:
                self.failed += 1
                raise CapacityError(
                    "spool.full", "The disk takes no more records; the line sorts on.", got=error
                ) from error

    def _insert(self, kind: RecordKind, payload: bytes, lifetime_items: int | None) -> None:
        with self._transaction():
            self._database.execute(
                "INSERT INTO record (boot_id, seq, kind, payload) VALUES (?, ?, ?, ?)",
                (self._boot_id, self._seq, str(kind), payload),
            )
            if lifetime_items is not None:
                self._set("lifetime_items", lifetime_items)
        self._seq += 1

    def _drop_oldest(self) -> None:
        """Windows before events; what is lost becomes one gap record that grows."""
        with self._transaction():
            dropped = self._database.execute(
                "DELETE FROM record WHERE id IN (SELECT id FROM record WHERE kind = ? ORDER BY id LIMIT ?)",
                (str(RecordKind.WINDOW), _DROP_AT_ONCE),
            ).rowcount
            if not dropped:
                return
            self._set("dropped", self.dropped + dropped)
            old = self._fact("gap_seq", -1)
            known = self._database.execute(
                "SELECT payload FROM record WHERE boot_id = ? AND seq = ?", (self._boot_id, old)
            ).fetchone()
            before = int(msgspec.msgpack.decode(known[0], type=Event).facts["records"]) if known else 0
            event = Event(
                at_ms=self._wall_ms(),
                code="spool.gap",
                message="Windows were dropped because the spool was full.",
                facts={"records": str(before + dropped)},
            )
            if known:
                self._database.execute("DELETE FROM record WHERE boot_id = ? AND seq = ?", (self._boot_id, old))
            self._database.execute(
                "INSERT INTO record (boot_id, seq, kind, payload) VALUES (?, ?, ?, ?)",
                (self._boot_id, self._seq, str(RecordKind.EVENT), msgspec.msgpack.encode(event)),
            )
            self._set("gap_seq", self._seq)
        self._seq += 1

    @contextlib.contextmanager
    def _transaction(self):  # type: ignore[no-untyped-def]  # noqa: ANN202  a generator for `with` only
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    # -- reading and forgetting -------------------------------------------------------------------------------

    def next_batch(self, most: int) -> tuple[Record, ...]:
        """The oldest records of the oldest boot, within the limits of one batch; events and windows in order."""
        rows = self._database.execute(
            "SELECT boot_id, seq, kind, payload FROM record ORDER BY id LIMIT ?", (most,)
        ).fetchall()
        records: list[Record] = []
        size = 0
        for boot_id, seq, kind, payload in rows:
            size += len(payload) + 64
            if records and (size > MAX_BATCH_BYTES // 2 or boot_id != records[0].boot_id):
                break
            records.append(Record(boot_id=boot_id, seq=seq, kind=RecordKind(kind), payload=payload))
        return tuple(records)

    def acknowledge(self, ack: Ack, sent_through: int) -> int:
        """Deletes what the control plane has; an acknowledgement beyond what was sent deletes only what was sent.

        Returns:
            Records deleted.
        """
        through = min(ack.through_seq, sent_through)
        with self._transaction():
            return int(
                self._database.execute(
                    "DELETE FROM record WHERE boot_id = ? AND seq <= ?", (ack.boot_id, through)
                ).rowcount
            )

    @property
    def depth(self) -> int:
        """Records waiting."""
        return int(self._database.execute("SELECT COUNT(*) FROM record").fetchone()[0])

    @property
    def dropped(self) -> int:
        """Windows dropped for lack of room since the agent was installed."""
        return self._fact("dropped", 0)

    @property
    def lifetime_items(self) -> int:
        """Items judged since the agent was installed, as of the last stored window."""
        return self._fact("lifetime_items", 0)

    def used_bytes(self) -> int:
        """Pages in use (free ones are used again)."""
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
        """Closes the file."""
        self._database.close()
