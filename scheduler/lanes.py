"""The waiting builds of a fleet, a lane for each project and need. What is read here costs the same however many wait.

That holds as long as the database goes by the indexes of what waits, whose order all queries ask for. PostgreSQL may take another
one and sort, where it knows the table as it was before many builds came, and a claim then takes seconds: so `keep_plans` tells it
not to, and rows are compared in ways that no other index has the order of.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Need
from millrace.settings import Settings
from scheduler.fairness import Lane
from scheduler.models import IS_HELD, IS_QUEUED, Build, Fleet, Project, Served, Turn

BEST = (Build.rank, Build.number)
OLDEST = (Build.number,)
"""The two orders in which the builds of a lane wait."""
_LEAST = (sa.literal(-(2**31)), sa.literal(-(2**31)))
"""What comes before all of them."""


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


def full_projects(session: Session, load: Load) -> list[str]:
    """The projects that are at their limit."""
    limits = sa.select(Project.name, Project.concurrent_build_limit).where(
        Project.name.in_(load.by_project), Project.concurrent_build_limit.is_not(None)
    )
    return sorted(name for name, limit in session.execute(limits) if limit is not None and load.by_project[name] >= limit)


def limits_of(session: Session, fleet: str, settings: Settings) -> Limits:
    """What the fleet and the farm allow."""
    row = session.get(Fleet, fleet)
    return Limits(
        paused=row is not None and row.paused_ms is not None,
        fleet=row.max_running if row is not None else None,
        everything=settings.max_running,
    )


def keep_plans(session: Session) -> None:
    """For the rest of the transaction, on PostgreSQL: by index, in order, whatever its statistics say."""
    if _is_sqlite(session):
        return
    off = [sa.func.set_config(name, "off", True) for name in ("enable_sort", "enable_seqscan", "enable_bitmapscan", "jit")]
    session.execute(sa.select(*off))


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
    waiting = waiting_projects(session, fleet, needs)
    order = OLDEST if fair else BEST
    head = (
        sa.select(Build.id)
        .where(IS_QUEUED, Build.fleet == fleet, *_in_lane(session, waiting, order), may_start(now))
        .order_by(Build.need, Build.project_name, *order)
        .limit(1)
        .correlate(waiting)
        .scalar_subquery()
    )
    heads = session.scalars(sa.select(head).select_from(waiting).where(waiting.c.project.is_not(None))).all()
    skipped = frozenset(without)
    return [lane for lane in _lanes(session, fleet, load, [one for one in heads if one]) if lane.project not in skipped]


def read_lane(session: Session, fleet: str, load: Load, now: int, build_id: str) -> Lane | None:
    """The lane of this very build, as if it were the first of it; None where it may not be claimed now."""
    waits = sa.select(Build.id).where(IS_QUEUED, Build.fleet == fleet, Build.id == build_id, may_start(now))
    return next(iter(_lanes(session, fleet, load, session.scalars(waits).all())), None)


def _lanes(session: Session, fleet: str, load: Load, heads: Collection[str]) -> list[Lane]:
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
        .select_from(Build)
        .join(Project, Project.name == Build.project_name)
        .outerjoin(Served, sa.and_(Served.fleet == fleet, Served.project_name == Project.name))
        .where(Build.id.in_(heads))
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


def waiting_projects(session: Session, fleet: str, needs: Collection[str]) -> sa.Subquery:
    """The projects with builds of these needs that wait for the fleet: `waiting.need` and `waiting.project`, or NULL for that.

    Found by one step through the index for each, the steps of all needs side by side.
    """
    kinds = sa.union_all(*(sa.select(sa.literal(need, sa.String).label("need")) for need in sorted(needs))).subquery("kinds")
    least = sa.select(Build.project_name).where(IS_QUEUED, Build.fleet == fleet).order_by(Build.need, Build.project_name).limit(1)
    start = least.where(*_after(session, kinds.c.need, sa.literal(""))).correlate(kinds).scalar_subquery()
    first = sa.select(kinds.c.need, start.label("project")).cte("project_step", recursive=True)
    following = least.where(*_after(session, first.c.need, first.c.project)).correlate(first).scalar_subquery()
    steps = first.union_all(sa.select(first.c.need, following).where(first.c.project.is_not(None)))
    return sa.select(steps.c.need, steps.c.project).subquery("waiting")


def _is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def _after(session: Session, need: sa.ColumnElement[str], project: sa.ColumnElement[str]) -> Sequence[sa.ColumnElement[bool]]:
    """Of this need, in projects after this one: in words by which each database goes through the index.

    What is equal to something given has no order of its own for PostgreSQL, and then any index would do; SQLite looks up that.
    """
    if _is_sqlite(session):
        return Build.need == need, Build.project_name > project
    return sa.tuple_(Build.need, Build.project_name) > sa.tuple_(need, project), Build.need <= need


def _in_lane(session: Session, waiting: sa.Subquery, order: Sequence[Any]) -> Sequence[sa.ColumnElement[bool]]:
    """Of just this need and this project, in the same way."""
    if _is_sqlite(session):
        return Build.need == waiting.c.need, Build.project_name == waiting.c.project
    place = sa.tuple_(Build.need, Build.project_name, *order)
    least = sa.tuple_(waiting.c.need, waiting.c.project, *_LEAST[: len(order)])
    return place >= least, sa.tuple_(Build.need, Build.project_name) <= sa.tuple_(waiting.c.need, waiting.c.project)


def _steps(column: sa.orm.InstrumentedAttribute[str], name: str, *where: sa.ColumnElement[bool]) -> sa.CTE:
    """The distinct values of a column of waiting builds, by one step through the index for each; the last row is NULL."""
    least = sa.select(column).where(IS_QUEUED, *where).order_by(column).limit(1)  # not min(): PostgreSQL may read all for that
    first = sa.select(least.scalar_subquery().label("value")).cte(name, recursive=True)
    following = least.where(column > first.c.value).correlate(first).scalar_subquery()
    return first.union_all(sa.select(following).where(first.c.value.is_not(None)))
