"""Workers that are asked to leave, and instances that are let go. All of it in the records, where claims see it.

A worker that is marked is given no more builds from that commit on (`scheduler.leases`); it finishes those that it has, and goes.
An instance is let go only while it holds no build, and from that commit on its worker gets none either: so that whatever is ended
after it runs nothing.
"""

from collections.abc import Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.log import get_logger
from scheduler.db import Database, now_ms
from scheduler.models import IS_HELD, Build, Instance, Worker

log = get_logger(__name__)
BY_HAND: Final = "drained by "
"""How it begins why a worker leaves that a person told to: what it is wanted for does not take that back."""


def ask_to_leave(db: Database, fleet: str, ids: Sequence[str], why: str) -> list[str]:
    """Mark workers that are up; those that were not marked before."""

    def work(session: Session) -> list[str]:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        found = session.scalars(_workers(fleet, ids).where(Worker.leave_ms.is_(None), Worker.state == "up")).all()
        for worker in found:
            worker.leave_ms, worker.leave_why = now, why[:500]
        return [worker.id for worker in found]

    return _told("worker.asked_to_leave", fleet, db.run(work) if ids else [], why)


def take_back(db: Database, fleet: str, ids: Sequence[str], why: str) -> list[str]:
    """Let marked workers stay after all, where they were not told yet; which."""

    def work(session: Session) -> list[str]:
        found = session.scalars(_workers(fleet, ids).where(Worker.leave_ms.is_not(None), Worker.state == "up")).all()
        for worker in found:
            worker.leave_ms, worker.leave_why = None, ""
        return [worker.id for worker in found]

    return _told("worker.may_stay", fleet, db.run(work) if ids else [], why)


def let_go(db: Database, fleet: str, ids: Sequence[str], why: str) -> list[str]:
    """Mark instances as ones that may be ended, where their workers hold no build; which."""

    def work(session: Session) -> list[str]:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        return [each for each in sorted(ids) if _let_go(session, fleet, each, why[:500], now)]

    return _told("instance.let_go", fleet, db.run(work) if ids else [], why)


def _let_go(session: Session, fleet: str, instance_id: str, why: str, now: int) -> bool:
    session.get(Worker, instance_id, with_for_update=True)
    instance = session.get(Instance, (fleet, instance_id), with_for_update=True)
    if instance is None:
        return False
    # Only now, as a worker that has just come may have had its first build while its instance was waited for.
    if session.scalar(sa.select(Build.id).where(IS_HELD, Build.lease_owner == instance_id).limit(1)) is not None:
        return False
    worker = session.get(Worker, instance_id, with_for_update=True, populate_existing=True)
    if worker is not None and worker.leave_ms is None:
        worker.leave_ms, worker.leave_why = now, why
    if instance.released_ms is None:
        instance.released_ms, instance.why = now, why
    session.flush()
    return True


def _workers(fleet: str, ids: Sequence[str]) -> sa.Select[tuple[Worker]]:
    return sa.select(Worker).where(Worker.fleet == fleet, Worker.id.in_(ids)).order_by(Worker.id).with_for_update()


def _told(event: str, fleet: str, ids: list[str], why: str) -> list[str]:
    for each in ids:
        log.info(event, fleet=fleet, worker_id=each, why=why)
    return ids
