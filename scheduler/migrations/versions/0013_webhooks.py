"""Webhooks, and what they were told."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("project_name", sa.String(150), nullable=False),
        sa.Column("provider", sa.String(20), nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("previous", sa.LargeBinary),
        sa.Column("previous_until_ms", sa.BigInteger, nullable=False),
        sa.Column("repository_id", sa.String(100)),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("modified_ms", sa.BigInteger, nullable=False),
        sa.Column("secret_ms", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["project_name"], ["projects.name"], name="fk_webhooks_project_name"),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
        sa.UniqueConstraint("project_name", name="uq_webhooks_project_name"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        sa.Column("webhook_id", sa.String(40), nullable=False),
        sa.Column("project_name", sa.String(150), nullable=False),
        sa.Column("delivery_id", sa.String(100), nullable=False),
        sa.Column("part", sa.Integer, nullable=False),
        sa.Column("same", sa.String(64)),
        sa.Column("received_ms", sa.BigInteger, nullable=False),
        sa.Column("what", sa.String(100), nullable=False),
        sa.Column("ref", sa.String(320)),
        sa.Column("commit_id", sa.String(64)),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("build_id", sa.String(200)),
        sa.Column("event", sa.JSON),
        sa.PrimaryKeyConstraint("id", name="pk_deliveries"),
        sa.UniqueConstraint("webhook_id", "delivery_id", "part", name="uq_deliveries_delivery_id"),
        sa.UniqueConstraint("webhook_id", "same", name="uq_deliveries_same"),
    )
    op.create_index("ix_deliveries_project", "deliveries", ["project_name", "id"])
    op.create_index("ix_deliveries_ref", "deliveries", ["webhook_id", "ref", "id"])
