"""The records on real databases: intake, claims, leases, endings, logs. Every test runs on SQLite and on PostgreSQL."""

import hashlib
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from millrace.contract import ArtifactReport, Claim, LogFooter, PhaseReport
from millrace.errors import (
    AlreadyExists,
    AttemptFenced,
    Conflict,
    IdempotencyMismatch,
    InvalidInput,
    MillraceError,
    NotFound,
)
from millrace.ids import staging_prefix
from millrace.project import BuildOverrides
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import BuildState, PhaseType, Reason, StatusType, TokenScope, Verdict
from scheduler import attempts, intake, leases, lifecycle, projects, queries, tokens
from scheduler.db import Database, OldSchema, now_ms
from scheduler.leases import hash_token
from scheduler.models import Build, Event, Outbox
from tests.support.records import EMPTY_LOG, a_build, a_claim, a_claim_request, a_project, a_report, log_footer, store_log


def shown(db: Database, build_id: str) -> queries.BuildRecord:
    record = queries.get_build(db, build_id)
    assert record is not None
    return record


def finished(db: Database, claim: Claim, **changes: object) -> BuildState:
    return lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report(**changes))  # type: ignore[arg-type]


def let_lease_run_out(db: Database, build_id: str) -> None:
    with db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build_id).values(lease_expires_ms=now_ms() - 1))


# Schema


def test_migrating_twice_and_at_once_is_safe(database: Database) -> None:
    starters = [Database(database.url) for _ in range(4)]
    threads = [threading.Thread(target=starter.migrate) for starter in starters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for starter in starters:
        starter.dispose()
    database.require_schema()


def test_a_schema_of_a_later_release_is_refused(database: Database) -> None:
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(OldSchema, match="9999 of a later release"):
        database.migrate()
    with pytest.raises(OldSchema, match="9999"):
        database.require_schema()


# Projects and tokens


def test_a_project_is_made_changed_and_deleted_once(database: Database) -> None:
    settings = a_project(database)
    with pytest.raises(AlreadyExists):
        projects.create(database, settings)
    changed = settings.model_copy(update={"description": "new"})
    assert projects.update(database, changed).settings.description == "new"
    projects.delete(database, "demo")
    with pytest.raises(NotFound):
        projects.get(database, "demo")
    with pytest.raises(NotFound):
        projects.delete(database, "demo")


def test_a_project_with_waiting_builds_is_not_deleted(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    with pytest.raises(Conflict, match="1 builds"):
        projects.delete(database, "demo")
    lifecycle.request_stop(database, build)
    projects.delete(database, "demo")
    assert shown(database, build).state is BuildState.STOPPED


def test_build_numbers_are_never_used_twice_even_after_deletion(database: Database, settings: Settings) -> None:
    a_project(database)
    first = a_build(database, settings)
    lifecycle.request_stop(database, first)
    projects.delete(database, "demo")
    a_project(database)
    assert shown(database, a_build(database, settings)).number == 2


def test_projects_are_listed_by_name_in_pages(database: Database) -> None:
    for name in ("cc", "aa", "bb"):
        a_project(database, name)
    page, cursor = projects.find(database, limit=2)
    assert [record.settings.name for record in page] == ["aa", "bb"]
    rest, end = projects.find(database, limit=2, after=cursor)
    assert ([record.settings.name for record in rest], end) == (["cc"], None)


def test_a_token_works_until_it_is_revoked_or_expires(database: Database) -> None:
    a_project(database)
    secret = tokens.create(database, "ci", TokenScope.PROJECT, project="demo", days=1)
    who = tokens.verify(database, secret)
    assert who is not None
    assert (who.scope, who.project) == (TokenScope.PROJECT, "demo")
    assert tokens.verify(database, secret + "x") is None
    tokens.revoke(database, who.token_id)
    assert tokens.verify(database, secret) is None
    old = tokens.create(database, "old", TokenScope.ADMIN, days=-1)
    assert tokens.verify(database, old) is None


def test_a_projects_tokens_end_with_it(database: Database) -> None:
    a_project(database)
    secret = tokens.create(database, "ci", TokenScope.PROJECT, project="demo")
    projects.delete(database, "demo")
    a_project(database)
    assert tokens.verify(database, secret) is None


def test_a_tokens_secret_is_nowhere_in_the_records(database: Database) -> None:
    secret = tokens.create(database, "admin", TokenScope.ADMIN)
    with database.reading() as session:
        rows = session.execute(sa.text("SELECT * FROM tokens")).all()
    assert secret not in str(rows)


# Intake


def test_a_build_and_its_bell_are_one_commit(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    record = shown(database, build)
    assert (record.state, record.number, record.attempt_no) == (BuildState.QUEUED, 1, 0)
    assert [phase.phase_type for phase in record.phases] == [PhaseType.SUBMITTED, PhaseType.QUEUED]
    assert record.phases[1].status is None
    with database.reading() as session:
        bells = session.scalars(sa.select(Outbox)).all()
    assert [bell.payload["buildId"] for bell in bells] == [build]


def test_an_unknown_project_and_a_wrong_override_leave_nothing_behind(database: Database, settings: Settings) -> None:
    with pytest.raises(NotFound, match="no project 'nope'"):
        a_build(database, settings, project="nope")
    a_project(database)
    with pytest.raises(InvalidInput, match="overrides"):
        a_build(database, settings, sourceTypeOverride="GIT")
    assert queries.find_builds(database)[0] == []


def test_one_idempotency_key_means_one_build(database: Database, settings: Settings) -> None:
    a_project(database)

    def submit(key: str, **overrides: object) -> intake.Submitted:
        wanted = BuildOverrides.model_validate({"projectName": "demo", **overrides})
        request = intake.BuildRequest(overrides=wanted, initiator="t", idempotency_scope="s", idempotency_key=key)
        return intake.submit(database, request, settings)

    first = submit("k")
    assert submit("k") == intake.Submitted(build_id=first.build_id, fleet="default", created=False)
    with pytest.raises(IdempotencyMismatch):
        submit("k", sourceVersion="other")
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(submit("same").build_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert len(queries.find_builds(database)[0]) == 2


# Claims


def test_each_queued_build_is_claimed_by_exactly_one_worker(database: Database, settings: Settings) -> None:
    for name in ("aa", "bb", "cc"):
        a_project(database, name)
    made = {a_build(database, settings, project=name) for name in ("aa", "bb", "cc") for _ in range(20)}
    claimed: list[str] = []
    lock = threading.Lock()

    def work(worker: str) -> None:
        while (claim := leases.claim(database, a_claim_request(worker), settings)) is not None:
            with lock:
                claimed.append(claim.build_id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(made)


def test_the_best_build_is_by_priority_then_share_then_age(database: Database, settings: Settings) -> None:
    a_project(database, "busy")
    a_project(database, "calm")
    first = a_build(database, settings, project="busy")
    second = a_build(database, settings, project="busy")
    other = a_build(database, settings, project="calm")
    urgent = a_build(database, settings, project="busy", priority=5)
    assert [a_claim(database, settings).build_id for _ in range(4)] == [urgent, other, first, second]


def test_a_projects_limit_holds_builds_back_until_one_ends(database: Database, settings: Settings) -> None:
    a_project(database, concurrentBuildLimit=1)
    first, second = a_build(database, settings), a_build(database, settings)
    claim = a_claim(database, settings)
    assert claim.build_id == first
    assert leases.claim(database, a_claim_request(), settings) is None
    finished(database, claim)
    assert a_claim(database, settings).build_id == second


def test_a_worker_without_free_slots_or_of_another_fleet_gets_nothing(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings)
    assert leases.claim(database, a_claim_request(free_slots=0), settings) is None
    assert leases.claim(database, a_claim_request(fleet="other"), settings) is None
    with pytest.raises(InvalidInput, match="protocol 99"):
        leases.claim(database, a_claim_request(protocol=99), settings)


# Leases


def test_a_lost_lease_is_queued_again_and_the_old_attempt_is_fenced(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    old = a_claim(database, settings)
    let_lease_run_out(database, build)
    assert leases.expire(database) == [build]
    assert leases.expire(database) == []
    assert shown(database, build).state is BuildState.QUEUED
    new = a_claim(database, settings, "w2")
    assert new.attempt_no == 2
    token = hash_token(old.token)
    report = PhaseReport(phase_type=PhaseType.BUILD, started_at_ms=1)
    data = b"late"
    calls: list[Callable[[], object]] = [
        lambda: leases.renew(database, build, 1, token, settings),
        lambda: attempts.record_phase(database, build, 1, token, report),
        lambda: attempts.store_log(
            database, build, 1, token, seq=0, offset=0, data=data, sha256=hashlib.sha256(data).hexdigest()
        ),
        lambda: attempts.settings_of(database, build, 1, token),
        lambda: lifecycle.finish(database, build, 1, token, a_report()),
        lambda: leases.renew(database, build, 2, token, settings),  # the new attempt, with the old one's token
    ]
    for call in calls:
        with pytest.raises(AttemptFenced):
            call()
    assert finished(database, new) is BuildState.SUCCEEDED


def test_at_the_cap_a_lost_build_ends_as_our_fault(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    for _ in range(settings.max_attempts):
        a_claim(database, settings)
        let_lease_run_out(database, build)
        leases.expire(database)
    record = shown(database, build)
    assert (record.state, record.reason) == (BuildState.FAULT, Reason.WORKER_LOST)
    assert record.attempt_no == settings.max_attempts
    assert leases.claim(database, a_claim_request(), settings) is None


def test_a_worker_that_leaves_is_not_counted_against_the_build(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings)
    for _ in range(settings.max_attempts + 2):
        claim = a_claim(database, settings)
        state = finished(database, claim, verdict=Verdict.HANDED_BACK, reason=Reason.WORKER_SHUTDOWN)
        assert state is BuildState.QUEUED


def test_a_fault_of_ours_is_tried_again_but_a_bug_is_not(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings)
    assert finished(database, a_claim(database, settings), verdict=Verdict.FAULT, reason=Reason.WORKER_LOST) is BuildState.QUEUED
    assert finished(database, a_claim(database, settings), verdict=Verdict.FAULT, reason=Reason.BUG) is BuildState.FAULT


def test_a_fault_that_may_last_is_tried_again_later_and_its_bell_waits_too(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    assert finished(database, a_claim(database, settings), verdict=Verdict.FAULT, reason=Reason.STORAGE) is BuildState.QUEUED
    assert leases.claim(database, a_claim_request(), settings) is None
    with database.transaction() as session:
        row = session.get_one(Build, build)
        bell = session.scalars(sa.select(Outbox).order_by(Outbox.id.desc())).first()
        assert bell is not None
        assert bell.next_try_ms == row.not_before_ms == row.queued_ms + lifecycle.backoff_ms(1)
        row.not_before_ms = 0
    assert a_claim(database, settings).build_id == build


@pytest.mark.parametrize(
    ("rule", "begun", "then"),
    [
        ("always", True, BuildState.QUEUED),
        ("before_commands", False, BuildState.QUEUED),
        ("before_commands", True, BuildState.FAULT),
        ("never", False, BuildState.FAULT),
    ],
)
def test_a_project_says_whether_a_fault_of_ours_is_tried_again(
    database: Database, settings: Settings, rule: str, begun: bool, then: BuildState
) -> None:
    a_project(database, millrace={"infraRetry": rule})
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    if begun:
        report = PhaseReport(phase_type=PhaseType.INSTALL, started_at_ms=1)
        attempts.record_phase(database, build, 1, hash_token(claim.token), report)
    let_lease_run_out(database, build)
    leases.expire(database)
    assert shown(database, build).state is then


def test_a_renewal_moves_the_lease_and_tells_of_a_wish_to_stop(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)
    let_lease_run_out(database, build)
    reply = leases.renew(database, build, 1, token, settings)
    assert (reply.cancel_requested, leases.expire(database)) == (False, [])
    assert 3500 < reply.deadline_in_s <= 3600
    lifecycle.request_stop(database, build)
    assert leases.renew(database, build, 1, token, settings).cancel_requested


# Endings


def test_a_queued_build_stops_at_once_and_a_finished_one_stays(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    assert lifecycle.request_stop(database, build)
    record = shown(database, build)
    assert (record.state, record.reason) == (BuildState.STOPPED, Reason.CANCELLED)
    assert [phase.phase_type for phase in record.phases] == [PhaseType.SUBMITTED, PhaseType.QUEUED, PhaseType.COMPLETED]
    assert lifecycle.request_stop(database, build)
    assert shown(database, build) == record
    assert not lifecycle.request_stop(database, "demo:00000000-0000-0000-0000-000000000000")


def test_a_stop_that_came_first_beats_any_verdict(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    lifecycle.request_stop(database, build)
    assert finished(database, claim) is BuildState.STOPPED
    assert shown(database, build).artifacts == []


def test_a_lost_lease_with_a_wish_to_stop_ends_stopped(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    a_claim(database, settings)
    lifecycle.request_stop(database, build)
    let_lease_run_out(database, build)
    leases.expire(database)
    assert shown(database, build).state is BuildState.STOPPED


def test_artifacts_become_visible_with_the_verdict_and_only_those_of_the_attempt(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    item = ArtifactReport(
        name="a.zip",
        key=staging_prefix(build, 1) + "a.zip",
        size_bytes=3,
        sha256="0" * 64,
        md5="0" * 32,
        packaging="ZIP",
        file_count=1,
    )
    foreign = item.model_copy(update={"key": staging_prefix(build, 2) + "a.zip"})
    with pytest.raises(InvalidInput, match="is not an object of attempt 1"):
        finished(database, claim, artifacts=(foreign,))
    assert shown(database, build).artifacts == []
    finished(database, claim, artifacts=(item,))
    assert [artifact.name for artifact in shown(database, build).artifacts] == ["a.zip"]


def test_the_same_report_twice_answers_the_same_and_another_is_fenced(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    assert finished(database, claim) is BuildState.SUCCEEDED
    assert finished(database, claim) is BuildState.SUCCEEDED
    with pytest.raises(AttemptFenced):
        finished(database, claim, verdict=Verdict.FAILED, reason=Reason.EXIT_CODE)
    with database.reading() as session:
        terminal = session.scalars(sa.select(Event.after).where(Event.build_id == build, Event.reason.is_not(None))).all()
    assert terminal == ["SUCCEEDED"]


def test_the_database_itself_refuses_a_second_ending(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    finished(database, a_claim(database, settings))
    with pytest.raises(sa.exc.DBAPIError, match="an ended build does not change"), database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build).values(state="FAILED"))


def test_a_stop_that_races_the_verdict_leaves_one_ending(database: Database, settings: Settings) -> None:
    a_project(database)
    for _ in range(25):
        build = a_build(database, settings)
        claim = a_claim(database, settings)
        together = threading.Barrier(2)
        problems: list[MillraceError] = []

        def finish(
            claim: Claim = claim, together: threading.Barrier = together, problems: list[MillraceError] = problems
        ) -> None:
            together.wait()
            try:
                finished(database, claim)
            except MillraceError as error:
                problems.append(error)

        def stop(build: str = build, together: threading.Barrier = together) -> None:
            together.wait()
            lifecycle.request_stop(database, build)

        threads = [threading.Thread(target=finish), threading.Thread(target=stop)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert shown(database, build).state in (BuildState.SUCCEEDED, BuildState.STOPPED)
        with database.reading() as session:
            count = session.scalar(
                sa.select(sa.func.count()).select_from(Event).where(Event.build_id == build, Event.reason.is_not(None))
            )
        assert count == 1


def test_a_build_that_waits_or_runs_too_long_is_ended_by_the_farm(database: Database, settings: Settings) -> None:
    a_project(database)
    waiting, overdue = a_build(database, settings), a_build(database, settings, priority=1)
    claim = a_claim(database, settings)
    assert claim.build_id == overdue
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == waiting).values(queue_deadline_ms=now_ms() - 1))
        session.execute(sa.update(Build).where(Build.id == overdue).values(deadline_ms=now_ms() - leases.DEADLINE_GRACE_MS - 1))
    assert sorted(leases.enforce_deadlines(database)) == sorted([waiting, overdue])
    assert (shown(database, waiting).state, shown(database, waiting).reason) == (BuildState.TIMED_OUT, Reason.QUEUE_TIMEOUT)
    assert (shown(database, overdue).state, shown(database, overdue).reason) == (BuildState.TIMED_OUT, Reason.TIMEOUT)
    with pytest.raises(AttemptFenced):
        finished(database, claim)


# Phases and logs


def test_phases_are_shown_in_codebuilds_order_and_shape(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)

    def report(phase: PhaseType, *, ended: bool) -> None:
        attempts.record_phase(
            database,
            build,
            1,
            token,
            PhaseReport(
                phase_type=phase,
                status=StatusType.SUCCEEDED if ended else None,
                started_at_ms=1000,
                ended_at_ms=1500 if ended else None,
                duration_ms=500 if ended else None,
            ),
        )

    report(PhaseType.PROVISIONING, ended=False)
    assert shown(database, build).state is BuildState.RUNNING
    report(PhaseType.PROVISIONING, ended=True)
    report(PhaseType.PROVISIONING, ended=False)  # the beginning again, late
    report(PhaseType.BUILD, ended=False)
    record = shown(database, build)
    assert [phase.phase_type.value for phase in record.phases] == ["SUBMITTED", "QUEUED", "PROVISIONING", "BUILD"]
    assert [phase.status for phase in record.phases] == [StatusType.SUCCEEDED, StatusType.SUCCEEDED, StatusType.SUCCEEDED, None]
    report(PhaseType.UPLOAD_ARTIFACTS, ended=False)
    assert shown(database, build).state is BuildState.FINALIZING
    finished(database, claim)
    assert shown(database, build).phases[-1].phase_type is PhaseType.COMPLETED


def test_a_log_is_whole_numbered_and_read_by_offset(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)

    def put(seq: int, offset: int, data: bytes, sha256: str | None = None) -> None:
        attempts.store_log(
            database, build, 1, token, seq=seq, offset=offset, data=data, sha256=sha256 or hashlib.sha256(data).hexdigest()
        )

    put(0, 0, b"hello ")
    put(0, 0, b"hello ")  # sent twice
    with pytest.raises(Conflict, match="other bytes"):
        put(0, 0, b"HELLO ")
    with pytest.raises(Conflict, match="gap"):
        put(2, 11, b"late")
    with pytest.raises(Conflict, match="gap"):
        put(1, 7, b"world")
    with pytest.raises(InvalidInput, match="SHA-256"):
        put(1, 6, b"world", "0" * 64)
    put(1, 6, b"world")

    def read(offset: int, size: int = 100) -> bytes:
        return queries.read_log(database, store, settings, build, 1, offset, size)

    assert (read(0), read(3), read(8, 2), read(11), read(99)) == (b"hello world", b"lo world", b"rl", b"", b"")
    whole = LogFooter(chunks=2, size_bytes=11, sha256=hashlib.sha256(b"hello world").hexdigest())
    finished(database, claim, log=whole)
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.size_bytes, info.ended, info.complete) == (11, True, True)


def test_a_log_with_a_gap_is_marked(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    finished(database, a_claim(database, settings), log=EMPTY_LOG.model_copy(update={"chunks": 3, "size_bytes": 30}))
    info = queries.log_info(database, build)
    assert info is not None
    assert not info.complete
    assert (info.gap, info.missing_bytes) == ("the log ends here: 30 bytes that were written after byte 0 never came", 30)


def test_a_log_whose_root_is_another_than_its_workers_is_marked(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    store_log(database, claim, b"what came")
    finished(database, claim, log=log_footer(b"what came").model_copy(update={"root": "0" * 64}))
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.complete, info.root) == (False, log_footer(b"what came").root)
    assert info.gap == "this log is damaged: by its hash, it is not what its worker wrote"


def test_the_last_releases_worker_gives_no_root(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    store_log(database, claim, b"what came")
    finished(database, claim, log=log_footer(b"what came").model_copy(update={"root": None}))
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.complete, info.gap, info.root) == (True, None, log_footer(b"what came").root)


@pytest.mark.parametrize("footer", [None, EMPTY_LOG.model_copy(update={"root": None})], ids=["this release", "the last one"])
def test_an_attempt_whose_process_was_lost_has_a_log_that_ends_in_a_gap(
    database: Database, settings: Settings, footer: LogFooter | None
) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    store_log(database, claim, b"what came")
    finished(database, claim, verdict=Verdict.HANDED_BACK, reason=Reason.WORKER_LOST, log=footer)
    info = queries.log_info(database, build, 1)
    assert info is not None
    assert (info.complete, info.missing_bytes, info.root) == (False, None, log_footer(b"what came").root)
    assert info.gap == "the log ends here: the worker was lost, and what it wrote after byte 9 never came"


def test_an_attempt_whose_lease_ran_out_has_a_log_that_ends_in_a_gap(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    store_log(database, claim, b"one ", b"two")
    let_lease_run_out(database, build)
    assert leases.expire(database) == [build]
    info = queries.log_info(database, build, 1)
    assert info is not None
    assert (info.complete, info.root) == (False, log_footer(b"one ", b"two").root)
    assert info.gap == "the log ends here: the worker was lost, and what it wrote after byte 7 never came"


# Reading


def test_builds_are_listed_newest_first_in_pages_and_by_state(database: Database, settings: Settings) -> None:
    a_project(database, "aa")
    a_project(database, "bb")
    made = [a_build(database, settings, project=name) for name in ("aa", "bb", "aa", "aa")]
    lifecycle.request_stop(database, made[0])
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = queries.find_builds(database, limit=3, cursor=cursor)
        seen += [record.id for record in page]
        if cursor is None:
            break
    assert sorted(seen) == sorted(made)
    assert {record.id for record in queries.find_builds(database, project="bb")[0]} == {made[1]}
    assert [record.id for record in queries.find_builds(database, states=[BuildState.STOPPED])[0]] == [made[0]]
    for cursor in ("x", "!!!", "AAAA"):
        with pytest.raises(InvalidInput, match="cursor"):
            queries.find_builds(database, cursor=cursor)


def test_what_a_restart_reads_is_what_was_there(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    finished(database, a_claim(database, settings), message="fine")
    before = shown(database, build)
    again = Database(database.url)
    assert shown(again, build) == before
    again.dispose()
