"""What is known of a fleet at one moment: its builds, its workers, its instances, and how long things take there."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.fleet import WorkerShape
from millrace.need import Need, Offer
from millrace.settings import Settings
from millrace.vocabulary import Verdict
from scheduler import lanes
from scheduler.db import now_ms
from scheduler.fleets.capacity import SILENT_MS
from scheduler.fleets.packing import slots_needed
from scheduler.fleets.policy import Load
from scheduler.fleets.provider import Instance, InstanceState
from scheduler.models import IS_HELD, IS_QUEUED, Attempt, Build, Event, Project, Worker
from scheduler.models import Instance as InstanceRow
from scheduler.placement import shape_offer
from scheduler.states import TERMINAL

LOST_MS: Final = 90_000
"""How long an instance that is there may be silent, while others of the farm are heard, before its worker counts as lost."""
_MOST_COUNTED: Final = 10_000
"""So many waiting builds are counted; more make no difference to a fleet's size."""
_EVENTS: Final = 2_000
"""How far back lengths of builds are looked for: so many moves of builds."""
_LENGTHS: Final = 50
_ENDED: Final = tuple(state.value for state in sorted(TERMINAL))
_BOOTS: Final = 20
_Kind = tuple[str, str, int, int, int | None]
"""Waiting builds of a project and a need: how many, since when the oldest waits, and how many of the project may run at once."""


class At(StrEnum):
    """What a worker is at. One that is marked, or leaves by itself, is draining; one that nobody hears any more is lost."""

    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    GONE = "gone"
    LOST = "lost"


@dataclass(frozen=True, kw_only=True)
class WorkerSeen:
    """A worker. `instance`: whether the fleet's provider lists it; one that is not came by other hands. `told`: it knows that it
    is to leave."""

    id: str
    at: At
    held: int
    slots: int
    generation: int | None
    instance: bool
    marked: bool
    told: bool
    idle_since_ms: int | None
    silent_ms: int
    not_claiming: str
    why: str


@dataclass(frozen=True, kw_only=True)
class InstanceSeen:
    """An instance that the provider lists. `known_ms`: since when we know of it; `joined`: its worker has come at some time.

    `stranger`: nobody here asked for it, and its worker has not come.
    """

    id: str
    state: InstanceState
    generation: int | None
    known_ms: int
    joined: bool
    released: bool
    stranger: bool
    news: bool
    """The records do not say it like this yet."""

    @property
    def boots(self) -> bool:
        """It is ours, and its worker may still come."""
        return not (self.joined or self.released or self.stranger) and self.state is not InstanceState.STOPPING


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long things take in a fleet, in the middle; None where nothing is known."""

    build_s: float | None = None
    boot_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A fleet at one moment."""

    load: Load
    workers: Sequence[WorkerSeen]
    instances: Sequence[InstanceSeen]
    unlisted: Sequence[str]
    """Instances that the records know as there, and the provider does not list."""

    def workers_at(self, *at: At) -> list[WorkerSeen]:
        """Those that are at one of these."""
        return [worker for worker in self.workers if worker.at in at]


def observe(
    session: Session,
    fleet: str,
    listed: Sequence[Instance],
    *,
    age_s: float,
    generation: int,
    times: Times,
    farm: Settings,
    shape: WorkerShape,
) -> Sight:
    """The fleet, with the instances that its provider listed `age_s` ago. As many rows are read as builds run and workers are."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    rows = {
        row.id: row
        for row in session.scalars(sa.select(InstanceRow).where(InstanceRow.fleet == fleet, sa.text("gone_ms IS NULL")))
    }
    workers = workers_of(session, fleet, {instance.id for instance in listed}, now)
    joined = {worker.id for worker in workers}
    instances = [_instance(instance, rows.get(instance.id), instance.id in joined, generation, now) for instance in listed]
    draining = [worker for worker in workers if worker.at is At.DRAINING]
    queued, builds, oldest_ms = _waiting(session, fleet, farm, now, shape, [one.id for one in workers if one.at is At.BUSY])
    return Sight(
        load=Load(
            now_ms=now,
            known_ms=now - int(age_s * 1000),
            queued=queued,
            waiting=builds,
            oldest_wait_s=max(0, now - oldest_ms) / 1000 if oldest_ms is not None else 0,
            running=sum(worker.held for worker in workers),
            on_draining=sum(worker.held for worker in draining),
            idle=sum(worker.at is At.IDLE for worker in workers),
            busy=sum(worker.at is At.BUSY for worker in workers),
            booting=sum(instance.boots for instance in instances),
            draining=len(draining),
            build_s=times.build_s,
            boot_s=times.boot_s,
        ),
        workers=workers,
        instances=instances,
        unlisted=sorted(set(rows) - {instance.id for instance in listed}),
    )


def _instance(instance: Instance, row: InstanceRow | None, joined: bool, generation: int, now: int) -> InstanceSeen:
    news = row is None or row.state != instance.state or (joined and row.joined_ms is None)
    joined = joined or (row is not None and row.joined_ms is not None)
    return InstanceSeen(
        news=news,
        id=instance.id,
        state=instance.state,
        generation=instance.generation,
        known_ms=row.found_ms if row is not None else now,
        joined=joined,
        released=row is not None and row.released_ms is not None,
        stranger=not joined and (instance.generation is None or instance.generation > generation),
    )


def workers_of(session: Session, fleet: str, listed: set[str], now: int) -> list[WorkerSeen]:
    """All that live, and those of listed instances that do not."""
    held: Counter[str | None] = Counter()
    for owner, count in session.execute(
        sa.select(Build.lease_owner, sa.func.count()).where(IS_HELD, Build.fleet == fleet).group_by(Build.lease_owner)
    ):
        held[owner] = count
    heard_ms = session.scalar(sa.select(sa.func.max(Worker.last_seen_ms))) or 0
    lost_ms = LOST_MS if heard_ms > now - SILENT_MS else 10 * LOST_MS  # where nobody is heard, it is not that one that is lost
    seen = []
    for worker in session.scalars(sa.select(Worker).where(Worker.fleet == fleet).order_by(Worker.id)):
        silent_ms = now - worker.last_seen_ms
        instance = worker.id in listed
        marked = worker.leave_ms is not None
        lives = held[worker.id] > 0 or (worker.state != "gone" and silent_ms < (lost_ms if instance else SILENT_MS))
        if not lives and not instance:
            continue
        if not lives:
            at = At.GONE if worker.state == "gone" else At.LOST
        elif marked or worker.state != "up":
            at = At.DRAINING
        else:
            at = At.BUSY if held[worker.id] else At.IDLE
        seen.append(
            WorkerSeen(
                id=worker.id,
                at=at,
                held=held[worker.id],
                slots=worker.slots,
                generation=worker.generation,
                instance=instance,
                marked=marked,
                told=worker.state != "up",
                idle_since_ms=worker.idle_since_ms,
                silent_ms=max(0, silent_ms),
                not_claiming=worker.not_claiming,
                why=worker.leave_why,
            )
        )
    return seen


def _waiting(
    session: Session, fleet: str, farm: Settings, now: int, shape: WorkerShape, staying: Sequence[str]
) -> tuple[int, int, int | None]:
    """How many slots the builds come to that free slots would start, how many builds that is, and since when the oldest waits.

    Builds that no worker of this shape could ever hold count for nothing. Where it has cpus or memory, the others count as they
    can be packed beside what the `staying` workers hold.
    """
    load = lanes.load_of(session, fleet)
    limits = lanes.limits_of(session, fleet, farm)
    if not limits.leave_room(load):
        return 0, 0, None
    left = min(most - running for most, running in _limited(limits, load))
    rooms: dict[str, int] = {}
    found: Counter[Need] = Counter()
    oldest_ms: int | None = None
    whole = shape_offer(shape)
    for project, key, waiting, since_ms, limit in _kinds(session, fleet, load, now, whole):
        if left < 1:
            break
        need = Need.parse(key)
        if need is None or not whole.holds(need):
            continue
        most = left if limit is None else limit - load.by_project.get(project, 0)
        taken = max(0, min(waiting, left, rooms.setdefault(project, most)))
        rooms[project] -= taken
        left -= taken
        if taken:
            found[need] += taken
            oldest_ms = since_ms if oldest_ms is None else min(oldest_ms, since_ms)
    return _as_slots(session, found, shape, staying), found.total(), oldest_ms


def _kinds(session: Session, fleet: str, load: lanes.Load, now: int, whole: Offer) -> Iterable[_Kind]:
    """What waits, by project and need. Of very much, those alone that may start, so that no others hide them."""
    some = (
        sa.select(Build.project_name, Build.need, Build.queued_ms)
        .where(IS_QUEUED, Build.fleet == fleet, lanes.may_start(now))
        .limit(_MOST_COUNTED)
        .subquery()
    )
    kinds = (
        sa.select(
            some.c.project_name, some.c.need, sa.func.count().label("waiting"), sa.func.min(some.c.queued_ms).label("since")
        )
        .group_by(some.c.project_name, some.c.need)
        .order_by(some.c.project_name, some.c.need)
        .subquery()
    )
    rows = sa.select(kinds, Project.concurrent_build_limit).join(Project, Project.name == kinds.c.project_name)
    found: list[_Kind] = [row._tuple() for row in session.execute(rows)]
    if sum(waiting for _project, _need, waiting, _since_ms, _limit in found) < _MOST_COUNTED:
        return found
    return _kind_by_kind(session, fleet, load, now, whole)


def _kind_by_kind(session: Session, fleet: str, load: lanes.Load, now: int, whole: Offer) -> Iterator[_Kind]:
    """The same, each counted by itself when it is asked for, and no more of it than its project may run."""
    lanes.keep_plans(session)
    needs = [key for key, need in lanes.waiting_needs(session, fleet).items() if whole.holds(need)]
    if not needs:
        return
    waiting = lanes.waiting_projects(session, fleet, needs)
    rows = sa.select(waiting, Project.concurrent_build_limit).join(Project, Project.name == waiting.c.project)
    for need, project, limit in session.execute(rows).all():
        most = _MOST_COUNTED if limit is None else min(_MOST_COUNTED, limit - load.by_project.get(project, 0))
        if most < 1:
            continue
        some = (
            sa.select(Build.queued_ms)
            .where(IS_QUEUED, Build.fleet == fleet, Build.need == need, Build.project_name == project, lanes.may_start(now))
            .limit(most)
            .subquery()
        )
        count, since_ms = session.execute(sa.select(sa.func.count(), sa.func.min(some.c.queued_ms))).one()
        if count:
            yield project, need, count, since_ms, limit


def _limited(limits: lanes.Limits, load: lanes.Load) -> list[tuple[int, int]]:
    """How many builds may run, and do; the last is what is counted at most."""
    known = ((limits.fleet, load.fleet), (limits.everything, load.everything))
    return [*((most, running) for most, running in known if most is not None), (_MOST_COUNTED, 0)]


def _as_slots(session: Session, waiting: Counter[Need], shape: WorkerShape, staying: Sequence[str]) -> int:
    """So many slots more than builds are held, that workers of this shape hold all of it."""
    whole = shape_offer(shape)
    if whole.is_unbounded or not waiting:
        return waiting.total()
    kinds = sa.select(Build.need, sa.func.count()).where(IS_HELD, Build.lease_owner.in_(staying)).group_by(Build.need)
    held: Counter[Need] = Counter()
    for key, count in session.execute(kinds):
        if (need := Need.parse(key)) is not None and whole.holds(need):
            held[need] += count
    return max(waiting.total(), slots_needed(held + waiting, shape, shape.slots) - held.total())


def measure(session: Session, fleet: str) -> Times:
    """How long builds and boots took of late."""
    last = sa.select(sa.func.max(Event.id) - _EVENTS).scalar_subquery()
    lengths = session.scalars(
        sa.select(Attempt.ended_ms - Attempt.claimed_ms)
        .select_from(Event)
        .join(Build, Build.id == Event.build_id)
        .join(Attempt, sa.and_(Attempt.build_id == Event.build_id, Attempt.attempt_no == Event.attempt_no))
        .where(Event.id > last, Event.after.in_(_ENDED), Build.fleet == fleet)
        .where(Attempt.ended_ms.is_not(None), Attempt.verdict != Verdict.HANDED_BACK.value)
        .order_by(Event.id.desc())
        .limit(_LENGTHS)
    ).all()
    boots = session.scalars(
        sa.select(InstanceRow.joined_ms - InstanceRow.found_ms)
        .where(InstanceRow.fleet == fleet, InstanceRow.joined_ms.is_not(None))
        .order_by(InstanceRow.joined_ms.desc())
        .limit(_BOOTS)
    ).all()
    return Times(build_s=_middle(lengths), boot_s=_middle(boots))


def _middle(lengths_ms: Sequence[int | None]) -> float | None:
    known = [max(0, length) / 1000 for length in lengths_ms if length is not None]
    return statistics.median(known) if known else None
