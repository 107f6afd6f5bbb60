"""alarms with their comments, deliveries and decisions, and the state of the loop that raises them

Revision ID: 0011
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op

from control_plane.database.tables.columns import Utc

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _alarm()
    op.create_table(
        "alarm_comment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alarm_id", sa.Integer(), nullable=False),
        sa.Column("at", Utc(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["alarm_id"], ["alarm.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_alarm_comment_alarm_id", "alarm_comment", ["alarm_id"])
    _delivery()
    op.create_table(
        "alarm_decision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alarm_id", sa.Integer(), nullable=False),
        sa.Column("request", sa.String(32), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", Utc(), nullable=False),
        sa.Column("decided_by", sa.String(), nullable=False),
        sa.Column("decided_at", Utc(), nullable=True),
        sa.ForeignKeyConstraint(["alarm_id"], ["alarm.id"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_alarm_decision_alarm_id", "alarm_decision", ["alarm_id"])
    op.create_index("ix_alarm_decision_state", "alarm_decision", ["state"])
    op.create_index("ix_alarm_decision_request_at", "alarm_decision", ["request", "at"])
    op.create_table(
        "alarm_state",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at", Utc(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def _alarm() -> None:
    op.create_table(
        "alarm",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(300), nullable=False),
        sa.Column("active_key", sa.String(300), nullable=True),
        sa.Column("grouping", sa.String(300), nullable=False),
        sa.Column("leader_id", sa.Integer(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("severity", sa.String(16), nullable=False),
        sa.Column("detector", sa.String(16), nullable=False),
        sa.Column("cause", sa.String(32), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("site", sa.String(128), nullable=False),
        sa.Column("line", sa.String(63), nullable=False),
        sa.Column("lane", sa.Integer(), nullable=True),
        sa.Column("lots", sa.JSON(), nullable=False),
        sa.Column("effect", sa.Float(), nullable=False),
        sa.Column("effect_unit", sa.String(), nullable=False),
        sa.Column("interval", sa.JSON(), nullable=False),
        sa.Column("items", sa.BigInteger(), nullable=False),
        sa.Column("delay_items", sa.BigInteger(), nullable=False),
        sa.Column("delay_s", sa.Float(), nullable=False),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("cost", sa.JSON(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("seen", sa.Integer(), nullable=False),
        sa.Column("escalation", sa.Integer(), nullable=False),
        sa.Column("raised_at", Utc(), nullable=False),
        sa.Column("seen_at", Utc(), nullable=False),
        sa.Column("absent_since", Utc(), nullable=True),
        sa.Column("waiting_since", Utc(), nullable=False),
        sa.Column("silenced_until", Utc(), nullable=True),
        sa.Column("acknowledged_at", Utc(), nullable=True),
        sa.Column("resolved_at", Utc(), nullable=True),
        sa.Column("resolved_by", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("updated_at", Utc(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("active_key"),
    )
    for name in ("key", "grouping", "leader_id", "state", "raised_at"):
        op.create_index(f"ix_alarm_{name}", "alarm", [name])
    op.create_index("ix_alarm_state_severity", "alarm", ["state", "severity"])
    op.create_index("ix_alarm_line_state", "alarm", ["line", "state"])


def _delivery() -> None:
    op.create_table(
        "alarm_delivery",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("alarm_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("receiver", sa.String(64), nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", Utc(), nullable=False),
        sa.Column("next_at", Utc(), nullable=False),
        sa.Column("ended_at", Utc(), nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["alarm_id"], ["alarm.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key"),
    )
    op.create_index("ix_alarm_delivery_alarm_id", "alarm_delivery", ["alarm_id"])
    op.create_index("ix_alarm_delivery_due", "alarm_delivery", ["state", "next_at"])


def downgrade() -> None:
    for table in ("alarm_state", "alarm_decision", "alarm_delivery", "alarm_comment", "alarm"):
        op.drop_table(table)
