"""Who is claimed before a build, by the very rules by which workers claim, as if from now on nothing ended and nothing came.

Workers differ in what they offer, and so the order in which they ask counts. It is foreseen as: those that live, by their ids,
each until it gets nothing more; then as many more as it takes, empty, each like one that could hold the build.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Need, Offer
from scheduler import fairness, lanes, placement
from scheduler.fairness import Lane
from scheduler.fleets.capacity import Living, claims
from scheduler.lanes import Load
from scheduler.models import IS_QUEUED, Build, Project, Served

_WORK: Final = 200_000
"""How much is looked at before the answer is `more than so many`: claims times projects."""
_PAGE: Final = 200
MANY_SLOTS: Final = 10**9
"""The slots of a worker that only stands for slots, where nothing else bounds one."""


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A build that goes before."""

    build_id: str
    project: str


@dataclass(frozen=True, kw_only=True)
class Like:
    """What a worker is like that could hold the build. `slots` is None where slots are all that counts, however many it has."""

    offer: Offer
    slots: int | None


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """The builds that are claimed before, in order; whether the build was reached, and by how many more workers than there are.

    `short_of_room`: a living worker that could hold it has a slot for it in the end, but no room.
    """

    ahead: Sequence[Ahead]
    found: bool
    more: int
    short_of_room: bool


@dataclass(kw_only=True)
class _Asker:
    """A worker that asks for builds."""

    offer: Offer
    room: Offer
    slots: int
    keeps: str | None = None


@dataclass(kw_only=True)
class _Queue:
    """The waiting builds of a project and a need, in both orders, read as far as they are needed."""

    orders: dict[bool, Iterator[Build]]
    heads: dict[bool, Build | None] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def head(self, *, fair: bool) -> Build | None:
        """The first that is left."""
        head = self.heads.get(fair)
        if fair not in self.heads or (head is not None and head.id in self.taken):
            head = self.heads[fair] = next((build for build in self.orders[fair] if build.id not in self.taken), None)
        return head


@dataclass(kw_only=True)
class _Line:
    """A project's waiting builds, by their needs."""

    project: str
    weight: int
    limit: int | None
    served: int
    running: int
    everywhere: int
    queues: dict[str, _Queue] = field(default_factory=dict)

    def lanes(self, could: Iterable[str], *, fair: bool) -> Iterator[Lane]:
        """As `scheduler.lanes` would read them after what was taken."""
        if self.limit is not None and self.everywhere >= self.limit:
            return
        for need in could:
            head = self.queues[need].head(fair=fair) if need in self.queues else None
            if head is not None:
                yield self.lane_of(head)

    def lane_of(self, build: Build) -> Lane:
        """The lane whose first build this is."""
        return Lane(
            project=self.project,
            weight=self.weight,
            running=self.running,
            served=self.served,
            build_id=build.id,
            level=build.level,
            queued_ms=build.queued_ms,
            need=build.need,
            rank=build.rank,
            number=build.number,
            passed_ms=build.passed_ms,
        )


def foresee(session: Session, build: Build, load: Load, now: int, workers: Sequence[Living], like: Like) -> Foreseen:
    """What is claimed until `build` is; `like` could hold it. Its project's own limit, and its back-off, are off."""
    return _Course(session, build, load, now).run(workers, like)


class _Course:
    """How the queue goes on."""

    def __init__(self, session: Session, build: Build, load: Load, now: int) -> None:
        self._session, self._build, self._now = session, build, now
        self._lines = _lines(session, build, load, now)
        self._needs = {
            key: need
            for key in {key for line in self._lines.values() for key in line.queues}
            if (need := Need.parse(key)) is not None
        }
        turn = lanes.turn_of(session, build.fleet)
        self._clock = turn.clock
        self._claims: Counter[str] = Counter()
        self._turn = turn
        self._ahead: list[Ahead] = []
        self._asked: list[_Asker] = []
        self._most = max(50, _WORK // max(1, sum(len(line.queues) for line in self._lines.values())))

    def run(self, workers: Sequence[Living], like: Like) -> Foreseen:
        """All askers in turn."""
        there = [_asker(one) for one in workers]
        self._asked = [asker for one, asker in zip(workers, there, strict=True) if claims(one.worker)]
        fresh = (_Asker(offer=like.offer, room=like.offer, slots=like.slots or MANY_SLOTS) for _ in range(self._most))
        more, found = 0, False
        for number, asker in enumerate(chain(there, fresh)):
            if found or len(self._ahead) >= self._most:
                break
            if (more := max(0, number + 1 - len(there))) > 0:
                self._asked.append(asker)
            while asker.slots > 0 and len(self._ahead) < self._most:
                lane = self._next(asker)
                if lane is None:
                    break
                if lane.build_id == self._build.id:
                    found = True
                    break
                self._claim(asker, lane)
        need = self._needs[self._build.need]
        short = any(asker.slots > 0 and asker.offer.holds(need) for asker in there)
        return Foreseen(ahead=self._ahead, found=found, more=more, short_of_room=short)

    def _next(self, asker: _Asker) -> Lane | None:
        """As `scheduler.placement.choose`."""
        fair = fairness.is_fair(placement.claims_of(self._turn, asker.offer) + self._claims[asker.offer.key])
        others = frozenset(one.keeps for one in self._asked if one is not asker and one.keeps is not None)
        if asker.keeps is not None and (lane := self._kept(asker)) is not None:
            if asker.room.is_large_enough(self._needs[lane.need]):
                return lane
            if lane.build_id not in others:
                return None
        asker.keeps = None
        could = [key for key, need in self._needs.items() if asker.offer.holds(need)]
        fits = {key for key in could if asker.room.is_large_enough(self._needs[key])}
        if not fits:
            return None
        found = (lane for line in self._lines.values() for lane in line.lanes(could, fair=fair))
        picked = placement.pick(found, fits, fair=fair, now=self._now, kept=others)
        asker.keeps = None if picked.keep is None else picked.keep.build_id
        return picked.lane

    def _kept(self, asker: _Asker) -> Lane | None:
        """The lane of the build for which it keeps room, where that still waits and may be claimed."""
        waits = sa.select(Build).where(IS_QUEUED, Build.id == asker.keeps, _may(self._build, self._now))
        build = self._session.scalars(waits).first()
        line = self._lines.get(build.project_name) if build is not None else None
        if build is None or line is None or any(build.id in queue.taken for queue in line.queues.values()):
            return None
        full = line.limit is not None and line.everywhere >= line.limit
        fitting = build.need in self._needs and asker.offer.holds(self._needs[build.need])
        return line.lane_of(build) if fitting and not full else None

    def _claim(self, asker: _Asker, lane: Lane) -> None:
        line = self._lines[lane.project]
        line.queues[lane.need].taken.add(lane.build_id)
        line.served, self._clock = fairness.serve(line.served, line.weight, self._clock)
        line.running += 1
        line.everywhere += 1
        asker.slots -= 1
        asker.keeps = None
        asker.room = asker.room.less([self._needs[lane.need]])
        self._claims[asker.offer.key] += 1
        self._ahead.append(Ahead(build_id=lane.build_id, project=lane.project))


def _asker(one: Living) -> _Asker:
    return _Asker(offer=one.offer, room=one.room, slots=one.free_slots, keeps=one.worker.keeps)


def _may(build: Build, now: int) -> sa.ColumnElement[bool]:
    return sa.or_(lanes.may_start(now), Build.id == build.id)


def _lines(session: Session, build: Build, load: Load, now: int) -> dict[str, _Line]:
    here = lanes.waiting_projects(session, build.fleet, lanes.waiting_needs(session, build.fleet))
    rows = session.execute(
        sa.select(here.c.need, Project.name, Project.weight, Project.concurrent_build_limit, Served.clock)
        .select_from(here)
        .join(Project, Project.name == here.c.project)
        .outerjoin(Served, sa.and_(Served.fleet == build.fleet, Served.project_name == Project.name))
    ).all()
    lines: dict[str, _Line] = {}
    for need, name, weight, limit, served in rows:
        line = lines.setdefault(
            name,
            _Line(
                project=name,
                weight=weight,
                limit=None if name == build.project_name else limit,
                served=served or 0,
                running=load.here.get(name, 0),
                everywhere=load.by_project.get(name, 0),
            ),
        )
        line.queues[need] = _Queue(
            orders={fair: _pages(session, build.fleet, name, need, _may(build, now), fair=fair) for fair in (False, True)}
        )
    return lines


def _pages(session: Session, fleet: str, project: str, need: str, may: sa.ColumnElement[bool], *, fair: bool) -> Iterator[Build]:
    builds = sa.select(Build).where(IS_QUEUED, Build.fleet == fleet, Build.need == need, Build.project_name == project, may)
    builds = builds.order_by(*(lanes.OLDEST if fair else lanes.BEST))
    at = 0
    while page := session.scalars(builds.offset(at).limit(_PAGE)).all():
        yield from page
        at += len(page)
