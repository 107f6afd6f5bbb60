"""The database: engine, migrations, audit, leases. SQLite (WAL) by default, PostgreSQL by URL; one code for both."""

import threading
from collections import deque
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, ExceptionContext, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlmodel import Session, create_engine

from models.errors import ConfigError, UnavailableError


def open_database(url: str, *, wait_s: float = 10.0) -> Engine:
    """Returns an engine for this URL.

    Args:
        url: SQLAlchemy's.
        wait_s: Longest wait for a lock, a connection, or a server that does not answer.

    Raises:
        ConfigError: `database.unsupported`.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": wait_s, "check_same_thread": False}, pool_timeout=wait_s)
        event.listen(engine, "connect", _prepare_sqlite)
        _take_turns(engine, wait_s)
        return engine
    if parsed.get_backend_name() == "postgresql":
        # A process that is stopped within a transaction must not hold its locks for ever: the server ends it.
        limits = f"-c lock_timeout={int(wait_s * 1000)} -c idle_in_transaction_session_timeout={int(wait_s * 1000)}"
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_timeout=wait_s,
            connect_args={"options": limits, "connect_timeout": max(2, int(wait_s))},
        )
        event.listen(engine, "handle_error", _away_when_ended)
        return engine
    raise ConfigError(
        "database.unsupported",
        "This database is not supported.",
        expected="sqlite or postgresql",
        got=parsed.get_backend_name(),
    )


_ENDED: Final = "25P03"
"""The server has ended a session that waited too long within its transaction (PostgreSQL's Appendix A)."""


def _away_when_ended(context: ExceptionContext) -> OperationalError | None:
    """Reports a session that its server has ended as lost, like every other one: the driver says internal error."""
    error = context.original_exception
    if getattr(error, "sqlstate", None) != _ENDED:
        return None
    context.is_disconnect = True
    return OperationalError(context.statement, None, error)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver must not begin transactions of its own: ours start as writers, so two never deadlock on an upgrade.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class _Turns:
    """First come, first served among the writers of one process.

    In SQLite the writer that looks at the right moment is next: one busy thread could keep the others out for seconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def take(self, wait_s: float) -> bool:
        """Waits for the caller's turn; returns False when it did not come in time."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait(wait_s)
        with self._lock:
            if not turn.is_set():
                self._waiting.remove(turn)
            return turn.is_set()

    def give_back(self) -> None:
        """Lets the next one write."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


def _take_turns(engine: Engine, wait_s: float) -> None:
    """Transactions that may write begin as writers, one after the other."""
    turns = _Turns()

    def begin(connection: Any) -> None:
        if not connection.get_execution_options().get("writes"):
            connection.exec_driver_sql("BEGIN")
            return
        connection.info["turn"] = turns.take(wait_s)
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except BaseException:
            end(connection)
            raise

    def end(connection: Any) -> None:
        if connection.info.pop("turn", False):
            turns.give_back()

    event.listen(engine, "begin", begin)
    event.listen(engine, "commit", end)
    event.listen(engine, "rollback", end)


def writing(engine: Engine) -> Session:
    """Returns a session whose transaction may write from its first statement on."""
    return Session(engine.execution_options(writes=True), expire_on_commit=False)


def reading(engine: Engine) -> Session:
    """Returns a session that only reads."""
    return Session(engine, expire_on_commit=False)


def check_alive(engine: Engine) -> None:
    """Raises when the database does not answer.

    Raises:
        UnavailableError: `database.unreachable`.
    """
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except DBAPIError as error:
        raise UnavailableError("database.unreachable", "The database does not answer.", got=error.orig) from error
