"""The waiting builds of a fleet, a lane for each project and need. What is read here costs the same however many wait."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Need
from millrace.settings import Settings
from scheduler.fairness import Lane
from scheduler.models import IS_HELD, IS_QUEUED, Build, Fleet, Project, Served, Turn

BEST = (Build.rank, Build.number)
OLDEST = (Build.number,)
"""The two orders in which the builds of a lane wait."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is held now: in all, of this fleet, of each project in all, and of each project in this fleet."""

    everything: int
    fleet: int
    by_project: Mapping[str, int]
    here: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What keeps a whole fleet from claiming. None: no limit."""

    paused: bool
    fleet: int | None
    everything: int | None

    def leave_room(self, load: Load) -> bool:
        """Whether one more build of the fleet may run."""
        return (
            not self.paused
            and (self.fleet is None or load.fleet < self.fleet)
            and (self.everything is None or load.everything < self.everything)
        )


def load_of(session: Session, fleet: str) -> Load:
    """What is held now. As many rows are read as builds run."""
    held = sa.select(Build.fleet, Build.project_name, sa.func.count()).where(IS_HELD).group_by(Build.fleet, Build.project_name)
    everywhere: Counter[str] = Counter()
    here: Counter[str] = Counter()
    for of_fleet, project, count in session.execute(held):
        everywhere[project] += count
        if of_fleet == fleet:
            here[project] += count
    return Load(everything=everywhere.total(), fleet=here.total(), by_project=everywhere, here=here)


def limits_of(session: Session, fleet: str, settings: Settings) -> Limits:
    """What the fleet and the farm allow."""
    row = session.get(Fleet, fleet)
    return Limits(
        paused=row is not None and row.paused_ms is not None,
        fleet=row.max_running if row is not None else None,
        everything=settings.max_running,
    )


def turn_of(session: Session, fleet: str) -> Turn:
    """The fleet's counts of claims and its clock."""
    return session.get(Turn, fleet) or Turn(fleet=fleet, claims=0, clock=0, offers={})


def may_start(now: int) -> sa.ColumnElement[bool]:
    """Of a waiting build: nothing but its turn, its need and the limits keeps it."""
    return sa.and_(Build.not_before_ms <= now, Build.cancel_requested_ms.is_(None), Build.queue_deadline_ms > now)


def waiting_needs(session: Session, fleet: str) -> dict[str, Need]:
    """What the waiting builds of the fleet need, each kind once, by its key. As many rows are read as there are kinds."""
    keys = session.scalars(sa.select(_steps(Build.need, "need_step", Build.fleet == fleet).c.value))
    return {key: need for key in keys if key is not None and (need := Need.parse(key)) is not None}


def read_lanes(
    session: Session, fleet: str, load: Load, now: int, needs: Collection[str], *, fair: bool, without: Iterable[str] = ()
) -> list[Lane]:
    """For each project that may have a build of these needs claimed now, and each need: the oldest one if `fair`, else the best.

    Projects at their limit are left out, and those in `without`. As many rows are read as projects wait, for each need.
    """
    if not needs:
        return []
    waiting = waiting_projects(fleet, needs)
    head = (
        sa.select(Build.id)
        .where(
            IS_QUEUED,
            Build.fleet == fleet,
            Build.need == waiting.c.need,
            Build.project_name == waiting.c.project,
            may_start(now),
        )
        .order_by(*(OLDEST if fair else BEST))
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    heads = sa.select(head.label("build_id")).select_from(waiting).where(waiting.c.project.is_not(None)).cte("heads")
    skipped = frozenset(without)
    return [lane for lane in _lanes(session, fleet, load, heads) if lane.project not in skipped]


def read_lane(session: Session, fleet: str, load: Load, now: int, build_id: str) -> Lane | None:
    """The lane of this very build, as if it were the first of it; None where it may not be claimed now."""
    only = sa.select(Build.id.label("build_id")).where(IS_QUEUED, Build.fleet == fleet, Build.id == build_id, may_start(now))
    return next(iter(_lanes(session, fleet, load, only.cte("heads"))), None)


def _lanes(session: Session, fleet: str, load: Load, heads: sa.CTE) -> list[Lane]:
    """The lanes of these builds, but for those of projects at their limit."""
    rows = session.execute(
        sa.select(
            Project.name,
            Project.weight,
            Project.concurrent_build_limit,
            Served.clock,
            Build.id,
            Build.level,
            Build.queued_ms,
            Build.need,
            Build.rank,
            Build.number,
            Build.passed_ms,
        )
        .select_from(heads)
        .join(Build, Build.id == heads.c.build_id)
        .join(Project, Project.name == Build.project_name)
        .outerjoin(Served, sa.and_(Served.fleet == fleet, Served.project_name == Project.name))
    )
    return [
        Lane(
            project=row.name,
            weight=row.weight,
            running=load.here.get(row.name, 0),
            served=row.clock or 0,
            build_id=row.id,
            level=row.level,
            queued_ms=row.queued_ms,
            need=row.need,
            rank=row.rank,
            number=row.number,
            passed_ms=row.passed_ms,
        )
        for row in rows
        if row.concurrent_build_limit is None or load.by_project.get(row.name, 0) < row.concurrent_build_limit
    ]


def waiting_fleets(session: Session) -> list[str]:
    """The fleets that builds wait for."""
    return list(session.scalars(sa.select(_steps(Build.fleet, "fleet_step").c.value).where(sa.text("value IS NOT NULL"))))


def waiting_projects(fleet: str, needs: Collection[str]) -> sa.Subquery:
    """The projects with builds of these needs that wait for the fleet: `waiting.need` and `waiting.project`, or NULL for that.

    Found by one step through the index for each, the steps of all needs side by side.
    """
    kinds = sa.union_all(*(sa.select(sa.literal(need, sa.String).label("need")) for need in sorted(needs))).subquery("kinds")
    least = sa.select(Build.project_name).where(IS_QUEUED, Build.fleet == fleet).order_by(Build.project_name).limit(1)
    first = sa.select(
        kinds.c.need, least.where(Build.need == kinds.c.need).correlate(kinds).scalar_subquery().label("project")
    ).cte("project_step", recursive=True)
    following = least.where(Build.need == first.c.need, Build.project_name > first.c.project).correlate(first).scalar_subquery()
    steps = first.union_all(sa.select(first.c.need, following).where(first.c.project.is_not(None)))
    return sa.select(steps.c.need, steps.c.project).subquery("waiting")


def _steps(column: sa.orm.InstrumentedAttribute[str], name: str, *where: sa.ColumnElement[bool]) -> sa.CTE:
    """The distinct values of a column of waiting builds, by one step through the index for each; the last row is NULL."""
    least = sa.select(column).where(IS_QUEUED, *where).order_by(column).limit(1)  # not min(): PostgreSQL may read all for that
    first = sa.select(least.scalar_subquery().label("value")).cte(name, recursive=True)
    following = least.where(column > first.c.value).correlate(first).scalar_subquery()
    return first.union_all(sa.select(following).where(first.c.value.is_not(None)))
