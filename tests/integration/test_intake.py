"""From a request to a queued build: what is recorded, what is refused, and what a repeated request gets."""

import threading

import pytest
import sqlalchemy as sa

from millrace.errors import IdempotencyMismatch, InvalidInput, NotFound
from millrace.project import BuildOverrides
from millrace.settings import Settings
from scheduler import intake, lifecycle, projects, queries
from scheduler.db import Database, now_ms
from scheduler.models import Build, Event, Idempotency, Outbox
from tests.support.records import a_build, a_claim, a_project, a_project_json

DAY_MS = 86_400_000


def submit(
    db: Database, settings: Settings, *, key: str | None = None, scope: str = "s", **overrides: object
) -> intake.Submitted:
    wanted = BuildOverrides.model_validate({"projectName": "demo", **overrides})
    request = intake.BuildRequest(overrides=wanted, initiator="t", idempotency_scope=scope, idempotency_key=key)
    return intake.submit(db, request, settings)


def count(db: Database, table: type) -> int:
    with db.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def test_the_record_holds_the_project_with_the_overrides_applied(database: Database, settings: Settings) -> None:
    environment = {
        **a_project_json()["environment"],
        "environmentVariables": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
    }
    a_project(database, environment=environment, timeoutInMinutes=30, sourceVersion="main")
    build = a_build(
        database,
        settings,
        environmentVariablesOverride=[{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
        timeoutInMinutesOverride=7,
        queuedTimeoutInMinutesOverride=9,
        imageOverride="other:1",
        priority=3,
    )
    record = queries.get_build(database, build)
    assert record is not None
    assert {v.name: v.value for v in record.settings.environment.environment_variables} == {"A": "1", "B": "3", "C": "4"}
    assert (record.settings.timeout_in_minutes, record.settings.environment.image, record.priority) == (7, "other:1", 3)
    assert record.settings.source_version == "main"
    with database.reading() as session:
        row = session.get_one(Build, build)
        assert row.queue_deadline_ms - row.submitted_ms == 9 * 60_000
    assert a_claim(database, settings).deadline_in_s == 7 * 60


def test_a_project_that_changes_later_does_not_change_an_accepted_build(database: Database, settings: Settings) -> None:
    project = a_project(database)
    build = a_build(database, settings)
    before = queries.get_build(database, build)
    projects.update(database, project.model_copy(update={"timeout_in_minutes": 5}))
    assert queries.get_build(database, build) == before


def test_a_wrong_override_is_named_by_its_field(database: Database, settings: Settings) -> None:
    a_project(database)
    with pytest.raises(InvalidInput) as caught:
        submit(database, settings, sourceTypeOverride="GIT")
    assert caught.value.fields
    assert all(problem.field is not None and problem.what for problem in caught.value.fields)
    assert (count(database, Build), count(database, Outbox)) == (0, 0)
    assert submit(database, settings).created  # and no number was spent
    (record,), _ = queries.find_builds(database)
    assert record.number == 1


def test_a_deleted_project_takes_no_builds(database: Database, settings: Settings) -> None:
    a_project(database)
    projects.delete(database, "demo")
    with pytest.raises(NotFound, match="no project 'demo'"):
        submit(database, settings)


def test_numbers_are_one_after_another_when_many_submit_at_once(database: Database, settings: Settings) -> None:
    a_project(database)
    threads = [threading.Thread(target=lambda: [submit(database, settings) for _ in range(10)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records, _ = queries.find_builds(database, limit=100)
    assert sorted(record.number for record in records) == list(range(1, 61))
    assert (count(database, Outbox), count(database, Event)) == (60, 0)


def test_a_key_is_good_in_its_scope_only(database: Database, settings: Settings) -> None:
    a_project(database)
    first = submit(database, settings, key="k", scope="one")
    second = submit(database, settings, key="k", scope="two")
    assert first.build_id != second.build_id
    assert submit(database, settings, key="k", scope="one").build_id == first.build_id


def test_a_key_still_names_its_build_when_that_ended_or_its_project_changed(database: Database, settings: Settings) -> None:
    project = a_project(database)
    first = submit(database, settings, key="k")
    lifecycle.request_stop(database, first.build_id)
    projects.update(database, project.model_copy(update={"timeout_in_minutes": 5}))
    again = submit(database, settings, key="k")
    assert (again.build_id, again.created) == (first.build_id, False)
    with pytest.raises(IdempotencyMismatch, match=first.build_id):
        submit(database, settings, key="k", priority=1)


def test_a_key_older_than_a_day_makes_a_new_build(database: Database, settings: Settings) -> None:
    a_project(database)
    first = submit(database, settings, key="k")
    with database.transaction() as session:
        session.execute(sa.update(Idempotency).values(created_ms=now_ms() - DAY_MS - 1))
    second = submit(database, settings, key="k")
    assert second.created
    assert second.build_id != first.build_id
    assert submit(database, settings, key="k").build_id == second.build_id


def test_a_key_that_races_itself_with_other_requests_makes_one_build(database: Database, settings: Settings) -> None:
    a_project(database)
    together = threading.Barrier(6)
    made: list[str] = []
    refused: list[IdempotencyMismatch] = []

    def run(priority: int) -> None:
        together.wait()
        try:
            made.append(submit(database, settings, key="k", priority=priority).build_id)
        except IdempotencyMismatch as error:
            refused.append(error)

    threads = [threading.Thread(target=run, args=(n % 2,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(set(made)), len(made), len(refused), count(database, Build)) == (1, 3, 3, 1)
