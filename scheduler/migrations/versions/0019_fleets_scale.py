"""Fleets have settings, generations and decisions; instances are known; workers say what they have, and may be asked to leave."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

_AUTO = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Add columns and tables."""
    for column in (
        sa.Column("generation", sa.Integer),
        sa.Column("cpu_millis", sa.Integer),
        sa.Column("memory_bytes", sa.BigInteger),
        sa.Column("labels", sa.JSON),
        sa.Column("idle_since_ms", sa.BigInteger),
        sa.Column("leave_ms", sa.BigInteger),
        sa.Column("leave_why", sa.String(500), nullable=False, server_default=""),
    ):
        op.add_column("workers", column)
    for column in (
        sa.Column("settings", sa.JSON),
        sa.Column("generation", sa.Integer, nullable=False, server_default="1"),
        sa.Column("stable_generation", sa.Integer, nullable=False, server_default="1"),
        sa.Column("rollout", sa.JSON),
        sa.Column("decision", sa.JSON),
        sa.Column("decided_ms", sa.BigInteger),
    ):
        op.add_column("fleets", column)
    op.create_table(
        "instances",
        sa.Column("fleet", sa.String(100), nullable=False),
        sa.Column("id", sa.String(100), nullable=False),
        sa.Column("provider", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("generation", sa.Integer),
        sa.Column("build_id", sa.String(200)),
        sa.Column("found_ms", sa.BigInteger, nullable=False),
        sa.Column("seen_ms", sa.BigInteger, nullable=False),
        sa.Column("joined_ms", sa.BigInteger),
        sa.Column("released_ms", sa.BigInteger),
        sa.Column("gone_ms", sa.BigInteger),
        sa.Column("why", sa.String(500), nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("fleet", "id", name="pk_instances"),
    )
    there = sa.text("gone_ms IS NULL")
    op.create_index("ix_instances_there", "instances", ["fleet"], sqlite_where=there, postgresql_where=there)
    op.create_table(
        "decisions",
        sa.Column("id", _AUTO, autoincrement=True, nullable=False),
        sa.Column("fleet", sa.String(100), nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("why", sa.String(500), nullable=False),
        sa.Column("load", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
    )
    op.create_index("ix_decisions_fleet", "decisions", ["fleet", "id"])
