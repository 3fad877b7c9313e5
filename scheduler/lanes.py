"""The waiting builds of a fleet, a lane for each project. What is read here costs the same however many wait."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.settings import Settings
from scheduler.fairness import Lane
from scheduler.models import IS_HELD, IS_QUEUED, Build, Fleet, Project, Served, Turn

BEST = (Build.rank, Build.number)
OLDEST = (Build.number,)
"""The two orders in which a project's builds wait."""


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
    """The fleet's count of claims and its clock."""
    return session.get(Turn, fleet) or Turn(fleet=fleet, claims=0, clock=0)


def may_start(now: int) -> sa.ColumnElement[bool]:
    """Of a waiting build: nothing but its turn and the limits keeps it."""
    return sa.and_(Build.not_before_ms <= now, Build.cancel_requested_ms.is_(None), Build.queue_deadline_ms > now)


def read_lanes(session: Session, fleet: str, load: Load, now: int, *, fair: bool, without: Iterable[str] = ()) -> list[Lane]:
    """The projects that may have a build claimed now, each with its oldest build where `fair`, else its best one.

    Projects at their limit are left out, and those in `without`. As many rows are read as projects wait.
    """
    waiting = waiting_projects(fleet)
    head = (
        sa.select(Build.id)
        .where(IS_QUEUED, Build.fleet == fleet, Build.project_name == waiting.c.project, may_start(now))
        .order_by(*(OLDEST if fair else BEST))
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    best = sa.select(waiting.c.project, head.label("build_id")).where(waiting.c.project.is_not(None)).cte("best")
    rows = session.execute(
        sa.select(
            Project.name, Project.weight, Project.concurrent_build_limit, Served.clock, Build.id, Build.level, Build.queued_ms
        )
        .select_from(best)
        .join(Build, Build.id == best.c.build_id)
        .join(Project, Project.name == best.c.project)
        .outerjoin(Served, sa.and_(Served.fleet == fleet, Served.project_name == best.c.project))
    )
    skipped = frozenset(without)
    return [
        Lane(
            project=project,
            weight=weight,
            running=load.here.get(project, 0),
            served=served or 0,
            build_id=build_id,
            level=level,
            queued_ms=queued_ms,
        )
        for project, weight, limit, served, build_id, level, queued_ms in rows
        if project not in skipped and (limit is None or load.by_project.get(project, 0) < limit)
    ]


def waiting_fleets(session: Session) -> list[str]:
    """The fleets that builds wait for."""
    return list(session.scalars(sa.select(_steps(Build.fleet, "fleet_step").c.value).where(sa.text("value IS NOT NULL"))))


def waiting_projects(fleet: str) -> sa.Subquery:
    """The projects that have builds waiting for the fleet: `waiting.project`, and a NULL."""
    steps = _steps(Build.project_name, "project_step", Build.fleet == fleet)
    return sa.select(steps.c.value.label("project")).subquery("waiting")


def _steps(column: sa.orm.InstrumentedAttribute[str], name: str, *where: sa.ColumnElement[bool]) -> sa.CTE:
    """The distinct values of a column of waiting builds, by one step through the index for each; the last row is NULL."""
    least = sa.select(column).where(IS_QUEUED, *where).order_by(column).limit(1)  # not min(): PostgreSQL may read all for that
    first = sa.select(least.scalar_subquery().label("value")).cte(name, recursive=True)
    following = least.where(column > first.c.value).correlate(first).scalar_subquery()
    return first.union_all(sa.select(following).where(first.c.value.is_not(None)))
