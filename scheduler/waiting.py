"""Why a build waits: who goes before it, which limits bind, and what would start it.

Foreseen with the rules by which builds are claimed (`scheduler.foresight`), as if from now on nothing ended and nothing came. So
the answer can be put to the test, and is: where all limits that it names are lifted as far as it says, the build is claimed;
where one of them is not, it is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from millrace.errors import Conflict
from millrace.need import Need
from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler import bounds, lanes, placement
from scheduler.bounds import Bound
from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import living
from scheduler.fleets.overflow import MOVED
from scheduler.foresight import Ahead, foresee
from scheduler.models import Build
from scheduler.queue import asked_for

AHEAD_SHOWN: Final = 10


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
    """Why the build waits; None where there is none such. Raises Conflict where its record cannot be read."""
    if "\x00" in build_id:
        return None
    with db.reading() as session:
        build = session.get(Build, build_id)
        if build is None:
            return None
        if build.state != BuildState.QUEUED:
            return _not_waiting(build)
        lanes.keep_plans(session)
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        load = lanes.load_of(session, build.fleet)
        need = Need.parse(build.need)
        if need is None:
            raise Conflict(f"the record of build {build.id} is damaged", hint="Stop it and start another one.")
        workers, shape = living(session, build.fleet), placement.scaled_shape(session, build.fleet)
        like = bounds.like_of(need, workers, shape)
        foreseen = foresee(session, build, load, now, workers, like)
        ahead, found = foreseen.ahead, foreseen.found
        own = 1 + sum(one.project == build.project_name for one in ahead)
        limits = [
            *bounds.of_records(session, build, settings, load, len(ahead) + 1, own, now),
            *bounds.of_workers(build.fleet, need, workers, shape, like, foreseen),
        ]
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
    if MOVED in build.marks:
        where = f"{where} (it was moved there, as fleet {_asked_for(build)} was full)"
    if not limits:
        return f"{where}; the next free slot that asks takes it, within seconds"
    return f"{where}; " + ", and ".join(bound.says for bound in limits)


def _asked_for(build: Build) -> str:
    environment = build.settings.get("environment")
    fleet = environment.get("fleet") if isinstance(environment, dict) else None
    return asked_for(fleet.get("fleetArn") if isinstance(fleet, dict) else None)
