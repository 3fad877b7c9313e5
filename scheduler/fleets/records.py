"""Fleets as they are set: paused or not, how many of their builds may run at once, and where their workers come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import Conflict, InvalidInput, NotFound
from millrace.fleet import FLEET_NAME, FleetSettings
from scheduler import lanes
from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import capacity_of
from scheduler.models import IS_HELD, IS_QUEUED, Build, Fleet, Instance, Worker


@dataclass(frozen=True, kw_only=True)
class FleetRecord:
    """A fleet: how it is set, and what it has. `paused_*` are None where it is not paused; `max_running` None: no limit.

    `settings` as they are on the wire, None where nothing but a limit was ever set. `decision`: what was decided last, when.
    """

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
    settings: Mapping[str, Any] | None
    generation: int
    stable_generation: int
    rollout: Mapping[str, Any] | None
    decision: Mapping[str, Any] | None
    decided_ms: int | None

    @property
    def is_scaled(self) -> bool:
        """Whether its workers come from a provider."""
        return bool(self.settings and self.settings.get("provider"))


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
    check_name(name)

    def set_limit(_session: Session, row: Fleet, _now: int) -> None:
        row.max_running = max_running

    return _write(db, name, set_limit)


def put(db: Database, name: str, settings: FleetSettings) -> FleetRecord:
    """Set a fleet, all of it. Makes it where there is none.

    Raises InvalidInput for a name that cannot be, Conflict where instances of another provider are still there.
    """
    check_name(name)

    def set_all(session: Session, row: Fleet, _now: int) -> None:
        _refuse_orphans(session, name, settings)
        row.max_running = settings.max_running
        row.settings = settings.model_dump(mode="json", by_alias=True, exclude={"max_running"}, exclude_none=True)

    return _write(db, name, set_all)


def check_name(name: str) -> None:
    """Raises InvalidInput for a name that no fleet can have."""
    if FLEET_NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{name[:100]!r} is no name of a fleet", hint="At most 100 letters, digits, hyphens, dots, underscores."
        )


def overflow_road(db: Database, name: str) -> list[str]:
    """The fleets that builds which flow over into `name` may come to, it first; a circle ends where it begins anew."""
    road = [name]
    with db.reading() as session:
        while True:
            row = session.get(Fleet, road[-1])
            to = (row.settings or {}).get("overflowFleet") if row is not None else None
            if to is None:
                return road
            road.append(to)
            if to in road[:-1]:
                return road


def has_workers(db: Database, name: str) -> bool:
    """Whether the fleet has a worker that lives, or a provider that starts some."""
    with db.reading() as session:
        row = session.get(Fleet, name)
        scaled = row is not None and (row.settings or {}).get("provider") is not None
        return scaled or bool(capacity_of(session, name).workers)


def refuse_orphans(db: Database, name: str, settings: FleetSettings) -> None:
    """Raises Conflict where instances of another provider than that of `settings` are there."""
    with db.reading() as session:
        _refuse_orphans(session, name, settings)


def pause(db: Database, name: str, *, by: str, why: str) -> FleetRecord:
    """No build of the fleet is claimed any more; those that run go on. Raises NotFound."""
    get(db, name)

    def set_paused(_session: Session, row: Fleet, now: int) -> None:
        row.paused_ms, row.paused_by, row.paused_why = row.paused_ms or now, by[:200], why[:500]

    return _write(db, name, set_paused)


def resume(db: Database, name: str) -> FleetRecord:
    """Builds of the fleet are claimed again. Raises NotFound."""
    get(db, name)

    def set_running(_session: Session, row: Fleet, _now: int) -> None:
        row.paused_ms, row.paused_by, row.paused_why = None, None, None

    return _write(db, name, set_running)


def _refuse_orphans(session: Session, name: str, settings: FleetSettings) -> None:
    """Nobody would look after instances of a provider that is not the fleet's any more."""
    kind = settings.provider.type if settings.provider is not None else None
    there = sa.select(Instance.provider, sa.func.count()).where(Instance.fleet == name, sa.text("gone_ms IS NULL"))
    for provider, count in session.execute(there.group_by(Instance.provider)):
        if provider != kind:
            raise Conflict(
                f"fleet {name} still has {count} instance{'s' * (count > 1)} of the provider {provider!r}",
                hint=f"'millrace fleet drain {name}' has them leave; change it when 'millrace fleet show {name}' shows none.",
            )


def _write(db: Database, name: str, fill: Callable[[Session, Fleet, int], None]) -> FleetRecord:
    def work(session: Session) -> FleetRecord:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row = session.get(Fleet, name, with_for_update=True)
        if row is None:
            row = Fleet(name=name)
            session.add(row)
        fill(session, row, now)
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
        settings=row.settings,
        generation=row.generation or 1,
        stable_generation=row.stable_generation or 1,
        rollout=row.rollout,
        decision=row.decision,
        decided_ms=row.decided_ms,
    )
