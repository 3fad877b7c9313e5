"""The database's own promises: schema, locks, retries, absence, and what a killed process leaves."""

import multiprocessing
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.orm import Session

from millrace.errors import InvalidInput, Unavailable
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import BuildState
from scheduler import leases, queries
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.models import Base, Build, Project
from scheduler.sweeper import Sweeper
from tests.support.postgres import PostgresServer
from tests.support.records import a_build, a_claim, a_claim_request, a_project

ROOT = Path(__file__).parents[2]


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.require_schema()
    database.dispose()


def _start_together(url: str) -> list[int | None]:
    starters = [multiprocessing.get_context("spawn").Process(target=_migrate, args=(url,)) for _ in range(3)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(60)
    return [starter.exitcode for starter in starters]


def test_processes_that_migrate_an_empty_sqlite_at_once_all_succeed(tmp_path: Path) -> None:
    assert _start_together(f"sqlite:///{tmp_path / 'records.db'}") == [0, 0, 0]


@pytest.mark.postgres
def test_processes_that_migrate_an_empty_postgresql_at_once_all_succeed(postgres_server: PostgresServer) -> None:
    with postgres_server.database() as url:
        assert _start_together(url) == [0, 0, 0]


def test_the_migrations_make_what_the_models_say(database: Database) -> None:
    with database.engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_what_the_sweeper_asks_each_round_is_answered_by_an_index(
    sqlite_database: Database, settings: Settings, store: DirectoryStore
) -> None:
    asked: list[str] = []
    plans: list[str] = []

    def listen(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if "FROM attempts" in statement and statement.startswith("SELECT"):
            asked.append(statement)

    sa.event.listen(sqlite_database.engine, "before_cursor_execute", listen)
    Sweeper(sqlite_database, Bell(f"redis+socket://{settings.home}/none"), store, settings).sweep()
    sa.event.remove(sqlite_database.engine, "before_cursor_execute", listen)
    for statement in asked:
        with sqlite_database.engine.connect() as connection:
            values = (1,) * statement.count("?")
            plans += [row[3] for row in connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, values)]
    assert any("ix_attempts_log_here" in step for step in plans)
    assert any("ix_attempts_unswept" in step for step in plans)
    assert not [step for step in plans if step.startswith("SCAN")]


def test_the_databases_clock_is_a_clock(database: Database) -> None:
    with database.reading() as session:
        told: int = session.execute(sa.select(now_ms())).scalar_one()
    assert abs(told - time.time() * 1000) < 5000


def test_sqlite_keeps_what_it_confirmed_and_its_references(sqlite_database: Database) -> None:
    with sqlite_database.reading() as session:
        found = [
            session.execute(sa.text(f"PRAGMA {name}")).scalar_one() for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert found == ["wal", 2, 1]


def test_a_reader_sees_one_moment(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    with database.reading() as session:
        before = session.execute(sa.select(Build.state)).scalar_one()
        a_claim(database, settings)
        after = session.execute(sa.select(Build.state)).scalar_one()
    assert (before, after) == ("QUEUED", "QUEUED")
    record = queries.get_build(database, build)
    assert record is not None
    assert record.state is BuildState.CLAIMED


@pytest.mark.parametrize("value", ["x\x00y", "long" * 100])
def test_a_value_that_cannot_be_kept_is_the_requests_fault(database: Database, value: str) -> None:
    def work(session: Session) -> None:
        session.add(Project(name=value, uuid="u", settings={}, created_ms=2**80, modified_ms=1))

    with pytest.raises(InvalidInput, match="cannot hold a value"):
        database.run(work)


def test_two_that_lock_each_other_out_both_get_through(database: Database) -> None:
    """On PostgreSQL a deadlock ends one of them, which is tried again; on SQLite they go one after the other."""
    a_project(database, "aa")
    a_project(database, "bb")
    together = threading.Barrier(2, timeout=1)

    def both(first: str, second: str) -> None:
        def work(session: Session) -> None:
            for name in (first, second):
                session.execute(
                    sa.update(Project).where(Project.name == name).values(last_build_number=Project.last_build_number + 1)
                )
                try:
                    together.wait()
                except threading.BrokenBarrierError:
                    continue  # SQLite: the other has not begun; or the second try

        database.run(work)

    threads = [threading.Thread(target=both, args=pair) for pair in (("aa", "bb"), ("bb", "aa"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert session.scalars(sa.select(Project.last_build_number)).all() == [2, 2]


def test_a_sqlite_that_stays_locked_is_unavailable_within_seconds_and_readers_go_on(
    sqlite_database: Database, settings: Settings
) -> None:
    a_project(sqlite_database)
    hog = sqlite3.connect(str(sa.make_url(sqlite_database.url).database), isolation_level=None)
    hog.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(Unavailable, match="locked"):
        a_build(sqlite_database, settings)
    assert time.monotonic() - began < 20
    sqlite_database.check()
    hog.execute("ROLLBACK")
    hog.close()
    a_build(sqlite_database, settings)


@pytest.mark.postgres
def test_a_postgresql_that_went_away_is_unavailable_and_serves_again_when_it_is_back(
    postgres_server: PostgresServer, settings: Settings
) -> None:
    with postgres_server.database() as url:
        database = Database(url)
        database.migrate()
        a_project(database)
        build = a_build(database, settings)
        postgres_server.stop()
        try:
            for call in (database.check, lambda: a_build(database, settings), database.migrate):
                began = time.monotonic()
                with pytest.raises(Unavailable, match="does not answer"):
                    call()
                assert time.monotonic() - began < 6
        finally:
            postgres_server.start()
        assert a_claim(database, settings).build_id == build
        database.dispose()


@pytest.mark.postgres
def test_one_that_froze_inside_a_claim_does_not_stop_all_others(postgres_server: PostgresServer, settings: Settings) -> None:
    with postgres_server.database() as url:
        database = Database(url)
        database.migrate()
        a_project(database)
        build = a_build(database, settings)
        with database.engine.connect() as frozen:
            frozen.execute(sa.select(sa.func.pg_advisory_xact_lock(leases._CLAIM_LOCK)))
            left_s = frozen.execute(sa.text("SHOW idle_in_transaction_session_timeout")).scalar_one()
            frozen.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 300"))
            claim = leases.claim(database, a_claim_request(), settings)  # waits until the server ends the frozen one
            assert claim is not None
            assert (claim.build_id, left_s) == (build, "20s")
            frozen.invalidate()
        database.dispose()


_KILLED = """
import os, signal, sys
from pathlib import Path
from millrace.settings import Settings
from scheduler.db import Database
from tests.support.records import a_build, a_project
database = Database(sys.argv[1])
a_project(database)
print(a_build(database, Settings(data_dir=Path("unused"))), flush=True)
if sys.argv[2] == "inside":
    with database.transaction() as session:
        from scheduler.models import Build
        session.query(Build).update({"priority": 50})
        session.flush()
        os.kill(os.getpid(), signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["after", "inside"])
def test_what_was_accepted_is_there_after_the_process_was_killed(database: Database, settings: Settings, where: str) -> None:
    with tempfile.TemporaryFile() as out:
        done = subprocess.run([sys.executable, "-c", _KILLED, database.url, where], stdout=out, cwd=ROOT, check=False)
        out.seek(0)
        build = out.read().decode().split("\n")[-2]
    assert done.returncode == -9
    record = queries.get_build(database, build)
    assert record is not None
    assert (record.state, record.priority) == (BuildState.QUEUED, 0)
    assert a_claim(database, settings).build_id == build
