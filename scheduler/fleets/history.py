"""The load that a fleet really had, from the records of its builds: to be tried again with other settings."""

import statistics
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from millrace.fleet import FleetSettings
from scheduler.db import Database
from scheduler.fleets import records
from scheduler.models import Attempt, Build, Fleet, Instance

MOST: Final = 50_000


@dataclass(frozen=True, kw_only=True)
class Held:
    """A slot was held for `length_ms` from `waited_ms` after `at_ms`, when there was something to hold it for."""

    at_ms: int
    waited_ms: int
    length_ms: int


@dataclass(frozen=True, kw_only=True)
class History:
    """Slots that were held for builds that came in a stretch of time, by time. An attempt that followed another came when
    that ended.

    `open`: attempts that have not ended, and builds that never had one; they are left out. `cut`: there were more than `MOST`
    builds. `boot_s`: the median of how long the fleet's last hundred workers took to come, None where none of its own has.
    """

    held: list[Held]
    open: int
    cut: bool
    boot_s: float | None
    settings: FleetSettings


def of(db: Database, fleet: str, since_ms: int, until_ms: int) -> History:
    """What was held of a fleet for builds that came from `since_ms` on and before `until_ms`. Raises NotFound."""
    records.get(db, fleet)
    builds = (
        sa.select(Build.id, Build.submitted_ms)
        .where(Build.submitted_ms >= since_ms, Build.submitted_ms < until_ms, Build.fleet == fleet)
        .order_by(Build.submitted_ms, Build.id)
        .limit(MOST + 1)
        .subquery()
    )
    tried = (
        sa.select(builds.c.id, builds.c.submitted_ms, Attempt.claimed_ms, Attempt.ended_ms)
        .select_from(builds.outerjoin(Attempt, Attempt.build_id == builds.c.id))
        .order_by(builds.c.submitted_ms, builds.c.id, Attempt.attempt_no)
    )
    boots = (
        sa.select(Instance.joined_ms - Instance.found_ms)
        .where(Instance.fleet == fleet, Instance.joined_ms.is_not(None))
        .order_by(Instance.found_ms.desc())
        .limit(100)
    )
    held: list[Held] = []
    left_open, known, last_id, came_ms = 0, 0, "", 0
    with db.reading() as session:
        row = session.get(Fleet, fleet)
        for build_id, submitted_ms, claimed_ms, ended_ms in session.execute(tried):
            if build_id != last_id:
                known, last_id, came_ms = known + 1, build_id, submitted_ms
            if known > MOST:
                break
            if ended_ms is None:
                left_open += 1
                continue
            held.append(Held(at_ms=came_ms, waited_ms=max(0, claimed_ms - came_ms), length_ms=max(0, ended_ms - claimed_ms)))
            came_ms = ended_ms
        booted = [ms for ms in session.scalars(boots) if ms is not None]
    return History(
        held=sorted(held, key=lambda one: one.at_ms),
        open=left_open,
        cut=known > MOST,
        boot_s=statistics.median(booted) / 1000 if booted else None,
        settings=FleetSettings.model_validate(row.settings if row is not None and row.settings else {}),
    )
