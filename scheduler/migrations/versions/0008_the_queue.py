"""Whose turn it is: levels, weights, fleets and their clocks; indexes by which a claim costs the same however many wait."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_QUEUED = "state = 'QUEUED'"
_HELD = "state IN ('CLAIMED', 'RUNNING', 'FINALIZING')"


def upgrade() -> None:
    """Add columns, tables and indexes; the old index of the queue goes, which only slowed writing down."""
    op.add_column("projects", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("projects", sa.Column("weight", sa.Integer, nullable=False, server_default="1"))
    op.add_column("projects", sa.Column("cancel_superseded", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("projects", sa.Column("infra_retry", sa.String(20), nullable=False, server_default="always"))
    op.add_column("builds", sa.Column("level", sa.Integer, nullable=False, server_default="0"))
    op.add_column("builds", sa.Column("rank", sa.Integer, nullable=False, server_default="0"))
    op.add_column("builds", sa.Column("not_before_ms", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("builds", sa.Column("line", sa.String(256), nullable=True))
    op.add_column("builds", sa.Column("superseded_by", sa.String(200), nullable=True))
    op.execute("UPDATE builds SET level = priority, rank = -1001 * priority WHERE state = 'QUEUED'")
    best = ["fleet", "project_name", "rank", "number"]
    _index("ix_builds_waiting", best, _QUEUED)
    _index("ix_builds_waiting_age", ["fleet", "project_name", "number"], _QUEUED)
    _index("ix_builds_waiting_deadline", ["queue_deadline_ms"], _QUEUED)
    _index("ix_builds_held", ["fleet", "project_name"], _HELD)
    _index("ix_builds_line", ["project_name", "line"], "finished_ms IS NULL")
    op.drop_index("ix_builds_queue", "builds")
    op.create_table(
        "fleets",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("paused_ms", sa.BigInteger, nullable=True),
        sa.Column("paused_by", sa.String(200), nullable=True),
        sa.Column("paused_why", sa.String(500), nullable=True),
        sa.Column("max_running", sa.Integer, nullable=True),
        sa.Column("modified_ms", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "turns",
        sa.Column("fleet", sa.String(100), primary_key=True),
        sa.Column("claims", sa.BigInteger, nullable=False),
        sa.Column("clock", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "served",
        sa.Column("fleet", sa.String(100), primary_key=True),
        sa.Column("project_name", sa.String(150), primary_key=True),
        sa.Column("clock", sa.BigInteger, nullable=False),
    )


def _index(name: str, columns: list[str], only: str) -> None:
    condition = sa.text(only)
    op.create_index(name, "builds", columns, sqlite_where=condition, postgresql_where=condition)
