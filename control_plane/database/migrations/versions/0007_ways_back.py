"""ways back, excluded agents, requests that may be repeated, model names whatever their case

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

from control_plane.database.tables.columns import Utc

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_FOREIGN_KEY = {"fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s"}


def upgrade() -> None:
    with op.batch_alter_table("agent", schema=None) as batch:
        batch.add_column(sa.Column("safe_state", AutoString(), nullable=False, server_default=""))
    with op.batch_alter_table("rollout", schema=None) as batch:
        batch.add_column(sa.Column("exclude", sa.JSON(), nullable=False, server_default="[]"))
        batch.add_column(sa.Column("safe_state", AutoString(), nullable=False, server_default=""))
    # SQLite names no foreign key; the convention gives it the name by which it can be dropped.
    sqlite = op.get_bind().dialect.name == "sqlite"
    name = "fk_rollout_agent_agent_id_agent" if sqlite else "rollout_agent_agent_id_fkey"
    with op.batch_alter_table("rollout_agent", schema=None, naming_convention=_FOREIGN_KEY) as batch:
        batch.drop_constraint(name, type_="foreignkey")
        batch.add_column(sa.Column("return_bundle", AutoString(), nullable=False, server_default=""))
        batch.add_column(sa.Column("return_safe_state", AutoString(), nullable=False, server_default=""))
        batch.add_column(sa.Column("returned_at", Utc(timezone=True), nullable=True))
        batch.add_column(sa.Column("returned", sa.Text(), nullable=False, server_default=""))
        batch.add_column(sa.Column("return_reason", sa.Text(), nullable=False, server_default=""))
        batch.create_index(batch.f("ix_rollout_agent_returned"), ["returned"], unique=False)
    _carry_over()
    op.create_table(
        "answered_request",
        sa.Column("key", AutoString(length=128), nullable=False),
        sa.Column("digest", AutoString(length=64), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("answered_at", Utc(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_answered_request_answered_at", "answered_request", ["answered_at"], unique=False)
    _separate_names()
    op.create_index("ix_model_name_whatever_case", "model", [sa.text("lower(name)")], unique=True)


def _carry_over() -> None:
    """Agents that a rollback is waiting for are waited for further; of older ways back nothing more is claimed."""
    op.execute(
        "UPDATE rollout_agent SET returned = 'PENDING', return_bundle = previous_bundle "
        "WHERE returned_generation > 0 AND rollout_id IN (SELECT id FROM rollout WHERE state = 'rolling-back')"
    )


def _separate_names() -> None:
    """Models whose names differ by case alone get a number: the oldest keeps its name."""
    connection = op.get_bind()
    model = sa.table("model", sa.column("id", sa.Integer), sa.column("name", sa.String))
    taken: set[str] = set()
    for row in connection.execute(sa.select(model.c.id, model.c.name).order_by(model.c.id)).all():
        name, number = row.name, 2
        while name.lower() in taken:
            name, number = f"{row.name[:58]}-{number}", number + 1
        taken.add(name.lower())
        if name != row.name:
            connection.execute(model.update().where(model.c.id == row.id).values(name=name))


def downgrade() -> None:
    op.drop_index("ix_model_name_whatever_case", "model")
    op.drop_table("answered_request")
    with op.batch_alter_table("rollout_agent", schema=None) as batch:
        batch.drop_index(batch.f("ix_rollout_agent_returned"))
        for column in ("return_bundle", "return_safe_state", "returned_at", "returned", "return_reason"):
            batch.drop_column(column)
    with op.batch_alter_table("rollout", schema=None) as batch:
        batch.drop_column("exclude")
        batch.drop_column("safe_state")
    with op.batch_alter_table("agent", schema=None) as batch:
        batch.drop_column("safe_state")
