"""Why a build waits: who goes before it, which limits bind, and what would start it.

Foreseen with the rules by which builds are claimed (`scheduler.fairness`), as if from now on nothing ended and nothing came. So
the answer can be put to the test, and is: where all limits that it names are lifted as far as it says, the build is claimed;
where one of them is not, it is not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler import fairness, lanes
from scheduler.db import Database, now_ms
from scheduler.fairness import Lane
from scheduler.fleets.capacity import capacity_of
from scheduler.lanes import Load
from scheduler.models import IS_QUEUED, Build, Fleet, Project, Served

_WORK: Final = 200_000
"""How much is looked at before the answer is `more than so many`: claims times projects."""
_PAGE: Final = 200
_NAMED: Final = 5
"""How many workers that take no builds are named."""
AHEAD_SHOWN: Final = 10


class Limit(StrEnum):
    """What can keep a build from being claimed."""

    FLEET_PAUSED = "fleet_paused"
    FLEET_LIMIT = "fleet_limit"
    FARM_LIMIT = "farm_limit"
    PROJECT_LIMIT = "project_limit"
    BACK_OFF = "back_off"
    NO_WORKER = "no_worker"
    SLOTS = "slots"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A limit that binds. `needs`: the limit, the free slots, or for BACK_OFF the time in ms, that would do; None for a pause."""

    limit: Limit
    says: str
    lift: str
    needs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A build that goes before."""

    build_id: str
    project: str


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Where a build stands. `position` counts from 1; None: it does not wait, or is further back than `ahead_count`.

    `ahead` names the first few. Without `limits` a waiting build is claimed by the next free slot that asks.
    """

    build_id: str
    state: BuildState
    fleet: str
    position: int | None
    ahead_count: int
    ahead: Sequence[Ahead]
    limits: Sequence[Bound]
    says: str


def explain(db: Database, build_id: str, settings: Settings) -> Waiting | None:
    """Why the build waits; None where there is none such."""
    if "\x00" in build_id:
        return None
    with db.reading() as session:
        build = session.get(Build, build_id)
        if build is None:
            return None
        if build.state != BuildState.QUEUED:
            return _not_waiting(build)
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        load = lanes.load_of(session, build.fleet)
        ahead, found = _foresee(session, build, load, now)
        own = 1 + sum(one.project == build.project_name for one in ahead)
        limits = _limits(session, build, settings, load, len(ahead) + 1, own, now)
    return Waiting(
        build_id=build.id,
        state=BuildState.QUEUED,
        fleet=build.fleet,
        position=len(ahead) + 1 if found else None,
        ahead_count=len(ahead),
        ahead=ahead[:AHEAD_SHOWN],
        limits=limits,
        says=_sentence(build, len(ahead), found, limits),
    )


def _not_waiting(build: Build) -> Waiting:
    held = build.lease_owner is not None
    says = f"it does not wait: it is {build.state}" + (f" on worker {build.lease_owner}" if held else f" ({build.reason})")
    return Waiting(
        build_id=build.id,
        state=BuildState(build.state),
        fleet=build.fleet,
        position=None,
        ahead_count=0,
        ahead=(),
        limits=(),
        says=says,
    )


def _sentence(build: Build, ahead: int, found: bool, limits: Sequence[Bound]) -> str:
    before = (
        "nothing goes before it" if not ahead else f"{'' if found else 'more than '}{ahead} build{'s' * (ahead > 1)} go before it"
    )
    where = f"in fleet {build.fleet} {before}"
    if not limits:
        return f"{where}; the next free slot that asks takes it, within seconds"
    return f"{where}; " + ", and ".join(bound.says for bound in limits)


@dataclass(kw_only=True)
class _Line:
    """A project's waiting builds in both orders, read as far as they are needed."""

    project: str
    weight: int
    limit: int | None
    served: int
    running: int
    everywhere: int
    orders: dict[bool, Iterator[Build]]
    heads: dict[bool, Build | None] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def lane(self, *, fair: bool) -> Lane | None:
        """As `scheduler.lanes` would read it after what was taken; None where nothing of it may be claimed."""
        if self.limit is not None and self.everywhere >= self.limit:
            return None
        head = self.heads.get(fair)
        if fair not in self.heads or (head is not None and head.id in self.taken):
            head = self.heads[fair] = next((build for build in self.orders[fair] if build.id not in self.taken), None)
        if head is None:
            return None
        return Lane(
            project=self.project,
            weight=self.weight,
            running=self.running,
            served=self.served,
            build_id=head.id,
            level=head.level,
            queued_ms=head.queued_ms,
        )


def _foresee(session: Session, build: Build, load: Load, now: int) -> tuple[list[Ahead], bool]:
    """The builds that are claimed before `build`, in order, and whether it was reached. Its project's own limit is off."""
    lines = _lines(session, build, load, now)
    turn = lanes.turn_of(session, build.fleet)
    claims, clock = turn.claims, turn.clock
    ahead: list[Ahead] = []
    for _ in range(max(50, _WORK // max(1, len(lines)))):
        fair = fairness.is_fair(claims)
        lane = fairness.choose((lane for line in lines.values() if (lane := line.lane(fair=fair)) is not None), fair=fair)
        if lane is None:
            raise AssertionError("the build itself can be chosen")
        if lane.build_id == build.id:
            return ahead, True
        ahead.append(Ahead(build_id=lane.build_id, project=lane.project))
        line = lines[lane.project]
        line.taken.add(lane.build_id)
        line.served, clock = fairness.serve(line.served, line.weight, clock)
        line.running += 1
        line.everywhere += 1
        claims += 1
    return ahead, False


def _lines(session: Session, build: Build, load: Load, now: int) -> dict[str, _Line]:
    here = lanes.waiting_projects(build.fleet)
    rows = session.execute(
        sa.select(Project.name, Project.weight, Project.concurrent_build_limit, Served.clock)
        .select_from(here)
        .join(Project, Project.name == here.c.project)
        .outerjoin(Served, sa.and_(Served.fleet == build.fleet, Served.project_name == Project.name))
    ).all()
    may = sa.or_(lanes.may_start(now), Build.id == build.id)
    return {
        name: _Line(
            project=name,
            weight=weight,
            limit=None if name == build.project_name else limit,
            served=served or 0,
            running=load.here.get(name, 0),
            everywhere=load.by_project.get(name, 0),
            orders={fair: _pages(session, build.fleet, name, may, fair=fair) for fair in (False, True)},
        )
        for name, weight, limit, served in rows
    }


def _pages(session: Session, fleet: str, project: str, may: sa.ColumnElement[bool], *, fair: bool) -> Iterator[Build]:
    builds = sa.select(Build).where(IS_QUEUED, Build.fleet == fleet, Build.project_name == project, may)
    builds = builds.order_by(*(lanes.OLDEST if fair else lanes.BEST))
    at = 0
    while page := session.scalars(builds.offset(at).limit(_PAGE)).all():
        yield from page
        at += len(page)


def _limits(
    session: Session, build: Build, settings: Settings, load: Load, position: int, own: int, now: int
) -> tuple[Bound, ...]:
    """The limits that bind, where `position` claims must happen for the build to be claimed, `own` of them of its project."""
    fleet = build.fleet
    row = session.get(Fleet, fleet) or Fleet(name=fleet)
    project_limit = session.scalar(sa.select(Project.concurrent_build_limit).where(Project.name == build.project_name))
    bounds: list[Bound] = []
    if row.paused_ms is not None:
        why = f": {row.paused_why}" if row.paused_why else ""
        bounds.append(
            Bound(
                limit=Limit.FLEET_PAUSED,
                says=f"fleet {fleet} is paused by {row.paused_by}{why}",
                lift=f"resume the fleet: millrace fleet resume {fleet}",
            )
        )
    of_project = load.by_project.get(build.project_name, 0)
    for limit, what, most, running, needs, lift in (
        (
            Limit.PROJECT_LIMIT,
            f"project {build.project_name}",
            project_limit,
            of_project,
            of_project + own,
            "its concurrentBuildLimit",
        ),
        (Limit.FLEET_LIMIT, f"fleet {fleet}", row.max_running, load.fleet, load.fleet + position, "the fleet's maxRunning"),
        (Limit.FARM_LIMIT, "the farm", settings.max_running, load.everything, load.everything + position, "MILLRACE_MAX_RUNNING"),
    ):
        if most is not None and needs > most:
            bounds.append(
                Bound(
                    limit=limit,
                    says=f"{what} may run {most} at once and runs {running}",
                    lift=f"wait until builds of it end, or raise {lift} to {needs}",
                    needs=needs,
                )
            )
    if build.not_before_ms > now:
        wait_s = (build.not_before_ms - now + 999) // 1000
        bounds.append(
            Bound(
                limit=Limit.BACK_OFF,
                says=f"its last attempt failed through the farm's fault, and the next one waits {wait_s} s more",
                lift="wait for that",
                needs=build.not_before_ms,
            )
        )
    capacity = capacity_of(session, fleet)
    if capacity.free_slots < position:
        missing = position - capacity.free_slots
        none = capacity.workers == 0
        slots = f"{missing} more free slot{'s' * (missing > 1)}"
        bounds.append(
            Bound(
                limit=Limit.NO_WORKER if none else Limit.SLOTS,
                says=f"no worker of fleet {fleet} is there"
                if none
                else "; ".join(
                    (
                        f"{capacity.free_slots} of {capacity.slots} slots of {capacity.workers} workers are free",
                        *capacity.not_claiming[:_NAMED],
                    )
                ),
                lift=f"start a worker of fleet {fleet} with {slots}"
                if none
                else f"{slots}: wait until builds end, "
                + ("mend what keeps workers from taking builds, " if capacity.not_claiming else "")
                + f"or add workers to fleet {fleet}",
                needs=position,
            )
        )
    return tuple(bounds)
