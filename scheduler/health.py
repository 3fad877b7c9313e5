"""Whether those are alive that a build needs beside the API: one scheduler that leads, and a worker."""

from typing import Final

import sqlalchemy as sa

from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import claims, why_not
from scheduler.models import Fleet, Leader, Worker

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
    """None where a worker was seen lately that takes builds, else what is wrong."""
    with db.reading() as session:
        if any(_is_scaled(settings) for settings in session.scalars(sa.select(Fleet.settings))):
            return None  # workers come when builds do
        known = session.execute(
            sa.select(Worker, now_ms() - Worker.last_seen_ms).where(Worker.state != "gone").order_by(Worker.last_seen_ms.desc())
        ).all()
    if not known:
        return "no worker has shown itself yet; builds wait"
    living = [worker for worker, silent_ms in known if silent_ms <= _WORKER_S * 1000]
    if not living:
        return f"no worker has shown itself for {known[0][1] // 1000} s; builds wait"
    if not any(claims(worker) for worker in living):
        return f"{why_not(living[0])}; builds wait"
    return None


def _is_scaled(settings: object) -> bool:
    return isinstance(settings, dict) and bool(settings.get("provider"))
