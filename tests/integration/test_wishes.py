"""Comments that approve: whether who wrote one may is asked of the git server, live, behind the delivery, in its own words."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from pydantic import SecretStr

from api.app import create_app
from api.webhooks.routes import read
from millrace.project import ProjectSource
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from millrace.webhook import EventKind, Heard, Provider, SourceEvent, WebhookSettings
from scheduler import hooks, queries, secrets, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.hooks import HookRecord, Outcome, Result
from scheduler.models import Delivery
from scheduler.providers import Access
from scheduler.wishes import GIVE_UP_MS, Wishes
from tests.support.forge import Forge
from tests.support.gitserver import make_certificate
from tests.support.providers import Standin, standing_in
from tests.support.records import a_project
from tests.support.webhooks import OTHER_SHA, SHA, a_comment, github_pull_request, sent

SOURCES = {
    "github": ("GITHUB_ENTERPRISE", "{url}/o/r.git"),
    "gitlab": ("GITLAB_SELF_MANAGED", "{url}/group/sub/r.git"),
    "center": ("BITBUCKET", "{url}/scm/KEY/slug.git"),
    "cloud": ("BITBUCKET", "https://bitbucket.org/o/r.git"),
}
NAMES = {"github": "o/r", "gitlab": "group/sub/r", "center": "KEY/slug", "cloud": "o/r"}
PROVIDERS = {"github": Provider.GITHUB, "gitlab": Provider.GITLAB, "cloud": Provider.BITBUCKET, "center": Provider.BITBUCKET}


@dataclass
class Desk:
    """A project at a git server of one kind, with a pull request of a stranger's that waits at `SHA`."""

    db: Database
    settings: Settings
    forge: Forge
    kind: str
    token: str = "the-token"
    now_ms: int = field(default_factory=lambda: int(time.time() * 1000) + 60_000)

    def __post_init__(self) -> None:
        self.wishes = self.another()

    def another(self) -> Wishes:
        """Whoever looks, such as after a restart."""
        return Wishes(self.db, self.settings, self._access, clock=lambda: self.now_ms)

    def _access(self, project: str, source: ProjectSource) -> Access | None:
        return Access(username="x-token-auth", token=self.token) if self.token else None

    def hook(self) -> HookRecord:
        return hooks.get(self.db, "demo")

    def wait(self, commit: str = SHA, delivery: str = "1", **changes: Any) -> Result:
        """A stranger's pull request comes."""
        event = SourceEvent(
            kind=EventKind.PULL_REQUEST_CREATED, ref="refs/heads/x", base_ref="refs/heads/main", commit=commit, stamp=delivery,
            pull_request=2, from_fork=True, title="mine", **changes,
        )  # fmt: skip
        heard = Heard(what="x", events=(event,), repository_id="1")
        return hooks.receive(self.db, self.hook(), heard, delivery_id=delivery, initiator="x", settings=self.settings)[0]

    def say(self, body: str = f"/millrace approve {SHA}", *, by: str = "7", delivery: str = "c1", **options: Any) -> Result:
        """Somebody comments; what is noted at once."""
        name = self.forge.people[by][0]
        event, payload = a_comment(self.kind, body, by=(by if self.kind == "cloud" else int(by), name), **options)
        heard = read(PROVIDERS[self.kind], payload, event)
        heard = Heard(what=heard.what, why=heard.why, wish=heard.wish, repository_id="1")
        return hooks.receive(self.db, self.hook(), heard, delivery_id=delivery, initiator="x", settings=self.settings)[0]

    def noted(self, delivery: str = "c1") -> tuple[str, str]:
        """What became of a delivery, and why."""
        with self.db.reading() as session:
            row = session.scalars(sa.select(Delivery).where(Delivery.delivery_id == delivery)).one()
            return row.outcome, row.why

    def builds(self) -> list[queries.BuildRecord]:
        return list(queries.find_builds(self.db, project="demo", states=[], limit=100, cursor=None)[0])

    def policy(self, *roles: str) -> None:
        chosen = {"pullRequestBuildPolicy": {"requiresCommentApproval": "FORK_PULL_REQUESTS", "approverRoles": list(roles)}}
        hooks.update(self.db, "demo", WebhookSettings.model_validate(chosen | {"filterGroups": GROUPS}))


GROUPS = [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED"}]]
PEOPLE = {
    "github": {"7": ("mona", "write"), "8": ("stranger", "read"), "9": ("hubot", "maintain"), "10": ("nobody", None)},
    "gitlab": {"7": ("mona", "developer"), "8": ("stranger", "reporter"), "9": ("hubot", "owner"), "10": ("nobody", None)},
    "cloud": {"{7}": ("mona", "write"), "{8}": ("stranger", "read"), "{9}": ("hubot", "admin"), "{10}": ("nobody", None)},
    "center": {"7": ("mona", "write"), "8": ("stranger", "read"), "9": ("mona.b", "admin"), "10": ("nobody", None)},
}


@pytest.fixture
def desks(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with ExitStack() as stack:
        servers: list[Standin] = []

        def make(kind: str = "github") -> Desk:
            tls = make_certificate(tmp_path, "api.bitbucket.org") if kind == "cloud" else None
            server = stack.enter_context(standing_in(tls))
            if tls is not None:
                monkeypatch.setenv("HTTPS_PROXY", server.url)
            servers.append(server)
            settings = Settings(data_dir=tmp_path / "farm", signing_key=SecretStr("k" * 64), ca_bundle=tls[0] if tls else None)
            source, location = SOURCES[kind]
            a_project(database, source={"type": source, "location": location.format(url=server.url)})
            hooks.create(database, secrets.keys_of(settings), "demo", WebhookSettings.model_validate({"filterGroups": GROUPS}))
            return Desk(database, settings, Forge(server, kind, NAMES[kind], people=dict(PEOPLE[kind])), kind)

        yield make
        assert [wrong for server in servers for wrong in server.wrong] == []


@pytest.mark.parametrize("kind", SOURCES)
def test_who_may_write_approves_by_a_comment_and_nobody_else(desks: Any, kind: str) -> None:
    desk = desks(kind)
    mona, stranger, _boss, nobody = desk.forge.people
    desk.wait()
    for number, who in enumerate((stranger, nobody)):
        assert desk.say(by=who, delivery=f"no{number}", ident=600 + number).outcome is Outcome.CHECKING
        assert desk.wishes.run() == 1
        outcome, why = desk.noted(f"no{number}")
        assert (outcome, "may not approve: their role is" in why) == ("ignored", True), why
    assert desk.builds() == []
    told = desk.say(by=mona)
    assert (told.outcome, told.build_id) == (Outcome.CHECKING, None)
    assert desk.wishes.due() and desk.wishes.run() == 1 and not desk.wishes.due()
    (build,) = desk.builds()
    assert (build.settings.source_commit, build.settings.fork) == (SHA, "pr/2")
    assert build.initiator.startswith("mona (")
    assert desk.noted()[0] == "build" and f"approved {SHA}" in desk.noted()[1]
    assert desk.noted("1") == ("build", f"approved by {build.initiator}")
    assert {one.headers["Authorization"] for one in desk.forge.standin.told} == {"Bearer the-token"}


def test_codebuilds_roles_say_who_may(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.policy("GITHUB_MAINTAIN", "GITLAB_OWNER")
    desk.say(by="7")
    desk.wishes.run()
    assert desk.noted() == ("ignored", "mona may not approve: their role is GITHUB_WRITE, and GITHUB_MAINTAIN may")
    desk.say(by="9", delivery="c2", ident=502)
    desk.wishes.run()
    assert desk.noted("c2")[0] == "build"


def test_an_approval_is_of_the_very_commit_that_waits(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.say(f"/codebuild_run({OTHER_SHA})")
    desk.wishes.run()
    assert desk.noted() == ("ignored", f"pull request 2 does not wait at {OTHER_SHA}")
    desk.say(number=3, delivery="c2", ident=502)
    desk.wishes.run()
    assert desk.noted("c2")[0] == "ignored"
    assert desk.forge.standin.asked == 0  # nobody is asked for where nothing would come of it
    desk.wait(OTHER_SHA, "2")
    desk.say(delivery="c3", ident=503)
    desk.wishes.run()
    assert (desk.noted("c3")[0], f"is at {OTHER_SHA} by now" in desk.noted("c3")[1]) == ("refused", True)
    assert desk.builds() == []


def test_bitbucket_cloud_tells_the_beginning_of_a_commit_and_what_is_built_is_what_was_named(desks: Any) -> None:
    desk = desks("cloud")
    desk.wait(SHA[:12])
    desk.say(by="{7}")
    desk.wishes.run()
    (build,) = desk.builds()
    assert build.settings.source_commit == SHA


def test_a_comment_counts_once_however_often_it_is_told(desks: Any) -> None:
    desk = desks()
    desk.wait()
    assert desk.say().outcome is Outcome.CHECKING
    for delivery in ("c1", "other"):
        assert desk.say(delivery=delivery).outcome is Outcome.DUPLICATE
    desk.wishes.run()
    assert desk.say(delivery="later").outcome is Outcome.DUPLICATE
    desk.wait(OTHER_SHA, "2")
    assert desk.say(f"/millrace approve {OTHER_SHA}", delivery="edited").outcome is Outcome.DUPLICATE  # the same comment
    assert len(desk.builds()) == 1


def test_a_server_that_is_away_is_asked_again_and_after_an_hour_it_is_no_approval(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.say()
    desk.forge.standin.always = (502, {}, {})
    for _ in range(5):
        desk.now_ms += 20_000
        assert desk.wishes.run() == 0
    assert (desk.noted()[0], "is not known yet: the server answered 502" in desk.noted()[1]) == ("checking", True)
    desk.forge.standin.always = None
    desk.now_ms += 120_000
    assert desk.another().run() == 1  # also by who was started meanwhile
    assert desk.noted()[0] == "build"
    desk.wait(OTHER_SHA, "2")
    desk.say(f"/millrace approve {OTHER_SHA}", delivery="c2", ident=502)
    desk.forge.standin.always = (500, {}, {})
    desk.wishes.run()
    desk.now_ms += GIVE_UP_MS + 60_000
    assert desk.wishes.run() == 1
    assert (desk.noted("c2")[0], "and so it is not approved" in desk.noted("c2")[1]) == ("refused", True)
    assert len(desk.builds()) == 1


def test_a_server_that_does_not_say_is_no_approval_until_it_is_told_again(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.forge.standin.answers = [(403, {}, {"message": "Must have push access to view collaborator permission."})]
    desk.say()
    desk.wishes.run()
    assert desk.noted()[0] == "refused" and "Must have push access" in desk.noted()[1]
    assert desk.say().outcome is Outcome.CHECKING  # the token was given more rights, and the server was let redeliver
    desk.wishes.run()
    assert desk.noted()[0] == "build"


def test_without_a_credential_nobody_can_be_asked(desks: Any) -> None:
    desk = desks()
    desk.token = ""
    desk.wait()
    desk.say()
    desk.wishes.run()
    assert desk.noted()[0] == "refused" and "'auth' names a secret" in desk.noted()[1]


def test_a_name_that_is_somebody_elses_by_now_approves_nothing(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.say(by="7")
    desk.forge.people = {"77": ("mona", "admin")}
    desk.wishes.run()
    assert desk.noted()[0] == "refused" and "is not the name of user 7" in desk.noted()[1]
    assert desk.builds() == []


def test_who_may_not_is_not_asked_for_at_each_of_their_comments(desks: Any) -> None:
    desk = desks()
    desk.wait()
    for number in range(5):
        desk.say(by="8", delivery=f"c{number}", ident=600 + number)
        desk.wishes.run()
    assert desk.forge.standin.asked == 1
    desk.now_ms += 61_000
    desk.forge.people["8"] = ("stranger", "write")
    desk.say(by="8", delivery="c9", ident=609)
    desk.wishes.run()
    assert desk.noted("c9")[0] == "build"


def test_a_pause_that_the_server_asks_for_is_kept(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.say()
    desk.forge.standin.answers = [(429, {"Retry-After": "300"}, {})]
    desk.wishes.run()
    desk.now_ms += 290_000
    assert not desk.wishes.due()
    desk.now_ms += 30_000
    assert desk.wishes.run() == 1 and desk.noted()[0] == "build"


def test_comments_that_are_put_off_hold_up_no_others(desks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.wishes._ROUND", 1)
    desk = desks()
    desk.wait()
    desk.say()
    desk.forge.standin.answers = [(429, {"Retry-After": "300"}, {})]
    assert desk.wishes.run() == 0
    desk.say(by="9", delivery="c2", ident=502)
    desk.now_ms += 10_000
    assert desk.another().run() == 1
    assert (desk.noted()[0], desk.noted("c2")[0]) == ("checking", "build")


def test_what_is_gone_or_damaged_meanwhile_approves_nothing_and_holds_up_nobody(desks: Any) -> None:
    desk = desks()
    desk.wait()
    desk.say()
    with desk.db.transaction() as session:
        row = session.scalars(sa.select(Delivery).where(Delivery.delivery_id == "c1")).one()
        row.event = {"wish": {"pull_request": 2}, "due_ms": 0}
    desk.say(delivery="c2", ident=502)
    assert desk.wishes.run() == 2
    assert (desk.noted(), desk.noted("c2")[0]) == (("ignored", "its record cannot be read"), "build")
    desk.wait(OTHER_SHA, "2")
    desk.say(f"/millrace approve {OTHER_SHA}", delivery="c3", ident=503)
    hooks.delete(desk.db, "demo")
    desk.wishes.run()
    assert desk.noted("c3") == ("ignored", "its webhook is gone")


def test_the_delivery_is_answered_at_once_while_the_server_is_silent(desks: Any, tmp_path: Path) -> None:
    desk = desks()
    settings, db = desk.settings, desk.db
    app = create_app(settings, db, DirectoryStore(tmp_path / "objects", b"k" * 32), Bell(f"redis+socket://{tmp_path}/no"))
    client: FlaskClient = app.test_client()
    hooks.delete(db, "demo")
    user = {"Authorization": f"Bearer {tokens.create(db, 'a', TokenScope.ADMIN)}"}
    made = client.post(
        "/v1/projects/demo/webhook", json={"filterGroups": GROUPS, "repositoryId": "186853002"}, headers=user
    ).get_json()
    where = made["payloadUrl"].partition("8420")[2]
    assert (
        client.post(where, **sent("github", made["secret"], github_pull_request(head_repo=99), event="pull_request")).status_code
        == 202
    )
    event, payload = a_comment("github", f"/codebuild_run({SHA})")
    desk.forge.standin.open.clear()
    began = time.monotonic()
    answer = client.post(where, **sent("github", made["secret"], payload, event=event))
    assert (answer.status_code, answer.get_json()["events"][0]["outcome"]) == (202, "checking")
    assert time.monotonic() - began < 5
    asking = threading.Thread(target=desk.wishes.run)
    asking.start()
    desk.forge.standin.open.set()
    asking.join(30)
    assert len(desk.builds()) == 1
    stranger = {**payload, "repository": {"id": 5, "full_name": "a/b", "clone_url": "https://github.com/a/b.git"}}
    other = client.post(where, **sent("github", made["secret"], stranger, event=event))
    assert (other.status_code, "about the repository a/b" in other.headers["Millrace-Outcome"]) == (204, True)
