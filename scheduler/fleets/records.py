"""Fleets as they are set: paused or not, and how many of their builds may run at once."""

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import InvalidInput, NotFound
from millrace.fleet import FLEET_NAME
from scheduler import lanes
from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import capacity_of
from scheduler.models import IS_HELD, IS_QUEUED, Build, Fleet, Worker


@dataclass(frozen=True, kw_only=True)
class FleetRecord:
    """A fleet: how it is set, and what it has. `paused_*` are None where it is not paused; `max_running` None: no limit."""

    name: str
    paused_ms: int | None
    paused_by: str | None
    paused_why: str | None
    max_running: int | None
    waiting: int
    running: int
    workers: int
    slots: int
    free_slots: int
    not_claiming: tuple[str, ...]


def find(db: Database) -> list[FleetRecord]:
    """All fleets that are set, that a worker belongs to, or that a build waits for or runs in, by name."""
    with db.reading() as session:
        running = sa.select(Build.fleet).where(IS_HELD)
        names = set(session.scalars(sa.union(sa.select(Fleet.name), sa.select(Worker.fleet), running)))
        return [_record(session, name) for name in sorted(names | set(lanes.waiting_fleets(session)))]


def get(db: Database, name: str) -> FleetRecord:
    """One of them. Raises NotFound."""
    for record in find(db):
        if record.name == name:
            return record
    raise NotFound(
        f"there is no fleet {name[:100]!r}",
        hint="GET /v1/fleets lists them; one is there once it is set, a worker joins it, or a build waits for it.",
    )


def change(db: Database, name: str, *, max_running: int | None) -> FleetRecord:
    """Set a fleet's limit; None: no limit. Makes the fleet where there is none. Raises InvalidInput for a name that cannot be."""
    if FLEET_NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{name[:100]!r} is no name of a fleet", hint="At most 100 letters, digits, hyphens, dots, underscores."
        )

    def set_limit(row: Fleet, _now: int) -> None:
        row.max_running = max_running

    return _write(db, name, set_limit)


def pause(db: Database, name: str, *, by: str, why: str) -> FleetRecord:
    """No build of the fleet is claimed any more; those that run go on. Raises NotFound."""
    get(db, name)

    def set_paused(row: Fleet, now: int) -> None:
        row.paused_ms, row.paused_by, row.paused_why = row.paused_ms or now, by[:200], why[:500]

    return _write(db, name, set_paused)


def resume(db: Database, name: str) -> FleetRecord:
    """Builds of the fleet are claimed again. Raises NotFound."""
    get(db, name)

    def set_running(row: Fleet, _now: int) -> None:
        row.paused_ms, row.paused_by, row.paused_why = None, None, None

    return _write(db, name, set_running)


def _write(db: Database, name: str, fill: Callable[[Fleet, int], None]) -> FleetRecord:
    def work(session: Session) -> FleetRecord:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row = session.get(Fleet, name, with_for_update=True)
        if row is None:
            row = Fleet(name=name)
            session.add(row)
        fill(row, now)
        row.modified_ms = now
        session.flush()
        return _record(session, name)

    try:
        return db.run(work)
    except sa.exc.IntegrityError:  # two made it at once
        return db.run(work)


def _record(session: Session, name: str) -> FleetRecord:
    row = session.get(Fleet, name) or Fleet(name=name)
    capacity = capacity_of(session, name)
    here = Build.fleet == name
    return FleetRecord(
        name=name,
        paused_ms=row.paused_ms,
        paused_by=row.paused_by,
        paused_why=row.paused_why,
        max_running=row.max_running,
        waiting=session.scalar(sa.select(sa.func.count()).where(IS_QUEUED, here)) or 0,
        running=session.scalar(sa.select(sa.func.count()).where(IS_HELD, here)) or 0,
        workers=capacity.workers,
        slots=capacity.slots,
        free_slots=capacity.free_slots,
        not_claiming=capacity.not_claiming,
    )
