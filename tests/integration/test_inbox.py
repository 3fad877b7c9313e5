"""Deliveries that come faster than they can be acted on: noted, answered, and acted on once, whoever dies meanwhile."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from millrace.failpoints import MARK
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.webhook import EventKind, Heard, SourceEvent, WebhookSettings
from scheduler import drain, hooks, inbox, queries
from scheduler.db import Database, now_ms
from scheduler.dispatch import Bell
from scheduler.drain import Clerk, Drain
from scheduler.hooks import HookRecord, Result
from scheduler.inbox import Arrival, Inbox
from scheduler.models import Build, Delivery, Webhook
from scheduler.secrets import keys_of
from scheduler.sweeper import Sweeper
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.records import a_project
from tests.support.webhooks import SOURCES, github_push, sent


class Desk:
    """A webhook, what comes for it, and who acts on that."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.settings = db, settings
        self.rung: list[str] = []
        self.inbox = Inbox(db, at_once=0)
        self.clerk = Clerk(db=db, settings=settings, ring=lambda build, _fleet: self.rung.append(build), stop=threading.Event())
        self.hook = self.make("demo")

    def make(self, project: str, **more: Any) -> HookRecord:
        a_project(self.db, project, source=SOURCES["git"], **more)
        return hooks.create(self.db, keys_of(self.settings), project, WebhookSettings())[0]

    def push(self, number: int, *, delivery: str = "", hook: HookRecord | None = None) -> Arrival:
        hook = hook or self.hook
        paths = tuple(f"src/{one}.py" for one in range(number))
        event = SourceEvent(kind=EventKind.PUSH, ref="refs/heads/main", commit=f"{number:040x}", stamp=f"{number}", paths=paths)
        heard = Heard(what="PUSH", events=(event,))
        name = delivery or f"d{number}"
        return Arrival(webhook_id=hook.id, project=hook.project, heard=heard, delivery_id=name, initiator="me")

    def receive(self, one: Arrival, hook: HookRecord | None = None) -> Sequence[Result]:
        who = {"delivery_id": one.delivery_id, "initiator": one.initiator}
        return hooks.receive(self.db, hook or self.hook, one.heard, settings=self.settings, **who)

    def drain(self) -> None:
        while self.clerk.act():
            pass

    def rows(self) -> list[Delivery]:
        with self.db.reading() as session:
            return list(session.scalars(sa.select(Delivery).order_by(Delivery.id)))

    def commits(self, project: str = "demo") -> list[str]:
        """Of the builds, oldest first."""
        builds = queries.find_builds(self.db, project=project, states=[], limit=500, cursor=None)[0]
        assert {build.initiator for build in builds} <= {"me"}
        return [build.settings.source_commit or "" for build in reversed(builds)]


@pytest.fixture
def desk(database: Database, settings: Settings) -> Desk:
    return Desk(database, settings)


@pytest.fixture
def one(sqlite_database: Database, settings: Settings) -> Desk:
    """On SQLite, for what is not about the database."""
    return Desk(sqlite_database, settings)


def test_what_was_noted_is_acted_on_in_its_order_and_once(desk: Desk) -> None:
    for number in range(25):
        desk.inbox.put(desk.push(number))
    assert [(row.outcome, row.build_id) for row in desk.rows()] == [("accepted", None)] * 25
    assert desk.rows()[3].ref == "refs/heads/main" and desk.rows()[3].commit_id == f"{3:040x}"
    assert inbox.read(desk.rows()[3]) == desk.push(3)
    desk.drain()
    assert desk.commits() == [f"{number:040x}" for number in range(25)]
    assert [row.outcome for row in desk.rows()] == ["build"] * 25
    assert desk.rung == [row.build_id for row in desk.rows()]
    assert not desk.clerk.act()


def test_the_same_delivery_that_comes_again_before_and_after_is_one_build(desk: Desk) -> None:
    for _ in range(2):
        desk.inbox.put(desk.push(1))
    desk.inbox.put(desk.push(1, delivery="other"))
    assert len(desk.rows()) == 2
    desk.drain()
    desk.inbox.put(desk.push(1))
    desk.drain()
    assert desk.commits() == [f"{1:040x}"]
    assert [row.outcome for row in desk.rows()] == ["build", "duplicate"]


def test_what_comes_meanwhile_lines_up_behind_and_a_ping_does_not(desk: Desk) -> None:
    desk.inbox.put(desk.push(1))
    (result,) = desk.receive(desk.push(2))
    assert (result.outcome, result.commit) == (hooks.Outcome.ACCEPTED, f"{2:040x}")
    ping = Arrival(webhook_id=desk.hook.id, project="demo", heard=Heard(what="ping", ping=True), delivery_id="p", initiator="me")
    (answer,) = desk.receive(ping)
    assert answer.outcome is hooks.Outcome.PING
    other = desk.make("other")
    (apart,) = desk.receive(desk.push(3, hook=other), other)
    assert apart.outcome is hooks.Outcome.BUILD
    desk.drain()
    assert desk.commits() == [f"{1:040x}", f"{2:040x}"]
    (result,) = desk.receive(desk.push(4))
    assert result.outcome is hooks.Outcome.BUILD


def test_two_that_act_at_once_do_nothing_twice(desk: Desk) -> None:
    others = [desk.make(f"p{number}") for number in range(4)]
    for number in range(40):
        desk.inbox.put(desk.push(number, hook=others[number % 4]))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: desk.drain(), range(3)))
    desk.drain()
    for number, hook in enumerate(others):
        assert desk.commits(hook.project) == [f"{commit:040x}" for commit in range(number, 40, 4)]


def test_those_who_come_at_once_share_a_commit_and_each_hears_of_its_own_fault(desk: Desk) -> None:
    commits: list[object] = []
    sa.event.listen(desk.db.engine, "commit", commits.append)
    begun = threading.Barrier(30)

    def put(number: int) -> str:
        arrival = desk.push(number, delivery="\ud800" if number == 7 else "")
        begun.wait(10)
        try:
            desk.inbox.put(arrival)
        except Exception as error:
            return type(error).__name__
        return "noted"

    with ThreadPoolExecutor(30) as pool:
        said = list(pool.map(put, range(30)))
    assert said[:7] + said[8:] == ["noted"] * 29
    assert said[7] != "noted"
    assert len(commits) < 60, "at most: the first, all the others, and each of them alone, as one was wrong"
    assert {row.delivery_id for row in desk.rows()} == {f"d{number}" for number in range(30) if number != 7}


def test_what_cannot_be_acted_on_is_refused_and_keeps_no_other(one: Desk) -> None:
    for number in range(3):
        one.inbox.put(one.push(number))
    with one.db.transaction() as session:
        session.execute(sa.update(Delivery).where(Delivery.delivery_id == "d1").values(event={"heard": {"events": "?"}}))
    one.drain()
    assert {row.delivery_id: row.outcome for row in one.rows()} == {"d0": "build", "d1": "refused", "d2": "build"}
    one.inbox.put(one.push(1))
    one.drain()
    assert sorted(one.commits()) == [f"{number:040x}" for number in range(3)]


def test_what_fails_by_a_fault_of_ours_keeps_no_other_webhook(one: Desk) -> None:
    other = one.make("other")
    one.inbox.put(one.push(1))
    one.inbox.put(one.push(2, hook=other))
    with one.db.transaction() as session:
        session.execute(sa.update(Webhook).where(Webhook.id == one.hook.id).values(settings={"buildType": "?"}))
    one.drain()
    assert [row.outcome for row in one.rows()] == ["refused", "build"]
    assert one.rows()[0].why == "it could not be acted on, and the farm's log says why: have it sent again"


def test_what_waits_at_a_webhook_that_was_deleted_says_so(desk: Desk) -> None:
    desk.inbox.put(desk.push(1))
    hooks.delete(desk.db, "demo")
    desk.drain()
    (row,) = desk.rows()
    assert (row.outcome, row.why, row.event) == ("ignored", "its webhook was deleted before it was acted on", None)
    assert desk.commits() == []


def test_the_thread_waits_until_the_rush_is_over_but_not_for_ever(one: Desk) -> None:
    drained = Drain(one.db, one.settings, lambda build, _fleet: one.rung.append(build), one.inbox)
    over = threading.Event()

    def rush() -> None:
        number = 0
        while not over.wait(0.01):
            with one.inbox.place() as room:
                assert not room
                one.inbox.put(one.push(number))
                drained.wake()
                number += 1

    rushing = threading.Thread(target=rush)
    rushing.start()
    wait_until(lambda: one.rung, 10)
    over.set()
    rushing.join()
    wait_until(lambda: {row.outcome for row in one.rows()} == {"build"}, 30)
    drained.join()
    drained.wake()
    one.inbox.put(one.push(10_000))
    assert one.rows()[-1].outcome == "accepted"


def test_the_scheduler_acts_on_what_a_dead_process_left(one: Desk, store: DirectoryStore) -> None:
    one.inbox.put(one.push(1))
    sweeper = Sweeper(one.db, Bell(f"redis+socket://{one.settings.home}/nothing.sock"), store, one.settings)
    assert sweeper.sweep()
    with one.db.transaction() as session:
        assert session.scalar(sa.select(Delivery.outcome)) == "accepted"  # it may be in good hands
        session.execute(sa.update(Delivery).values(received_ms=now_ms() - drain.LEFT_MS))

    def acted() -> bool:
        sweeper.sweep()
        return one.commits() == [f"{1:040x}"]

    wait_until(acted, 10)


@pytest.fixture
def server(database: Database, settings: Settings) -> Iterator[ApiServer]:
    with serving(database, settings, processes=2, threads=16, MILLRACE_WEBHOOKS_AT_ONCE="1") as running:
        yield running


def _hooks(server: ApiServer, count: int) -> list[tuple[str, str]]:
    """Address and secret of so many webhooks."""
    made = []
    for number in range(count):
        a_project(server.db, f"p{number}", source=SOURCES["github"])
        record, secret = hooks.create(server.db, keys_of(server.settings), f"p{number}", WebhookSettings())
        made.append((f"{server.url}/webhooks/github/{record.id}", secret))
    return made


def _push(hook: tuple[str, str], number: int) -> httpx.Response:
    wanted = sent("github", hook[1], github_push(after=f"{number + 1:040x}"), delivery=f"d{number}")
    return httpx.post(hook[0], content=wanted["data"], headers=wanted["headers"], timeout=30)


def test_a_burst_is_answered_and_each_of_its_pushes_is_built(server: ApiServer) -> None:
    made = _hooks(server, 4)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda number: _push(made[number % 4], number), range(120)))
    assert {answer.status_code for answer in answers} in ({202}, {201, 202})
    noted = [answer.json() for answer in answers if answer.status_code == 202]
    assert {one["events"][0]["outcome"] for one in noted} == {"accepted"}
    wait_until(lambda: _outcomes(server.db) == {"build": 120}, 60)
    with server.db.reading() as session:
        assert session.scalar(sa.select(sa.func.count(Build.id))) == 120
    assert _push(made[0], 0).json()["events"][0]["outcome"] == "duplicate"


def _outcomes(db: Database) -> dict[str, int]:
    with db.reading() as session:
        counted = session.execute(sa.select(Delivery.outcome, sa.func.count(Delivery.id)).group_by(Delivery.outcome))
        return {outcome: count for outcome, count in counted}


@pytest.mark.parametrize("point", ["inbox.Inbox._commit.after", "drain.Clerk._take.before", "drain.Clerk._take.after"])
def test_what_was_answered_is_built_once_though_the_process_dies(database: Database, settings: Settings, point: str) -> None:
    """Killed with the answers on their way, or in the midst of acting on them; the git server sends again what got no answer."""
    more = {"MILLRACE_WEBHOOKS_AT_ONCE": "0", "MILLRACE_TESTING": "1", "MILLRACE_FAILPOINT": f"commit.{point}:2"}
    with serving(database, settings, **more) as server:
        made = _hooks(server, 2)

        def deliver(number: int) -> int:
            try:
                return _push(made[number % 2], number).status_code
            except httpx.TransportError:
                return 0

        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(deliver, range(30)))
        wait_until(lambda: (settings.home / MARK).exists(), 30)
        wait_until(lambda: deliver(1000) == 202, 30)
        said = [deliver(number) if status != 202 else status for number, status in enumerate(said)]
        assert set(said) == {202}

        def left() -> bool:
            """The scheduler's part, which is no process here."""
            Clerk(db=database, settings=settings, ring=lambda *_: None, stop=threading.Event()).act()
            return "accepted" not in _outcomes(database)

        wait_until(left, 60)
        with database.reading() as session:
            built = session.scalars(sa.select(Delivery.commit_id).where(Delivery.outcome == "build")).all()
            assert sorted(built) == sorted(f"{number + 1:040x}" for number in [*range(30), 1000])
            assert session.scalar(sa.select(sa.func.count(Build.id))) == 31


def test_a_server_acts_on_what_another_left(sqlite_database: Database, settings: Settings) -> None:
    desk = Desk(sqlite_database, settings)
    for number in range(1, 4):
        desk.inbox.put(desk.push(number))
    with serving(sqlite_database, settings):
        wait_until(lambda: _outcomes(sqlite_database) == {"build": 3}, 30)
