"""What the living workers of a fleet have."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Need, Offer
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


@dataclass(frozen=True, kw_only=True)
class Living:
    """A living worker: how many builds it holds, what it has in all, and what of it is free beside them."""

    worker: Worker
    holds: int
    offer: Offer
    room: Offer

    @property
    def free_slots(self) -> int:
        """How many more builds its slots take; 0 where it asks for none."""
        return max(0, self.worker.slots - self.holds) if claims(self.worker) else 0


def claims(worker: Worker) -> bool:
    """Whether a worker asks for builds when it has a free slot."""
    return worker.state == "up" and worker.leave_ms is None and not worker.not_claiming


def why_not(worker: Worker) -> str:
    """What keeps a worker from asking for builds, for people."""
    leaves = worker.state != "up" or worker.leave_ms is not None
    return f"worker {worker.id} " + ("is leaving" if leaves else f"takes no builds: {worker.not_claiming}")


def offer_of(worker: Worker) -> Offer:
    """What a worker has in all."""
    return Offer(cpu_millis=worker.cpu_millis, memory_bytes=worker.memory_bytes, labels=frozenset(worker.labels or ()))


def living(session: Session, fleet: str) -> list[Living]:
    """The fleet's living workers by id, and what is left of each. One lives while it shows itself, or holds a build."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    held: dict[str, list[Need | None]] = defaultdict(list)
    kinds = sa.select(Build.lease_owner, Build.need, sa.func.count()).where(IS_HELD).group_by(Build.lease_owner, Build.need)
    for owner, key, count in session.execute(kinds):
        held[owner] += [Need.parse(key)] * count
    found = []
    for worker in session.scalars(sa.select(Worker).where(Worker.fleet == fleet).order_by(Worker.id)):
        mine = held[worker.id]
        if mine or (worker.last_seen_ms > now - SILENT_MS and worker.state != "gone"):
            offer = offer_of(worker)
            left = offer.less(need for need in mine if need is not None)
            found.append(Living(worker=worker, holds=len(mine), offer=offer, room=left))
    return found


def capacity_of(session: Session, fleet: str) -> Capacity:
    """What the fleet's living workers have."""
    return capacity_in(living(session, fleet))


def capacity_in(workers: Sequence[Living]) -> Capacity:
    """What these have."""
    return Capacity(
        workers=len(workers),
        slots=sum(one.worker.slots for one in workers),
        free_slots=sum(one.free_slots for one in workers),
        not_claiming=tuple(why_not(one.worker) for one in workers if not claims(one.worker)),
    )
