"""Where the branches of webhooks' repositories are."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, and the columns that say when they were looked at."""
    op.add_column("webhooks", sa.Column("looked_ms", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("webhooks", sa.Column("seen_ms", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "heads",
        sa.Column("webhook_id", sa.String(40), nullable=False),
        sa.Column("ref", sa.String(320), nullable=False),
        sa.Column("commit_id", sa.String(64)),
        sa.Column("moved_to", sa.String(64)),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhooks.id"], name="fk_heads_webhook_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("webhook_id", "ref", name="pk_heads"),
    )
