"""When a cache was used, and what attempts asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("cache_entries", sa.Column("used_ms", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("attempts", sa.Column("cache_lookups", sa.JSON))
