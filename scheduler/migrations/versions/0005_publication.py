"""Where artifacts are to be published, and whether they are."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what is there already is published nowhere, and so done."""
    op.add_column("artifacts", sa.Column("public_bucket", sa.String(63), nullable=True))
    op.add_column("artifacts", sa.Column("public_key", sa.String(1200), nullable=True))
    op.add_column("artifacts", sa.Column("published", sa.Boolean, nullable=False, server_default=sa.true()))
    op.create_index(
        "ix_artifacts_unpublished",
        "artifacts",
        ["build_id"],
        sqlite_where=sa.text("published = 0"),
        postgresql_where=sa.text("published = false"),
    )
