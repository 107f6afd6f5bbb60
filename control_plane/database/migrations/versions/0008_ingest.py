"""what an agent reports and what a person assigned kept apart, ages that outlive the last window, counts up to 2**53

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

from control_plane.database.tables.columns import Utc

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("agent", schema=None) as batch:
        batch.add_column(sa.Column("labels_assigned", sa.JSON(), nullable=False, server_default="{}"))
        batch.add_column(sa.Column("stored_at", Utc(), nullable=True))
        batch.add_column(sa.Column("window_at", Utc(), nullable=True))
        batch.add_column(sa.Column("twins", sa.JSON(), nullable=False, server_default="{}"))
    if op.get_bind().dialect.name != "sqlite":  # an integer of SQLite has 64 bits already
        op.alter_column("window", "items", type_=sa.BigInteger(), existing_type=sa.Integer(), existing_nullable=False)
    op.create_index("ix_window_agent_received", "window", ["agent_id", "received_at"])
    op.create_index("ix_window_bundle_received", "window", ["bundle", "received_at"])
    op.create_index("ix_event_agent_received", "event", ["agent_id", "received_at"])
    op.drop_index("ix_event_received_at", table_name="event")
    _fill()


def _fill() -> None:
    """A label that the agent does not report so was assigned by a person; the newest records give the ages."""
    bind = op.get_bind()
    agent = sa.table(
        "agent",
        *(sa.column(n, sa.JSON()) for n in ("labels", "labels_assigned", "reported")),
        sa.column("id"),
        sa.column("window_at", Utc()),
        sa.column("stored_at", Utc()),
    )
    tables = {n: sa.table(n, sa.column("agent_id"), sa.column("received_at", Utc())) for n in ("window", "event")}
    for agent_id, labels, reported in bind.execute(sa.select(agent.c.id, agent.c.labels, agent.c.reported)).all():
        said = (reported or {}).get("labels", {})
        assigned = {name: value for name, value in (labels or {}).items() if said.get(name) != value}
        newest = {
            name: bind.execute(sa.select(sa.func.max(t.c.received_at)).where(t.c.agent_id == agent_id)).scalar()
            for name, t in tables.items()
        }
        at = max((value for value in newest.values() if value is not None), default=None)
        values = {"labels_assigned": assigned, "window_at": newest["window"], "stored_at": at}
        bind.execute(sa.update(agent).where(agent.c.id == agent_id).values(values))


def downgrade() -> None:
    op.create_index("ix_event_received_at", "event", ["received_at"])
    op.drop_index("ix_event_agent_received", table_name="event")
    op.drop_index("ix_window_bundle_received", table_name="window")
    op.drop_index("ix_window_agent_received", table_name="window")
    with op.batch_alter_table("agent", schema=None) as batch:
        for name in ("twins", "window_at", "stored_at", "labels_assigned"):
            batch.drop_column(name)
