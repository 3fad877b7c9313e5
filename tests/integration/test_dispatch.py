"""The bell on a real Redis: what it says, how it fails, and that nothing is lost by that."""

import base64
import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from millrace.settings import Settings
from scheduler import db, dispatch, leases
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.models import Build, Outbox
from tests.support import redis
from tests.support.records import a_build, a_claim_request, a_project
from tests.support.redis import RedisServer

pytestmark = pytest.mark.redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that this test may stop."""
    with redis.running() as server:
        yield server


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def messages(server: RedisServer, fleet: str = "default") -> list[bytes]:
    with server.client() as client:
        found: list[bytes] = client.lrange(dispatch.queue_of(fleet), 0, -1)
    return found


def unsent(records: Database) -> int:
    with records.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Outbox).where(Outbox.sent_ms.is_(None))) or 0


def due_now(records: Database) -> None:
    with records.transaction() as session:
        session.execute(sa.update(Outbox).values(next_try_ms=now_ms()))


def test_a_message_is_json_and_holds_a_build_id_and_nothing_else(own_redis: RedisServer) -> None:
    assert Bell(own_redis.url).ring("demo:1", "big")
    (message,) = messages(own_redis, "big")
    envelope = json.loads(message)
    assert envelope["content-type"] == "application/json"
    assert envelope["headers"]["task"] == dispatch.TASK
    arguments, keywords, _ = json.loads(base64.b64decode(envelope["body"]))
    assert (arguments, keywords) == (["demo:1"], {})


def test_a_ring_never_takes_a_second_and_then_none_is_tried_for_a_while(silent: str, settings: Settings) -> None:
    for url in (
        silent,
        "redis://127.0.0.1:1/0",
        f"redis+socket://{settings.home}/nothing.sock",
        "redis://no.such.host.invalid/0",
    ):
        bell = Bell(url)
        began = time.monotonic()
        assert not bell.ring("demo:1", "default")
        assert time.monotonic() - began < 1
        began = time.monotonic()
        assert not any(bell.ring("demo:1", "default") for _ in range(100))
        assert time.monotonic() - began < 0.1
        assert bell.check()


def test_builds_are_accepted_quickly_while_redis_hangs_and_all_are_told_when_it_is_back(
    database: Database, settings: Settings, own_redis: RedisServer, silent: str
) -> None:
    a_project(database)
    deaf = Bell(silent)
    for _ in range(5):
        began = time.monotonic()
        build = a_build(database, settings)
        dispatch.ring_now(database, deaf, build, "default")
        assert time.monotonic() - began < 1
    assert unsent(database) == 5
    assert dispatch.relay(database, deaf) == 0
    due_now(database)
    assert dispatch.relay(database, Bell(own_redis.url)) == 5
    assert (unsent(database), len(messages(own_redis))) == (0, 5)


def test_a_bell_rings_again_after_redis_was_restarted(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "QUIET_S", 0.1)
    bell = Bell(own_redis.url)
    assert bell.ring("demo:1", "default")
    own_redis.stop()
    assert not bell.ring("demo:2", "default")
    assert bell.check()
    own_redis.start()
    until = time.monotonic() + 5
    while not bell.ring("demo:3", "default"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert bell.check() is None
    assert len(messages(own_redis)) == 1


def test_threads_may_share_a_bell(own_redis: RedisServer) -> None:
    bell = Bell(own_redis.url)
    rang: list[bool] = []

    def ring() -> None:
        rang.extend(bell.ring(f"demo:{n}", "default") for n in range(25))

    threads = [threading.Thread(target=ring) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (rang.count(True), len(messages(own_redis))) == (200, 200)


def test_a_ringer_notes_every_build_and_wakes_no_more_workers_than_there_are(
    database: Database, settings: Settings, own_redis: RedisServer
) -> None:
    a_project(database)
    builds = [a_build(database, settings) for _ in range(50)]
    for worker in ("w1", "w2"):
        leases.claim(database, a_claim_request(worker, free_slots=0), settings)
    ringer = dispatch.Ringer(database, Bell(own_redis.url))
    for build in builds:  # while the first is rung for
        ringer.ring(build, "default")
    ringer.join()
    assert unsent(database) == 0
    assert 2 <= len(messages(own_redis)) < 50
    deaf = dispatch.Ringer(database, Bell("redis://127.0.0.1:1/0"))
    deaf.ring(a_build(database, settings), "default")
    deaf.join()
    assert unsent(database) == 1


def test_messages_that_nobody_reads_do_not_pile_up(database: Database, settings: Settings, own_redis: RedisServer) -> None:
    a_project(database)
    bell = Bell(own_redis.url)
    for _ in range(3):
        dispatch.ring_now(database, bell, a_build(database, settings), "default")
    with database.transaction() as session:
        session.execute(sa.update(Build).values(queued_ms=now_ms() - dispatch.FORGOTTEN_MS - 1))
    for _ in range(10):
        dispatch.relay(database, bell)
    assert len(messages(own_redis)) == 3
    with own_redis.client() as client:
        client.flushall()
    for _ in range(10):
        dispatch.relay(database, bell)
    assert len(messages(own_redis)) == 1


def test_an_accepted_build_is_not_refused_because_its_bell_could_not_be_noted(
    sqlite_database: Database, settings: Settings, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_project(sqlite_database)
    build = a_build(sqlite_database, settings)
    monkeypatch.setattr(db, "_TRIES", 1)
    with sqlite_database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=50")
    hog = sqlite3.connect(str(sa.make_url(sqlite_database.url).database), isolation_level=None)
    hog.execute("BEGIN IMMEDIATE")
    dispatch.ring_now(sqlite_database, Bell(own_redis.url), build, "default")
    hog.execute("ROLLBACK")
    hog.close()
    assert len(messages(own_redis)) == 1
    assert unsent(sqlite_database) == 1
