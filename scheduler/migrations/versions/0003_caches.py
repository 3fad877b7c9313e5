"""Caches that builds made, by namespace, paths and key."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "cache_entries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("namespace", sa.String(300), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("key", sa.String(512), nullable=False),
        sa.Column("object_key", sa.String(1200), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("build_id", sa.String(200), nullable=False),
        sa.Column("attempt_no", sa.Integer, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("replaced_ms", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["build_id"], ["builds.id"], name="fk_cache_entries_build_id"),
        sa.UniqueConstraint("namespace", "version", "key", "replaced_ms", name="uq_cache_entries_namespace"),
    )
    op.create_index("ix_cache_entries_build", "cache_entries", ["build_id", "attempt_no"])
    op.create_index("ix_cache_entries_replaced", "cache_entries", ["replaced_ms"])
