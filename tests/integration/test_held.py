"""A git server is told that a pull request waits for an approval, with a link to the page, until a build says how it goes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from millrace.project import ProjectSource
from millrace.settings import Settings
from millrace.webhook import EventKind, Heard, SourceEvent, WebhookSettings
from scheduler import hooks, secrets
from scheduler.db import Database
from scheduler.held import Held
from scheduler.messenger import Messenger
from scheduler.providers import Access
from tests.support.providers import Standin, standing_in
from tests.support.records import a_project
from tests.support.webhooks import OTHER_SHA, SHA

HOUR_MS = 3_600_000


@dataclass
class Desk:
    """Projects at a git server that stands in, and who tells it."""

    db: Database
    settings: Settings
    server: Standin
    token: str = "the-token"
    now_ms: int = field(default_factory=lambda: int(time.time() * 1000) + 60_000)

    def __post_init__(self) -> None:
        self.held = self.another()
        self.messenger = Messenger(self.db, self.settings, self._access, clock=lambda: self.now_ms)

    def another(self) -> Held:
        """Whoever tells, such as after a restart."""
        return Held(self.db, self.settings, self._access, clock=lambda: self.now_ms)

    def _access(self, project: str, source: ProjectSource) -> Access | None:
        return Access(username="x-token-auth", token=self.token)

    def project(self, name: str = "demo", **source: Any) -> None:
        auth = {"type": "SECRETS_MANAGER", "resource": "git"}
        source = {"type": "GITHUB_ENTERPRISE", "location": f"{self.server.url}/o/r.git", "auth": auth, **source}
        a_project(self.db, name, source={key: value for key, value in source.items() if value is not None})
        groups = [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED"}]]
        hooks.create(self.db, secrets.keys_of(self.settings), name, WebhookSettings.model_validate({"filterGroups": groups}))

    def wait(self, commit: str = SHA, name: str = "demo") -> None:
        event = SourceEvent(kind=EventKind.PULL_REQUEST_CREATED, commit=commit, stamp=commit, pull_request=2, from_fork=True)
        heard = Heard(what="x", events=(event,), repository_id="1")
        hook = hooks.get(self.db, name)
        hooks.receive(self.db, hook, heard, delivery_id=commit, initiator="x", settings=self.settings)


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Desk]:
    settings = Settings(data_dir=tmp_path / "farm", public_url="https://farm.example", signing_key=SecretStr("k" * 64))
    with standing_in() as server:
        yield Desk(database, settings, server)
        assert server.wrong == []


def test_who_looks_at_the_pull_request_reads_that_it_waits_and_where_to_approve(desk: Desk) -> None:
    desk.project()
    desk.wait()
    assert desk.held.due() and desk.held.run() == 1
    assert not desk.held.due() and desk.another().run() == 0
    (told,) = desk.server.told
    assert told.body == {
        "state": "pending",
        "context": "AWS CodeBuild us-east-1 (demo)",
        "description": "Waits for an approval for project demo",
        "target_url": "https://farm.example/approvals/demo",
    }
    hooks.approve(desk.db, "demo", SHA, by="mona", settings=desk.settings)
    assert desk.messenger.run() == 1
    assert [(one.body["context"], one.where["sha"]) for one in desk.server.told] == [(told.body["context"], SHA)] * 2
    assert desk.server.told[1].body["description"] == "Build queued for project demo"


def test_a_server_that_is_away_is_told_later_and_one_that_refuses_is_left_alone(desk: Desk) -> None:
    desk.project()
    desk.wait()
    desk.server.answers = [(502, {}, {}), (429, {"Retry-After": "60"}, {})]
    assert desk.held.run() == 0 and not desk.held.due()
    desk.now_ms += 5_000
    assert desk.held.run() == 0
    desk.now_ms += 60_000
    assert not desk.held.due()
    desk.now_ms += 10_000
    assert desk.another().run() == 1
    desk.wait(OTHER_SHA)
    desk.server.answers = [(403, {}, {"message": "Resource not accessible"})]
    assert desk.held.run() == 0
    desk.now_ms += HOUR_MS
    assert not desk.held.due() and desk.server.asked == 4


def test_nobody_is_told_without_a_credential_of_old_things_or_of_what_was_approved(desk: Desk) -> None:
    desk.project("open", auth=None)
    desk.project("other", type="GIT", location="https://git.example/r.git", auth=None)
    desk.project()
    for name in ("open", "other", "demo"):
        desk.wait(name=name)
    hooks.approve(desk.db, "demo", SHA, by="mona", settings=desk.settings)
    assert desk.held.run() == 0 and not desk.held.due()
    desk.wait(OTHER_SHA)
    desk.now_ms += 25 * HOUR_MS
    assert not desk.held.due() and desk.server.asked == 0


def test_an_apps_token_tells_nothing_as_its_builds_would_not_replace_it(desk: Desk) -> None:
    desk.token = "ghs_of-an-app"
    desk.project()
    desk.wait()
    assert desk.held.run() == 0 and not desk.held.due() and desk.server.asked == 0


def test_the_context_is_the_projects_own_where_it_is_the_same_for_all_builds(desk: Desk) -> None:
    desk.project(buildStatusConfig={"context": "ci/millrace"})
    desk.project("varied", buildStatusConfig={"context": "ci/$CODEBUILD_BUILD_NUMBER"})
    desk.wait()
    desk.wait(name="varied")
    desk.held.run()
    assert [one.body["context"] for one in desk.server.told] == ["ci/millrace", "AWS CodeBuild us-east-1 (varied)"]
