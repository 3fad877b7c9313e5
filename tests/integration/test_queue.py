"""The queue's order and limits, on real databases."""

from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import InvalidInput, LimitExceeded, NotFound
from millrace.project import BuildOverrides
from millrace.settings import Settings
from millrace.vocabulary import BuildState, Reason, Verdict
from scheduler import foresight, intake, leases, lifecycle, queries, waiting
from scheduler.bounds import Limit
from scheduler.db import Database
from scheduler.fairness import FAIR_TURN, longest_wait
from scheduler.fleets import records
from scheduler.leases import hash_token
from scheduler.models import Build
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report

GIT: dict[str, Any] = {"source": {"type": "GITHUB", "location": "https://github.com/o/r.git"}}


def shown(db: Database, build_id: str) -> queries.BuildRecord:
    record = queries.get_build(db, build_id)
    assert record is not None
    return record


def run_next(db: Database, settings: Settings) -> str:
    """The next build, claimed and ended."""
    claim = a_claim(db, settings)
    lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
    return claim.build_id


def test_one_build_of_a_project_does_not_wait_for_three_thousand_of_another(database: Database, settings: Settings) -> None:
    a_project(database, "many")
    a_project(database, "one")
    first = a_build(database, settings, project="many")
    with database.transaction() as session:
        row = session.get_one(Build, first)
        like = {column.name: getattr(row, column.name) for column in Build.__table__.columns}
        rows = [{**like, "id": f"many:{n}", "number": n, "level": 100, "rank": -100_000} for n in range(2, 3001)]
        session.execute(sa.insert(Build), rows)  # all of them as urgent as can be
    for _ in range(3):
        run_next(database, settings)
    lone = a_build(database, settings, project="one")
    bound = longest_wait(1, [1])
    assert lone in [run_next(database, settings) for _ in range(bound)]
    assert bound == 3 * FAIR_TURN


def test_a_project_tokens_priority_orders_its_own_project_alone(database: Database, settings: Settings) -> None:
    a_project(database, "mine")
    a_project(database, "yours")
    theirs = a_build(database, settings, project="yours")
    plain = a_build(database, settings, project="mine")

    def urgent(by_admin: bool) -> str:
        wanted = BuildOverrides.model_validate({"projectName": "mine", "priority": 100})
        return intake.submit(database, intake.BuildRequest(overrides=wanted, initiator="t", by_admin=by_admin), settings).build_id

    own = urgent(by_admin=False)
    assert [run_next(database, settings) for _ in range(2)] == [theirs, own]
    admins = urgent(by_admin=True)
    other = a_build(database, settings, project="yours")
    assert [run_next(database, settings) for _ in range(3)] == [admins, other, plain]


def test_a_projects_own_priority_counts_among_projects(database: Database, settings: Settings) -> None:
    a_project(database, "calm")
    a_project(database, "release", millrace={"priority": 10})
    a_build(database, settings, project="calm")
    first = a_build(database, settings, project="release")
    assert run_next(database, settings) == first


def test_a_fleet_that_is_paused_claims_nothing_until_it_is_resumed(database: Database, settings: Settings) -> None:
    a_project(database)
    build = a_build(database, settings)
    paused = records.pause(database, "default", by="me", why="new disks")
    assert (paused.waiting, paused.paused_by, paused.paused_why) == (1, "me", "new disks")
    assert leases.claim(database, a_claim_request(), settings) is None
    said = waiting.explain(database, build, settings)
    assert said is not None
    assert said.limits[0].limit is Limit.FLEET_PAUSED
    assert "paused by me: new disks" in said.says
    assert records.resume(database, "default").paused_ms is None
    assert a_claim(database, settings).build_id == build
    with pytest.raises(NotFound, match="no fleet 'defualt'"):
        records.pause(database, "defualt", by="me", why="")
    with pytest.raises(InvalidInput):
        records.change(database, "../x", max_running=1)


def test_a_fleet_and_the_farm_run_no_more_than_their_limits(database: Database, settings: Settings) -> None:
    a_project(database)
    for _ in range(4):
        a_build(database, settings)
    records.change(database, "default", max_running=2)
    assert [leases.claim(database, a_claim_request(), settings) is None for _ in range(3)] == [False, False, True]
    records.change(database, "default", max_running=None)
    strict = settings.model_copy(update={"max_running": 3})
    assert [leases.claim(database, a_claim_request(), strict) is None for _ in range(2)] == [False, True]
    record = records.get(database, "default")
    assert (record.waiting, record.running, record.workers, record.slots, record.free_slots) == (1, 3, 1, 4, 1)


def test_a_farm_may_refuse_what_is_over_a_projects_limit(database: Database, settings: Settings) -> None:
    strict = settings.model_copy(update={"concurrency_overflow": "reject"})
    a_project(database, concurrentBuildLimit=1)
    a_build(database, strict)
    with pytest.raises(LimitExceeded, match="its limit is 1"):
        a_build(database, strict)
    run_next(database, strict)
    a_build(database, strict)


def test_a_new_build_of_a_branch_stops_the_older_ones_of_it(database: Database, settings: Settings) -> None:
    a_project(database, millrace={"cancelSuperseded": True}, **GIT)
    running = a_build(database, settings, sourceVersion="feature")
    claim = a_claim(database, settings)
    waits = a_build(database, settings, sourceVersion="refs/heads/feature")
    kept = [a_build(database, settings, sourceVersion=version) for version in ("main", "pr/7", "a" * 40, "refs/tags/v1")]
    assert shown(database, running).cancel_requested
    newest = a_build(database, settings, sourceVersion="feature")
    assert shown(database, waits).state is BuildState.STOPPED
    assert shown(database, waits).message == f"superseded by {newest}"
    token = hash_token(claim.token)
    stopped = a_report(Verdict.STOPPED, Reason.CANCELLED, message="stopped")
    assert lifecycle.finish(database, running, 1, token, stopped) is BuildState.STOPPED
    assert shown(database, running).message == f"superseded by {waits}"
    assert {shown(database, build).state for build in [*kept, newest]} == {BuildState.QUEUED}
    again = a_build(database, settings, sourceVersion="pr/7")
    assert shown(database, kept[1]).message == f"superseded by {again}"
    assert shown(database, kept[2]).state is BuildState.QUEUED


def test_without_the_setting_no_build_is_superseded(database: Database, settings: Settings) -> None:
    a_project(database, **GIT)
    older = a_build(database, settings, sourceVersion="feature")
    a_build(database, settings, sourceVersion="feature")
    assert shown(database, older).state is BuildState.QUEUED


def test_a_project_without_git_has_no_branches_to_supersede(database: Database, settings: Settings) -> None:
    a_project(database, millrace={"cancelSuperseded": True})
    older = a_build(database, settings)
    a_build(database, settings)
    assert shown(database, older).state is BuildState.QUEUED


def test_a_build_given_back_keeps_its_place_before_younger_ones(database: Database, settings: Settings) -> None:
    a_project(database)
    first, _second = a_build(database, settings), a_build(database, settings)
    claim = a_claim(database, settings)
    handed = a_report(Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN)
    assert lifecycle.finish(database, first, 1, hash_token(claim.token), handed) is BuildState.QUEUED
    assert a_claim(database, settings).build_id == first


def test_the_explanation_of_a_long_queue_says_more_than(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "_WORK", 1)
    a_project(database)
    builds = [a_build(database, settings) for _ in range(60)]
    said = waiting.explain(database, builds[-1], settings)
    assert said is not None
    assert (said.position, said.ahead_count, len(said.ahead)) == (None, 50, waiting.AHEAD_SHOWN)
    assert "more than 50 builds go before it" in said.says
