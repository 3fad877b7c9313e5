"""The scheduler's round on real databases and a real Redis: what it relays, ends, puts away and forgets."""

import hashlib
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from minio.credentials import StaticProvider

from millrace.chunks import compare, read_list
from millrace.contract import ArtifactReport, LogFooter
from millrace.errors import InfraProblem
from millrace.ids import log_key, staging_prefix
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.storage.s3 import S3Store
from millrace.vocabulary import BuildState, Reason, Verdict
from scheduler import attempts, dispatch, lifecycle, queries, sweeper
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.leases import hash_token
from scheduler.models import Attempt, Build, Event, Idempotency, Leader, LogChunk, Outbox, Worker
from scheduler.sweeper import Sweeper
from tests.chaos.proxy import Faults, Proxy
from tests.support.postgres import PostgresServer
from tests.support.records import a_build, a_claim, a_project, a_report, log_footer, store_log
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
    store_log(database, claim, *chunks)
    whole = b"".join(chunks)
    footer = log_footer(*chunks)
    lifecycle.finish(database, build, 1, hash_token(claim.token), a_report(log=footer))
    listed = queries.log_list(database, store, settings, build, 1)
    long_ago(database, build)
    Sweeper(database, bell, store, settings).sweep()
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(LogChunk)) == 0
    assert listed is not None
    assert queries.log_list(database, store, settings, build, 1) == listed
    assert hashlib.sha256(listed).hexdigest() == footer.root
    tally, sha256 = compare(read_list(io.BytesIO(listed)), io.BytesIO(whole).read)
    assert (tally.root, sha256) == (footer.root, footer.sha256)
    stored = store.stat(settings.bucket, log_key(build, 1))
    assert stored is not None
    assert stored.sha256 == footer.sha256
    assert queries.read_log(database, store, settings, build, 1, 0, 10**6) == whole
    assert queries.read_log(database, store, settings, build, 1, 999, 3) == b"ABB"
    assert queries.read_log(database, store, settings, build, 1, len(whole), 10) == b""
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.complete, info.root, info.gap) == (True, footer.root, None)


def test_as_many_damaged_logs_as_a_round_takes_keep_no_other_from_the_store(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "_LOGS_AT_ONCE", 2)
    a_project(database)
    damaged, good = [an_ended_log(database, settings, b"damaged") for _ in range(3)], an_ended_log(database, settings, b"good")
    with database.transaction() as session:
        session.execute(sa.delete(LogChunk).where(LogChunk.build_id.in_(damaged)))
        session.execute(sa.update(Attempt).where(Attempt.build_id.in_(damaged)).values(ended_ms=Attempt.ended_ms - 1000))
    one = Sweeper(database, bell, store, settings)
    for _ in range(2):
        one._put_logs_away()
    assert store.stat(settings.bucket, log_key(good, 1)) is not None
    with database.reading() as session:
        left = sa.select(Attempt.build_id).where(Attempt.log_key.is_(None))
        assert set(session.scalars(left)) == set(damaged)
    with database.transaction() as session:  # whoever mends them need not start anything
        session.execute(sa.update(Attempt).where(Attempt.build_id == damaged[0]).values(log_chunks=0, log_bytes=0))
    for _ in range(2):
        one._put_logs_away()


def test_what_cannot_be_removed_of_one_attempt_does_not_bar_the_others(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "_LOSERS_AT_ONCE", 1)
    a_project(database)
    stuck, free = an_ended_log(database, settings, b"a"), an_ended_log(database, settings, b"b")
    remove = store.delete_prefix

    def refuse(bucket: str, prefix: str) -> int:
        if prefix.startswith(staging_prefix(stuck, 1)):
            raise InfraProblem("the object store refuses", reason=Reason.STORAGE)
        return remove(bucket, prefix)

    monkeypatch.setattr(store, "delete_prefix", refuse)
    with database.transaction() as session:
        session.execute(sa.update(Attempt).values(ended_ms=Attempt.ended_ms - 2 * 86_400_000))
        session.execute(sa.update(Attempt).where(Attempt.build_id == stuck).values(ended_ms=Attempt.ended_ms - 1000))
    one = Sweeper(database, bell, store, settings)
    for _ in range(2):
        one._drop_losers()
    with database.reading() as session:
        assert session.scalars(sa.select(Attempt.build_id).where(Attempt.swept == sa.true())).all() == [free]
    monkeypatch.undo()
    for _ in range(3):
        one._drop_losers()
    with database.reading() as session:
        assert session.scalars(sa.select(Attempt.build_id).where(Attempt.swept == sa.false())).all() == []


def test_a_log_that_the_last_release_ended_gets_its_root_on_its_way_to_the_store(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = an_ended_log(database, settings, b"of old")
    with database.transaction() as session:
        session.execute(sa.update(Attempt).values(log_root=None, log_footer=None))
    Sweeper(database, bell, store, settings).sweep()
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.complete, info.root) == (True, log_footer(b"of old").root)


def test_what_a_losing_attempt_stored_is_removed_a_day_later(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
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


def an_ended_log(database: Database, settings: Settings, text: bytes) -> str:
    """A build that failed long ago, with its log still in the database."""
    build = a_build(database, settings)
    token = hash_token(a_claim(database, settings).token)
    digest = hashlib.sha256(text).hexdigest()
    attempts.store_log(database, build, 1, token, seq=0, offset=0, data=text, sha256=digest)
    footer = LogFooter(chunks=1, size_bytes=len(text), sha256=digest)
    lifecycle.finish(database, build, 1, token, a_report(Verdict.FAILED, Reason.EXIT_CODE, log=footer))
    long_ago(database, build)
    return build


def test_two_schedulers_at_once_do_everything_once(
    database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer
) -> None:
    """Both act, as they would where one was frozen beyond its lease in the middle of a round."""
    with redis_server.client() as client:
        client.flushall()
    a_project(database)
    logs = {an_ended_log(database, settings, b"log %d" % n): b"log %d" % n for n in range(10)}
    lost = [a_build(database, settings) for _ in range(10)]
    late = [a_build(database, settings, priority=-1) for _ in range(10)]
    for _ in lost:
        a_claim(database, settings)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id.in_(lost)).values(lease_expires_ms=now_ms() - 1))
        session.execute(sa.update(Build).where(Build.id.in_(late)).values(queue_deadline_ms=now_ms() - 1))
    sweepers = [Sweeper(database, Bell(redis_server.url), store, settings) for _ in range(2)]
    for each in sweepers:
        each._lead = lambda: True  # type: ignore[method-assign]
    together = threading.Barrier(2)

    def round_of(sweeper: Sweeper) -> None:
        together.wait()
        sweeper.sweep()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(round_of, sweepers))
    with database.reading() as session:
        moves = session.execute(sa.select(Event.build_id, Event.event).where(Event.event.in_(["REQUEUED", "TIMED_OUT"]))).all()
        assert session.scalar(sa.select(sa.func.count()).select_from(LogChunk)) == 0
    assert sorted(map(tuple, moves)) == sorted([*((b, "REQUEUED") for b in lost), *((b, "TIMED_OUT") for b in late)])
    for build, text in logs.items():
        assert queries.read_log(database, store, settings, build, 1, 0, 100) == text
        info = queries.log_info(database, build)
        assert info is not None
        assert info.complete


def test_when_the_leader_dies_another_takes_over_after_its_lease(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    first, second = Sweeper(database, bell, store, settings), Sweeper(database, bell, store, settings)
    assert [first.sweep(), second.sweep()] == [True, False]
    with database.transaction() as session:
        session.execute(sa.update(Leader).values(expires_ms=now_ms() - 1))
    assert [second.sweep(), first.sweep()] == [True, False]


def test_a_leader_that_stops_leaves_its_place_at_once(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    stop = threading.Event()
    stop.set()
    first, second = Sweeper(database, bell, store, settings), Sweeper(database, bell, store, settings)
    assert first.sweep()
    first.run_forever(stop)
    assert second.sweep()


def test_a_store_that_is_away_keeps_nothing_else_waiting(
    database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer, bell: Bell, tmp_path: Path
) -> None:
    a_project(database)
    logged = an_ended_log(database, settings, b"kept")
    build = a_build(database, settings)
    (tmp_path / "objects").write_text("no folder")
    with database.transaction() as session:
        session.add(Idempotency(scope="s", key="k", request_sha256="0" * 64, build_id=build, created_ms=1))
    sweeper = Sweeper(database, bell, store, settings)
    assert sweeper.sweep()
    assert rung(redis_server) == 2
    with database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Idempotency)) == 0
    assert queries.read_log(database, store, settings, logged, 1, 0, 10) == b"kept"
    (tmp_path / "objects").unlink()
    sweeper.sweep()
    assert store.stat(settings.bucket, log_key(logged, 1)) is not None
    assert queries.read_log(database, store, settings, logged, 1, 0, 10) == b"kept"


def test_a_store_that_never_answers_keeps_no_lost_build_waiting(
    sqlite_database: Database, settings: Settings, bell: Bell
) -> None:
    database = sqlite_database
    a_project(database)
    an_ended_log(database, settings, b"kept")
    build = a_build(database, settings)
    a_claim(database, settings)
    with Proxy(("127.0.0.1", 9)) as silent:
        silent.faults = Faults(silent_up=True)
        store = S3Store(
            f"127.0.0.1:{silent.port}", keys=StaticProvider("a", "b" * 8), region="us-east-1", secure=False, bucket="millrace"
        )
        sweeper = Sweeper(database, bell, store, settings)
        assert sweeper.sweep()
        with database.transaction() as session:
            session.execute(sa.update(Build).where(Build.id == build).values(lease_expires_ms=now_ms() - 1))
        began = time.monotonic()
        assert sweeper.sweep()
        assert time.monotonic() - began < 10
        assert _state(database, build) is BuildState.QUEUED
    sweeper._beside["store"].join(20)


def test_a_log_that_cannot_be_put_away_does_not_bar_the_others(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    broken, whole = an_ended_log(database, settings, b"broken"), an_ended_log(database, settings, b"whole")
    with database.transaction() as session:
        session.execute(sa.delete(LogChunk).where(LogChunk.build_id == broken))
    Sweeper(database, bell, store, settings).sweep()
    assert store.stat(settings.bucket, log_key(broken, 1)) is None
    assert store.stat(settings.bucket, log_key(whole, 1)) is not None


def test_a_log_that_is_not_what_its_footer_says_is_marked(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = an_ended_log(database, settings, b"true")
    with database.transaction() as session:
        session.execute(sa.update(LogChunk).values(data=b"lies"))
    assert queries.read_log(database, store, settings, build, 1, 0, 10) == b"lies"
    Sweeper(database, bell, store, settings).sweep()
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.complete, info.gap) == (False, "this log is damaged: by its hash, it is not what its worker wrote")


def test_a_log_that_was_deleted_from_the_store_is_a_clear_error(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = an_ended_log(database, settings, b"gone")
    Sweeper(database, bell, store, settings).sweep()
    store.delete(settings.bucket, log_key(build, 1))
    with pytest.raises(InfraProblem, match="is not in the object store"):
        queries.read_log(database, store, settings, build, 1, 0, 10)


def test_what_was_seen_to_is_not_looked_at_again(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    an_ended_log(database, settings, b"x")
    with database.transaction() as session:
        session.execute(sa.update(Worker).values(last_seen_ms=now_ms() - 8 * 86_400_000))
    Sweeper(database, bell, store, settings).sweep()
    with database.reading() as session:
        assert session.scalars(sa.select(Attempt.swept)).all() == [True]
        assert session.scalars(sa.select(Worker.id)).all() == []


def test_after_a_gap_nobody_loses_a_build_for_one_lease(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    a_claim(database, settings)
    quick = settings.model_copy(update={"lease_ttl_s": 1.0, "renew_every_s": 0.2, "sweep_every_s": 0.1})
    sweeper = Sweeper(database, bell, store, quick)
    sweeper.sweep()
    with database.transaction() as session:  # as if all had stood still for a minute
        session.execute(sa.update(Leader).values(expires_ms=now_ms() - 60_000))
        session.execute(sa.update(Build).values(lease_expires_ms=now_ms() - 55_000))
    sweeper.sweep()
    sweeper.sweep()
    assert _state(database, build) is BuildState.CLAIMED
    until = time.monotonic() + 5
    while _state(database, build) is BuildState.CLAIMED:
        assert time.monotonic() < until
        time.sleep(0.1)
        sweeper.sweep()
    assert _state(database, build) is BuildState.QUEUED


def test_a_scheduler_that_starts_again_at_once_spares_nobody(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    a_claim(database, settings)
    stop = threading.Event()
    stop.set()
    first = Sweeper(database, bell, store, settings)
    first.sweep()
    first.run_forever(stop)
    with database.transaction() as session:
        session.execute(sa.update(Build).values(lease_expires_ms=now_ms() - 1))
    Sweeper(database, bell, store, settings).sweep()
    assert _state(database, build) is BuildState.QUEUED


def _clock_set(database: Database, by_ms: int) -> None:
    """As it is after the database's clock was set forward: all that was noted lies further back."""
    columns = (
        Build.submitted_ms,
        Build.queued_ms,
        Build.queue_deadline_ms,
        Build.first_claimed_ms,
        Build.deadline_ms,
        Build.lease_expires_ms,
        Build.not_before_ms,
        Build.cancel_requested_ms,
        Attempt.claimed_ms,
        Leader.expires_ms,
        Outbox.next_try_ms,
    )
    with database.transaction() as session:
        for column in columns:
            session.execute(sa.update(column.class_).values({column: column - by_ms}))


@pytest.mark.parametrize("by_s", [3600, -3600])
def test_nothing_ends_or_waits_because_the_databases_clock_was_set(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell, by_s: int
) -> None:
    a_project(database)
    set_by_s = 0.0
    sweeper = Sweeper(database, bell, store, settings, monotonic=lambda: time.monotonic() - set_by_s)
    running, waiting = a_build(database, settings), a_build(database, settings)
    assert a_claim(database, settings).build_id == running
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == running).values(deadline_ms=now_ms() + 60_000))
        waits = {"queue_deadline_ms": now_ms() + 60_000, "not_before_ms": now_ms()}
        session.execute(sa.update(Build).where(Build.id == waiting).values(waits))
    assert sweeper.sweep()
    set_by_s = by_s
    _clock_set(database, by_s * 1000)
    assert sweeper.sweep()
    with database.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        build, other = session.get_one(Build, running), session.get_one(Build, waiting)
    assert (build.state, other.state) == ("CLAIMED", "QUEUED")
    assert build.lease_expires_ms is not None
    assert 0 < build.lease_expires_ms - now <= settings.lease_ttl_s * 1000
    assert build.deadline_ms is not None
    assert min(build.deadline_ms, other.queue_deadline_ms) > now + 30_000
    assert other.not_before_ms <= now
    if by_s > 0:
        assert max(build.deadline_ms, other.queue_deadline_ms) < now + 90_000
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == running).values(lease_expires_ms=now_ms() - 1))
    sweeper.sweep()
    assert _state(database, running) is BuildState.QUEUED, "what is lost is still found"
    finished = a_claim(database, settings)
    lifecycle.finish(database, finished.build_id, finished.attempt_no, hash_token(finished.token), a_report())
    record = queries.get_build(database, finished.build_id)
    assert record is not None
    assert all(phase.duration_ms is None or phase.duration_ms >= 0 for phase in record.phases)


@pytest.mark.parametrize("damaged", ["{", "[]", '"text"', "null"])
def test_a_record_that_cannot_be_read_keeps_no_other_from_its_end_or_its_worker(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell, damaged: str
) -> None:
    if damaged == "{" and not database.is_sqlite:
        damaged = "7"  # PostgreSQL takes nothing that is no JSON
    a_project(database)
    lost, late, barring, good = (a_build(database, settings) for _ in range(4))
    assert a_claim(database, settings).build_id == lost
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == lost).values(lease_expires_ms=now_ms() - 1))
        session.execute(sa.update(Build).where(Build.id == late).values(queue_deadline_ms=now_ms() - 1))
        for one in (lost, late, barring):
            session.execute(sa.text("UPDATE builds SET settings = :damaged WHERE id = :id"), {"damaged": damaged, "id": one})
    sweeper = Sweeper(database, bell, store, settings)
    assert sweeper.sweep()
    assert sweeper.sweep()
    assert a_claim(database, settings).build_id == good
    with database.reading() as session:
        states = dict(session.execute(sa.select(Build.id, Build.state)).all())
    assert (states[barring], states[late]) == ("FAULT", "TIMED_OUT"), states


def test_no_lease_lasts_longer_than_one_can_when_a_scheduler_begins(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    a_project(database)
    build = a_build(database, settings)
    a_claim(database, settings)
    with database.transaction() as session:
        session.execute(sa.update(Build).values(lease_expires_ms=now_ms() + 3_600_000))
    Sweeper(database, bell, store, settings).sweep()
    with database.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        expires_ms = session.get_one(Build, build).lease_expires_ms
    assert expires_ms is not None
    assert expires_ms <= now + settings.lease_ttl_s * 1000


def test_a_leader_that_is_dead_bars_nobody_where_the_clock_was_set_back(
    database: Database, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    Sweeper(database, bell, store, settings).sweep()
    _clock_set(database, -3_600_000)
    assert Sweeper(database, bell, store, settings).sweep()


def _state(database: Database, build: str) -> BuildState:
    record = queries.get_build(database, build)
    assert record is not None
    return record.state


@pytest.mark.postgres
def test_a_scheduler_outlives_its_database(
    postgres_server: PostgresServer, settings: Settings, store: DirectoryStore, bell: Bell
) -> None:
    with postgres_server.database() as url:
        database = Database(url)
        database.migrate()
        a_project(database)
        build = a_build(database, settings)
        a_claim(database, settings)
        stop = threading.Event()
        quick = settings.model_copy(update={"sweep_every_s": 0.1})
        scheduler = threading.Thread(target=Sweeper(database, bell, store, quick).run_forever, args=(stop,))
        scheduler.start()
        try:
            postgres_server.stop()
            time.sleep(0.5)  # some rounds without a database
            postgres_server.start()
            with database.transaction() as session:
                session.execute(sa.update(Build).values(lease_expires_ms=now_ms() - 1))
            until = time.monotonic() + 10
            while (record := queries.get_build(database, build)) is None or record.state is not BuildState.QUEUED:
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            stop.set()
            scheduler.join(10)
        assert not scheduler.is_alive()
        database.dispose()
