"""The way from a badge's address to its project."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let a project be found by the id that stands in the address."""
    op.create_index("ix_projects_uuid", "projects", ["uuid"])
