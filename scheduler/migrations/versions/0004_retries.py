"""Which build a build repeats, and which repeats it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("builds", sa.Column("retry_of", sa.String(200), nullable=True))
    op.add_column("builds", sa.Column("auto_retry_number", sa.Integer, nullable=False, server_default="0"))
    op.add_column("builds", sa.Column("next_auto_retry", sa.String(200), nullable=True))
