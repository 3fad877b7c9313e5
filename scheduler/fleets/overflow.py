"""Builds that a fleet cannot start at its maximum go to another one (CodeBuild: overflowBehavior ON_DEMAND)."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.log import get_logger
from scheduler import lanes
from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import living
from scheduler.models import IS_QUEUED, Build, Fleet
from scheduler.placement import misfit, scaled_shape

log = get_logger(__name__)
MOVED = "overflowed"
"""The mark of a build that was moved, with when."""
_AT_ONCE = 200


def move(db: Database, fleet: str, to: str, count: int, *, waited_s: float) -> Sequence[str]:
    """Have `count` waiting builds wait for the fleet `to`: those that came last, of such as have waited for `waited_s`.

    They stay the builds that they are, with their numbers and all else. None goes to a fleet that is paused,
    that has neither a worker nor a provider, or whose workers could never hold it; and none whose project is at its limit, as it
    would wait there, too.
    """

    def work(session: Session) -> list[str]:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        other = session.get(Fleet, to)
        if other is not None and other.paused_ms is not None:
            return []
        shape = scaled_shape(session, to)
        if shape is None and not living(session, to):
            return []
        needs = [key for key, need in lanes.waiting_needs(session, fleet).items() if shape is None or not misfit(need, shape)]
        waiting = (
            sa.select(Build)
            .where(IS_QUEUED, Build.fleet == fleet, lanes.may_start(now), Build.queued_ms <= now - int(waited_s * 1000))
            .where(Build.need.in_(needs), Build.project_name.not_in(lanes.full_projects(session, lanes.load_of(session, fleet))))
            .order_by(Build.queued_ms.desc(), Build.number.desc())
            .limit(min(count, _AT_ONCE))
            .with_for_update(skip_locked=True)
        )
        moved = session.scalars(waiting).all()
        for build in moved:
            build.fleet, build.marks = to, {**build.marks, MOVED: now}
        return [build.id for build in moved]

    moved = db.run(work)
    for build_id in moved:
        log.info("build.overflowed", build_id=build_id, fleet=fleet, to=to)
    return moved
