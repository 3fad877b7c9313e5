"""What git servers are to be told of builds."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "notices",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        sa.Column("project_name", sa.String(150), nullable=False),
        sa.Column("build_id", sa.String(200), nullable=False),
        sa.Column("topic", sa.String(64), nullable=False),
        sa.Column("asked_ms", sa.BigInteger, nullable=False),
        sa.Column("commit_id", sa.String(64), nullable=False),
        sa.Column("context", sa.String(255), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("due_ms", sa.BigInteger, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
        sa.Column("settled_ms", sa.BigInteger),
        sa.Column("outcome", sa.String(20)),
        sa.Column("why", sa.Text, nullable=False, server_default=""),
        sa.Column("known_as", sa.String(50)),
        sa.ForeignKeyConstraint(["build_id"], ["builds.id"], name="fk_notices_build_id"),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
    )
    op.create_index("ix_notices_topic", "notices", ["topic", "asked_ms", "id"])
    op.create_index("ix_notices_build", "notices", ["build_id", "id"])
    op.create_index("ix_notices_project", "notices", ["project_name", "id"])
    waits = sa.text("settled_ms IS NULL")
    op.create_index("ix_notices_due", "notices", ["due_ms"], sqlite_where=waits, postgresql_where=waits)
