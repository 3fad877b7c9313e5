"""What builds need and workers offer, on real databases: reserved, kept room for, refused or explained."""

import sqlite3
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from millrace.contract import Claim
from millrace.errors import InvalidInput
from millrace.fleet import FleetSettings, Scaling, WorkerShape
from millrace.need import GIB
from millrace.project import BuildOverrides
from millrace.settings import Settings
from scheduler import intake, lanes, leases, lifecycle, waiting
from scheduler.bounds import Limit
from scheduler.db import Database, _alembic, now_ms
from scheduler.fleets import overflow
from scheduler.fleets.capacity import living
from scheduler.fleets.observe import Times, observe
from scheduler.fleets.policy import Memory, decide
from scheduler.leases import hash_token
from scheduler.models import Build, Fleet, Worker
from scheduler.placement import KEEP_AFTER_MS
from scheduler.waiting import Waiting
from tests.support.postgres import PostgresServer
from tests.support.records import a_build, a_claim_request, a_project, a_report

LARGE = {"computeTypeOverride": "BUILD_GENERAL1_LARGE"}
GPU = {"workerLabelsOverride": ["gpu"]}
EIGHT = {"cpus": 8, "memory_bytes": 16 * GIB}


def ask(db: Database, settings: Settings, worker: str = "w1", **offer: Any) -> Claim | None:
    return leases.claim(db, a_claim_request(worker, slots=10, free_slots=10, **offer), settings)


def end(db: Database, claim: Claim) -> None:
    lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())


def why(db: Database, build_id: str, settings: Settings) -> Waiting:
    said = waiting.explain(db, build_id, settings)
    assert said is not None
    return said


def set_fleet(db: Database, worker: dict[str, Any], *, provider: bool = True) -> None:
    wanted = {"worker": worker, **({"provider": {"type": "process"}} if provider else {})}
    settings = FleetSettings.model_validate(wanted).model_dump(mode="json", by_alias=True, exclude_none=True)
    with db.transaction() as session:
        session.merge(Fleet(name="default", settings=settings))


def test_a_worker_holds_no_more_than_it_offers_whatever_it_says_is_free(database: Database, settings: Settings) -> None:
    a_project(database)
    builds = [a_build(database, settings) for _ in range(6)]
    held = [ask(database, settings, **EIGHT) for _ in range(5)]
    assert [claim and claim.build_id for claim in held] == [*builds[:4], None]  # four times 2 vCPU and 4 GiB
    assert held[0] is not None
    end(database, held[0])
    again = ask(database, settings, **EIGHT)
    assert again is not None
    assert again.build_id == builds[4]
    other = ask(database, settings, "w2")  # which says nothing of cpus: its slots bound it
    assert other is not None


def test_memory_bounds_as_cpus_do(database: Database, settings: Settings) -> None:
    a_project(database)
    for _ in range(3):
        a_build(database, settings)
    assert [ask(database, settings, memory_bytes=9 * GIB) is None for _ in range(3)] == [False, False, True]


def test_a_build_larger_than_a_whole_worker_never_squeezes_in(database: Database, settings: Settings) -> None:
    a_project(database)
    large = a_build(database, settings, **LARGE)
    small = a_build(database, settings)
    offer = {"cpus": 7.9}
    first = ask(database, settings, **offer)
    assert first is not None
    assert first.build_id == small
    assert ask(database, settings, **offer) is None
    with database.transaction() as session:
        assert session.get_one(Build, large).passed_ms is None  # it was not this worker that could have had it
        session.execute(sa.update(Build).values(passed_ms=1))
    assert ask(database, settings, **offer) is None
    with database.reading() as session:
        assert session.get_one(Worker, "w1").keeps is None
    said = why(database, large, settings)
    assert [bound.limit for bound in said.limits] == [Limit.SIZE]
    assert "it waits for a worker of fleet default with 8 vCPU and 16 GiB free" in said.says
    assert "the largest living one has 7.9 vCPU and any memory" in said.says


def test_labels_choose_the_worker(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings, **GPU)
    assert ask(database, settings) is None
    assert ask(database, settings, labels=("ssd",)) is None
    said = why(database, build, settings)
    assert [bound.limit for bound in said.limits] == [Limit.LABELS]
    assert said.says.endswith("it waits for a worker of fleet default with label gpu; none living has it")
    claim = ask(database, settings, "w2", labels=("ssd", "gpu"))
    assert claim is not None
    assert claim.settings.environment.worker_labels == ("gpu",)


def test_room_is_kept_for_a_large_build_on_one_worker(database: Database, settings: Settings) -> None:
    a_project(database)
    a_project(database, "big")
    small = [a_build(database, settings) for _ in range(12)]
    first = ask(database, settings, **EIGHT)
    large = a_build(database, settings, project="big", **LARGE)
    second = ask(database, settings, **EIGHT)
    assert first is not None and second is not None  # two claims of small builds
    assert second.build_id == small[1]  # though it was the turn of the large one
    said = why(database, large, settings)
    assert [bound.limit for bound in said.limits] == [Limit.ROOM]
    assert "with 8 vCPU and 16 GiB free; of those with a free slot, worker w1 has most, 4 vCPU and 8 GiB" in said.says
    with database.transaction() as session:
        assert session.get_one(Build, large).passed_ms is not None
        session.execute(sa.update(Build).where(Build.id == large).values(passed_ms=now_ms() - KEEP_AFTER_MS))
    assert ask(database, settings, **EIGHT) is None  # it keeps room, and another does not
    others = [ask(database, settings, "w2", **EIGHT) for _ in range(2)]
    assert [claim and claim.build_id for claim in others] == [large, None]  # which is empty, and has it at once
    third = ask(database, settings, **EIGHT)
    assert third is not None
    assert third.build_id == small[2]


def test_what_room_is_kept_for_is_taken_as_soon_as_it_fits(database: Database, settings: Settings) -> None:
    a_project(database)
    a_project(database, "big")
    for _ in range(12):
        a_build(database, settings)
    running = [ask(database, settings, **EIGHT) for _ in range(2)]
    large = a_build(database, settings, project="big", **LARGE)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == large).values(passed_ms=1))
    twin = {"w2": ask(database, settings, "w2", cpus=4, memory_bytes=16 * GIB)}
    assert twin["w2"] is not None  # it could not hold it, and so keeps nothing
    for claim in running:
        assert ask(database, settings, **EIGHT) is None
        assert claim is not None
        end(database, claim)
    taken = ask(database, settings, **EIGHT)
    assert taken is not None
    assert taken.build_id == large
    with database.reading() as session:
        assert session.get_one(Worker, "w1").keeps is None
        assert session.get_one(Build, large).passed_ms is None


def test_a_keeper_that_falls_silent_is_replaced(database: Database, settings: Settings) -> None:
    a_project(database)
    a_project(database, "big")
    for _ in range(12):
        a_build(database, settings)
    for worker in ("w1", "w2"):
        assert ask(database, settings, worker, **EIGHT) is not None
    large = a_build(database, settings, project="big", **LARGE)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == large).values(passed_ms=1))
    assert ask(database, settings, "w1", **EIGHT) is None
    assert ask(database, settings, "w2", **EIGHT) is not None
    with database.transaction() as session:
        session.execute(sa.update(Worker).where(Worker.id == "w1").values(last_seen_ms=now_ms() - 60_000))
    assert ask(database, settings, "w2", **EIGHT) is None
    assert ask(database, settings, "w1", **EIGHT) is not None  # it comes back, and another keeps room meanwhile
    with database.reading() as session:
        assert {one.id: one.keeps for one in session.scalars(sa.select(Worker))} == {"w1": None, "w2": large}


def test_a_set_fleet_refuses_at_once_what_none_of_its_workers_can_ever_hold(database: Database, settings: Settings) -> None:
    a_project(database)
    set_fleet(database, {"cpus": 4, "memoryBytes": 8 * GIB, "labels": ["ssd"]})
    with pytest.raises(InvalidInput) as caught:
        a_build(database, settings, **LARGE, **GPU)
    assert [field.field for field in caught.value.fields] == ["environment.computeType", "environment.workerLabels"]
    assert "it takes 8 vCPU and 16 GiB, and a whole worker of the fleet has 4 vCPU and 8 GiB" in caught.value.message
    assert "workers of the fleet do not have the label gpu: they have ssd" in caught.value.message
    assert a_build(database, settings, workerLabelsOverride=["ssd"])
    set_fleet(database, {"cpus": 4}, provider=False)  # nobody says that no other worker comes
    assert a_build(database, settings, **LARGE, **GPU)


def test_a_fleet_that_is_set_smaller_says_so_of_builds_that_wait(database: Database, settings: Settings) -> None:
    a_project(database)
    set_fleet(database, {"cpus": 16})
    large = a_build(database, settings, **LARGE)
    assert [bound.limit for bound in why(database, large, settings).limits] == [Limit.NO_WORKER]
    set_fleet(database, {"cpus": 4})
    said = why(database, large, settings)
    assert [bound.limit for bound in said.limits] == [Limit.NEVER_FITS]
    assert "no worker of fleet default as it is set can ever hold it" in said.says


def test_a_retry_is_refused_as_a_new_build_is(database: Database, settings: Settings) -> None:
    a_project(database)
    large = a_build(database, settings, **LARGE)
    claim = ask(database, settings)
    assert claim is not None
    end(database, claim)
    set_fleet(database, {"cpus": 4})
    with pytest.raises(InvalidInput, match="no worker of fleet default can ever run this build"):
        intake.retry(database, intake.RetryRequest(build_id=large, initiator="t"), settings)


def test_each_kind_of_workers_has_fair_turns_of_its_own(database: Database, settings: Settings) -> None:
    """A worker that cannot hold the oldest build does not use up the turns at which it would be claimed."""
    a_project(database)
    a_project(database, "meek")
    for number in range(30):
        wanted = BuildOverrides.model_validate({"projectName": "demo", "priority": 100})
        request = intake.BuildRequest(overrides=wanted, initiator=f"t{number}", by_admin=True)
        intake.submit(database, request, settings)
    meek = a_build(database, settings, project="meek", **GPU)
    taken = []
    for _ in range(4):
        for _ in range(3):
            assert ask(database, settings, "plain") is not None
        claim = ask(database, settings, "special", labels=("gpu",))
        assert claim is not None
        taken.append(claim.build_id)
    assert meek in taken


def test_what_a_worker_offers_and_has_left_is_counted(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings)
    assert ask(database, settings, cpus=3, memory_bytes=6 * GIB) is not None
    with database.reading() as session:
        (one,) = living(session, "default")
        assert (one.holds, str(one.offer), str(one.room)) == (1, "3 vCPU and 6 GiB", "1 vCPU and 2 GiB")


def test_a_need_that_cannot_be_read_bars_no_other(database: Database, settings: Settings) -> None:
    a_project(database)
    damaged, well = a_build(database, settings), a_build(database, settings)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == damaged).values(need="much"))
    claim = ask(database, settings, **EIGHT)
    assert claim is not None
    assert claim.build_id == well


def test_builds_that_wait_get_their_needs_when_the_schema_changes(database: Database, settings: Settings) -> None:
    a_project(database)
    large, small = a_build(database, settings, **LARGE), a_build(database, settings)
    with database.transaction() as session:
        connection = session.connection()
        for name in ("ix_builds_waiting_best", "ix_builds_waiting_oldest"):
            connection.execute(sa.text(f"DROP INDEX {name}"))
        for table, column in (("builds", "need"), ("builds", "passed_ms"), ("workers", "keeps"), ("turns", "offers")):
            connection.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        for name in ("ix_builds_waiting", "ix_builds_waiting_age"):
            connection.execute(sa.text(f"CREATE INDEX {name} ON builds (fleet)"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0021'"))
        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "0022")
    with database.reading() as session:
        needs = {build: session.get_one(Build, build).need for build in (large, small)}
    assert needs == {large: f"8000/{16 * GIB}/", small: f"2000/{4 * GIB}/"}


@pytest.mark.parametrize("offer", [{}, {"cpus": 3.5}, {"cpus": 0.5}], ids=["all fit", "some fit", "none fits"])
def test_a_claim_reads_no_more_however_many_builds_wait(
    sqlite_database: Database, settings: Settings, offer: dict[str, float]
) -> None:
    """Counted in steps of SQLite's virtual machine, as time would depend on what else the machine does."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    @sa.event.listens_for(sqlite_database.engine, "checkout")
    def watch(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
        connection.set_progress_handler(count, 10)

    for project in ("demo", "other"):
        a_project(sqlite_database, project)
    first = a_build(sqlite_database, settings)
    with sqlite_database.reading() as session:
        row = session.get_one(Build, first)
        like = {column.name: getattr(row, column.name) for column in Build.__table__.columns}

    def cost(waiting: range) -> int:
        nonlocal steps
        rows = [
            {
                **like,
                "id": f"{project}:{number}",
                "project_name": project,
                "number": number,
                "need": f"{1000 * (1 + number % 5)}/1/",
            }
            for number in waiting
            for project in ("demo", "other")
        ]
        with sqlite_database.transaction() as session:
            session.execute(sa.insert(Build), rows)
        steps = 0
        claim = ask(sqlite_database, settings, f"w{len(waiting)}", **offer)
        taken = steps
        assert (claim is None) == (offer.get("cpus") == 0.5)
        return taken

    few = cost(range(10, 60))
    assert cost(range(60, 5_000)) <= 1.2 * few


@pytest.mark.postgres
def test_statistics_from_before_many_builds_came_make_no_claim_slow(
    postgres_server: PostgresServer, postgres_template: str, settings: Settings
) -> None:
    """PostgreSQL goes by the indexes of what waits; at worst it reads all rows once, and not once for each lane."""
    with postgres_server.database(postgres_template) as url:
        database = Database(url)
        a_project(database)
        first = a_build(database, settings)
        with database.transaction() as session:
            row = session.get_one(Build, first)
            like = {column.name: getattr(row, column.name) for column in Build.__table__.columns}
            rows = [{**like, "id": f"demo:{n}", "number": n, "need": f"{1000 * (1 + n % 5)}/1/"} for n in range(10, 10_000)]
            session.execute(sa.insert(Build), rows)
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM builds"))
            connection.execute(sa.text("UPDATE pg_class SET reltuples = 0 WHERE relname = 'builds'"))
        with database.transaction() as session:
            lanes.keep_plans(session)
            load = lanes.load_of(session, "default")
            now = session.execute(sa.select(now_ms())).scalar_one()
            before = session.scalar(sa.text("SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'builds'"))
            needs = lanes.waiting_needs(session, "default")
            assert len(lanes.read_lanes(session, "default", load, now, needs, fair=True)) == 6
            after = session.scalar(sa.text("SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'builds'"))
        database.dispose()
        assert after is not None
        assert after - (before or 0) < 15_000


def test_a_fleet_grows_by_the_workers_that_builds_need_and_for_none_that_it_cannot_hold(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    shape = WorkerShape(slots=4, cpus=8, memory_bytes=16 * GIB)

    def wanted() -> tuple[int, int]:
        with database.reading() as session:
            sight = observe(session, "default", [], age_s=0, generation=1, times=Times(), farm=settings, shape=shape)
        return sight.load.queued, decide(Scaling(maximum=9), shape.slots, sight.load, Memory()).wanted

    a_build(database, settings, **LARGE)
    assert ask(database, settings, **EIGHT) is not None
    assert wanted() == (0, 1)
    a_build(database, settings, **GPU)
    a_build(database, settings, computeTypeOverride="BUILD_GENERAL1_XLARGE")
    assert wanted() == (0, 1)
    a_build(database, settings, **LARGE)  # it does not fit beside the first, though three slots are free there
    assert wanted() == (4, 2)
    for _ in range(4):
        a_build(database, settings)
    assert wanted()[1] == 3


def test_what_a_fleet_could_never_hold_does_not_flow_over_to_it(database: Database, settings: Settings) -> None:
    a_project(database)
    large, small = a_build(database, settings, **LARGE), a_build(database, settings)
    with database.transaction() as session:
        worker = {"cpus": 4}
        set_to = FleetSettings.model_validate({"worker": worker, "provider": {"type": "process"}})
        session.add(Fleet(name="other", settings=set_to.model_dump(mode="json", by_alias=True, exclude_none=True)))
    assert overflow.move(database, "default", "other", 2, waited_s=0) == [small]
    with database.reading() as session:
        assert session.get_one(Build, large).fleet == "default"


def test_builds_that_cannot_overflow_keep_no_others_from_it(database: Database, settings: Settings) -> None:
    a_project(database)
    a_project(database, "limited", concurrentBuildLimit=1)
    a_build(database, settings, "limited")
    assert ask(database, settings) is not None
    small = a_build(database, settings)
    a_build(database, settings, **LARGE)
    a_build(database, settings, "limited")  # it would not run elsewhere either
    with database.transaction() as session:
        set_to = FleetSettings.model_validate({"worker": {"cpus": 4}, "provider": {"type": "process"}})
        session.add(Fleet(name="other", settings=set_to.model_dump(mode="json", by_alias=True, exclude_none=True)))
    assert overflow.move(database, "default", "other", 1, waited_s=0) == [small]


def test_what_waits_most_hides_no_others_from_a_fleet(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More wait of a project at its limit, and of what fits no worker, than are counted."""
    monkeypatch.setattr("scheduler.fleets.observe._MOST_COUNTED", 5)
    for name, changes in (("a-limited", {"concurrentBuildLimit": 1}), ("demo", {}), ("some", {"concurrentBuildLimit": 2})):
        a_project(database, name, **changes)
    for _ in range(6):
        a_build(database, settings, "a-limited")
        a_build(database, settings, **GPU)
    assert ask(database, settings) is not None

    def queued() -> int:
        with database.reading() as session:
            shape = WorkerShape()
            sight = observe(session, "default", [], age_s=0, generation=1, times=Times(), farm=settings, shape=shape)
        return sight.load.queued

    assert queued() == 0
    for _ in range(3):
        a_build(database, settings, "some")
    assert queued() == 2
    for _ in range(9):
        a_build(database, settings)
    assert queued() == 5


def test_nothing_overflows_to_where_nobody_is(database: Database, settings: Settings) -> None:
    a_project(database)
    build_id = a_build(database, settings)
    assert overflow.move(database, "default", "misspelt", 1, waited_s=0) == []
    assert ask(database, settings, fleet="misspelt") is None  # a worker of its own comes, by whatever hands
    assert overflow.move(database, "default", "misspelt", 1, waited_s=0) == [build_id]
