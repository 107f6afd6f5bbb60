"""Alembic's environment: takes the URL from the caller, the tables from `database.tables`."""

from alembic import context
from sqlmodel import SQLModel

from control_plane.database import tables
from control_plane.database.engine import open_database

assert tables.agents.Agent.metadata is SQLModel.metadata  # noqa: S101  importing the tables is what fills the metadata


def run() -> None:
    """Runs the migrations in one transaction."""
    engine = open_database(context.config.attributes["url"])
    with engine.connect() as connection:
        context.configure(
            connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True, compare_type=True
        )
        with context.begin_transaction():
            if connection.dialect.name == "postgresql":
                # Replicas that start in one moment migrate one after the other; the others find nothing left to do.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7238745)")
            context.run_migrations()
    engine.dispose()


run()
