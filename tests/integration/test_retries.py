"""Builds that are built again: by a phase that asks for it, by request, and by themselves; on real databases."""

from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import Conflict, IdempotencyMismatch, NotFound
from millrace.settings import Settings
from millrace.vocabulary import BuildState, Reason, Verdict
from scheduler import intake, leases, lifecycle, projects, queries
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Attempt, Build, Outbox
from tests.support.records import a_build, a_claim, a_project, a_report

RETRY = a_report(Verdict.HANDED_BACK, Reason.PHASE_RETRY, message="a phase failed")
FAILED = a_report(Verdict.FAILED, Reason.EXIT_CODE, exit_code=1)


def shown(db: Database, build_id: str) -> queries.BuildRecord:
    record = queries.get_build(db, build_id)
    assert record is not None
    return record


def finish(db: Database, settings: Settings, report: lifecycle.FinishReport) -> str:
    claim = a_claim(db, settings)
    lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)
    return claim.build_id


def everything(db: Database) -> list[queries.BuildRecord]:
    return sorted(queries.find_builds(db, limit=100)[0], key=lambda record: record.number)


def test_a_phase_retry_queues_the_same_build_and_charges_nobody(database: Database, settings: Settings) -> None:
    a_project(database)
    first, second = a_build(database, settings), a_build(database, settings)
    for done in range(settings.max_attempts + 2):
        claim = a_claim(database, settings)
        assert (claim.build_id, claim.retries, claim.attempt_no) == (first, done, done + 1), "it keeps its place"
        lifecycle.finish(database, first, claim.attempt_no, hash_token(claim.token), RETRY)
        assert shown(database, first).state is BuildState.QUEUED
    assert finish(database, settings, a_report()) == first
    assert shown(database, first).state is BuildState.SUCCEEDED
    assert shown(database, second).state is BuildState.QUEUED


def test_a_stop_wins_over_a_phase_retry(database: Database, settings: Settings) -> None:
    a_project(database)
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    lifecycle.request_stop(database, build_id)
    lifecycle.finish(database, build_id, 1, hash_token(claim.token), RETRY)
    assert (shown(database, build_id).state, shown(database, build_id).reason) == (BuildState.STOPPED, Reason.CANCELLED)


def test_attempts_that_a_phase_asked_for_share_the_builds_time(database: Database, settings: Settings) -> None:
    a_project(database, timeoutInMinutes=10)
    build_id = a_build(database, settings)

    def attempt(took_minutes: int) -> float:
        claim = a_claim(database, settings)
        with database.transaction() as session:
            session.execute(
                sa.update(Attempt).where(Attempt.ended_ms.is_(None)).values(claimed_ms=now_ms() - took_minutes * 60_000)
            )
        lifecycle.finish(database, build_id, claim.attempt_no, hash_token(claim.token), RETRY)
        return claim.deadline_in_s

    assert attempt(4) == 600
    assert attempt(5) == pytest.approx(360, abs=1)
    assert attempt(1) == pytest.approx(60, abs=1)
    record = shown(database, build_id)
    assert (record.state, record.reason) == (BuildState.TIMED_OUT, Reason.TIMEOUT)


def test_a_worker_that_never_stops_to_retry_is_held_up(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "MAX_PHASE_RETRIES", 2)
    a_project(database)
    build_id = a_build(database, settings)
    for _ in range(3):
        finish(database, settings, RETRY)
    record = shown(database, build_id)
    assert (record.state, record.reason) == (BuildState.FAULT, Reason.BUG)


def test_a_retry_is_a_new_build_with_the_old_settings_and_commit(database: Database, settings: Settings) -> None:
    source = {"type": "GIT", "location": "https://git.example/a.git", "buildspec": "x.yml"}
    a_project(database, source=source, sourceVersion="main")
    variables = [{"name": "A", "value": "1"}]
    old = a_build(database, settings, environmentVariablesOverride=variables, imageOverride="x:1", priority=7)
    finish(database, settings, a_report(Verdict.FAILED, Reason.EXIT_CODE, resolved_source_version="c" * 40))
    projects.update(database, projects.get(database, "demo").settings.model_copy(update={"timeout_in_minutes": 9}))
    made = intake.retry(database, intake.RetryRequest(build_id=old, initiator="me"), settings)
    assert made.created
    record = shown(database, made.build_id)
    assert (record.number, record.initiator, record.priority, record.retry_of) == (2, "me", 7, old)
    assert (record.settings.source_version, record.settings.source_commit) == ("main", "c" * 40)
    assert record.settings.timeout_in_minutes == 60
    assert record.settings.environment.image == "x:1"
    assert [(one.name, one.value) for one in record.settings.environment.environment_variables] == [("A", "1")]
    assert shown(database, old).settings.source_commit is None
    assert a_claim(database, settings).settings.source_commit == "c" * 40


def test_a_retry_asks_for_a_build_that_has_ended_and_a_project_that_is_there(database: Database, settings: Settings) -> None:
    a_project(database)
    build_id = a_build(database, settings)
    with pytest.raises(Conflict, match="has not ended, it is QUEUED"):
        intake.retry(database, intake.RetryRequest(build_id=build_id, initiator="me"), settings)
    finish(database, settings, FAILED)
    for unknown in ("demo:none", "no\x00thing"):
        with pytest.raises(NotFound):
            intake.retry(database, intake.RetryRequest(build_id=unknown, initiator="me"), settings)
    request = intake.RetryRequest(build_id=build_id, initiator="me", idempotency_scope="s", idempotency_key="k")
    first = intake.retry(database, request, settings)
    again = intake.retry(database, request, settings)
    assert (again.build_id, again.created) == (first.build_id, False)
    other = intake.BuildRequest(
        overrides=intake.BuildOverrides.model_validate({"projectName": "demo"}),
        initiator="me",
        idempotency_scope="s",
        idempotency_key="k",
    )
    with pytest.raises(IdempotencyMismatch):
        intake.submit(database, other, settings)
    finish(database, settings, a_report())
    projects.delete(database, "demo")
    with pytest.raises(NotFound, match="no project"):
        intake.retry(database, intake.RetryRequest(build_id=build_id, initiator="me"), settings)


def test_builds_that_fail_are_retried_by_themselves_up_to_the_limit(database: Database, settings: Settings) -> None:
    a_project(database, autoRetryLimit=2)
    a_build(database, settings)
    for _ in range(3):
        finish(database, settings, FAILED)
    assert leases.claim(database, lifecycle_request(), settings) is None
    builds = everything(database)
    assert [(one.number, one.auto_retry_number) for one in builds] == [(1, 0), (2, 1), (3, 2)]
    assert {one.state for one in builds} == {BuildState.FAILED}
    assert [one.retry_of for one in builds] == [None, builds[0].id, builds[1].id]
    assert [one.next_auto_retry for one in builds] == [builds[1].id, builds[2].id, None]
    with database.reading() as session:
        bells = session.scalars(sa.select(Outbox.key).where(Outbox.kind == "bell")).all()
    assert {f"bell/{one.id}/0" for one in builds} <= set(bells)


def lifecycle_request() -> "leases.ClaimRequest":
    return leases.ClaimRequest(worker_id="w", fleet="default", slots=1, free_slots=1, version="0")


def test_a_report_sent_twice_retries_once(database: Database, settings: Settings) -> None:
    a_project(database, autoRetryLimit=5)
    a_build(database, settings)
    claim = a_claim(database, settings)
    for _ in range(2):
        lifecycle.finish(database, claim.build_id, 1, hash_token(claim.token), FAILED)
    assert len(everything(database)) == 2


@pytest.mark.parametrize(
    ("report", "retried"),
    [
        (a_report(), False),
        (a_report(Verdict.STOPPED, Reason.CANCELLED), False),
        (a_report(Verdict.TIMED_OUT, Reason.TIMEOUT), True),
        (a_report(Verdict.FAULT, Reason.BUG), False),
    ],
)
def test_only_failures_are_retried(database: Database, settings: Settings, report: lifecycle.FinishReport, retried: bool) -> None:
    a_project(database, autoRetryLimit=1)
    a_build(database, settings)
    finish(database, settings, report)
    assert len(everything(database)) == 1 + retried


def test_what_the_sweeper_ends_is_retried_too(database: Database, settings: Settings) -> None:
    a_project(database, autoRetryLimit=1)
    build_id = a_build(database, settings)
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == build_id).values(queue_deadline_ms=1))
    assert leases.enforce_deadlines(database) == [build_id]
    first, second = everything(database)
    assert (first.state, first.next_auto_retry) == (BuildState.TIMED_OUT, second.id)
    assert second.state is BuildState.QUEUED


@pytest.mark.parametrize("damage", [{"autoRetryLimit": "many"}, {"autoRetryLimit": 1, "source": {}}])
def test_a_build_whose_record_is_damaged_ends_without_a_retry(
    database: Database, settings: Settings, damage: dict[str, Any]
) -> None:
    a_project(database)
    build_id = a_build(database, settings)
    with database.transaction() as session:
        build = session.get(Build, build_id)
        assert build is not None
        build.settings, build.queue_deadline_ms = build.settings | damage, 1
    assert leases.enforce_deadlines(database) == [build_id]
    with database.reading() as session:
        assert session.scalars(sa.select(Build.state)).all() == [BuildState.TIMED_OUT.value]
    with pytest.raises(Conflict, match="made by another release"):
        intake.retry(database, intake.RetryRequest(build_id=build_id, initiator="me"), settings)


def test_an_override_sets_the_limit_and_a_deleted_project_ends_it(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings, autoRetryLimitOverride=1)
    finish(database, settings, FAILED)
    assert len(everything(database)) == 2
    with database.transaction() as session:
        session.execute(sa.text("UPDATE projects SET deleted_ms = 1"))
    finish(database, settings, FAILED)
    assert len(everything(database)) == 2
