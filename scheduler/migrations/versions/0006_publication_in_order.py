"""Which artifact an address of a project's bucket belongs to, and why another is not there."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, and the index by which an address's artifacts are found."""
    op.add_column("artifacts", sa.Column("public_problem", sa.Text, nullable=True))
    op.add_column("artifacts", sa.Column("public_round", sa.Integer, nullable=False, server_default="0"))
    op.create_index("ix_artifacts_public", "artifacts", ["public_bucket", "public_key"])
