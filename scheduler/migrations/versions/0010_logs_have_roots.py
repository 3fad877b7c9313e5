"""Logs have a root over the list of their chunks, and what the worker said of its log is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add both; an ended log that is still in the database gets its root when it moves to the object store."""
    op.add_column("attempts", sa.Column("log_root", sa.String(64), nullable=True))
    op.add_column("attempts", sa.Column("log_footer", sa.JSON(), nullable=True))
