"""A cache may lie on the layers of others."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "cache_layers",
        sa.Column("entry_id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("object_key", sa.String(1200), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("build_id", sa.String(200), nullable=False),
        sa.Column("attempt_no", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["entry_id"], ["cache_entries.id"], name="fk_cache_layers_entry_id"),
        sa.PrimaryKeyConstraint("entry_id", "seq"),
    )
    op.create_index("ix_cache_layers_build", "cache_layers", ["build_id", "attempt_no"])
