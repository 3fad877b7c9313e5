"""The phases of a build as the API shows them, after each way to end (CodeBuild: BuildPhase)."""

from typing import Any

import pytest
import sqlalchemy as sa

from api import render
from millrace.contract import Claim, PhaseContext, PhaseReport
from millrace.settings import Settings
from millrace.vocabulary import COMMAND_PHASES, PhaseType, Reason, StatusType, Verdict
from scheduler import attempts, leases, lifecycle, queries
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Build
from tests.support.records import a_build, a_claim, a_project, a_report

OK = [{"statusCode": "", "message": ""}]
WORKERS = (
    PhaseType.PROVISIONING,
    PhaseType.DOWNLOAD_SOURCE,
    *COMMAND_PHASES,
    PhaseType.UPLOAD_ARTIFACTS,
    PhaseType.FINALIZING,
)


@pytest.fixture
def database(sqlite_database: Database) -> Database:
    """Nothing here differs between databases."""
    a_project(sqlite_database)
    return sqlite_database


def shown(db: Database, settings: Settings, build_id: str) -> dict[str, Any]:
    record = queries.get_build(db, build_id)
    assert record is not None
    return render.build(record, settings)


def phases(db: Database, settings: Settings, build_id: str) -> list[tuple[str, str | None]]:
    return [(one["phaseType"], one.get("phaseStatus")) for one in shown(db, settings, build_id)["phases"]]


def report(db: Database, claim: Claim, phase: PhaseType, status: StatusType | None = None, duration_ms: int = 0) -> None:
    token = hash_token(claim.token)
    ended = {"status": status, "ended_at_ms": 5000 + duration_ms, "duration_ms": duration_ms} if status else {}
    message = PhaseReport.model_validate({"phase_type": phase, "started_at_ms": 5000, **ended})
    attempts.record_phase(db, claim.build_id, claim.attempt_no, token, message)


def reach(db: Database, claim: Claim, phase: PhaseType) -> None:
    """Every phase before `phase` has succeeded, and it runs."""
    for before in WORKERS[: WORKERS.index(phase)]:
        report(db, claim, before)
        report(db, claim, before, StatusType.SUCCEEDED)
    report(db, claim, phase)


def finish(db: Database, claim: Claim, verdict: Verdict, reason: Reason) -> None:
    lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report(verdict, reason, message="why"))


def test_a_new_build_has_two_phases(database: Database, settings: Settings) -> None:
    build = shown(database, settings, a_build(database, settings))
    began = build["startTime"]
    assert build["phases"] == [
        {"phaseType": "SUBMITTED", "phaseStatus": "SUCCEEDED", "startTime": began, "endTime": began, "durationInSeconds": 0},
        {"phaseType": "QUEUED", "startTime": began},
    ]
    assert (build["currentPhase"], build["buildStatus"], build["buildComplete"]) == ("QUEUED", "IN_PROGRESS", False)
    assert "endTime" not in build


def test_a_claimed_build_runs_a_phase_before_its_worker_tells_of_one(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    build = shown(database, settings, build_id)
    assert build["currentPhase"] == "PROVISIONING"
    queued, running = build["phases"][1:]
    assert queued["phaseStatus"] == "SUCCEEDED"
    assert queued.keys() == {"phaseType", "phaseStatus", "startTime", "endTime", "durationInSeconds"}
    assert running.keys() == {"phaseType", "startTime"}
    report(database, claim, PhaseType.PROVISIONING)
    assert shown(database, settings, build_id)["phases"][2] == {"phaseType": "PROVISIONING", "startTime": 5.0}


def test_durations_are_cut_off_and_times_keep_their_milliseconds(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    report(database, claim, PhaseType.PROVISIONING, StatusType.SUCCEEDED, 494)
    report(database, claim, PhaseType.BUILD, StatusType.SUCCEEDED, 899_322)
    first, second = shown(database, settings, build_id)["phases"][2:]
    assert (first["durationInSeconds"], first["endTime"]) == (0, 5.494)
    assert (second["durationInSeconds"], second["endTime"], second["contexts"]) == (899, 904.322, OK)


def test_a_build_that_went_well(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    reach(database, claim, PhaseType.FINALIZING)
    report(database, claim, PhaseType.FINALIZING, StatusType.SUCCEEDED)
    finish(database, claim, Verdict.SUCCEEDED, Reason.SUCCEEDED)
    build = shown(database, settings, build_id)
    assert [one["phaseType"] for one in build["phases"]] == [phase.value for phase in PhaseType]
    assert all("contexts" not in one for one in build["phases"][:2])
    assert all(one["contexts"] == OK for one in build["phases"][2:-1])
    assert build["phases"][-1] == {"phaseType": "COMPLETED", "startTime": build["endTime"]}
    assert (build["currentPhase"], build["buildComplete"]) == ("COMPLETED", True)


def test_a_failed_phase_keeps_its_context(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    context = PhaseContext(
        status_code="COMMAND_EXECUTION_ERROR", message="Error while executing command: x. Reason: exit status 1"
    )
    failed = PhaseReport(
        phase_type=PhaseType.BUILD,
        status=StatusType.FAILED,
        started_at_ms=1,
        ended_at_ms=2,
        duration_ms=1,
        contexts=(context,),
    )
    attempts.record_phase(database, build_id, 1, hash_token(claim.token), failed)
    finish(database, claim, Verdict.FAILED, Reason.EXIT_CODE)
    contexts = {one["phaseType"]: one.get("contexts") for one in shown(database, settings, build_id)["phases"]}
    assert contexts["BUILD"] == [{"statusCode": context.status_code, "message": context.message}]


@pytest.mark.parametrize("phase", WORKERS)
def test_stopped_in_each_phase(database: Database, settings: Settings, phase: PhaseType) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    reach(database, claim, phase)
    lifecycle.request_stop(database, build_id)
    finish(database, claim, Verdict.STOPPED, Reason.CANCELLED)
    build = shown(database, settings, build_id)
    *_before, last, completed = build["phases"]
    assert (last["phaseType"], last["phaseStatus"]) == (phase.value, "STOPPED")
    assert "contexts" not in last
    assert (completed["phaseType"], completed.keys()) == ("COMPLETED", {"phaseType", "startTime"})
    assert (build["buildStatus"], build["currentPhase"]) == ("STOPPED", "COMPLETED")


def test_stopped_and_timed_out_in_the_queue(database: Database, settings: Settings) -> None:
    stopped, timed_out = a_build(database, settings), a_build(database, settings)
    lifecycle.request_stop(database, stopped)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == timed_out).values(submitted_ms=now_ms() - 2500, queue_deadline_ms=1))
    leases.enforce_deadlines(database)
    for build_id, status in ((stopped, "STOPPED"), (timed_out, "TIMED_OUT")):
        assert phases(database, settings, build_id) == [("SUBMITTED", "SUCCEEDED"), ("QUEUED", status), ("COMPLETED", None)]
        build = shown(database, settings, build_id)
        assert "contexts" not in build["phases"][1]
        assert build["phases"][1]["endTime"] == build["endTime"]
        assert build["buildStatus"] == status
    assert shown(database, settings, timed_out)["phases"][1]["durationInSeconds"] == 2


def test_a_build_that_waits_again_shows_the_queue_and_ends_there(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    reach(database, claim, PhaseType.BUILD)
    finish(database, claim, Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN)
    assert phases(database, settings, build_id) == [("SUBMITTED", "SUCCEEDED"), ("QUEUED", None)]
    assert shown(database, settings, build_id)["currentPhase"] == "QUEUED"
    claim = a_claim(database, settings)
    assert phases(database, settings, build_id)[1:] == [("QUEUED", "SUCCEEDED"), ("PROVISIONING", None)]
    finish(database, claim, Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN)
    lifecycle.request_stop(database, build_id)
    assert phases(database, settings, build_id)[1:] == [("QUEUED", "STOPPED"), ("COMPLETED", None)]


def test_a_build_whose_workers_were_lost_shows_where(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    for _ in range(settings.max_attempts):
        a_claim(database, settings)
        with database.transaction() as session:
            session.execute(sa.update(Build).where(Build.id == build_id).values(lease_expires_ms=1))
        leases.expire(database)
    build = shown(database, settings, build_id)
    assert phases(database, settings, build_id)[2:] == [("PROVISIONING", "FAULT"), ("COMPLETED", None)]
    (context,) = build["phases"][2]["contexts"]
    assert context["statusCode"] == "INTERNAL_SERVICE_ERROR"
    assert "went silent" in context["message"]


def test_a_build_that_ran_too_long_says_so_in_its_phase(database: Database, settings: Settings) -> None:
    build_id = a_build(database, settings)
    reach(database, a_claim(database, settings), PhaseType.BUILD)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build_id).values(deadline_ms=1))
    leases.enforce_deadlines(database)
    last = shown(database, settings, build_id)["phases"][-2]
    assert (last["phaseType"], last["phaseStatus"]) == ("BUILD", "TIMED_OUT")
    assert last["contexts"] == [{"statusCode": "BUILD_TIMED_OUT", "message": "Build has timed out. "}]
