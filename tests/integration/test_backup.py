"""Backups of a farm at work, put back after it has gone on: nothing of the copy is lost, no number comes twice, fsck is clean."""

import glob
import os
import random
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from millrace.errors import AlreadyExists, AttemptFenced, Conflict, InvalidInput, NotFound, Unavailable
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import BuildState
from scheduler import backup, fsck, leases, lifecycle
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.fsck import Scope
from scheduler.leases import hash_token
from scheduler.models import Build, Project
from scheduler.sweeper import Sweeper
from tests.support import release
from tests.support.farm import need_engine, wait_until
from tests.support.load import Load
from tests.support.postgres import PostgresServer
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report
from tests.support.redis import RedisServer

COPY = Callable[[Path], None]


class Records:
    """Records that are backed up and put back as docs/backup.md says. `url` may change by putting back."""

    def __init__(self, folder: Path, server: PostgresServer | None) -> None:
        self._folder, self._server = folder, server
        self._bin = max(glob.glob("/usr/lib/postgresql/*/bin"), default="")
        self.url = f"sqlite:///{folder / 'records.db'}"
        self._names: list[str] = []
        if server is not None:
            self.url = self._create()

    def _create(self) -> str:
        assert self._server is not None
        name = f"b{random.randrange(10**12)}"
        self._run("createdb", *self._where(), name)
        self._names.append(name)
        return f"postgresql+psycopg://postgres@127.0.0.1:{self._server.port}/{name}"

    def _where(self) -> list[str]:
        assert self._server is not None
        return ["--host=127.0.0.1", f"--port={self._server.port}", "--username=postgres"]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run([f"{self._bin}/{program}", *arguments], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 0, done.stderr

    def back_up(self, file: Path) -> None:
        if self._server is None:
            backup.copy_sqlite(self._folder / "records.db", file)
        else:
            self._run("pg_dump", *self._where(), "--format=custom", f"--file={file}", self._names[-1])

    def put_back(self, file: Path) -> None:
        if self._server is None:
            assert backup.put_back_sqlite(file, self._folder / "records.db") is not None
            return
        self.url = self._create()
        self._run("pg_restore", *self._where(), "--exit-on-error", "--no-owner", f"--dbname={self._names[-1]}", str(file))

    def close(self) -> None:
        for name in self._names:
            self._run("dropdb", *self._where(), "--force", name)


@contextmanager
def records_on(request: pytest.FixtureRequest, folder: Path) -> Iterator[Records]:
    server: PostgresServer | None = request.getfixturevalue("postgres_server") if request.param == "postgres" else None
    made = Records(folder, server)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Records]:
    with records_on(request, tmp_path) as made:
        yield made


def test_a_backup_under_load_is_put_back_and_all_is_well(
    records: Records, settings: Settings, store: DirectoryStore, tmp_path: Path
) -> None:
    db = Database(records.url)
    db.migrate()
    a_project(db)
    copy = tmp_path / "copy"
    a_build(db, settings)
    a_claim(db, settings)  # it is held while the copy is made, and by nobody afterwards
    with Load(db, settings) as load:
        wait_until(lambda: len(load.given) > 60)
        before = list(load.given)
        records.back_up(copy)
        after = len(load.given)
        wait_until(lambda: len(load.given) > after + 60)
    db.dispose()
    records.put_back(copy)

    db = Database(records.url)
    db.migrate()
    taken_back = backup.after_restore(db, gap=1000)
    with db.reading() as session:
        there = dict(session.execute(sa.select(Build.id, Build.state)).tuples().all())
        held = session.scalars(sa.select(Build.id).where(Build.state.in_(["CLAIMED", "RUNNING", "FINALIZING"]))).all()
    assert {build_id for build_id, _number in before} <= set(there)
    assert len(there) < len(load.given)
    assert held == []
    assert taken_back
    for claim in load.held:  # also those whose attempt the copy does not know
        with pytest.raises(AttemptFenced):
            leases.renew(db, claim.build_id, claim.attempt_no, hash_token(claim.token), settings)

    again = Load(db, settings)
    with again:
        wait_until(lambda: len(again.given) > 30)
    assert not {number for _id, number in again.given} & {number for _id, number in load.given}
    assert not {build_id for build_id, _number in again.given} & {build_id for build_id, _number in load.given}
    for claim in again.held:
        lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
    while (claim := leases.claim(db, a_claim_request("w", slots=1000), settings)) is not None:
        lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
    Sweeper(db, Bell(f"redis+socket://{tmp_path}/none"), store, settings).sweep()
    findings = fsck.check(Scope(db=db, settings=settings, store=store, at_rest=True))
    assert {one.number: one.faults for one in findings if one.faults} == {}
    with db.reading() as session:
        assert set(session.scalars(sa.select(Build.state))) == {BuildState.SUCCEEDED}
    db.dispose()


def test_what_was_taken_back_is_not_counted_against_its_build(sqlite_database: Database, settings: Settings) -> None:
    a_project(sqlite_database)
    build = a_build(sqlite_database, settings)
    stopped = a_build(sqlite_database, settings)
    a_claim(sqlite_database, settings)
    a_claim(sqlite_database, settings)
    lifecycle.request_stop(sqlite_database, stopped)
    assert set(backup.after_restore(sqlite_database, gap=5)) == {build, stopped}
    with sqlite_database.reading() as session:
        rows = {row.id: row for row in session.execute(sa.select(Build.id, Build.state, Build.faults)).all()}
        assert session.execute(sa.select(Project.last_build_number)).scalar_one() == 7
    assert (rows[build].state, rows[build].faults, rows[stopped].state) == ("QUEUED", 0, "STOPPED")


# SQLite's own copies


def test_a_copy_is_whole_while_a_writer_writes_and_readable_by_its_owner_only(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    a_project(sqlite_database)
    copy = tmp_path / "copy.db"
    with sqlite_database.transaction() as session:  # not committed: not in the copy
        session.execute(sa.update(Project).values(last_build_number=99))
        backup.copy_sqlite(tmp_path / "records.db", copy)
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as opened:
        assert opened.execute("SELECT last_build_number FROM projects").fetchall() == [(0,)]
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.db"]
    with pytest.raises(AlreadyExists, match="is there already"):
        backup.copy_sqlite(tmp_path / "records.db", copy)
    with pytest.raises(NotFound):
        backup.copy_sqlite(tmp_path / "nothing.db", tmp_path / "other")
    with pytest.raises(Unavailable, match="cannot be written"):
        backup.copy_sqlite(tmp_path / "records.db", tmp_path / "no-folder" / "copy")


def test_what_is_no_copy_is_refused_and_the_records_stay(sqlite_database: Database, tmp_path: Path) -> None:
    a_project(sqlite_database)
    good = tmp_path / "good"
    backup.copy_sqlite(tmp_path / "records.db", good)
    body = good.read_bytes()
    wrong = {
        "text": b"hello",
        "empty": b"",
        "cut": body[: len(body) // 2],
        "torn": body[:8192] + os.urandom(8192) + body[16384:],
    }
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInput, match=r"no copy of a farm's records|is damaged"):
            backup.put_back_sqlite(tmp_path / name, tmp_path / "records.db")
    with pytest.raises(NotFound):
        backup.put_back_sqlite(tmp_path / "nowhere", tmp_path / "records.db")
    with pytest.raises(Conflict, match="in use"):
        backup.put_back_sqlite(good, tmp_path / "records.db")
    sqlite_database.require_schema()
    assert not list(tmp_path.glob("*.part"))


def test_damaged_records_are_put_aside_whole(sqlite_database: Database, tmp_path: Path) -> None:
    a_project(sqlite_database)
    copy = tmp_path / "copy"
    backup.copy_sqlite(tmp_path / "records.db", copy)
    sqlite_database.dispose()
    (tmp_path / "records.db").write_bytes(b"\0" * 100_000)
    aside = backup.put_back_sqlite(copy, tmp_path / "records.db")
    assert aside is not None
    assert aside.read_bytes() == b"\0" * 100_000
    opened = Database(f"sqlite:///{tmp_path / 'records.db'}")
    opened.require_schema()
    opened.dispose()


# Through the commands, with a worker that goes on


@pytest.mark.docker
@pytest.mark.redis
@pytest.mark.parametrize("records", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
def test_a_farm_is_restored_under_a_worker_that_goes_on(records: Records, redis_server: RedisServer, tmp_path: Path) -> None:
    need_engine()
    copy = tmp_path / "copy"
    with (
        tempfile.TemporaryDirectory(prefix="mr-bk-") as folder,
        release.parts(Path(folder), records.url, redis_server.url) as farm,
    ):
        farm.call("bootstrap")
        for part in ("api", "scheduler", "worker"):
            farm.start(part)
        users = farm.farm
        done = users.build(["echo done"], project="done", more="artifacts:\n  files: ['**/*']\n")
        assert users.ended(done)["buildStatus"] == "FAILED"  # nothing matches; its log is what counts here
        build = users.build(["for n in $(seq 1 60); do echo line-$n; sleep 0.2; done"])
        users.await_log(build, "line-5\n")
        if "sqlite" in records.url:
            said = users.cli("backup", str(copy))
            assert said.returncode == 0, said.stderr
            busy = users.cli("restore", str(copy))
            assert (busy.returncode, "is in use" in busy.stderr) == (1, True), busy
        else:
            records.back_up(copy)
            said = users.cli("backup", str(tmp_path / "no"))
            assert (said.returncode, "pg_dump" in said.stderr) == (1, True), said
        lost = users.build(["echo lost"], project="lost")
        users.ended(lost)
        farm.stop("scheduler")
        farm.stop("api")
        if "sqlite" in records.url:
            said = users.cli("restore", str(copy))
        else:
            records.put_back(copy)
            farm.environment["MILLRACE_DATABASE_URL"] = records.url
            said = users.cli("restored")
        assert said.returncode == 0, said.stderr
        assert "1 builds that were running wait again" in said.stdout
        farm.start("api")
        farm.start("scheduler")
        ended = users.ended(build)
        assert ended["buildStatus"] == "SUCCEEDED"
        assert [(one["verdict"], one["reason"]) for one in ended["millrace"]["attempts"]] == [
            ("HANDED_BACK", "infra.worker_shutdown"),
            ("SUCCEEDED", "succeeded"),
        ]
        lines = [line for line in users.log_of(build).splitlines() if line.startswith("line-")]
        assert lines == [f"line-{n}" for n in range(1, 61)]
        assert "done" in users.log_of(done)
        renewed = users.show(users.build(["true"], project="done"))
        assert renewed["buildNumber"] == 1002
        users.ended(renewed["id"])
        wait_until(lambda: users.containers() == [], 60)
        checked = users.cli("fsck", "--at-rest")
        assert checked.returncode == 0, checked.stdout
