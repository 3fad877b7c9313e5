"""What `millrace why` says is put to the test: the limits that it names are those that bind, all of them and no other."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.need import GIB
from millrace.settings import Settings
from scheduler import leases, lifecycle, waiting
from scheduler.bounds import Bound, Limit
from scheduler.db import Database, now_ms
from scheduler.fleets import records
from scheduler.fleets.capacity import living
from scheduler.leases import hash_token
from scheduler.models import Build, Fleet, Project, Worker
from scheduler.waiting import Waiting
from tests.support.records import a_build, a_claim_request, a_project, a_report

PROJECTS = ("aa", "bb", "cc")
NEEDS: tuple[dict[str, Any], ...] = (
    {},
    {"computeTypeOverride": "BUILD_GENERAL1_MEDIUM"},
    {"workerLabelsOverride": ["gpu"]},
    {"computeTypeOverride": "BUILD_GENERAL1_LARGE", "workerLabelsOverride": ["gpu"]},
)
OFFERS: tuple[dict[str, Any], ...] = (
    {},
    {"cpus": 4, "labels": ("gpu",)},
    {"cpus": 6, "memory_bytes": 12 * GIB},
    {"labels": ("gpu", "ssd")},
)


@dataclass(frozen=True)
class Farm:
    """A farm as Hypothesis draws it. Of a build: project, level, need; of a worker: slots, what it offers, whether it leaves."""

    builds: list[tuple[str, int, int]]
    workers: list[tuple[int, int, bool]]
    held: int
    ended: int
    project_limits: dict[str, int | None]
    weights: dict[str, int]
    fleet_limit: int | None
    farm_limit: int | None
    paused: bool
    back_off: bool
    asked: int
    passed: int | None
    keeps: tuple[int, int] | None


FARMS = st.builds(
    Farm,
    builds=st.lists(
        st.tuples(st.sampled_from(PROJECTS), st.integers(-1, 1), st.sampled_from([0, 0, 0, 1, 2, 3])), min_size=1, max_size=9
    ),
    workers=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from([False, False, False, True])), max_size=3
    ),
    held=st.integers(0, 3),
    ended=st.integers(0, 2),
    project_limits=st.fixed_dictionaries({name: st.sampled_from([None, None, 1, 2]) for name in PROJECTS}),
    weights=st.fixed_dictionaries({name: st.integers(1, 3) for name in PROJECTS}),
    fleet_limit=st.sampled_from([None, None, 1, 2, 4]),
    farm_limit=st.sampled_from([None, None, 1, 3]),
    paused=st.sampled_from([False, False, True]),
    back_off=st.sampled_from([False, False, False, True]),
    asked=st.integers(0, 100),
    passed=st.none() | st.integers(0, 8),
    keeps=st.none() | st.tuples(st.integers(0, 2), st.integers(0, 8)),
)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mr-waiting-") as folder:
        db = Database(f"sqlite:///{folder}/template.db")
        db.migrate()
        for name in PROJECTS:
            a_project(db, name)
        db.dispose()
        yield Path(folder) / "template.db"


def prepare(db: Database, farm: Farm, free: Settings) -> str | None:
    """The farm's records; the build that is asked for, None where none waits."""
    for name, level, need in farm.builds:
        a_build(db, free, project=name, priority=level, **NEEDS[need])
    for number in range((farm.held + farm.ended) * bool(farm.workers)):
        which = number % len(farm.workers)
        slots, offer, _leaves = farm.workers[which]
        claim = leases.claim(db, a_claim_request(f"w{which}", slots=slots, **OFFERS[offer]), free)
        if claim is not None and number >= farm.held:
            lifecycle.finish(db, claim.build_id, 1, hash_token(claim.token), a_report())
    with db.transaction() as session:
        for name in PROJECTS:
            session.execute(
                sa.update(Project)
                .where(Project.name == name)
                .values(concurrent_build_limit=farm.project_limits[name], weight=farm.weights[name])
            )
        session.add(Fleet(name="default", max_running=farm.fleet_limit, paused_ms=1 if farm.paused else None, paused_by="me"))
    for which, (slots, offer, leaves) in enumerate(farm.workers):
        state = "draining" if leaves else "up"
        leases.claim(db, a_claim_request(f"w{which}", slots=slots, free_slots=0, state=state, **OFFERS[offer]), free)
    with db.transaction() as session:
        queued = session.scalars(sa.select(Build).where(Build.state == "QUEUED").order_by(Build.number, Build.id)).all()
        if not queued:
            return None
        if farm.passed is not None:
            queued[farm.passed % len(queued)].passed_ms = 1
        if farm.keeps is not None and farm.workers:
            which, kept = farm.keeps
            session.get_one(Worker, f"w{which % len(farm.workers)}").keeps = queued[kept % len(queued)].id
        asked = queued[farm.asked % len(queued)]
        if farm.back_off:
            asked.not_before_ms = session.execute(sa.select(now_ms())).scalar_one() + 3_600_000
        return asked.id


def lift(db: Database, said: Waiting, farm: Farm, but: Limit | None) -> tuple[Settings, Bound | None]:
    """Lift every limit that was named as far as was said, but for one; the farm's settings, and the workers that come."""
    needs = {bound.limit: bound.needs for bound in said.limits if bound.limit is not but}
    if Limit.FLEET_PAUSED in needs:
        records.resume(db, "default")
    with db.transaction() as session:
        if Limit.PROJECT_LIMIT in needs:
            name = said.build_id.partition(":")[0]
            limit = needs[Limit.PROJECT_LIMIT]
            session.execute(sa.update(Project).where(Project.name == name).values(concurrent_build_limit=limit))
        if Limit.FLEET_LIMIT in needs:
            session.execute(sa.update(Fleet).values(max_running=needs[Limit.FLEET_LIMIT]))
        if Limit.BACK_OFF in needs:
            session.execute(sa.update(Build).where(Build.id == said.build_id).values(not_before_ms=0))
    more = next((bound for bound in said.limits if bound.like is not None and bound.limit is not but), None)
    return Settings(max_running=needs.get(Limit.FARM_LIMIT, farm.farm_limit)), more


def claimed(db: Database, settings: Settings, more: Bound | None) -> list[str]:
    """What the living workers claim, by their ids, each until it gets nothing more; then those that come, each empty."""
    with db.reading() as session:
        asking = [(one.worker.id, one.offer, one.free_slots) for one in living(session, "default")]
    if more is not None and more.like is not None and more.more is not None:
        asking += [(f"z{number:02}", more.like.offer, more.like.slots or 50) for number in range(more.more)]
    found = []
    for worker, offer, slots in asking:
        said = {
            "cpus": None if offer.cpu_millis is None else offer.cpu_millis / 1000,
            "memory_bytes": offer.memory_bytes,
            "labels": tuple(offer.labels),
        }
        for free in range(slots, 0, -1):
            claim = leases.claim(db, a_claim_request(worker, slots=50, free_slots=free, **said), settings)
            if claim is None:
                break
            found.append(claim.build_id)
    return found


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(FARMS)
def test_lifting_what_is_named_starts_the_build_and_lifting_less_does_not(template: Path, farm: Farm) -> None:
    with tempfile.TemporaryDirectory(prefix="mr-waiting-") as folder:
        here = Path(folder) / "records.db"
        shutil.copy(template, here)
        db = Database(f"sqlite:///{here}")
        build = prepare(db, farm, Settings())
        said = waiting.explain(db, build, Settings(max_running=farm.farm_limit)) if build else None
        db.dispose()
        if build is None or said is None:
            return
        assert said.position is not None
        assert len({bound.limit for bound in said.limits}) == len(said.limits)
        for but in [None, *(bound.limit for bound in said.limits)]:
            copy = Path(folder) / f"{but}.db"
            shutil.copy(here, copy)
            db = Database(f"sqlite:///{copy}")
            try:
                order = claimed(db, *lift(db, said, farm, but))
            finally:
                db.dispose()
            if but is None:
                assert order.index(build) == said.position - 1
                assert [one.build_id for one in said.ahead] == order[: said.position - 1]
            else:
                assert build not in order, f"{but} was named, and does not bind"


def test_what_does_not_wait_says_where_it_is(template: Path, tmp_path: Path) -> None:
    shutil.copy(template, tmp_path / "records.db")
    db = Database(f"sqlite:///{tmp_path / 'records.db'}")
    build = a_build(db, Settings(), project="aa")
    first = waiting.explain(db, build, Settings())
    assert first is not None
    assert (first.position, [bound.limit for bound in first.limits]) == (1, [Limit.NO_WORKER])
    claim = leases.claim(db, a_claim_request("w1"), Settings())
    assert claim is not None
    running = waiting.explain(db, build, Settings())
    assert running is not None
    assert (running.position, running.says) == (None, "it does not wait: it is CLAIMED on worker w1")
    lifecycle.finish(db, build, 1, hash_token(claim.token), a_report())
    ended = waiting.explain(db, build, Settings())
    assert ended is not None
    assert ended.says == "it does not wait: it is SUCCEEDED (succeeded)"
    assert waiting.explain(db, "aa:nothing", Settings()) is None
    db.dispose()
