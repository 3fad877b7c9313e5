"""Whether those are alive that a build needs beside the API: one scheduler that leads, and a worker."""

from typing import Final

import sqlalchemy as sa

from scheduler.db import Database, now_ms
from scheduler.models import Leader, Worker

_SCHEDULER_S: Final = 30
"""A leader that has not led for so long, and no other in its place, is no scheduler: a lease of one is a few seconds."""
_WORKER_S: Final = 60
"""A worker asks for builds every ten seconds, whether it can take one or not."""


def scheduler(db: Database) -> str | None:
    """None where a scheduler leads, else what is wrong."""
    with db.reading() as session:
        silent_ms: int | None = session.execute(
            sa.select(now_ms() - Leader.expires_ms).where(Leader.name == "sweeper")
        ).scalar_one_or_none()
    if silent_ms is None:
        return "no scheduler has run yet; lost builds are not taken back"
    if silent_ms > _SCHEDULER_S * 1000:
        return f"no scheduler has acted for {silent_ms // 1000} s; lost builds are not taken back"
    return None


def workers(db: Database) -> str | None:
    """None where a worker was seen lately, else what is wrong."""
    with db.reading() as session:
        silent_ms: int | None = session.execute(sa.select(now_ms() - sa.func.max(Worker.last_seen_ms))).scalar_one()
    if silent_ms is None:
        return "no worker has shown itself yet; builds wait"
    if silent_ms > _WORKER_S * 1000:
        return f"no worker has shown itself for {silent_ms // 1000} s; builds wait"
    return None
