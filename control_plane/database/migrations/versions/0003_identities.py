"""identities

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import AutoString

import control_plane.database.tables.columns

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "identity",
        sa.Column("agent_id", AutoString(length=63), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("renewal_asked_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("renewal_approved_until", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("created_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("agent_id"),
    )
    with op.batch_alter_table("identity", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_identity_state"), ["state"], unique=False)

    op.create_table(
        "certificate",
        sa.Column("serial", AutoString(length=40), nullable=False),
        sa.Column("agent_id", AutoString(length=63), nullable=False),
        sa.Column("key_sha256", AutoString(length=64), nullable=False),
        sa.Column("issued_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=False),
        sa.Column("not_after", control_plane.database.tables.columns.Utc(timezone=True), nullable=False),
        sa.Column("renewed", sa.Boolean(), nullable=False),
        sa.Column("revoked_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("revoked_because", AutoString(), nullable=False),
        sa.Column("pem", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["agent_id"], ["identity.agent_id"]),
        sa.PrimaryKeyConstraint("serial"),
    )
    with op.batch_alter_table("certificate", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_certificate_agent_id"), ["agent_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_certificate_key_sha256"), ["key_sha256"], unique=True)
        batch_op.create_index(batch_op.f("ix_certificate_revoked_at"), ["revoked_at"], unique=False)

    op.create_table(
        "enrolment_token",
        sa.Column("secret_sha256", AutoString(length=64), nullable=False),
        sa.Column("agent_id", AutoString(length=63), nullable=False),
        sa.Column("created_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=False),
        sa.Column("created_by", AutoString(), nullable=False),
        sa.Column("expires_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=False),
        sa.Column("used_at", control_plane.database.tables.columns.Utc(timezone=True), nullable=True),
        sa.Column("key_sha256", AutoString(length=64), nullable=False),
        sa.ForeignKeyConstraint(["agent_id"], ["identity.agent_id"]),
        sa.PrimaryKeyConstraint("secret_sha256"),
    )
    with op.batch_alter_table("enrolment_token", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_enrolment_token_agent_id"), ["agent_id"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("enrolment_token", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_enrolment_token_agent_id"))

    op.drop_table("enrolment_token")
    with op.batch_alter_table("certificate", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_certificate_revoked_at"))
        batch_op.drop_index(batch_op.f("ix_certificate_key_sha256"))
        batch_op.drop_index(batch_op.f("ix_certificate_agent_id"))

    op.drop_table("certificate")
    with op.batch_alter_table("identity", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_identity_state"))

    op.drop_table("identity")
