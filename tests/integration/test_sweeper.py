"""The scheduler's round on real databases and a real Redis: what it relays, ends, puts away and forgets."""

import hashlib
import time

import pytest
import sqlalchemy as sa

from millrace.contract import ArtifactReport, LogFooter
from millrace.ids import log_key, staging_prefix
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import BuildState, Reason, Verdict
from scheduler import attempts, dispatch, lifecycle, queries
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.leases import hash_token
from scheduler.models import Attempt, Build, Idempotency, LogChunk, Outbox
from scheduler.sweeper import Sweeper
from tests.support.records import a_build, a_claim, a_project, a_report
from tests.support.redis import RedisServer

pytestmark = pytest.mark.redis


@pytest.fixture
def bell(redis_server: RedisServer) -> Bell:
    with redis_server.client() as client:
        client.flushall()
    return Bell(redis_server.url)


def rung(redis_server: RedisServer, fleet: str = "default") -> int:
    with redis_server.client() as client:
        count: int = client.llen(dispatch.queue_of(fleet))
        return count


def long_ago(db: Database, build: str) -> None:
    with db.transaction() as session:
        session.execute(sa.update(Attempt).where(Attempt.build_id == build).values(ended_ms=now_ms() - 2 * 86_400_000))


def test_what_could_not_be_told_is_told_when_redis_is_back(
    database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer
) -> None:
    a_project(database)
    deaf = Bell(f"redis+socket://{settings.home}/nothing.sock")
    build = a_build(database, settings)
    began = time.monotonic()
    dispatch.ring_now(database, deaf, build, "default")
    assert time.monotonic() - began < 2
    with redis_server.client() as client:
        client.flushall()
    bell = Bell(redis_server.url)
    assert dispatch.relay(database, bell) == 1
    assert rung(redis_server) == 1
    assert dispatch.relay(database, bell) == 0


def test_a_bell_whose_message_was_lost_is_rung_again_when_the_build_has_waited_long(
    database: Database, settings: Settings, redis_server: RedisServer, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    dispatch.ring_now(database, bell, build, "default")
    assert dispatch.relay(database, bell) == 0
    with database.transaction() as session:
        session.execute(sa.update(Build).values(queued_ms=now_ms() - dispatch.FORGOTTEN_MS - 1))
    assert dispatch.relay(database, bell) == 0  # the first message still lies there
    with redis_server.client() as client:
        client.flushall()
    assert dispatch.relay(database, bell) == 1
    assert rung(redis_server) == 1


def test_a_round_takes_a_lost_build_back_and_rings_for_it(
    database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    a_claim(database, settings)
    with database.transaction() as session:
        session.execute(sa.update(Build).values(lease_expires_ms=now_ms() - 1))
    assert Sweeper(database, bell, store, settings).sweep()
    record = queries.get_build(database, build)
    assert record is not None
    assert record.state is BuildState.QUEUED
    assert rung(redis_server) == 2


def test_only_one_of_two_schedulers_acts(database: Database, settings: Settings, store: DirectoryStore, bell: Bell) -> None:
    first, second = Sweeper(database, bell, store, settings), Sweeper(database, bell, store, settings)
    assert [first.sweep(), second.sweep(), first.sweep()] == [True, False, True]


def test_an_ended_log_moves_to_the_store_and_reads_the_same(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    chunks = [bytes([65 + n]) * (1000 * (n + 1)) for n in range(5)]
    offset = 0
    for seq, data in enumerate(chunks):
        digest = hashlib.sha256(data).hexdigest()
        attempts.store_log(database, build, 1, hash_token(claim.token), seq=seq, offset=offset, data=data, sha256=digest)
        offset += len(data)
    whole = b"".join(chunks)
    footer = LogFooter(chunks=5, size_bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    lifecycle.finish(database, build, 1, hash_token(claim.token), a_report(log=footer))
    long_ago(database, build)
    Sweeper(database, bell, store, settings).sweep()
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(LogChunk)) == 0
    stored = store.stat(settings.bucket, log_key(build, 1))
    assert stored is not None
    assert stored.sha256 == footer.sha256
    assert queries.read_log(database, store, settings, build, 1, 0, 10**6) == whole
    assert queries.read_log(database, store, settings, build, 1, 999, 3) == b"ABB"
    assert queries.read_log(database, store, settings, build, 1, len(whole), 10) == b""
    info = queries.log_info(database, build)
    assert info is not None
    assert info.complete


def test_what_a_losing_attempt_stored_is_removed_a_day_later(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    import io

    a_project(database)
    build = a_build(database, settings)
    lost = a_claim(database, settings)
    store.put(settings.bucket, staging_prefix(build, 1) + "a.zip", io.BytesIO(b"lost"))
    lifecycle.finish(
        database, build, 1, hash_token(lost.token), a_report(verdict=Verdict.HANDED_BACK, reason=Reason.WORKER_SHUTDOWN)
    )
    won = a_claim(database, settings)
    kept = store.put(settings.bucket, staging_prefix(build, 2) + "a.zip", io.BytesIO(b"kept"))
    item = ArtifactReport(
        name="a.zip", key=kept.key, size_bytes=4, sha256=kept.sha256 or "", md5="0" * 32, packaging="ZIP", file_count=1
    )
    lifecycle.finish(database, build, 2, hash_token(won.token), a_report(artifacts=(item,)))
    sweeper = Sweeper(database, bell, store, settings)
    sweeper.sweep()
    assert len(list(store.list(settings.bucket, "artifacts/"))) == 2
    long_ago(database, build)
    sweeper.sweep()
    assert [stored.key for stored in store.list(settings.bucket, "artifacts/")] == [kept.key]


def test_old_keys_and_messages_are_forgotten(database: Database, settings: Settings, store: DirectoryStore, bell: Bell) -> None:
    a_project(database)
    build = a_build(database, settings)
    with database.transaction() as session:
        session.add(Idempotency(scope="s", key="k", request_sha256="0" * 64, build_id=build, created_ms=1))
        session.execute(sa.update(Outbox).values(sent_ms=1))
    Sweeper(database, bell, store, settings).sweep()
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Idempotency)) == 0
        assert session.scalar(sa.select(sa.func.count()).select_from(Outbox)) == 0
