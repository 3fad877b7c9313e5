"""Builds say what they need of a worker, and wait by that; workers may keep room for one; turns are counted by offer."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

_GIB = 1024**3
_SIZES = {
    "BUILD_GENERAL1_SMALL": (2, 4),
    "BUILD_GENERAL1_MEDIUM": (4, 8),
    "BUILD_GENERAL1_LARGE": (8, 16),
    "BUILD_GENERAL1_XLARGE": (36, 72),
    "BUILD_GENERAL1_2XLARGE": (72, 144),
}
"""vCPU and GiB of the compute types that there were."""
_QUEUED = sa.text("state = 'QUEUED'")


def upgrade() -> None:
    """Add columns, fill them in for builds that have not ended, and change the ways to builds that wait."""
    small = _need("BUILD_GENERAL1_SMALL")
    op.add_column("builds", sa.Column("need", sa.String(1000), nullable=False, server_default=small))
    op.add_column("builds", sa.Column("passed_ms", sa.BigInteger))
    op.add_column("workers", sa.Column("keeps", sa.String(200)))
    op.add_column("turns", sa.Column("offers", sa.JSON, nullable=False, server_default="{}"))
    builds = sa.table(
        "builds",
        sa.column("id", sa.String),
        sa.column("settings", sa.JSON),
        sa.column("need", sa.String),
        sa.column("finished_ms", sa.BigInteger),
    )
    known = op.get_bind()
    unlike: dict[str, list[str]] = {}
    for build_id, settings in known.execute(sa.select(builds.c.id, builds.c.settings).where(builds.c.finished_ms.is_(None))):
        if (need := _need(_compute_type(settings))) != small:
            unlike.setdefault(need, []).append(build_id)
    for need, ids in unlike.items():
        for start in range(0, len(ids), 500):
            known.execute(sa.update(builds).where(builds.c.id.in_(ids[start : start + 500])).values(need=need))
    for name, columns in (
        ("ix_builds_waiting_best", ["fleet", "need", "project_name", "rank", "number"]),
        ("ix_builds_waiting_oldest", ["fleet", "need", "project_name", "number"]),
    ):
        op.create_index(name, "builds", columns, sqlite_where=_QUEUED, postgresql_where=_QUEUED)
    for name in ("ix_builds_waiting", "ix_builds_waiting_age"):
        op.drop_index(name, "builds")


def _need(compute_type: str) -> str:
    cpus, memory = _SIZES.get(compute_type, _SIZES["BUILD_GENERAL1_SMALL"])
    return f"{cpus * 1000}/{memory * _GIB}/"


def _compute_type(settings: Any) -> str:
    """What stands in a build's settings; nothing where they are damaged."""
    environment = settings.get("environment") if isinstance(settings, dict) else None
    return str(environment.get("computeType")) if isinstance(environment, dict) else ""
