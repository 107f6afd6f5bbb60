"""Brings a database to the present schema, and says at which it is."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from control_plane.database.engine import open_database
from models.errors import UnavailableError

log = logging.getLogger("sortline.database")
MIGRATIONS = Path(__file__).parent / "migrations"
_PAUSE_S: Final = 2.0
"""Between two attempts to reach a database server that does not answer."""


def _alembic(url: str) -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Brings the tables to this program's version, or to an earlier one.

    Raises:
        UnavailableError: `database.unreachable`.
    """
    try:
        open_database(url).dispose()
        command.upgrade(_alembic(url), revision)
    except DBAPIError as error:
        raise UnavailableError(
            "database.unreachable", "The database cannot be reached or migrated.", got=str(error.orig)[:300]
        ) from error


def migrate_when_reachable(
    url: str, *, waiting: Callable[[str], object], pause: Callable[[float], object] = time.sleep
) -> None:
    """Brings the tables to this program's version as soon as the database server answers.

    Services start in any order: a server that is away, starts up or refuses the login is waited for without end, with
    one log line for each different reason. A SQLite file is not waited for.

    Args:
        url: SQLAlchemy's.
        waiting: Gets each new reason as one line, for the service manager.
        pause: Called with seconds between two attempts.

    Raises:
        UnavailableError: `database.unreachable`, where waiting cannot help.
    """
    server = make_url(url)
    comes_back, reason = server.get_backend_name() != "sqlite", ""
    while True:
        try:
            migrate(url)
        except UnavailableError as error:
            if not (comes_back and isinstance(error.__cause__, OperationalError | InterfaceError)):
                raise
            said = " ".join(str(error.got).split())
            if said != reason:
                reason = said
                line = f"waits for the database at {server.host or 'its socket'}: {said}"
                log.warning(line)
                waiting(line)
            pause(_PAUSE_S)
        else:
            if reason:
                log.info("the database answers")
            return


def migration_state(engine: Engine) -> tuple[str | None, str | None]:
    """(version of the tables, version this program needs)."""
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    with engine.connect() as connection:
        return current_revision(connection), head


def current_revision(connection: Connection) -> str | None:
    """Returns the version of the tables; None where there are none."""
    return MigrationContext.configure(connection).get_current_revision()


def known_revisions() -> frozenset[str]:
    """Returns every version of the tables that this program can make and bring up to date."""
    return frozenset(script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions())
