"""Every move that the table knows is made through `apply`, and every other is refused and leaves nothing behind."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from millrace.errors import AttemptFenced, IllegalTransition, InvalidInput
from millrace.settings import Settings
from millrace.vocabulary import BuildState, Reason, Verdict
from scheduler import leases, lifecycle
from scheduler.db import Database
from scheduler.leases import hash_token
from scheduler.lifecycle import apply
from scheduler.models import Attempt, Build, Event
from scheduler.states import TERMINAL, TRANSITIONS, BuildEvent
from tests.support.records import a_build, a_claim, a_project, a_report

S, E = BuildState, BuildEvent
_ROADS: dict[BuildState, tuple[BuildEvent, ...]] = {
    S.QUEUED: (),
    S.CLAIMED: (E.CLAIMED,),
    S.RUNNING: (E.CLAIMED, E.STARTED),
    S.FINALIZING: (E.CLAIMED, E.STARTED, E.FINALIZING),
    S.SUCCEEDED: (E.CLAIMED, E.FINALIZING, E.SUCCEEDED),
    S.FAILED: (E.CLAIMED, E.FINALIZING, E.FAILED),
    S.TIMED_OUT: (E.TIMED_OUT,),
    S.STOPPED: (E.STOPPED,),
    S.FAULT: (E.CLAIMED, E.FAULTED),
}
"""How a queued build gets to each state."""
_ENDINGS = {
    E.SUCCEEDED: Reason.SUCCEEDED,
    E.FAILED: Reason.EXIT_CODE,
    E.TIMED_OUT: Reason.TIMEOUT,
    E.STOPPED: Reason.CANCELLED,
    E.FAULTED: Reason.WORKER_LOST,
}


def move(db: Database, build_id: str, *events: BuildEvent) -> None:
    def work(session: sa.orm.Session) -> None:
        for event in events:
            build = session.get_one(Build, build_id)
            apply(session, build, event, reason=_ENDINGS.get(event))

    db.run(work)


def facts(db: Database, build_id: str) -> tuple[str, str | None, int, int]:
    """State, Reason, attempt and number of events."""
    with db.reading() as session:
        build = session.get_one(Build, build_id)
        events = session.scalar(sa.select(sa.func.count()).select_from(Event).where(Event.build_id == build_id))
        return build.state, build.reason, build.attempt_no, events or 0


@pytest.fixture
def queued(sqlite_database: Database, settings: Settings) -> str:
    a_project(sqlite_database)
    return a_build(sqlite_database, settings)


@pytest.mark.parametrize(("before", "event"), TRANSITIONS, ids=lambda value: value.value)
def test_each_move_of_the_table_is_made_with_its_event(
    sqlite_database: Database, queued: str, before: BuildState, event: BuildEvent
) -> None:
    move(sqlite_database, queued, *_ROADS[before])
    then = TRANSITIONS[before, event]
    *_, attempt_no, events = facts(sqlite_database, queued)
    move(sqlite_database, queued, event)
    reason = _ENDINGS[event].value if then in TERMINAL else None
    assert facts(sqlite_database, queued) == (then.value, reason, attempt_no + (event is E.CLAIMED), events + 1)
    with sqlite_database.reading() as session:
        last = session.scalars(sa.select(Event).order_by(Event.id.desc())).first()
    assert last is not None
    assert (last.before, last.event, last.after, last.reason) == (before.value, event.value, then.value, reason)
    assert last.attempt_no == attempt_no + (event is E.CLAIMED)


@pytest.mark.parametrize("before", S, ids=lambda value: value.value)
def test_what_the_table_does_not_know_is_refused_and_changes_nothing(
    sqlite_database: Database, queued: str, before: BuildState
) -> None:
    move(sqlite_database, queued, *_ROADS[before])
    was = facts(sqlite_database, queued)
    assert was[0] == before.value
    for event in E:
        if (before, event) not in TRANSITIONS:
            with pytest.raises(IllegalTransition, match=f"{before} cannot become {event}"):
                move(sqlite_database, queued, event)
    assert facts(sqlite_database, queued) == was


def test_a_move_from_a_state_that_another_has_left_is_fenced(sqlite_database: Database, queued: str) -> None:
    with sqlite_database.reading() as session:
        stale = session.get_one(Build, queued)
    move(sqlite_database, queued, E.CLAIMED, E.REQUEUED)  # QUEUED again, but an attempt later
    with pytest.raises(AttemptFenced, match="moved by another"), sqlite_database.transaction() as session:
        apply(session, stale, E.CLAIMED)
    assert facts(sqlite_database, queued)[0] == "QUEUED"


def test_a_move_that_is_not_committed_leaves_no_event(sqlite_database: Database, queued: str) -> None:
    with pytest.raises(ZeroDivisionError), sqlite_database.transaction() as session:
        apply(session, session.get_one(Build, queued), E.STOPPED, reason=Reason.CANCELLED)
        raise ZeroDivisionError
    assert facts(sqlite_database, queued) == ("QUEUED", None, 0, 0)


@pytest.mark.parametrize("verdict", Verdict, ids=lambda value: value.value)
def test_a_verdict_and_a_reason_that_contradict_each_other_are_refused(
    sqlite_database: Database, settings: Settings, queued: str, verdict: Verdict
) -> None:
    claim = a_claim(sqlite_database, settings)
    wrong = Reason.EXIT_CODE if verdict is not Verdict.FAILED else Reason.WORKER_LOST
    with pytest.raises(InvalidInput, match="no reason for an attempt"):
        lifecycle.finish(sqlite_database, queued, 1, hash_token(claim.token), a_report(verdict, wrong))
    assert facts(sqlite_database, queued)[0] == "CLAIMED"


def test_a_build_that_is_handed_back_for_ever_comes_to_an_end(sqlite_database: Database, settings: Settings, queued: str) -> None:
    state = BuildState.QUEUED
    for _ in range(100):
        claim = a_claim(sqlite_database, settings)
        report = a_report(Verdict.HANDED_BACK, Reason.WORKER_SHUTDOWN)
        state = lifecycle.finish(sqlite_database, queued, claim.attempt_no, hash_token(claim.token), report)
        if state is not BuildState.QUEUED:
            break
    assert state is BuildState.FAULT
    assert facts(sqlite_database, queued)[1:3] == ("infra.worker_shutdown", 20 + settings.max_attempts)


def test_a_record_that_cannot_be_read_ends_and_lets_the_others_pass(
    sqlite_database: Database, settings: Settings, queued: str
) -> None:
    good = a_build(sqlite_database, settings)
    with sqlite_database.transaction() as session:
        session.get_one(Build, queued).settings = {"queuedTimeoutInMinutes": 5}
    assert a_claim(sqlite_database, settings).build_id == good
    assert facts(sqlite_database, queued)[:3] == ("FAULT", "internal.bug", 1)
    with sqlite_database.reading() as session:
        assert session.get_one(Attempt, (queued, 1)).ended_ms is not None
    assert leases.expire(sqlite_database) == []


def test_the_database_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "farm"
    Database(f"sqlite:///{folder / 'records.db'}").dispose()
    assert folder.stat().st_mode & 0o077 == 0
