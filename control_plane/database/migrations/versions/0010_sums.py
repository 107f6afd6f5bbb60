"""sums of windows over spans, fidelity by hour, history of agents, horizon of deleted windows, archived days

Revision ID: 0010
Revises: 0009
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from control_plane.database.tables.columns import Utc

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_OPEN: dict[str, Any] = {"sqlite_where": sa.text("folded = 0"), "postgresql_where": sa.text("NOT folded")}


def _big() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _counts(*names: str, nullable: bool = False) -> list[sa.Column[int]]:
    return [sa.Column(name, _big(), nullable=nullable) for name in names]


def _numbers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer(), nullable=False) for name in names]


def upgrade() -> None:
    with op.batch_alter_table("agent", schema=None) as batch:
        batch.add_column(sa.Column("setup_digest", sa.String(64), nullable=False, server_default=""))
    op.create_table(
        "rollup",
        sa.Column("agent_id", sa.String(63), nullable=False),
        sa.Column("span_s", sa.Integer(), nullable=False),
        sa.Column("start", Utc(), nullable=False),
        *(sa.Column(name, sa.String(64), nullable=False) for name in ("bundle", "lot", "variety", "challenger")),
        *_numbers("windows", "left_out", "by_arrival"),
        *_counts("items"),
        sa.Column("first_at", Utc(), nullable=False),
        sa.Column("last_at", Utc(), nullable=False),
        sa.Column("folded", sa.Boolean(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "span_s", "start", "bundle", "lot", "variety", "challenger"),
    )
    op.create_index("ix_rollup_span_start", "rollup", ["span_s", "start"])
    op.create_index("ix_rollup_open", "rollup", ["agent_id", "span_s"], **_OPEN)
    op.create_table(
        "fidelity_hour",
        sa.Column("agent_id", sa.String(63), nullable=False),
        sa.Column("hour", Utc(), nullable=False),
        sa.Column("boot_id", sa.String(16), nullable=False),
        *_counts("first_seq", "last_seq", nullable=True),
        *_numbers("records", "duplicates", "windows", "late", "backfilled", "refused", "impossible", "by_arrival"),
        *_counts("items", "unjudged", "counted_items"),
        *_counts("lifetime_low", "lifetime_high", nullable=True),
        *_counts("cells", "nulls"),
        *_counts("report_lag_ms", "window_lag_ms", nullable=True),
        sa.PrimaryKeyConstraint("agent_id", "hour", "boot_id"),
    )
    op.create_table(
        "agent_history",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("agent_id", sa.String(63), nullable=False),
        sa.Column("at", Utc(), nullable=False),
        sa.Column("agent_at", Utc(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_agent_history_agent_at", "agent_history", ["agent_id", "at"])
    op.create_table(
        "window_horizon",
        sa.Column("agent_id", sa.String(63), nullable=False),
        sa.Column("boot_id", sa.String(16), nullable=False),
        *_counts("through_seq"),
        sa.Column("at", Utc(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "boot_id"),
    )
    op.create_table(
        "archived_day",
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("file", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        *_numbers("rows"),
        *_counts("size_bytes"),
        sa.Column("at", Utc(), nullable=False),
        sa.PrimaryKeyConstraint("day"),
    )


def downgrade() -> None:
    for name in ("archived_day", "window_horizon", "agent_history", "fidelity_hour", "rollup"):
        op.drop_table(name)
    with op.batch_alter_table("agent", schema=None) as batch:
        batch.drop_column("setup_digest")
