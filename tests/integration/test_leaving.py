"""Workers that are marked get no more builds, whatever comes first; and nothing is let go that holds one. On both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from millrace.errors import MillraceError
from millrace.settings import Settings
from scheduler import leases, lifecycle
from scheduler.db import Database, now_ms
from scheduler.fleets import capacity, marks
from scheduler.leases import hash_token
from scheduler.models import Build, Instance, Worker
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report


def worker(db: Database, worker_id: str = "w1") -> Worker:
    with db.reading() as session:
        return session.get_one(Worker, worker_id)


def an_instance(db: Database, instance_id: str) -> None:
    with db.transaction() as session:
        now = session.execute(sa.select(now_ms())).scalar_one()
        session.add(
            Instance(
                fleet="default", id=instance_id, provider="process", state="booting", generation=1, found_ms=now, seen_ms=now
            )
        )


def test_a_marked_worker_ends_what_it_has_and_gets_nothing_more(database: Database, settings: Settings) -> None:
    a_project(database)
    first, second = a_build(database, settings), a_build(database, settings)
    held = a_claim(database, settings, "w1")
    assert held.build_id == first
    assert marks.ask_to_leave(database, "default", ["w1", "nobody"], "too many") == ["w1"]
    assert marks.ask_to_leave(database, "default", ["w1"], "again") == []
    assert leases.leave_why(database, "w1") == "", "it was not asked yet"
    assert leases.claim(database, a_claim_request("w1"), settings) is None
    assert leases.leave_why(database, "w1") == "too many"
    assert worker(database).state == "draining"
    with database.reading() as session:
        shown = capacity.capacity_of(session, "default")
    assert (shown.workers, shown.free_slots, shown.not_claiming) == (1, 0, ("worker w1 is leaving",))
    assert leases.renew(database, first, 1, hash_token(held.token), settings).cancel_requested is False
    lifecycle.finish(database, first, 1, hash_token(held.token), a_report())
    assert leases.claim(database, a_claim_request("w1"), settings) is None
    assert a_claim(database, settings, "w2").build_id == second


def test_a_claim_whose_answer_was_lost_is_answered_again_to_a_worker_that_was_marked_since(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    a_build(database, settings)
    request = a_claim_request("w1", token="mr_att_" + "x" * 43)
    first = leases.claim(database, request, settings)
    marks.ask_to_leave(database, "default", ["w1"], "too many")
    again = leases.claim(database, request, settings)
    assert first is not None
    assert again is not None
    assert again.build_id == first.build_id


def test_a_mark_is_taken_back_until_the_worker_was_told(database: Database, settings: Settings) -> None:
    a_project(database)
    leases.claim(database, a_claim_request("w1"), settings)
    marks.ask_to_leave(database, "default", ["w1"], "too many")
    assert marks.take_back(database, "default", ["w1"], "wanted") == ["w1"]
    a_build(database, settings)
    a_claim(database, settings, "w1")
    marks.ask_to_leave(database, "default", ["w1"], "too many")
    assert leases.claim(database, a_claim_request("w1"), settings) is None
    assert marks.take_back(database, "default", ["w1"], "wanted") == []


def test_a_worker_that_left_and_was_started_again_by_hand_takes_builds(database: Database, settings: Settings) -> None:
    a_project(database)
    leases.claim(database, a_claim_request("w1"), settings)
    marks.ask_to_leave(database, "default", ["w1"], "drained")
    leases.claim(database, a_claim_request("w1"), settings)
    leases.claim(database, a_claim_request("w1", free_slots=0, state="gone"), settings)
    build = a_build(database, settings)
    assert a_claim(database, settings, "w1").build_id == build


def test_a_worker_of_an_instance_that_was_marked_stays_so_when_it_is_started_again(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    an_instance(database, "i-1")
    leases.claim(database, a_claim_request("i-1", generation=1), settings)
    marks.ask_to_leave(database, "default", ["i-1"], "too many")
    leases.claim(database, a_claim_request("i-1", generation=1), settings)
    leases.claim(database, a_claim_request("i-1", generation=1, free_slots=0, state="gone"), settings)
    a_build(database, settings)
    assert leases.claim(database, a_claim_request("i-1", generation=1), settings) is None


def test_an_instance_that_was_let_go_before_its_worker_came_gives_that_one_nothing(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    a_build(database, settings)
    an_instance(database, "i-1")
    assert marks.let_go(database, "default", ["i-1", "i-2"], "it did not come") == ["i-1"]
    assert leases.claim(database, a_claim_request("i-1", generation=1), settings) is None
    assert leases.leave_why(database, "i-1") == "it did not come"


def test_what_holds_a_build_is_not_let_go(database: Database, settings: Settings) -> None:
    a_project(database)
    a_build(database, settings)
    an_instance(database, "i-1")
    claim = leases.claim(database, a_claim_request("i-1", generation=1), settings)
    assert claim is not None
    assert marks.let_go(database, "default", ["i-1"], "why not") == []
    lifecycle.finish(database, claim.build_id, 1, hash_token(claim.token), a_report())
    assert marks.let_go(database, "default", ["i-1"], "why not") == ["i-1"]


def test_marks_and_claims_at_once_never_give_a_build_to_a_worker_that_may_be_ended(
    database: Database, settings: Settings
) -> None:
    a_project(database)
    workers = [f"i-{n}" for n in range(8)]
    for each in workers:
        an_instance(database, each)
    for _ in range(120):
        a_build(database, settings)
    gone: dict[str, bool] = {}
    wrong: list[str] = []
    over = threading.Event()

    def carry(each: str) -> None:
        while not over.is_set():
            try:
                claim = leases.claim(database, a_claim_request(each, generation=1, slots=1, free_slots=1), settings)
            except MillraceError:
                continue
            if claim is None:
                if leases.leave_why(database, each):
                    return
                continue
            if gone.get(each):
                wrong.append(each)
            lifecycle.finish(database, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())

    def end() -> None:
        for each in workers:
            while not marks.let_go(database, "default", [each], "too many"):
                pass
            with database.reading() as session:
                holds = session.scalar(sa.select(Build.id).where(Build.lease_owner == each))
            if holds is not None:
                wrong.append(f"{each} was let go with {holds}")
            gone[each] = True
        over.set()

    with ThreadPoolExecutor(9) as pool:
        tasks = [pool.submit(carry, each) for each in workers] + [pool.submit(end)]
        for task in tasks:
            task.result(timeout=120)
    assert wrong == []


def test_a_worker_says_what_it_has_and_is_idle_since_it_holds_nothing(database: Database, settings: Settings) -> None:
    a_project(database)
    offers = {"generation": 3, "cpus": 2.5, "memory_bytes": 8 * 1024**3, "labels": ("gpu", "ssd")}
    leases.claim(database, a_claim_request("w1", **offers), settings)
    seen = worker(database)
    assert (seen.generation, seen.cpu_millis, seen.memory_bytes, seen.labels) == (3, 2500, 8 * 1024**3, ["gpu", "ssd"])
    idle_since = seen.idle_since_ms
    assert idle_since is not None
    build = a_build(database, settings)
    claim = leases.claim(database, a_claim_request("w1", **offers), settings)
    assert claim is not None
    assert worker(database).idle_since_ms is None
    leases.claim(database, a_claim_request("w1", free_slots=0, **offers), settings)
    assert worker(database).idle_since_ms is None
    lifecycle.finish(database, build, 1, hash_token(claim.token), a_report())
    leases.claim(database, a_claim_request("w1", **offers), settings)
    later = worker(database).idle_since_ms
    assert later is not None
    assert later >= idle_since


def test_a_worker_that_was_started_for_one_build_gets_that_one_and_no_other(database: Database, settings: Settings) -> None:
    a_project(database)
    a_project(database, "narrow", concurrentBuildLimit=1)
    _first, second = a_build(database, settings), a_build(database, settings)
    claim = leases.claim(database, a_claim_request("t1", only=second), settings)
    assert claim is not None
    assert claim.build_id == second
    assert leases.claim(database, a_claim_request("t2", only=second), settings) is None
    assert leases.claim(database, a_claim_request("t3", only="nothing"), settings) is None
    narrow = [a_build(database, settings, project="narrow") for _ in range(2)]
    assert leases.claim(database, a_claim_request("t4", only=narrow[1]), settings) is not None
    assert leases.claim(database, a_claim_request("t5", only=narrow[0]), settings) is None, "its project runs as many as it may"


@pytest.mark.parametrize("why", ["too many", "weiß nicht\nX-Other: 1", "100 %"])
def test_the_answer_to_a_claim_asks_a_worker_to_leave_in_any_words(why: str) -> None:
    from urllib.parse import unquote

    from api.attempts import _PLAIN, quote

    header = quote(why, safe=_PLAIN)
    assert header.isascii()
    assert "\n" not in header
    assert unquote(header) == why
