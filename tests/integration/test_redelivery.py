"""What GitHub could not deliver is asked for again, once it can be: what was lost, in its order, and nothing else."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.project import ProjectSource
from millrace.settings import Settings
from millrace.webhook import Heard, WebhookSettings
from scheduler import hooks, secrets
from scheduler.db import Database
from scheduler.providers import Access
from scheduler.redelivery import Redelivery
from tests.support.forge import Answer, Forge
from tests.support.providers import standing_in
from tests.support.records import a_project

MINUTE_MS = 60_000
DAY_MS = 24 * 60 * MINUTE_MS


@dataclass
class Desk:
    """A project of GitHub's whose webhook we made there, and who reads its list."""

    db: Database
    settings: Settings
    forge: Forge
    now_ms: int = field(default_factory=lambda: int(time.time() * 1000) + DAY_MS)

    def __post_init__(self) -> None:
        self.redelivery = Redelivery(self.db, self.settings, self._access, clock=lambda: self.now_ms)

    def _access(self, project: str, source: ProjectSource) -> Access | None:
        return Access(username="x", token="the-token")

    def lose(self, guid: str, *, minutes_ago: float, status: int = 502, event: str = "push") -> int:
        return self.forge.delivered(guid, status, int(self.now_ms - minutes_ago * MINUTE_MS), event)

    def read(self, later_ms: int = 0) -> int:
        self.now_ms += later_ms
        return self.redelivery.run()

    def asked(self) -> list[str]:
        """What GitHub was told to deliver again, in order."""
        return [one.where["delivery_id"] for one in self.forge.standin.told_of("github/redeliver")]


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Desk]:
    settings = Settings(data_dir=tmp_path / "farm", signing_key=SecretStr("k" * 64))
    with standing_in() as server:
        a_project(database, source={"type": "GITHUB_ENTERPRISE", "location": f"{server.url}/o/r.git"})
        hooks.create(database, secrets.keys_of(settings), "demo", WebhookSettings())
        hooks.set_provider_hook(database, "demo", "101")
        yield Desk(database, settings, Forge(server, "github"))
        assert server.wrong == []


def test_what_did_not_arrive_is_delivered_again_the_oldest_first(desk: Desk) -> None:
    first = desk.lose("one", minutes_ago=50, event="pull_request")
    desk.lose("two", minutes_ago=40, status=200)
    third = desk.lose("three", minutes_ago=30, status=0, event="issue_comment")
    fourth = desk.lose("four", minutes_ago=20, status=500)
    desk.lose("ping", minutes_ago=10, event="ping")
    desk.lose("new", minutes_ago=0.1)
    assert desk.read() == 3
    assert desk.asked() == [str(first), str(third), str(fourth)]
    assert len(desk.forge.standin.told_of("github/deliveries")) == 3  # all pages
    assert desk.read() == 0  # its turn has not come


def test_what_is_noted_here_arrived_whatever_github_believes(desk: Desk) -> None:
    desk.lose("known", minutes_ago=30)
    heard = Heard(what="push", why="x", repository_id="1")
    hooks.receive(desk.db, hooks.get(desk.db, "demo"), heard, delivery_id="known", initiator="x", settings=desk.settings)
    assert desk.read() == 0


def test_an_attempt_that_arrived_is_enough_and_three_that_failed_are(desk: Desk) -> None:
    desk.lose("again", minutes_ago=30)
    desk.lose("again", minutes_ago=20, status=202)
    for minutes in (30, 20, 10):
        desk.lose("hopeless", minutes_ago=minutes)
    desk.lose("twice", minutes_ago=30)
    newest = desk.lose("twice", minutes_ago=20)
    assert desk.read() == 1
    assert desk.asked() == [str(newest)]


def test_one_that_github_will_not_deliver_again_holds_up_no_other(desk: Desk) -> None:
    gone, lost = desk.lose("gone", minutes_ago=30), desk.lose("lost", minutes_ago=20)
    redeliver = desk.forge.standin.says["github/redeliver"]
    refused: Answer = (422, {}, {"message": "Validation Failed"})
    desk.forge.standin.says["github/redeliver"] = lambda told: (
        refused if told.where["delivery_id"] == str(gone) else redeliver(told)
    )
    assert desk.read() == 1
    assert desk.asked() == [str(gone), str(lost)]


def test_where_github_delivers_nothing_again_all_stays_to_be_asked_for(desk: Desk) -> None:
    lost = [desk.lose("one", minutes_ago=30), desk.lose("two", minutes_ago=20)]
    redeliver = desk.forge.standin.says["github/redeliver"]
    desk.forge.standin.says["github/redeliver"] = lambda told: (404, {}, {"message": "Not Found"})
    assert desk.read() == 0
    desk.forge.standin.says["github/redeliver"] = redeliver
    assert desk.read(60 * MINUTE_MS) == 2
    assert desk.asked() == [str(one) for one in lost] * 2


def test_only_what_is_new_since_the_last_look_is_read(desk: Desk) -> None:
    for number in range(8):
        desk.lose(f"old-{number}", minutes_ago=200 - number, status=200)
    desk.read()
    pages = len(desk.forge.standin.told_of("github/deliveries"))
    lost = desk.lose("lost", minutes_ago=-1)
    assert desk.read(3 * MINUTE_MS) == 1
    assert desk.asked() == [str(lost)]
    assert len(desk.forge.standin.told_of("github/deliveries")) == pages + 1


def test_a_list_that_cannot_be_read_is_read_from_where_it_was_left(desk: Desk) -> None:
    desk.read()
    lost = desk.lose("lost", minutes_ago=-1)
    desk.forge.standin.always = (502, {}, {})
    for _ in range(20):
        assert desk.read(5 * MINUTE_MS) == 0
    desk.forge.standin.always = (429, {"Retry-After": "600"}, {})
    desk.read(5 * MINUTE_MS)
    desk.forge.standin.always, asked = None, desk.forge.standin.asked
    assert not desk.redelivery.due() and desk.read(9 * MINUTE_MS) == 0 and desk.forge.standin.asked == asked
    assert desk.read(2 * MINUTE_MS) == 1
    assert desk.asked() == [str(lost)]


def test_a_token_that_may_not_read_the_list_is_said_once_and_harms_nothing(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.forge.may_hook = False
    for _ in range(3):
        desk.read(10 * MINUTE_MS)
    assert "".join(capsys.readouterr()).count("webhook.not_listed") == 1


def test_other_projects_lists_are_not_looked_for(desk: Desk) -> None:
    source = {"type": "GITHUB_ENTERPRISE", "location": f"{desk.forge.standin.url}/o/other.git"}
    a_project(desk.db, "by-hand", source=source)
    hooks.create(desk.db, secrets.keys_of(desk.settings), "by-hand", WebhookSettings())
    desk.read()
    assert {one.where["hook_id"] for one in desk.forge.standin.told} == {"101"}
    never = Redelivery(desk.db, desk.settings.model_copy(update={"look_every_s": 0}), desk._access, clock=lambda: desk.now_ms)
    desk.now_ms += DAY_MS
    assert not never.due()
