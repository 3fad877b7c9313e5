"""Claims and endings under load and in races, on real databases."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from millrace.contract import ArtifactReport, Claim, LogFooter, PhaseReport
from millrace.errors import AttemptFenced, InvalidInput, MillraceError
from millrace.ids import new_secret, staging_prefix
from millrace.settings import Settings
from millrace.vocabulary import BuildState, PhaseType, Reason, StatusType, Verdict
from scheduler import attempts, leases, lifecycle, logs, queries
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Build, Event, Worker
from scheduler.states import TERMINAL
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report


def shown(db: Database, build_id: str) -> queries.BuildRecord:
    record = queries.get_build(db, build_id)
    assert record is not None
    return record


def change(db: Database, build_id: str, **values: object) -> None:
    with db.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build_id).values(**values))


def endings(db: Database) -> Counter[str]:
    """How many terminal events each build has."""
    with db.reading() as session:
        rows = session.scalars(sa.select(Event.build_id).where(Event.after.in_([state.value for state in TERMINAL]))).all()
    return Counter(rows)


# Claims


def test_eight_workers_claim_two_hundred_builds_each_once_and_by_the_rules(database: Database, settings: Settings) -> None:
    limits = {"aa": None, "bb": None, "cc": 3, "dd": None}
    for name, limit in limits.items():
        a_project(database, name, concurrentBuildLimit=limit)
    made = [a_build(database, settings, project=name) for _ in range(50) for name in limits]
    lock = threading.Lock()
    claimed: list[str] = []
    at_a_time: list[int] = []
    held = sa.select(sa.func.count()).where(Build.project_name == "cc", Build.lease_owner.is_not(None))

    def work(worker: int) -> None:
        idle = 0
        while idle < 3:
            claim = leases.claim(database, a_claim_request(f"w{worker}"), settings)
            if claim is None:
                idle += 1  # the limit of cc may leave nothing to claim for a moment
                continue
            with database.reading() as session:
                running = session.execute(held).scalar_one()
            with lock:
                claimed.append(claim.build_id)
                at_a_time.append(running)
            state = lifecycle.finish(database, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
            assert state is BuildState.SUCCEEDED

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(claimed) == sorted(made)
    assert 1 <= max(at_a_time) <= 3
    assert endings(database) == Counter(made)
    assert {record.attempt_no for record in queries.find_builds(database, limit=500)[0]} == {1}


def test_a_project_with_one_build_does_not_wait_behind_another_with_many(database: Database, settings: Settings) -> None:
    a_project(database, "many")
    a_project(database, "one")
    for _ in range(30):
        a_build(database, settings, project="many")
    for _ in range(4):
        a_claim(database, settings)
    lone = a_build(database, settings, project="one")
    assert a_claim(database, settings).build_id == lone


def test_a_claim_whose_answer_was_lost_is_answered_again(database: Database, settings: Settings) -> None:
    a_project(database)
    first, second = a_build(database, settings), a_build(database, settings)
    token = new_secret("att")
    request = a_claim_request("w1", token=token)
    claims = [leases.claim(database, request, settings) for _ in range(3)]
    assert [claim and (claim.build_id, claim.attempt_no, claim.token) for claim in claims] == [(first, 1, token)] * 3
    assert leases.renew(database, first, 1, hash_token(token), settings).cancel_requested is False
    other = leases.claim(database, a_claim_request("w2", token=token), settings)  # nobody else gets it by that
    assert other is not None
    assert other.build_id == second
    lifecycle.finish(database, first, 1, hash_token(token), a_report())
    assert leases.claim(database, request, settings) is None


def test_a_build_whose_stop_is_wished_is_never_claimed(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    change(database, build, cancel_requested_ms=1)  # as if a stop and a requeue had met
    assert leases.claim(database, a_claim_request(), settings) is None


def test_builds_of_a_fleet_go_to_its_workers_by_name_or_arn(database: Database, settings: Settings) -> None:
    def environment(fleet: str) -> dict[str, object]:
        return {
            "type": "LINUX_CONTAINER",
            "image": "millrace/base:latest",
            "computeType": "BUILD_GENERAL1_SMALL",
            "fleet": {"fleetArn": fleet},
        }

    a_project(database, "bare", environment=environment("big"))
    a_project(database, "arn", environment=environment("arn:aws:codebuild:us-east-1:000000000000:fleet/big:0-1"))
    a_project(database, "bad", environment=environment("no fleet"))
    made = [a_build(database, settings, project=name) for name in ("bare", "arn")]
    assert leases.claim(database, a_claim_request(), settings) is None
    claims = [leases.claim(database, a_claim_request(fleet="big"), settings) for _ in range(2)]
    assert [claim.build_id for claim in claims if claim] == made
    with pytest.raises(InvalidInput, match="neither the ARN nor the name") as caught:
        a_build(database, settings, project="bad")
    assert [problem.field for problem in caught.value.fields] == ["environment.fleet.fleetArn"]


def test_a_worker_is_remembered_whatever_it_calls_its_version(database: Database, settings: Settings) -> None:
    leases.claim(database, a_claim_request(version="v" * 200), settings)
    with database.reading() as session:
        assert session.scalars(sa.select(Worker.version)).all() == ["v" * 50]


# Leases


def test_only_lost_leases_are_taken_back_by_two_sweepers_at_once(database: Database, settings: Settings) -> None:
    a_project(database)
    made = [a_build(database, settings) for _ in range(20)]
    claims = [a_claim(database, settings) for _ in made]
    lost = [claim.build_id for claim in claims[:10]]
    for build in lost:
        change(database, build, lease_expires_ms=now_ms() - 1)
    with ThreadPoolExecutor(4) as pool:
        taken = [build for ended in pool.map(lambda _n: leases.expire(database), range(4)) for build in ended]
    assert sorted(taken) == sorted(lost)
    states = Counter(shown(database, build).state for build in made)
    assert states == {BuildState.QUEUED: 10, BuildState.CLAIMED: 10}


def test_a_build_queued_again_after_a_long_run_waits_its_whole_time_out(database: Database, settings: Settings) -> None:
    a_project(database, queuedTimeoutInMinutes=5)
    build = a_build(database, settings)
    a_claim(database, settings)
    change(database, build, queue_deadline_ms=now_ms() - 3_600_000, lease_expires_ms=now_ms() - 1)
    leases.expire(database)
    assert leases.enforce_deadlines(database) == []
    assert a_claim(database, settings).attempt_no == 2


def test_a_worker_that_does_not_answer_to_a_stop_is_fenced(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)
    attempts.record_phase(database, build, 1, token, PhaseReport(phase_type=PhaseType.PROVISIONING, started_at_ms=1))
    lifecycle.request_stop(database, build)
    assert leases.enforce_deadlines(database) == []
    change(database, build, cancel_requested_ms=now_ms() - leases.STOP_GRACE_MS - 1)
    assert leases.enforce_deadlines(database) == [build]
    record = shown(database, build)
    assert (record.state, record.reason) == (BuildState.STOPPED, Reason.CANCELLED)
    assert [(phase.phase_type, phase.status) for phase in record.phases[2:]] == [
        (PhaseType.PROVISIONING, StatusType.STOPPED),
        (PhaseType.COMPLETED, None),
    ]
    with pytest.raises(AttemptFenced):
        leases.renew(database, build, 1, token, settings)


@pytest.mark.parametrize(
    ("verdict", "reason", "status"),
    [
        (Verdict.TIMED_OUT, Reason.TIMEOUT, StatusType.TIMED_OUT),
        (Verdict.FAILED, Reason.OOM, StatusType.FAILED),
        (Verdict.STOPPED, Reason.CANCELLED, StatusType.STOPPED),
        (Verdict.FAULT, Reason.BUG, StatusType.FAULT),
    ],
)
def test_a_phase_left_open_is_closed_as_the_attempt_ended(
    database: Database, settings: Settings, verdict: Verdict, reason: Reason, status: StatusType
) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    token = hash_token(claim.token)
    tomorrow = 4_000_000_000_000  # a worker's clock may be wrong
    attempts.record_phase(database, build, 1, token, PhaseReport(phase_type=PhaseType.PROVISIONING, started_at_ms=tomorrow))
    lifecycle.finish(database, build, 1, token, a_report(verdict, reason, message="why"))
    phase = shown(database, build).phases[2]
    assert (phase.status, phase.ended_ms, phase.duration_ms) == (status, tomorrow, 0)
    assert phase.contexts == {
        StatusType.STOPPED: None,
        StatusType.FAULT: [{"statusCode": "INTERNAL_SERVICE_ERROR", "message": "why"}],
        StatusType.TIMED_OUT: [{"statusCode": "BUILD_TIMED_OUT", "message": "Build has timed out. "}],
    }.get(status, [{"statusCode": "", "message": ""}])


@pytest.mark.parametrize("phase", [PhaseType.SUBMITTED, PhaseType.QUEUED, PhaseType.COMPLETED])
def test_a_worker_does_not_report_the_farms_own_phases(database: Database, settings: Settings, phase: PhaseType) -> None:
    a_project(database)
    build = a_build(database, settings)
    token = hash_token(a_claim(database, settings).token)
    with pytest.raises(InvalidInput, match="told by the farm"):
        attempts.record_phase(database, build, 1, token, PhaseReport(phase_type=phase, started_at_ms=1))


@pytest.mark.parametrize("attempt_no", [0, -1, 2, 2**31, 2**70])
def test_an_attempt_that_never_was_is_fenced(database: Database, settings: Settings, attempt_no: int) -> None:
    a_project(database)
    build = a_build(database, settings)
    token = hash_token(a_claim(database, settings).token)
    with pytest.raises(AttemptFenced):
        leases.renew(database, build, attempt_no, token, settings)


def test_text_that_no_database_can_hold_does_not_cost_the_verdict(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    claim = a_claim(database, settings)
    report = a_report(Verdict.FAILED, Reason.EXIT_CODE, message="a\x00b", resolved_source_version="v" * 300 + "\x00")
    assert lifecycle.finish(database, build, 1, hash_token(claim.token), report) is BuildState.FAILED
    record = shown(database, build)
    assert (record.message, len(record.resolved_source_version or "")) == ("a\ufffdb", 256)


# Races. A fault in the fencing shows as a second ending, a lost artifact or a stop that was not obeyed.


def at_once(*calls: Callable[[], object]) -> list[MillraceError]:
    together = threading.Barrier(len(calls))
    problems: list[MillraceError] = []

    def run(call: Callable[[], object]) -> None:
        together.wait()
        try:
            call()
        except MillraceError as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


def artifact_of(claim: Claim) -> ArtifactReport:
    return ArtifactReport(
        name="a",
        key=staging_prefix(claim.build_id, claim.attempt_no) + "a",
        size_bytes=1,
        sha256="0" * 64,
        md5="0" * 32,
        packaging="NONE",
        file_count=1,
    )


def test_a_verdict_that_races_a_stop_two_hundred_times_ends_each_build_once(database: Database, settings: Settings) -> None:
    a_project(database)
    seen: Counter[BuildState] = Counter()
    for _ in range(200):
        build = a_build(database, settings)
        claim = a_claim(database, settings)
        report = a_report(artifacts=(artifact_of(claim),))
        token = hash_token(claim.token)
        calls: list[Callable[[], object]] = [
            lambda b=build, t=token, r=report: lifecycle.finish(database, b, 1, t, r),
            lambda b=build: lifecycle.request_stop(database, b),
        ]
        assert at_once(*calls) == []
        record = shown(database, build)
        assert (record.state, record.reason, len(record.artifacts)) in (
            (BuildState.SUCCEEDED, Reason.SUCCEEDED, 1),
            (BuildState.STOPPED, Reason.CANCELLED, 0),
        )
        seen[record.state] += 1
    assert set(endings(database).values()) == {1}
    assert sum(seen.values()) == 200


def test_a_verdict_that_races_the_sweeper_and_its_own_repeat_counts_once_or_not_at_all(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    for _ in range(40):
        build = a_build(database, settings)
        claim = a_claim(database, settings)
        report = a_report(artifacts=(artifact_of(claim),))
        token = hash_token(claim.token)
        change(database, build, lease_expires_ms=now_ms() - 1)
        finish = lambda b=build, t=token, r=report: lifecycle.finish(database, b, 1, t, r)  # noqa: E731
        problems = at_once(finish, lambda: leases.expire(database), finish)
        record = shown(database, build)
        if record.state is BuildState.SUCCEEDED:
            assert (problems, len(record.artifacts)) == ([], 1)
        else:
            assert (record.state, record.artifacts) == (BuildState.QUEUED, [])
            assert [type(problem) for problem in problems] == [AttemptFenced, AttemptFenced]
            lifecycle.request_stop(database, build)
    assert set(endings(database).values()) == {1}


def test_the_same_log_chunk_sent_many_times_at_once_is_kept_once(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    token = hash_token(a_claim(database, settings).token)
    data = b"x" * 100_000
    digest = hashlib.sha256(data).hexdigest()

    def put() -> None:
        attempts.store_log(database, build, 1, token, seq=0, offset=0, data=data, sha256=digest)

    assert at_once(*[put] * 6) == []
    info = queries.log_info(database, build)
    assert info is not None
    assert info.size_bytes == len(data)


def test_a_log_over_its_limit_is_refused_and_marked(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 10)
    a_project(database)
    build = a_build(database, settings)
    token = hash_token(a_claim(database, settings).token)
    for seq, data in enumerate((b"12345", b"67890ABC", b"!")):
        call = lambda s=seq, d=data: attempts.store_log(  # noqa: E731
            database, build, 1, token, seq=s, offset=s * 5, data=d, sha256=hashlib.sha256(d).hexdigest()
        )
        if seq == 0:
            call()
        else:
            with pytest.raises(MillraceError, match="at most 10 bytes"):
                call()
    info = queries.log_info(database, build)
    assert info is not None
    assert (info.size_bytes, info.complete) == (10, False)
    footer = LogFooter(chunks=2, size_bytes=14, sha256=hashlib.sha256(b"1234567890ABC!").hexdigest())
    lifecycle.finish(database, build, 1, token, a_report(log=footer))
    info = queries.log_info(database, build)
    assert info is not None
    assert info.gap == "the log ends here: it is at its limit of 10 bytes, and 4 bytes after byte 10 were not kept"
