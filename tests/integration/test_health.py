"""Health, with each part really stopped, frozen or broken. Nothing here waits for more than its answer's three seconds."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from api.readiness import Readiness
from millrace.settings import Settings, for_children
from millrace.storage.directory import DirectoryStore
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.models import Leader, Worker
from scheduler.sweeper import Sweeper
from tests.support import minio, postgres, redis
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.records import a_build, a_claim, a_project

ROOT = Path(__file__).parents[2]
PARTS = {"database", "schema", "broker", "store", "scheduler", "workers"}


@contextmanager
def well(db: Database, settings: Settings, broker: str, **more: str) -> Iterator[ApiServer]:
    """A server of which every part is well: a scheduler led, and a worker came, just now."""
    a_project(db)
    a_build(db, settings)
    a_claim(db, settings)
    Sweeper(db, Bell(broker), DirectoryStore(settings.home / "objects", b"k" * 32), settings).sweep()
    with serving(db, settings, MILLRACE_BROKER_URL=broker, **more) as server:
        yield server


def asked(server: ApiServer) -> tuple[int, dict[str, Any]]:
    """Status and body of /readyz, which must come soon."""
    answer = httpx.get(server.url + "/readyz", timeout=3)
    body: dict[str, Any] = answer.json()
    assert set(body["parts"]) == PARTS
    return answer.status_code, body


def ill(server: ApiServer) -> tuple[int, str, dict[str, str]]:
    """HTTP status, status, and what is said of the parts that are not well."""
    code, body = asked(server)
    return code, body["status"], {name: part["detail"] for name, part in body["parts"].items() if part["status"] != "ok"}


def becomes(server: ApiServer, code: int, status: str, *parts: str) -> dict[str, str]:
    """What is wrong, once exactly these parts are."""
    return wait_until(
        lambda: (said := ill(server))[:2] == (code, status) and set(said[2]) == set(parts) and (said[2] or True), 20
    )  # type: ignore[return-value]


@pytest.mark.redis
def test_redis_away_or_frozen_only_degrades(sqlite_database: Database, settings: Settings) -> None:
    with redis.running() as broker, well(sqlite_database, settings, broker.url) as server:
        assert ill(server) == (200, "ok", {})
        broker.stop()
        becomes(server, 200, "degraded", "broker")
        broker.start()
        becomes(server, 200, "ok")
        assert broker._process is not None
        os.kill(broker._process.pid, signal.SIGSTOP)
        try:
            becomes(server, 200, "degraded", "broker")
            started = server.post("/v1/builds", {"projectName": "demo"})
            assert started.status_code == 201
        finally:
            os.kill(broker._process.pid, signal.SIGCONT)
        becomes(server, 200, "ok")


@pytest.mark.redis
@pytest.mark.postgres
def test_postgresql_away_or_frozen_is_down(settings: Settings, redis_server: redis.RedisServer) -> None:
    with postgres.running() as records, records.database() as url:
        db = Database(url)
        db.migrate()
        with well(db, settings, redis_server.url) as server:
            assert ill(server) == (200, "ok", {})
            with records.frozen():
                for _ in range(3):
                    said = becomes(server, 503, "down", "database", "schema", "scheduler", "workers")
                    assert said["database"] == "does not answer"
                    assert httpx.get(server.url + "/healthz", timeout=3).status_code == 200
            becomes(server, 200, "ok")
            records.stop()
            said = becomes(server, 503, "down", "database", "schema", "scheduler", "workers")
            assert said["scheduler"] == "cannot be told while the database does not answer"
            records.start()
            becomes(server, 200, "ok")
        db.dispose()


@pytest.mark.redis
def test_a_store_folder_that_cannot_be_written_degrades(
    sqlite_database: Database, settings: Settings, redis_server: redis.RedisServer
) -> None:
    with well(sqlite_database, settings, redis_server.url) as server:
        becomes(server, 200, "ok")  # which makes the folder
        objects = settings.home / "objects"
        objects.rename(settings.home / "elsewhere")
        objects.write_text("a file in the way")
        assert "failed to write a file" in becomes(server, 200, "degraded", "store")["store"]
        objects.unlink()
        becomes(server, 200, "ok")


@pytest.mark.redis
@pytest.mark.minio
def test_minio_away_degrades(
    sqlite_database: Database, settings: Settings, redis_server: redis.RedisServer, tmp_path: Path
) -> None:
    minio.require_program()
    with minio.minio_server(tmp_path / "minio") as server_of_objects:
        keys = {
            "MILLRACE_STORE_URL": server_of_objects.url,
            "MILLRACE_STORE_ACCESS_KEY": server_of_objects.access_key,
            "MILLRACE_STORE_SECRET_KEY": server_of_objects.secret_key,
        }
        with well(sqlite_database, settings, redis_server.url, **keys) as server:
            becomes(server, 200, "ok")
            server_of_objects.stop()
            said = becomes(server, 200, "degraded", "store")
            assert server_of_objects.secret_key not in str(said)
            server_of_objects.start()
            becomes(server, 200, "ok")


@pytest.mark.redis
def test_schema_scheduler_and_workers_are_named(
    sqlite_database: Database, settings: Settings, redis_server: redis.RedisServer
) -> None:
    def write(*statements: Any) -> None:
        with sqlite_database.transaction() as session:
            for statement in statements:
                session.execute(statement)

    version = sa.text("UPDATE alembic_version SET version_num = :to")
    with sqlite_database.reading() as session:
        head = session.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one()
    with well(sqlite_database, settings, redis_server.url) as server:
        write(version.bindparams(to="0001"))
        assert "this release needs" in becomes(server, 503, "down", "schema")["schema"]
        write(version.bindparams(to="9999"))  # a later release has migrated, and this one still runs
        becomes(server, 200, "ok")
        write(version.bindparams(to=head))
        write(sa.update(Leader).values(expires_ms=now_ms() - 100_000))
        write(sa.update(Worker).values(last_seen_ms=now_ms() - 100_000))
        said = becomes(server, 200, "degraded", "scheduler", "workers")
        assert said["scheduler"].startswith("no scheduler has acted for 10")
        assert said["workers"].startswith("no worker has shown itself for 10")
        write(sa.delete(Leader))
        wait_until(lambda: "no scheduler has run yet" in ill(server)[2]["scheduler"], 5)


def _status(server: ApiServer, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**for_children(os.environ), "MILLRACE_API_URL": server.url, "MILLRACE_TOKEN": server.token}
    command = [sys.executable, "-m", "millrace.cli", "status", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=30)


def test_status_says_it_to_people(sqlite_database: Database, settings: Settings) -> None:
    with serving(sqlite_database, settings) as server:
        done = _status(server)
        assert (done.returncode, done.stderr) == (1, "")
        assert "The farm is degraded" in done.stdout
        assert "no worker has shown itself yet; builds wait" in done.stdout
        assert '"status": "degraded"' in _status(server, "--json").stdout
        server.stop()
        gone = _status(server)
    assert (gone.returncode, gone.stderr) == (2, "")
    assert "The farm is down" in gone.stdout


def test_a_password_in_a_librarys_message_is_not_repeated(
    sqlite_database: Database, settings: Settings, store: DirectoryStore
) -> None:
    from pydantic import SecretStr

    from api.app import create_app

    secret = SecretStr("redis://:hunter%402@127.0.0.1:1/0")
    app = create_app(settings.model_copy(update={"broker_url": secret}), sqlite_database, store, Bell(secret.get_secret_value()))
    context = app.extensions["millrace"]
    readiness = Readiness(
        {**context.readiness._checks, "broker": lambda: "cannot log in with hunter@2 at redis://:hunter%402@127"}
    )
    object.__setattr__(context, "readiness", readiness)
    said = app.test_client().get("/readyz").get_data(as_text=True)
    assert "cannot log in with *** at redis://:***@127" in said
    assert "hunter" not in said
