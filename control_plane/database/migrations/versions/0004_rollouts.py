"""rollouts with policies, outcomes and ways back

Revision ID: 0004
Revises: 0003
"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

import control_plane.database.tables.columns

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _rollout() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("policy", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("cleared_wave", sa.Integer(), nullable=False, server_default="-1"),
        sa.Column("mode", sa.String(), nullable=False, server_default="live"),
        sa.Column("min_items", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("dynamic", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("swap", sa.String(), nullable=False, server_default="belt-gap"),
        sa.Column("swap_within_s", sa.Float(), nullable=True),
        sa.Column("approved_by", sa.String(), nullable=False, server_default=""),
    )


def _part() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("place", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("outcome", sa.Text(), nullable=False, server_default="QUEUED"),
        sa.Column("reason", sa.Text(), nullable=False, server_default=""),
        sa.Column("tried", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("assigned_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("started_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("concluded_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("returned_generation", sa.BigInteger(), nullable=False, server_default="0"),
    )


def _agent() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("mode", sa.String(), nullable=False, server_default="live"),
        sa.Column("swap", sa.String(), nullable=False, server_default="belt-gap"),
        sa.Column("swap_within_s", sa.Float(), nullable=True),
    )


def upgrade() -> None:
    for table, columns in (("rollout", _rollout()), ("rollout_agent", _part()), ("agent", _agent())):
        with op.batch_alter_table(table, schema=None) as batch:
            for column in columns:
                batch.add_column(column)
    with op.batch_alter_table("rollout_agent", schema=None) as batch:
        batch.create_index(batch.f("ix_rollout_agent_outcome"), ["outcome"], unique=False)
    _carry_over()
    with op.batch_alter_table("rollout", schema=None) as batch:
        batch.drop_column("abort_share")
        batch.drop_column("min_executed")


def _carry_over() -> None:
    """Old limits become abort criteria, old selectors the language of today, agents of ended rollouts are done."""
    rollout = sa.table(
        "rollout",
        sa.column("id", sa.Integer),
        sa.column("abort_share", sa.Float),
        sa.column("min_executed", sa.Integer),
        sa.column("selector", sa.JSON),
        sa.column("policy", sa.JSON),
    )
    connection = op.get_bind()
    for row in connection.execute(sa.select(rollout)).all():
        labels = row.selector if isinstance(row.selector, dict) else json.loads(row.selector)
        criteria = {
            "failureType": "ALL",
            "action": "CANCEL",
            "thresholdPercentage": max(0.01, min(100.0, 100.0 * row.abort_share)),
            "minNumberOfExecutedThings": max(1, row.min_executed),
        }
        values = {
            "policy": {"abortConfig": {"criteriaList": [criteria]}},
            "selector": {"labels": ",".join(f"{k}={v}" for k, v in sorted(labels.items())), "agents": []},
        }
        connection.execute(rollout.update().where(rollout.c.id == row.id).values(**values))
    part = sa.table("rollout_agent", sa.column("rollout_id", sa.Integer), sa.column("outcome", sa.Text))
    ended = sa.text("SELECT id FROM rollout WHERE state IN ('completed', 'aborted', 'rolled-back')")
    ids = [row[0] for row in connection.execute(ended)]
    if ids:
        connection.execute(part.update().where(part.c.rollout_id.in_(ids)).values(outcome="CANCELED"))


def downgrade() -> None:
    with op.batch_alter_table("rollout", schema=None) as batch:
        batch.add_column(sa.Column("abort_share", sa.Float(), nullable=False, server_default="0.2"))
        batch.add_column(sa.Column("min_executed", sa.Integer(), nullable=False, server_default="1"))
    with op.batch_alter_table("rollout_agent", schema=None) as batch:
        batch.drop_index(batch.f("ix_rollout_agent_outcome"))
    for table, columns in (("rollout", _rollout()), ("rollout_agent", _part()), ("agent", _agent())):
        with op.batch_alter_table(table, schema=None) as batch:
            for column in columns:
                batch.drop_column(column.name)
