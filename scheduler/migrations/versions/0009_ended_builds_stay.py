"""The trigger that refuses changes of ended builds covers all of the row that tells how it ended, not state and reason only."""

from alembic import op

from scheduler.guard import statements

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the trigger anew."""
    for statement in statements(sqlite=op.get_bind().dialect.name == "sqlite"):
        op.get_bind().exec_driver_sql(statement)
