"""The builds that wait for a fleet, for providers that start an instance for each of them."""

from collections import Counter
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Need
from scheduler import lanes
from scheduler.db import now_ms
from scheduler.fleets.provider import WaitingBuild
from scheduler.models import IS_QUEUED, Build, Project

MOST: Final = 500
"""So many are told of at once; the others are when these have instances."""


def waiting_builds(session: Session, fleet: str) -> list[WaitingBuild]:
    """Those that may be claimed now, the best first, and of no project more than its limit leaves room for.

    Of one level, projects take turns by their weight, after what runs of them; inside a project the oldest come first.
    `attempt_no` is that of the attempt which would begin.
    """
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    running = Counter(lanes.load_of(session, fleet).by_project)
    found: list[WaitingBuild] = []
    full: set[str] = set()
    mine = sa.func.row_number().over(partition_by=Build.project_name, order_by=(Build.rank, Build.queued_ms, Build.number))
    while True:
        ahead = sa.case(dict(running), value=Build.project_name, else_=0) if running else sa.literal(0)
        turn = (mine + ahead) * 1.0 / Project.weight
        rows = session.execute(
            sa.select(Build.id, Build.attempt_no, Build.project_name, Build.settings, Build.need, Project.concurrent_build_limit)
            .join(Project, Project.name == Build.project_name)
            .where(IS_QUEUED, Build.fleet == fleet, lanes.may_start(now))
            .where(Build.project_name.not_in(full), Build.id.not_in([one.build_id for one in found]))
            .order_by(Build.rank, turn, Build.queued_ms, Build.project_name)
            .limit(MOST - len(found))
        ).all()
        before = len(full)
        for build_id, attempt_no, project, settings, key, limit in rows:
            if limit is not None and running[project] >= limit:
                full.add(project)
                continue
            need = Need.parse(key)
            if need is None:  # a damaged record is fsck's
                continue
            running[project] += 1
            found.append(
                WaitingBuild(
                    build_id=build_id,
                    attempt_no=attempt_no + 1,
                    image=settings["environment"]["image"],
                    cpus=need.cpu_millis / 1000,
                    memory_bytes=need.memory_bytes,
                )
            )
        if len(full) == before:  # so that those of a project at its limit hide no others
            break
    return found
