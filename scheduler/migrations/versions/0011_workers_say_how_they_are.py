"""Workers say whether they leave, and what keeps them from claiming."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("workers", sa.Column("state", sa.String(20), nullable=False, server_default="up"))
    op.add_column("workers", sa.Column("not_claiming", sa.String(500), nullable=False, server_default=""))
