"""What people and programs see of a fleet's workers: who they are, what they are at, and what was decided lately."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import NotFound
from scheduler.db import Database, now_ms
from scheduler.fleets import observe
from scheduler.fleets.capacity import Living, living
from scheduler.fleets.observe import WorkerSeen
from scheduler.models import Decision, Instance, Worker

DECISIONS_SHOWN: Final = 20


@dataclass(frozen=True, kw_only=True)
class InstanceRecord:
    """An instance as it was seen last."""

    id: str
    provider: str
    state: str
    generation: int | None
    found_ms: int
    joined_ms: int | None
    released_ms: int | None
    why: str


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
    """How many workers were to be there, and why."""

    at_ms: int
    wanted: int
    why: str
    load: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Face:
    """A fleet's workers and instances now, and its last decisions, the newest first."""

    now_ms: int
    workers: Sequence[WorkerSeen]
    living: Mapping[str, Living]
    """Those of the workers that live, by id, with what they have in all and what of it is free."""
    instances: Sequence[InstanceRecord]
    decisions: Sequence[DecisionRecord]


def face_of(db: Database, fleet: str) -> Face:
    """All that is shown of one fleet beside how it is set."""
    with db.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        there = (
            sa.select(Instance)
            .where(Instance.fleet == fleet, sa.text("gone_ms IS NULL"))
            .order_by(Instance.found_ms, Instance.id)
        )
        instances = [_instance(row) for row in session.scalars(there)]
        return Face(
            now_ms=now,
            workers=observe.workers_of(session, fleet, {instance.id for instance in instances}, now),
            living={one.worker.id: one for one in living(session, fleet)},
            instances=instances,
            decisions=_decisions(session, fleet),
        )


def workers_of(db: Database, fleet: str) -> list[str]:
    """The ids of all that could be asked to leave."""
    with db.reading() as session:
        up = sa.select(Worker.id).where(Worker.fleet == fleet, Worker.state == "up").order_by(Worker.id)
        return list(session.scalars(up))


def need_worker(db: Database, fleet: str, worker_id: str) -> None:
    """Raises NotFound where the fleet has no such worker that is there."""
    with db.reading() as session:
        row = session.get(Worker, worker_id) if "\x00" not in worker_id else None
        if row is None or row.fleet != fleet or row.state == "gone":
            raise NotFound(
                f"fleet {fleet} has no worker {worker_id[:100]!r}", hint=f"'millrace fleet show {fleet}' names its workers."
            )


def _instance(row: Instance) -> InstanceRecord:
    return InstanceRecord(
        id=row.id,
        provider=row.provider,
        state=row.state,
        generation=row.generation,
        found_ms=row.found_ms,
        joined_ms=row.joined_ms,
        released_ms=row.released_ms,
        why=row.why,
    )


def _decisions(session: Session, fleet: str) -> list[DecisionRecord]:
    last = sa.select(Decision).where(Decision.fleet == fleet).order_by(Decision.id.desc()).limit(DECISIONS_SHOWN)
    return [DecisionRecord(at_ms=row.at_ms, wanted=row.wanted, why=row.why, load=row.load) for row in session.scalars(last)]
