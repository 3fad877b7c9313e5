"""`millrace fsck`: each invariant is planted broken and seen named, and mended where that is offered; a well farm is clean."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import docker
import pytest
import sqlalchemy as sa

from buildenv.engine import LABEL_ATTEMPT, LABEL_BUILD, LABEL_PLACE, LABEL_WORKSPACES
from millrace.commands.fsck import ThisHost
from millrace.commands.session import Session
from millrace.contract import ArtifactReport, LogFooter, PhaseReport
from millrace.ids import log_key, log_list_key, staging_prefix, uuid_of
from millrace.locks import held
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import BuildState, PhaseType, Reason, StatusType, Verdict
from scheduler import attempts, fairness, fsck, guard, leases, lifecycle
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.fleets import records
from scheduler.fsck import Finding, Scope, Standing, Thing
from scheduler.leases import hash_token
from scheduler.models import Artifact, Attempt, Build, Delivery, Event, Fleet, LogChunk, Notice, Outbox, Phase, Project, Worker
from scheduler.sweeper import Sweeper
from tests.support.farm import need_engine, wait_until
from tests.support.load import Load
from tests.support.records import a_build, a_claim, a_project, a_report
from tests.support.redis import RedisServer

ROOT = Path(__file__).parents[2]
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
LOG = b"hello\nworld\n"
ARTIFACT = b"an artifact"


class AHost:
    """A host with the things that a test lays there."""

    def __init__(self) -> None:
        self.laid: list[Thing] = []

    def things(self) -> Sequence[Thing]:
        return list(self.laid)

    def clean(self) -> int:
        count = len(self.laid)
        self.laid.clear()
        return count


class Farm:
    """Records and objects as a farm has them that has run, and runs: one build of each kind."""

    def __init__(self, db: Database, settings: Settings, store: DirectoryStore, broker: str) -> None:
        self.db, self.settings, self.store, self.host = db, settings, store, AHost()
        self.bell = Bell(broker)
        a_project(db)
        self.done = a_build(db, settings)
        self.run(self.done)
        self.retried = a_build(db, settings)
        a_claim(db, settings)
        self.update(Build, {"lease_expires_ms": now_ms() - 1}, Build.id == self.retried)
        leases.expire(db)
        self.run(self.retried)
        self.stopped = a_build(db, settings)
        lifecycle.request_stop(db, self.stopped)
        self.running = a_build(db, settings)
        a_claim(db, settings)
        self.queued = a_build(db, settings)
        self.sweeper = Sweeper(db, self.bell, store, settings)
        self.sweeper.sweep()

    def run(self, build_id: str) -> None:
        """Claim the build, and carry it to its end with a log and an artifact."""
        claim = a_claim(self.db, self.settings)
        assert claim.build_id == build_id
        token = hash_token(claim.token)
        at_ms = int(time.time() * 1000)
        begun = PhaseReport(phase_type=PhaseType.BUILD, started_at_ms=at_ms)
        ended = PhaseReport(
            phase_type=PhaseType.BUILD, started_at_ms=at_ms, ended_at_ms=at_ms + 1, duration_ms=1, status=StatusType.SUCCEEDED
        )
        for report in (begun, ended):
            attempts.record_phase(self.db, build_id, claim.attempt_no, token, report)
        for seq, data in enumerate((LOG[:6], LOG[6:])):
            digest = hashlib.sha256(data).hexdigest()
            attempts.store_log(self.db, build_id, claim.attempt_no, token, seq=seq, offset=seq * 6, data=data, sha256=digest)
        key = f"{staging_prefix(build_id, claim.attempt_no)}demo.zip"
        self.store.put(self.settings.bucket, key, io.BytesIO(ARTIFACT))
        artifact = ArtifactReport(
            name="demo.zip",
            key=key,
            size_bytes=len(ARTIFACT),
            sha256=hashlib.sha256(ARTIFACT).hexdigest(),
            md5="0" * 32,
            packaging="ZIP",
            file_count=1,
        )
        footer = LogFooter(chunks=2, size_bytes=len(LOG), sha256=hashlib.sha256(LOG).hexdigest())
        lifecycle.finish(self.db, build_id, claim.attempt_no, token, a_report(artifacts=(artifact,), log=footer))

    def put_logs_away(self) -> None:
        """As the scheduler does some seconds after the end."""
        self.grow_older(6000)
        assert self.sweeper.sweep()

    def grow_older(self, ms: int) -> None:
        """Let all of this have happened earlier."""
        for column in (
            Build.submitted_ms,
            Build.queued_ms,
            Build.first_claimed_ms,
            Build.finished_ms,
            Phase.started_ms,
            Phase.ended_ms,
        ):
            self.update(column.class_, {column.key: column - ms})
        for column in (Attempt.claimed_ms, Attempt.ended_ms, Event.at_ms):
            self.update(column.class_, {column.key: column - ms})

    def update(self, table: Any, values: dict[str, Any], *where: Any) -> None:
        """Change rows behind the farm's back, past the guard too."""
        with self.db.transaction() as session:
            self.unguard(session)
            session.execute(sa.update(table).where(*where).values(**values))
            guard.make(session)

    def unguard(self, session: Any) -> None:
        on = "" if self.db.is_sqlite else " ON builds"
        session.execute(sa.text(f"DROP TRIGGER {guard.NAME}{on}"))

    def add(self, *rows: Any) -> None:
        with self.db.transaction() as session:
            session.add_all(rows)

    def scope(self, **more: Any) -> Scope:
        values: dict[str, Any] = {"db": self.db, "settings": self.settings, "store": self.store, "bell": self.bell}
        values |= {"host_patience_s": 0, **more}
        return Scope(**values)

    def look(self, number: int, **more: Any) -> Finding:
        return fsck.check(self.scope(**more), {number})[0]


@pytest.fixture
def farm(database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer) -> Farm:
    return Farm(database, settings, store, redis_server.url)


def violated(finding: Finding, words: str, *ids: str) -> None:
    """Assert that the finding blames just this."""
    assert finding.standing is Standing.VIOLATED, finding
    assert any(words in fault.what for fault in finding.faults), finding
    assert {one for fault in finding.faults for one in fault.ids} >= set(ids), finding


def test_a_well_farm_is_not_blamed(farm: Farm) -> None:
    for _ in range(2):
        findings = fsck.check(farm.scope(host=farm.host, journal=[], canaries=["not-to-be-found"]))
        assert [one.number for one in findings] == list(range(1, 26))
        assert {one.number: one.faults for one in findings if one.faults} == {}
        unchecked = {one.number: one.standing for one in findings if one.standing is not Standing.OK}
        assert unchecked == {
            19: Standing.NOT_BUILT,
            20: Standing.UNCHECKED,
        }
        farm.put_logs_away()


def test_a_busy_farm_is_not_blamed(
    database: Database, settings: Settings, store: DirectoryStore, redis_server: RedisServer
) -> None:
    a_project(database)
    bell = Bell(redis_server.url)
    with Load(database, settings) as load:
        for _ in range(12):
            findings = fsck.check(Scope(db=database, settings=settings, store=store, bell=bell))
            assert {one.number: one.faults for one in findings if one.faults} == {}
        wait_until(lambda: len(load.given) > 20)


def test_what_was_not_given_is_said_and_blamed_on_nobody(farm: Farm) -> None:
    findings = {one.number: one for one in fsck.check(Scope(db=farm.db, settings=farm.settings))}
    for number, word in (
        (1, "--journal"),
        (8, "object store"),
        (11, "--journal"),
        (14, "--host"),
        (16, "broker"),
        (17, "--canaries"),
    ):
        assert findings[number].standing is Standing.UNCHECKED
        assert word in findings[number].note
        assert not findings[number].away


def _overload(farm: Farm) -> None:
    farm.update(Worker, {"cpu_millis": 3000})
    farm.update(Build, {"need": f"4000/{8 * 1024**3}/"}, Build.id == farm.running)


# Plants: the number, what is done behind the farm's back, and words of what is said of it; `{done}` and so on are ids.


def _end_twice(farm: Farm) -> None:
    with farm.db.transaction() as session:
        end = session.scalars(sa.select(Event).where(Event.build_id == farm.done).order_by(Event.id.desc())).first()
        assert end is not None
        facts = {name: getattr(end, name) for name in ("build_id", "attempt_no", "at_ms", "event", "before", "after", "reason")}
        session.add(Event(**facts))


def _no_end(farm: Farm) -> None:
    with farm.db.transaction() as session:
        session.execute(sa.delete(Event).where(Event.build_id == farm.done, Event.after == "SUCCEEDED"))


def _drop_attempt(farm: Farm) -> None:
    with farm.db.transaction() as session:
        session.execute(sa.delete(Phase).where(Phase.build_id == farm.retried, Phase.attempt_no == 1))
        session.execute(sa.delete(Attempt).where(Attempt.build_id == farm.retried, Attempt.attempt_no == 1))


def _set(table: Any, of: str, values: dict[str, Any], *more: Any) -> Callable[[Farm], None]:
    def plant(farm: Farm) -> None:
        its = table.id if table is Build else table.build_id
        farm.update(table, values, its == getattr(farm, of), *more)

    return plant


def _crowd(farm: Farm) -> None:
    a_claim(farm.db, farm.settings)
    farm.update(Worker, {"slots": 1})


def _over_limit(farm: Farm) -> None:
    a_claim(farm.db, farm.settings)
    farm.update(Project, {"concurrent_build_limit": 1, "modified_ms": Project.modified_ms - HOUR_MS})


def _over_fleet_limit(farm: Farm) -> None:
    a_claim(farm.db, farm.settings)
    records.change(farm.db, "default", max_running=1)
    assert farm.look(13).standing is Standing.OK  # lowered while two run
    farm.update(Fleet, {"modified_ms": Fleet.modified_ms - HOUR_MS})


def _deliver(*rows: dict[str, Any]) -> Callable[[Farm], None]:
    def plant(farm: Farm) -> None:
        common = {"webhook_id": "w", "project_name": "demo", "what": "PUSH", "why": "", "received_ms": now_ms()}
        with farm.db.transaction() as session:
            for number, row in enumerate(rows):
                values = {**common, "delivery_id": f"d{number}", "outcome": "build", "build_id": farm.done, **row}
                session.add(Delivery(**values))

    return plant


PLANTS: list[tuple[str, int, Callable[[Farm], None], str]] = [
    ("past its deadline", 2, _set(Build, "running", {"deadline_ms": now_ms() - HOUR_MS}), "{running} is CLAIMED and ran past"),
    ("lease", 2, _set(Build, "running", {"lease_expires_ms": now_ms() - HOUR_MS}), "{running} is CLAIMED and has a lease"),
    ("queue", 2, _set(Build, "queued", {"queue_deadline_ms": now_ms() - HOUR_MS}), "{queued} is QUEUED and waited"),
    ("nobody's", 2, _set(Build, "running", {"lease_owner": None}), "{running} is CLAIMED and is held, but"),
    ("ended twice", 3, _end_twice, "{done} is SUCCEEDED and has 2 terminal events"),
    ("never ended", 3, _no_end, "{done} is SUCCEEDED and has 0 terminal events"),
    ("delivery of nothing", 12, _deliver({"build_id": "demo:x"}), "delivery d0 of demo started demo:x, which is not in"),
    ("two deliveries", 12, _deliver({}, {"what": "PULL_REQUEST_CREATED"}), "2 deliveries started {done}"),
    ("a late delivery", 12, _deliver({"outcome": "accepted", "received_ms": 1}), "delivery d0 of demo is still accepted"),
    ("a late comment", 12, _deliver({"outcome": "checking", "received_ms": 1}), "delivery d0 of demo is still checking"),
    ("changed", 3, _set(Build, "done", {"state": "FAILED", "reason": "user.exit_code"}), "{done} is FAILED, its last event"),
    (
        "other reason",
        3,
        _set(Build, "stopped", {"reason": "user.timeout"}),
        "{stopped} has the reason user.timeout, its event said",
    ),
    ("odd move", 3, _set(Event, "running", {"after": "RUNNING"}), "moves it by CLAIMED from QUEUED to RUNNING"),
    ("unknown reason", 4, _set(Build, "done", {"reason": "because"}), "{done} is SUCCEEDED with the reason because"),
    ("reason of another state", 4, _set(Build, "done", {"reason": "user.exit_code"}), "{done} is SUCCEEDED with the reason"),
    ("a bug", 4, _set(Build, "stopped", {"state": "FAULT", "reason": "internal.bug"}), "{stopped} met a bug"),
    ("an attempt is gone", 5, _drop_attempt, "{retried} is at attempt 2, and has 1 attempts (2 to 2)"),
    ("a number is left out", 5, _set(Event, "running", {"attempt_no": 3}), "is of attempt 3, the one before of 0"),
    (
        "overlap",
        6,
        _set(Attempt, "retried", {"ended_ms": now_ms() + HOUR_MS}, Attempt.attempt_no == 1),
        "attempt 1 of {retried} had not ended",
    ),
    ("open attempt", 6, _set(Attempt, "done", {"ended_ms": None}), "{done} is SUCCEEDED, its attempt 1 has not ended"),
    ("a loser's artifact", 6, _set(Artifact, "retried", {"attempt_no": 1}), "demo.zip of attempt 1 of {retried} is visible"),
    (
        "a long run after a stop",
        10,
        _set(Build, "running", {"cancel_requested_ms": now_ms() - HOUR_MS}),
        "{running} was told to stop",
    ),
    (
        "a verdict after a stop",
        10,
        _set(Build, "done", {"cancel_requested_ms": Build.finished_ms - 1}),
        "{done} was told to stop and is SUCCEEDED",
    ),
    ("a crowded worker", 13, _crowd, "worker w1 has 1 slots and holds 2 builds"),
    ("too many of a project", 13, _over_limit, "project demo may run 1 builds at once and runs 2"),
    ("too many of a fleet", 13, _over_fleet_limit, "fleet default may run 1 builds at once and runs 2"),
    (
        "too much for a worker",
        25,
        _overload,
        "worker w1 offers 3 vCPU and any memory and holds builds that need 4 vCPU and 8 GiB",
    ),
    (
        "a label that a worker has not",
        25,
        _set(Build, "running", {"need": "1000/1/gpu,ssd"}),
        "worker w1 holds {running} and has no label gpu, ssd",
    ),
    ("a need that is none", 25, _set(Build, "running", {"need": "much"}), "{running} needs 'much', which cannot be read"),
    ("ended before it began", 22, _set(Build, "done", {"finished_ms": Build.submitted_ms - 1}), "{done}: its times"),
    ("an attempt backwards", 22, _set(Attempt, "done", {"ended_ms": Attempt.claimed_ms - 1}), "{done}: an attempt ended"),
    (
        "a negative phase",
        22,
        _set(Phase, "done", {"duration_ms": -1}, Phase.phase_type == "BUILD"),
        "{done}: negative time in phase BUILD",
    ),
    ("an event backwards", 22, _set(Event, "done", {"at_ms": 1}, Event.after == "SUCCEEDED"), "of {done} is earlier"),
]


@pytest.mark.redis
@pytest.mark.parametrize(("number", "plant", "words"), [plant[1:] for plant in PLANTS], ids=[plant[0] for plant in PLANTS])
def test_what_is_wrong_in_the_records_is_named(farm: Farm, number: int, plant: Callable[[Farm], None], words: str) -> None:
    plant(farm)
    violated(
        farm.look(number),
        words.format(**{name: getattr(farm, name) for name in ("done", "retried", "stopped", "running", "queued")}),
    )


def test_deliveries_that_tell_of_one_build_rightly_are_not_blamed(farm: Farm) -> None:
    _deliver({}, {"what": "issue_comment created"}, {"outcome": "duplicate"}, {"outcome": "checking", "build_id": None})(farm)
    assert not farm.look(12).faults


def test_grace_times_keep_a_busy_farm_from_blame(farm: Farm) -> None:
    farm.update(Build, {"lease_expires_ms": now_ms() - 20_000, "deadline_ms": now_ms() - 70_000}, Build.id == farm.running)
    farm.update(Build, {"cancel_requested_ms": now_ms() - 190_000}, Build.id == farm.running)
    farm.update(Project, {"concurrent_build_limit": 1, "modified_ms": now_ms()})  # lowered while two run
    farm.host.laid = [Thing(kind="container", name="young", attempt=None, age_s=60)]
    assert [one.number for one in fsck.check(farm.scope(host=farm.host)) if one.faults] == []


def test_builds_before_since_are_left_out_unless_they_go_on(farm: Farm) -> None:
    farm.update(Build, {"reason": "because"}, Build.id == farm.done)
    farm.update(Build, {"deadline_ms": now_ms() - HOUR_MS}, Build.id == farm.running)
    late = int(time.time() * 1000) + HOUR_MS
    assert farm.look(4).standing is Standing.VIOLATED
    assert farm.look(4, since_ms=late).standing is Standing.OK
    assert farm.look(2, since_ms=late).standing is Standing.VIOLATED


def test_at_rest_every_build_has_ended(farm: Farm) -> None:
    assert farm.look(2).standing is Standing.OK
    violated(farm.look(2, at_rest=True), "at rest", farm.running, farm.queued)


# The guard of ended builds


@pytest.mark.parametrize(
    "values",
    [
        {"state": "QUEUED"},
        {"reason": "user.oom"},
        {"finished_ms": None, "reason": None},
        {"attempt_no": 9},
        {"exported": [{"a": "b"}]},
    ],
    ids=lambda values: "+".join(values),
)
def test_the_database_itself_refuses_to_change_an_ended_build(farm: Farm, values: dict[str, Any]) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="an ended build does not change"), farm.db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == farm.done).values(**values))


def test_what_may_still_come_to_an_ended_build_may_come(farm: Farm) -> None:
    with farm.db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == farm.done).values(next_auto_retry="demo:next"))
        session.execute(sa.update(Build).where(Build.id == farm.running).values(message="still free"))


def test_a_build_that_fails_is_retried_by_itself_past_the_guard(database: Database, settings: Settings) -> None:
    a_project(database, autoRetryLimit=1)
    first = a_build(database, settings)
    claim = a_claim(database, settings)
    report = a_report(verdict=Verdict.FAILED, reason=Reason.EXIT_CODE)
    assert lifecycle.finish(database, first, 1, hash_token(claim.token), report) is BuildState.FAILED
    with database.reading() as session:
        assert session.scalars(sa.select(Build.next_auto_retry).where(Build.id == first)).one() is not None


def test_a_missing_guard_is_named_and_made_again(farm: Farm) -> None:
    with farm.db.transaction() as session:
        farm.unguard(session)
    violated(farm.look(3), "lacks the trigger")
    done, after = fsck.mend(farm.scope(), [farm.look(3)])
    assert done == [f"make-guard: made the trigger {guard.NAME}"]
    assert [one.standing for one in after] == [Standing.OK]
    with pytest.raises(sa.exc.IntegrityError), farm.db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == farm.done).values(state="QUEUED"))


# The queue


def _a_worker_asks(farm: Farm, **values: Any) -> None:
    farm.update(Worker, {"slots": 4, "last_seen_ms": now_ms() + 60_000, **values})


def test_a_build_that_workers_pass_over_is_named(farm: Farm) -> None:
    def look() -> Finding:
        return farm.look(23, look_again_s=0)

    _a_worker_asks(farm)
    assert look().standing is Standing.OK  # it has not waited for long
    farm.update(Build, {"queued_ms": now_ms() - HOUR_MS, "submitted_ms": now_ms() - HOUR_MS}, Build.id == farm.queued)
    violated(look(), f"{farm.queued} waits, no limit keeps it, and worker w1 asked", farm.queued)
    _a_worker_asks(farm, last_seen_ms=now_ms() - 20_000)  # it leaves, or its disk is full
    assert look().standing is Standing.OK
    _a_worker_asks(farm, slots=1)  # which holds a build
    assert look().standing is Standing.OK
    _a_worker_asks(farm, last_seen_ms=now_ms() - 5_000)  # it has not asked since the first look
    assert look().standing is Standing.OK
    _a_worker_asks(farm)
    farm.update(Project, {"concurrent_build_limit": 1})
    assert look().standing is Standing.OK
    farm.update(Project, {"concurrent_build_limit": None})
    assert look().standing is Standing.VIOLATED
    records.change(farm.db, "default", max_running=None)
    records.pause(farm.db, "default", by="t", why="")
    assert look().standing is Standing.OK


def test_a_project_that_is_passed_over_is_named(farm: Farm) -> None:
    a_project(farm.db, "other")
    waiting = a_build(farm.db, farm.settings, project="other")
    farm.update(Project, {"modified_ms": 1})

    def claims(count: int) -> None:
        at_ms = int(time.time() * 1000) + 1000
        farm.add(
            *(
                Event(build_id=farm.done, attempt_no=1, at_ms=at_ms, event="CLAIMED", before="QUEUED", after="CLAIMED")
                for _ in range(count)
            )
        )

    most = fairness.longest_wait(1, [1])
    claims(most)
    assert farm.look(24).standing is Standing.OK
    claims(1)
    violated(farm.look(24), f"project other holds nothing in fleet default, and {most + 1} claims of others went by", waiting)
    farm.update(Project, {"modified_ms": now_ms() + 5000})  # its limit was lifted just now
    assert farm.look(24).standing is Standing.OK


# Repairs of the records


def test_what_is_overdue_is_ended_by_repair(farm: Farm) -> None:
    farm.update(Build, {"lease_expires_ms": now_ms() - HOUR_MS}, Build.id == farm.running)
    farm.update(Build, {"queue_deadline_ms": now_ms() - HOUR_MS}, Build.id == farm.queued)
    done, after = fsck.mend(farm.scope(), [farm.look(2)])
    assert len(done) == 1
    assert done[0].startswith("end-overdue: moved 2 builds")
    assert [one.standing for one in after] == [Standing.OK]
    with farm.db.reading() as session:
        states = dict(session.execute(sa.select(Build.id, Build.state)).tuples().all())
    assert (states[farm.running], states[farm.queued]) == ("QUEUED", "TIMED_OUT")


def test_a_build_deaf_to_its_stop_is_ended_by_repair(farm: Farm) -> None:
    farm.update(Build, {"cancel_requested_ms": now_ms() - HOUR_MS}, Build.id == farm.running)
    _done, after = fsck.mend(farm.scope(), [farm.look(10)])
    assert [one.standing for one in after] == [Standing.OK]


# Objects


def test_artifacts_that_are_gone_or_changed_are_named(farm: Farm) -> None:
    gone, changed = (f"{staging_prefix(build, number)}demo.zip" for build, number in ((farm.done, 1), (farm.retried, 2)))
    farm.store.delete(farm.settings.bucket, gone)
    farm.store.put(farm.settings.bucket, changed, io.BytesIO(b"another one"))
    finding = farm.look(8)
    violated(finding, f"artifact demo.zip of {farm.done} ({gone}) is not in the object store", farm.done)
    violated(finding, f"artifact demo.zip of {farm.retried} ({changed}) reads back as 11 bytes", farm.retried)


def test_no_more_objects_are_read_than_asked_for(farm: Farm) -> None:
    farm.store.delete(farm.settings.bucket, f"{staging_prefix(farm.done, 1)}demo.zip")
    assert farm.look(8, objects=1).standing is Standing.OK  # the newer build's
    assert farm.look(8, objects=None).standing is Standing.VIOLATED


def test_a_store_that_is_away_is_no_fault_of_the_objects(farm: Farm, tmp_path: Path) -> None:
    away = DirectoryStore(tmp_path / "a-file" / "objects", b"k" * 32)
    (tmp_path / "a-file").write_text("in the way")
    finding = farm.look(8, store=away)
    assert (finding.standing, finding.away) == (Standing.UNCHECKED, True)


@pytest.mark.parametrize(
    "plant",
    [
        sa.delete(LogChunk).where(LogChunk.seq == 0),
        sa.delete(LogChunk),
        sa.update(LogChunk).where(LogChunk.seq == 1).values(seq=2),
        sa.update(LogChunk).where(LogChunk.seq == 1).values(offset=7),
        sa.update(LogChunk).where(LogChunk.seq == 1).values(data=b"WORLD\n"),
        sa.update(LogChunk).where(LogChunk.seq == 1).values(data=b"WORLD\n", sha256=hashlib.sha256(b"WORLD\n").hexdigest()),
    ],
    ids=["a gap", "nothing", "a number left out", "an offset", "other bytes", "other bytes with their own hash"],
)
def test_a_log_in_the_records_that_is_not_whole_is_named(farm: Farm, plant: Any) -> None:
    with farm.db.transaction() as session:
        session.execute(plant.where(LogChunk.build_id == farm.done))
    finding = farm.look(9)
    violated(finding, f"the log of attempt 1 of {farm.done}", farm.done)
    assert {one for fault in finding.faults for one in fault.ids} == {farm.done}


def test_a_log_that_is_not_what_it_was_at_its_end_is_named_by_its_root(farm: Farm) -> None:
    farm.update(Attempt, {"log_root": "0" * 64}, Attempt.build_id == farm.done)
    violated(farm.look(9), f"the log of attempt 1 of {farm.done} has the root", farm.done)
    farm.put_logs_away()
    violated(farm.look(9), f"the log of attempt 1 of {farm.done} has the root", farm.done)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "the list of its chunks is not"),
        (lambda lines: lines[:1], "is not what the list of its chunks says: there are more bytes than the 6 of its 1 chunks"),
        (lambda lines: lines[1:], "is not what the list of its chunks says: chunk 0 at byte 0 is missing"),
        (lambda lines: [lines[0], lines[1].replace(b" 6 6 ", b" 6 7 ")], "chunk 1 (bytes 6 to 13) is missing, or its end"),
    ],
    ids=["gone", "cut", "without its start", "changed"],
)
def test_a_list_of_chunks_in_the_store_that_fits_no_more_is_named(farm: Farm, change: Any, says: str) -> None:
    farm.put_logs_away()
    key = log_list_key(farm.done, 1)
    with farm.store.open(farm.settings.bucket, key) as body:
        lines = body.read().splitlines(keepends=True)
    farm.store.delete(farm.settings.bucket, key)
    if change is not None:
        farm.store.put(farm.settings.bucket, key, io.BytesIO(b"".join(change(lines))))
    violated(farm.look(9), says, farm.done)


@pytest.mark.parametrize("body", [None, LOG[:-1], LOG[::-1]], ids=["gone", "cut", "changed"])
def test_a_log_in_the_store_that_is_not_whole_is_named(farm: Farm, body: bytes | None) -> None:
    farm.put_logs_away()
    key = log_key(farm.done, 1)
    assert farm.look(9).standing is Standing.OK
    if body is None:
        farm.store.delete(farm.settings.bucket, key)
    else:
        farm.store.put(farm.settings.bucket, key, io.BytesIO(body))
    violated(farm.look(9), f"the log of attempt 1 of {farm.done}", farm.done)


def test_what_lost_attempts_left_is_named_and_removed(farm: Farm) -> None:
    left = f"{staging_prefix(farm.retried, 1)}demo.zip"
    farm.store.put(farm.settings.bucket, left, io.BytesIO(b"of the loser"))
    assert farm.look(7).standing is Standing.OK  # its day is not over
    farm.grow_older(2 * DAY_MS)
    violated(farm.look(7), f"attempt 1 of {farm.retried} ended more than a day ago", farm.retried)
    done, after = fsck.mend(farm.scope(), [farm.look(7)])
    assert "removed 1 objects" in done[0]
    assert [one.standing for one in after] == [Standing.OK]
    farm.store.put(farm.settings.bucket, left, io.BytesIO(b"by a late upload"))
    violated(farm.look(7), f"attempt 1 of {farm.retried} lost, and 1 of its objects are there", farm.retried, left)
    _done, after = fsck.mend(farm.scope(), [farm.look(7)])
    assert [one.standing for one in after] == [Standing.OK]
    assert farm.look(8).standing is Standing.OK  # what may be seen is there


# The journal, the broker, the host


def test_the_journal_is_held_against_the_records(farm: Farm) -> None:
    lost = f"demo:{uuid.uuid4()}"
    accepted = {"op": "start", "key": "a", "status": 201, "build": farm.done, "body": "1"}
    journal: list[dict[str, Any]] = [
        accepted,
        {**accepted, "status": 200},
        {"op": "start", "key": "b", "status": 503},
        {"op": "start", "key": "c", "status": None},
        {"op": "stop", "status": 200, "build": "whatever"},
    ]
    assert farm.look(1, journal=journal).standing is Standing.OK
    assert farm.look(11, journal=journal).standing is Standing.OK
    violated(farm.look(1, journal=[*journal, {"op": "start", "status": 201, "build": lost}]), "was accepted, and is not", lost)
    doubled = [*journal, {**accepted, "build": farm.retried}]
    violated(farm.look(11, journal=doubled), "key 'a' was answered with 2 builds", farm.done, farm.retried)
    violated(
        farm.look(11, journal=[*journal, {**accepted, "body": "2"}]), "key 'a' was accepted with different requests", farm.done
    )


@pytest.mark.redis
def test_a_message_that_is_late_is_named_and_sent_while_the_broker_answers(farm: Farm) -> None:
    farm.add(
        Outbox(kind="bell", key="bell/x/0", payload={"buildId": farm.queued, "fleet": "default"}, created_ms=1, next_try_ms=1)
    )
    assert farm.look(16, bell=Bell("redis+socket:///nowhere/redis.sock")).standing is Standing.OK
    violated(farm.look(16), "message bell/x/0 is not sent after 0 tries", "bell/x/0")
    done, after = fsck.mend(farm.scope(), [farm.look(16)])
    assert done[0].startswith("ring: sent ")
    assert [one.standing for one in after] == [Standing.OK]


@pytest.mark.redis
def test_a_notice_that_nobody_sends_is_named_and_one_that_is_tried_is_not(farm: Farm) -> None:
    mine = {"project_name": "demo", "build_id": farm.queued, "topic": "t", "asked_ms": 1, "commit_id": "0" * 40, "context": ""}
    farm.add(Notice(**mine, state="QUEUED", created_ms=1, due_ms=4_000_000_000_000, tries=3))
    assert farm.look(16).standing is Standing.OK
    farm.update(Notice, {"due_ms": now_ms() - HOUR_MS}, Notice.topic == "t")
    violated(farm.look(16), f"of {farm.queued} (QUEUED) is not sent after 3 tries", farm.queued)


def test_what_is_left_on_a_host_is_named_and_removed(farm: Farm) -> None:
    running, done = (uuid_of(farm.running), 1), (uuid_of(farm.done), 1)
    farm.host.laid = [
        Thing(kind="container", name="lives", attempt=running, age_s=5000),
        Thing(kind="workspace", name="lives-1", attempt=running, age_s=5000, size_bytes=10),
        Thing(kind="container", name="just-ended", attempt=done, age_s=5000),
        Thing(kind="container", name="parked", attempt=None, age_s=5000, lives=True),
    ]
    assert [one.standing for one in fsck.check(farm.scope(host=farm.host), {14, 15, 21})] == [Standing.OK] * 3
    farm.update(Attempt, {"ended_ms": now_ms() - 100_000, "claimed_ms": 1}, Attempt.build_id == farm.done)
    farm.host.laid += [
        Thing(kind="workspace", name="left-1", attempt=None, age_s=100, size_bytes=10),
        Thing(kind="network", name="net", attempt=None, age_s=100),
    ]
    findings = fsck.check(farm.scope(host=farm.host), {14, 15, 21})
    violated(findings[0], "container just-ended belongs to no living attempt", "just-ended", "net")
    violated(findings[1], "workspace left-1", "left-1")
    violated(findings[2], "10 bytes of ended attempts", "left-1")
    done_now, after = fsck.mend(farm.scope(host=farm.host), findings)
    assert done_now == ["clean-host: removed 6 things"]
    assert [one.standing for one in after] == [Standing.OK] * 3


@pytest.mark.redis
@pytest.mark.parametrize(
    "spell",
    [str, lambda text: base64.b64encode(text.encode()).decode(), lambda text: text[::-1], lambda text: text.encode().hex()],
)
def test_strings_that_must_stand_nowhere_are_found_everywhere(
    farm: Farm, redis_server: RedisServer, spell: Callable[[str], str]
) -> None:
    canary = f"canary-{uuid.uuid4().hex}"
    look = lambda: farm.look(17, canaries=[canary])  # noqa: E731  # a name for what is asked four times
    assert look().standing is Standing.OK
    farm.update(Build, {"settings": {"x": spell(canary)}}, Build.id == farm.queued)
    violated(look(), "string 1 stands in builds.settings", farm.queued)
    farm.update(Build, {"settings": {}}, Build.id == farm.queued)
    farm.put_logs_away()
    farm.store.put(farm.settings.bucket, log_key(farm.done, 1), io.BytesIO(b"x" * (1024 * 1024 - 20) + spell(canary).encode()))
    violated(look(), "string 1 stands in the log logs/")
    assert canary not in str(look())
    farm.store.delete(farm.settings.bucket, log_key(farm.done, 1))
    farm.update(Attempt, {"log_key": None, "log_bytes": 0}, Attempt.build_id == farm.done)
    with redis_server.client() as client:
        client.rpush("some-queue", spell(canary))
        violated(look(), "string 1 stands in the broker's key some-queue")
        client.delete("some-queue")
    assert look().standing is Standing.OK


# The command


def _cli(tmp_path: Path, farm: Farm, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": "/usr/bin:/bin",
        "MILLRACE_DATA_DIR": str(tmp_path / "cli"),
        "MILLRACE_DATABASE_URL": farm.db.url,
        "MILLRACE_STORE_URL": (tmp_path / "objects").as_uri(),
        **more,
    }
    command = [sys.executable, "-m", "millrace.cli", "fsck", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.redis
def test_the_command_says_it_by_its_exit_status_and_in_json(farm: Farm, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_text(json.dumps({"op": "start", "status": 201, "build": farm.done}) + "\n\n")
    well = _cli(tmp_path, farm, "--journal", str(journal), "--json")
    assert (well.returncode, well.stderr) == (0, "")
    said = json.loads(well.stdout)
    assert said["status"] == "ok"
    assert [one["number"] for one in said["invariants"]] == list(range(1, 26))
    assert said["invariants"][0]["standing"] == "ok"

    farm.update(Build, {"lease_expires_ms": now_ms() - HOUR_MS}, Build.id == farm.running)
    ill = _cli(tmp_path, farm)
    assert ill.returncode == 1
    assert " 2 violated Every build ends in time" in ill.stdout
    assert f"{farm.running} is CLAIMED and has a lease that ran out" in ill.stdout
    assert "'--repair' carries out end-overdue" in ill.stdout
    mended = _cli(tmp_path, farm, "--repair")
    assert mended.returncode == 0
    assert f"repaired by end-overdue: moved 1 builds {farm.running}" in mended.stdout


def test_the_command_says_what_it_could_not_look_at(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}\nnot json\n")
    assert _cli(tmp_path, farm, "--journal", str(tmp_path / "bad")).returncode == 2
    away = _cli(tmp_path, farm, "--json", MILLRACE_STORE_URL=(tmp_path / "bad" / "x").as_uri())
    assert (away.returncode, json.loads(away.stdout)["status"]) == (2, "away")
    nowhere = _cli(tmp_path, farm, MILLRACE_DATABASE_URL="postgresql+psycopg://nobody@127.0.0.1:1/x")
    assert nowhere.returncode == 2
    assert "the database does not answer" in nowhere.stdout
    assert "Traceback" not in away.stderr + nowhere.stderr


def test_what_a_worker_is_about_to_remove_is_given_time(farm: Farm) -> None:
    farm.host.laid = [Thing(kind="workspace", name="place-1", attempt=None, age_s=5000)]
    remover = threading.Timer(1, farm.host.clean)
    remover.start()
    assert farm.look(15, host=farm.host, host_patience_s=60).standing is Standing.OK
    remover.join()


@pytest.mark.docker
def test_this_hosts_engine_and_workspaces_are_looked_at(farm: Farm, tmp_path: Path) -> None:
    need_engine()
    workspaces = tmp_path / "work"
    session = Session(settings=farm.settings.model_copy(update={"work_dir": workspaces}), environ={})
    labels = {LABEL_WORKSPACES: str(workspaces), LABEL_BUILD: farm.running, LABEL_ATTEMPT: "1"}
    running, old = workspaces / f"{uuid_of(farm.running)}-1", workspaces / f"{uuid.uuid4()}-1"
    for folder in (running, old):
        folder.mkdir(parents=True)
        (folder / "file").write_text("left")
        os.utime(folder, (0, 0))
    (workspaces / f"{running.name}.lock").touch()
    place = {LABEL_WORKSPACES: str(workspaces), LABEL_PLACE: "place-1"}
    name = f"fsck-{uuid.uuid4().hex}"
    client = docker.from_env(timeout=30)
    try:
        container = client.containers.create("millrace/standard:latest", "true", name=name, labels=labels)
        volume = client.volumes.create(name, labels=place)
        try:
            with held(workspaces / "place-1.lock"):
                assert {thing.kind for thing in ThisHost(session).things() if thing.lives} == {"volume"}
            things = {(thing.kind, thing.name): thing for thing in ThisHost(session).things()}
        finally:
            container.remove(force=True)
            volume.remove()
    finally:
        client.close()
    attempt = (uuid_of(farm.running), 1)
    assert {key: thing.attempt for key, thing in things.items()} == {
        ("container", name): attempt,
        ("volume", name): None,
        ("workspace", running.name): attempt,
        ("workspace", old.name): (old.name[:-2], 1),
    }
    assert all(-5 < thing.age_s < 60 for key, thing in things.items() if key[0] != "workspace")
    ill = _cli(tmp_path, farm, "--host", "--patience", "1", MILLRACE_WORK_DIR=str(workspaces))
    assert ill.returncode == 1
    assert f"workspace {old.name} belongs to no living attempt" in ill.stdout
    assert running.name not in ill.stdout
    with held(workspaces / f"{running.name}.lock"):  # as its attempt does
        mended = _cli(tmp_path, farm, "--host", "--repair", "--patience", "1", MILLRACE_WORK_DIR=str(workspaces))
    assert mended.returncode == 0, mended.stdout
    assert sorted(entry.name for entry in workspaces.iterdir() if entry.is_dir()) == [running.name]


def test_an_engine_that_is_away_is_said(farm: Farm, tmp_path: Path) -> None:
    away = _cli(tmp_path, farm, "--host", "--only", "14", MILLRACE_DOCKER_HOST="unix:///nowhere/docker.sock")
    assert away.returncode == 2
    assert "the Docker engine does not answer" in away.stdout


def test_the_page_is_made_from_the_checks() -> None:
    assert (ROOT / "docs" / "fsck.md").read_text() == fsck.page()
