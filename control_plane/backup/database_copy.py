"""Copies a database while it is in use, as it is at one moment, and loads the copy into an empty one.

SQLite: the library's backup interface, into one file. PostgreSQL: COPY of every table in one read-only transaction of
isolation level REPEATABLE READ; no program of the server is needed. Tables are those that the database has, so a new
table is part of the backup from its migration on.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, Final

from sqlalchemy import Connection, MetaData, Table, func, make_url, select, text

from control_plane.backup.archive import ArchiveWriter
from control_plane.database.engine import open_database
from control_plane.database.migrate import current_revision, migrate
from models.errors import ConflictError, InputError

SQLITE_FILE: Final = "database.sqlite"
TABLES: Final = "database"
_VERSION_TABLE: Final = "alembic_version"
_PIECE: Final = 1024 * 1024


def sqlite_path(url: str) -> Path:
    """Returns the file of a SQLite database."""
    return Path(make_url(url).database or "").resolve()


def copy_sqlite(url: str, writer: ArchiveWriter) -> str:
    """Copies a SQLite database as it is at one moment; returns the version of its tables.

    One step for all pages: in WAL mode it keeps no writer out, and a copy in many steps would begin again with every
    write.

    Raises:
        ConflictError: `backup.no_database`.
        InputError: `backup.damaged_database`.
    """
    source = sqlite_path(url)
    if not source.is_file():
        raise ConflictError("backup.no_database", f"{source} does not exist.", expected="a database", got="nothing")
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(writer.place(SQLITE_FILE))) as copy:
        live.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a journal beside it
        found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise InputError("backup.damaged_database", f"{source} is damaged.", expected="ok", got=str(found)[:200])
        revision = copy.execute(f"SELECT version_num FROM {_VERSION_TABLE}").fetchone()  # noqa: S608  a constant
    writer.add(SQLITE_FILE)
    return str(revision[0]) if revision else ""


def copy_postgresql(url: str, writer: ArchiveWriter) -> tuple[str, tuple[str, ...]]:
    """Copies every table of a PostgreSQL database as it is at one moment.

    Returns:
        The version of the tables, and the tables in the order in which they can be loaded.
    """
    engine = open_database(url)
    try:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")
            revision = current_revision(connection)
            tables = _tables(connection)
            for table in tables:
                with (
                    _cursor(connection) as cursor,
                    cursor.copy(f"COPY {_named(table)} TO STDOUT") as rows,
                    writer.place(f"{TABLES}/{table.name}.copy").open("wb") as target,
                ):
                    for piece in rows:
                        target.write(piece)
                writer.add(f"{TABLES}/{table.name}.copy")
            connection.rollback()
    finally:
        engine.dispose()
    return revision or "", tuple(str(table.name) for table in tables)


def check_empty_postgresql(url: str, revision: str) -> None:
    """Refuses a PostgreSQL database that holds anything; tables without rows may remain of a restore that failed.

    Raises:
        ConflictError: `backup.not_empty`.
    """
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            filled = [
                t.name for t in _tables(connection) if connection.execute(select(func.count()).select_from(t)).scalar()
            ]
            found = current_revision(connection)
    finally:
        engine.dispose()
    if filled or found not in {None, revision}:
        raise ConflictError(
            "backup.not_empty",
            "The database is not empty; restore into a new one.",
            expected="a database without tables",
            got=", ".join(filled[:5]) or f"tables of version {found}",
        )


def load_postgresql(url: str, folder: Path, tables: tuple[str, ...], revision: str) -> None:
    """Makes the tables of the backup's version and loads them, all or nothing.

    Args:
        url: An empty database.
        folder: The backup.
        tables: In the order in which they can be loaded.
        revision: Version of the tables.

    Raises:
        InputError: `backup.unreadable`: the backup and this version of the tables do not fit.
    """
    migrate(url, revision)
    engine = open_database(url)
    try:
        with engine.begin() as connection:
            known = {table.name: table for table in _tables(connection)}
            if set(known) != set(tables):
                raise InputError(
                    "backup.unreadable",
                    f"The backup does not hold the tables of version {revision}.",
                    expected=sorted(known),
                    got=sorted(tables),
                )
            for name in reversed(tables):
                connection.execute(known[name].delete())  # what a migration has put there
            for name in tables:
                with (folder / TABLES / f"{name}.copy").open("rb") as stream:
                    _load(connection, known[name], stream)
    finally:
        engine.dispose()


def _load(connection: Connection, table: Table, stream: BinaryIO) -> None:
    with _cursor(connection) as cursor, cursor.copy(f"COPY {_named(table)} FROM STDIN") as rows:
        while piece := stream.read(_PIECE):
            rows.write(piece)
    for column in table.primary_key:
        sequence = connection.execute(
            text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": f'"{table.name}"', "column": column.name}
        ).scalar()
        highest = connection.execute(select(func.max(column))).scalar() if sequence else None
        if highest is not None:
            connection.execute(text("SELECT setval(:sequence, :value)"), {"sequence": sequence, "value": highest})


def _tables(connection: Connection) -> list[Table]:
    """The tables that the database has, referenced ones first."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != _VERSION_TABLE]


def _named(table: Table) -> str:
    """The table and its columns in a fixed order, quoted."""
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    return f'"{table.name}" ({columns})'


def _cursor(connection: Connection) -> Any:
    """A cursor of the driver, within the connection's transaction: COPY is not part of SQLAlchemy."""
    driver: Any = connection.connection.driver_connection
    return driver.cursor()
