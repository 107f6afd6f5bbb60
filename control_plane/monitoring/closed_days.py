"""Writes closed days as Parquet: the sums over minutes, one file a day, for whatever reads Parquet.

Rules: a file appears whole or not at all (written beside, synced, renamed), and a manifest in the folder names every
file with its digest and how many windows it holds; a day is written two hours after its end, and once more when no
window of it can arrive any more if some have arrived since; minutes are not deleted before their day is archived.
DuckDB writes the files: it is one package of 66 MB that also reads them, where pyarrow would be a second one of twice
that size for writing alone. It is an extra, because most sites need no archive.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlalchemy import Engine
from sqlmodel import Session, col, func, select

from control_plane.database.engine import reading, writing
from control_plane.database.tables.windows import ArchivedDay, Rollup
from control_plane.fleet.spooled import OLDEST
from control_plane.monitoring.rollups import DAY, MINUTE, start_of, total_of
from models.errors import ConfigError

MANIFEST: Final = "manifest.json"
_GRACE: Final = timedelta(hours=2)
_FINAL: Final = OLDEST + timedelta(days=1)
_ROWS_AT_ONCE: Final = 1000
_COUNTS: Final = (
    *("frames", "frames_dropped", "frames_bad", "items", "items_unjudged", "verdicts_late", "views", "duration_ms"),
)
_TABLES: Final = ("classes", "grades", "outlets", "shots", "ejections", "ejectors", "camera", "truth", "shadow")
_TEXTS: Final = ("agent_id", "bundle", "lot", "variety", "challenger")
_NUMBERS: Final = ("windows", "left_out", "by_arrival", *_COUNTS, "lifetime_items")
_COLUMNS: Final = {
    **dict.fromkeys(_TEXTS, "VARCHAR"),
    **dict.fromkeys(("start", "first_at", "last_at"), "TIMESTAMPTZ"),
    **dict.fromkeys(_NUMBERS, "BIGINT"),
    **dict.fromkeys(_TABLES, "MAP(VARCHAR, BIGINT)"),
    "latency_ms": "MAP(INTEGER, BIGINT)",
    "features": "BIGINT[][]",
    "nulls": "BIGINT[]",
    "payload": "VARCHAR",
}
"""Column -> type. `latency_ms` maps the bucket of the histogram to its count, `features` has 16 counts per feature,
`payload` is the sum as the MessagePack of a window, which holds all of it."""


class Archive:
    """The folder of archived days.

    Args:
        engine: Database.
        folder: Where the files are; it is made.

    Raises:
        ConfigError: `retention.no_library` where DuckDB is not installed.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        try:
            import duckdb  # noqa: PLC0415  an extra
        except ImportError as error:
            raise ConfigError(
                "retention.no_library",
                "The archive needs DuckDB, which is not installed.",
                expected="pip install 'sortline[archive]'",
                got=error,
            ) from error
        self._connect = duckdb.connect
        folder.mkdir(parents=True, exist_ok=True)

    def write_due(self, now: datetime, most: int) -> int:
        """Writes the days that are due, the oldest first; returns how many."""
        with reading(self._engine) as session:
            due = [day for day, _ in zip(_due(session, now), range(most), strict=False)]
        for day in due:
            self._write(day, now)
        return len(due)

    def kept_from(self, session: Session) -> datetime | None:
        """Returns the begin of the oldest day whose minutes are not archived; None when there is none."""
        done = set(session.exec(select(ArchivedDay.day)))
        return next((day for day in _days(session) if _name(day) not in done), None)

    def _write(self, day: datetime, now: datetime) -> None:
        with writing(self._engine) as session:
            known = session.get(ArchivedDay, _name(day))
            if known is not None and _windows(session, day) <= known.windows:
                # Nothing came since, or some is deleted already: the file holds more than the table.
                known.at = now
                session.add(known)
                session.commit()
                return
        name = f"minutes-{_name(day)}.parquet"
        lines, part = self._folder / f".{name}.lines", self._folder / f".{name}.part"
        rows = windows = 0
        try:
            with reading(self._engine) as session, lines.open("wb") as out:
                for row in _rows(session, day):
                    out.write(msgspec.json.encode(row) + b"\n")
                    rows, windows = rows + 1, windows + row["windows"]
            self._convert(lines, part)
            digest, size = _digest_of(part), part.stat().st_size
            _sync(part)
            part.replace(self._folder / name)
        finally:
            lines.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        _sync(self._folder)
        with writing(self._engine) as session:
            known = session.get(ArchivedDay, _name(day)) or ArchivedDay(day=_name(day), file=name, sha256="", at=now)
            known.sha256, known.rows, known.windows, known.size_bytes, known.at = digest, rows, windows, size, now
            session.add(known)
            session.commit()
            days = session.exec(select(ArchivedDay).order_by(col(ArchivedDay.day))).all()
        self._write_manifest([entry.model_dump(mode="json") for entry in days])

    def _convert(self, lines: Path, parquet: Path) -> None:
        columns = ", ".join(f"{name}: '{kind}'" for name, kind in _COLUMNS.items())
        with self._connect(":memory:") as connection:
            connection.execute("SET threads = 1; SET memory_limit = '512MB'; SET TimeZone = 'UTC'")
            connection.execute(
                "COPY (SELECT * REPLACE (from_base64(payload) AS payload) FROM read_json($lines, "  # noqa: S608
                f"format = 'newline_delimited', columns = {{{columns}}})) "
                f"TO '{str(parquet).replace(chr(39), chr(39) * 2)}' (FORMAT parquet, COMPRESSION zstd)",
                {"lines": str(lines)},
            )

    def _write_manifest(self, days: list[dict[str, Any]]) -> None:
        part = self._folder / f".{MANIFEST}.part"
        part.write_text(json.dumps({"schema_version": 1, "days": days}, indent=1), encoding="utf-8")
        _sync(part)
        part.replace(self._folder / MANIFEST)
        _sync(self._folder)


def _name(day: datetime) -> str:
    return day.astimezone(UTC).date().isoformat()


def _days(session: Session) -> Iterator[datetime]:
    """Yields the days of which there are minutes, oldest first."""
    after: datetime | None = None
    while True:
        query = select(func.min(Rollup.start)).where(Rollup.span_s == MINUTE)
        first = session.exec(query if after is None else query.where(col(Rollup.start) >= after)).one()
        if first is None:
            return
        day = start_of(first, DAY)
        yield day
        after = day + timedelta(days=1)


def _due(session: Session, now: datetime) -> Iterator[datetime]:
    """Yields closed days that are not archived, and once more those of which no window can arrive any more."""
    done = {entry.day: entry for entry in session.exec(select(ArchivedDay))}
    for day in _days(session):
        end = day + timedelta(days=1)
        if now < end + _GRACE:
            return
        entry = done.get(_name(day))
        if entry is None or entry.at < end + _FINAL <= now:
            yield day


def _of(day: datetime) -> tuple[Any, ...]:
    return Rollup.span_s == MINUTE, col(Rollup.start) >= day, col(Rollup.start) < day + timedelta(days=1)


def _windows(session: Session, day: datetime) -> int:
    return int(session.exec(select(func.sum(Rollup.windows)).where(*_of(day))).one() or 0)


def _rows(session: Session, day: datetime) -> Iterator[dict[str, Any]]:
    query = select(Rollup).where(*_of(day)).order_by(col(Rollup.start), col(Rollup.agent_id))
    for row in session.exec(query.execution_options(yield_per=_ROWS_AT_ONCE)):
        total = total_of(row)
        window = total.window
        facts: dict[str, Any] = {name: getattr(row, name) for name in (*_TEXTS, "start", "first_at", "last_at")}
        facts |= {"windows": total.windows, "left_out": total.left_out, "by_arrival": total.by_arrival}
        if window is not None:
            facts |= {name: getattr(window, name) for name in (*_COUNTS, *_TABLES, "lifetime_items", "nulls")}
            facts["latency_ms"] = window.latency_ms.buckets
            facts["features"] = window.feature_counts().tolist()
            facts["payload"] = base64.b64encode(msgspec.msgpack.encode(window)).decode()
        session.expunge(row)
        yield facts


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
