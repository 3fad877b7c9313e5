"""What the sweeper looks for at each round is found without reading the attempts of years."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Index the attempts that are still to be seen to, and only those."""
    log_here = sa.text("log_key IS NULL AND log_bytes > 0")
    op.create_index("ix_attempts_log_here", "attempts", ["ended_ms"], sqlite_where=log_here, postgresql_where=log_here)
    op.create_index(
        "ix_attempts_unswept",
        "attempts",
        ["ended_ms"],
        sqlite_where=sa.text("swept = 0"),
        postgresql_where=sa.text("swept = false"),
    )
    op.drop_index("ix_attempts_ended", "attempts")
