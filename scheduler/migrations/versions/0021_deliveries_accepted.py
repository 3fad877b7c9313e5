"""The way to the deliveries that were only noted."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let those be found fast that are still to be acted on."""
    waiting = sa.text("outcome = 'accepted'")
    op.create_index("ix_deliveries_accepted", "deliveries", ["webhook_id", "id"], sqlite_where=waiting, postgresql_where=waiting)
