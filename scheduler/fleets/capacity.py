"""What the living workers of a fleet have."""

from collections import Counter
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from scheduler.db import now_ms
from scheduler.models import IS_HELD, Build, Worker

SILENT_MS: Final = 30_000
"""How long after its last word an idle worker counts as living: three of its polls."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What living workers of a fleet have."""

    workers: int = 0
    slots: int = 0
    free_slots: int = 0
    not_claiming: tuple[str, ...] = ()
    """A sentence for each that claims nothing, though it lives."""


def claims(worker: Worker) -> bool:
    """Whether a worker asks for builds when it has a free slot."""
    return worker.state == "up" and worker.leave_ms is None and not worker.not_claiming


def why_not(worker: Worker) -> str:
    """What keeps a worker from asking for builds, for people."""
    leaves = worker.state != "up" or worker.leave_ms is not None
    return f"worker {worker.id} " + ("is leaving" if leaves else f"takes no builds: {worker.not_claiming}")


def capacity_of(session: Session, fleet: str) -> Capacity:
    """What the fleet's living workers have. A worker lives while it shows itself, or holds a build."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    held: Counter[str | None] = Counter()
    for owner, count in session.execute(sa.select(Build.lease_owner, sa.func.count()).where(IS_HELD).group_by(Build.lease_owner)):
        held[owner] = count
    living = [
        worker
        for worker in session.scalars(sa.select(Worker).where(Worker.fleet == fleet))
        if held[worker.id] or (worker.last_seen_ms > now - SILENT_MS and worker.state != "gone")
    ]
    return Capacity(
        workers=len(living),
        slots=sum(worker.slots for worker in living),
        free_slots=sum(max(0, worker.slots - held[worker.id]) for worker in living if claims(worker)),
        not_claiming=tuple(why_not(worker) for worker in living if not claims(worker)),
    )
