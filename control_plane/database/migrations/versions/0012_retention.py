"""indexes by which retention finds what is past its time, and how many windows an archived day holds

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_event_received", "event", ["received_at"])
    op.create_index("ix_fidelity_hour_hour", "fidelity_hour", ["hour"])
    size = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    with op.batch_alter_table("archived_day", schema=None) as batch:
        batch.add_column(sa.Column("windows", size, nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("archived_day", schema=None) as batch:
        batch.drop_column("windows")
    op.drop_index("ix_fidelity_hour_hour", table_name="fidelity_hour")
    op.drop_index("ix_event_received", table_name="event")
