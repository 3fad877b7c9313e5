"""What waits for an approval is found at once; and what a git server calls a webhook of ours."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and indexes."""
    op.add_column("webhooks", sa.Column("provider_hook_id", sa.String(100)))
    op.add_column("webhooks", sa.Column("listed_ms", sa.BigInteger, nullable=False, server_default="0"))
    for name, columns, outcome in (
        ("ix_deliveries_checking", ["id"], "checking"),
        ("ix_deliveries_waiting", ["project_name", "id"], "approval"),
    ):
        only = sa.text(f"outcome = '{outcome}'")
        op.create_index(name, "deliveries", columns, sqlite_where=only, postgresql_where=only)
