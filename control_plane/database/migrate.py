"""Brings a database to the present schema, and says at which it is."""

from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from control_plane.database.engine import open_database
from models.errors import UnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"


def _alembic(url: str) -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def migrate(url: str) -> None:
    """Brings the tables to this program's version.

    Raises:
        UnavailableError: `database.unreachable`.
    """
    try:
        open_database(url).dispose()
        command.upgrade(_alembic(url), "head")
    except DBAPIError as error:
        raise UnavailableError(
            "database.unreachable", "The database cannot be reached or migrated.", got=str(error.orig)[:300]
        ) from error


def migration_state(engine: Engine) -> tuple[str | None, str | None]:
    """(version of the tables, version this program needs)."""
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision(), head
