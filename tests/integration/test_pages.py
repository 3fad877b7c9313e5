"""The page of what waits: who sees it, what a form may do, and that what strangers typed stays text (no browser yet)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api.app import create_app
from api.pages.words import changes_at, plain
from api.sessions import COOKIE
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from millrace.webhook import EventKind, Heard, Provider, SourceEvent, WebhookSettings
from scheduler import hooks, queries, secrets, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from tests.support.records import a_project
from tests.support.webhooks import OTHER_SHA, SHA, SOURCES

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}‮gnp.exe"


@dataclass
class Desk:
    """An API with a project of GitHub's, and a browser's cookies."""

    db: Database
    settings: Settings
    client: FlaskClient
    token: str
    count: int = field(default=0)

    def project(self, name: str = "demo") -> None:
        a_project(self.db, name, source=SOURCES["github"])
        hooks.create(self.db, secrets.keys_of(self.settings), name, WebhookSettings())

    def wait(self, commit: str = SHA, name: str = "demo", number: int = 2, **changes: Any) -> None:
        self.count += 1
        said = {"kind": EventKind.PULL_REQUEST_CREATED, "ref": "refs/heads/x", "base_ref": "refs/heads/main", "title": "Mend it"}
        said |= {"author": "stranger", "page": "https://github.com/o/r/pull/2", "stamp": f"{self.count}"}
        event = SourceEvent(**{**said, "commit": commit, "pull_request": number, "from_fork": True, **changes})
        heard = Heard(what="x", events=(event,), repository_id="1")
        hook = hooks.get(self.db, name)
        policy = {"requiresCommentApproval": "ALL_PULL_REQUESTS"}
        groups = [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED, PULL_REQUEST_REOPENED"}]]
        chosen = WebhookSettings.model_validate({"pullRequestBuildPolicy": policy, "filterGroups": groups})
        hooks.update(self.db, name, chosen)
        hook = hooks.get(self.db, name)
        hooks.receive(self.db, hook, heard, delivery_id=str(self.count), initiator="x", settings=self.settings)

    def sign_in(self, token: str = "", **form: str) -> TestResponse:
        return self.client.post("/signin", data={"token": token or self.token, **form})

    def page(self, path: str = "/approvals/demo") -> str:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return answer.get_data(as_text=True)

    def word(self) -> str:
        found = re.search(r'name="word" value="([^"]+)"', self.page("/approvals"))
        assert found is not None
        return found[1]

    def approve(self, commit: str = SHA, name: str = "demo", **options: Any) -> TestResponse:
        form = {"commit": commit, "word": options.pop("word", None) or self.word()}
        return self.client.post(f"/approvals/{name}", data=form, **options)

    def builds(self, name: str = "demo") -> list[queries.BuildRecord]:
        return list(queries.find_builds(self.db, project=name, states=[], limit=100, cursor=None)[0])


@pytest.fixture
def desk(sqlite_database: Database, settings: Settings, store: DirectoryStore) -> Iterator[Desk]:
    app = create_app(settings, sqlite_database, store, Bell(f"redis+socket://{settings.home}/nothing.sock"))
    made = Desk(sqlite_database, settings, app.test_client(), tokens.create(sqlite_database, "mona", TokenScope.ADMIN))
    made.project()
    yield made


def test_who_has_not_signed_in_is_sent_to_where_one_does_and_back(desk: Desk) -> None:
    desk.wait()
    answer = desk.client.get("/approvals/demo")
    assert (answer.status_code, answer.location) == (303, "/signin?next=/approvals/demo")
    assert desk.client.post("/approvals/demo", data={"commit": SHA}).status_code == 303
    assert 'type="password"' in desk.client.get(answer.location).get_data(as_text=True)
    came = desk.sign_in(next="/approvals/demo")
    assert (came.status_code, came.location) == (303, "/approvals/demo")
    cookie = came.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and desk.token not in cookie and "Secure" not in cookie
    assert SHA in desk.page()
    assert desk.builds() == []


def test_the_button_starts_the_build_of_the_very_commit_once(desk: Desk) -> None:
    desk.wait()
    desk.sign_in()
    answer = desk.approve()
    assert (answer.status_code, answer.location) == (303, "/approvals/demo")
    (build,) = desk.builds()
    assert (build.settings.source_commit, build.initiator) == (SHA, "mona (page)")
    shown = desk.page()
    assert "Nothing waits." in shown and build.id in shown and "approved by mona (page)" in shown
    again = desk.approve()
    assert (again.status_code, "waits for approval" in again.get_data(as_text=True)) == (404, True)
    assert len(desk.builds()) == 1


@pytest.mark.parametrize("commit", ["", "\x00", f"{SHA}\n", f"{SHA[:12]}; id", SHA.upper(), SHA[:6]])
def test_a_form_that_names_no_commit_starts_nothing(desk: Desk, commit: str) -> None:
    desk.wait()
    desk.sign_in()
    answer = desk.approve(commit)
    assert (answer.status_code, "this is no commit" in answer.get_data(as_text=True)) == (422, True)
    assert desk.builds() == []


def test_a_pull_request_that_moved_on_has_no_button_and_an_old_form_starts_nothing(desk: Desk) -> None:
    desk.wait()
    desk.sign_in()
    desk.wait(OTHER_SHA)
    shown = desk.page()
    assert shown.count("<form method") == 2 and f"<code>{OTHER_SHA[:12]}</code> by now" in shown
    answer = desk.approve(SHA)
    assert (answer.status_code, OTHER_SHA in answer.get_data(as_text=True)) == (409, True)
    assert desk.builds() == []


def test_two_events_at_one_commit_are_one_thing_to_approve(desk: Desk) -> None:
    desk.wait()
    desk.wait(kind=EventKind.PULL_REQUEST_REOPENED)
    desk.sign_in()
    assert desk.page().count("<article") == 1
    desk.approve()
    assert "Nothing waits." in desk.page()
    found = hooks.deliveries(desk.db, "demo", limit=10)[0]
    assert sorted(one.result.outcome.value for one in found) == ["build", "duplicate"]


def test_what_strangers_typed_is_text(desk: Desk) -> None:
    desk.wait(title=HOSTILE, author=HOSTILE, ref=f"refs/heads/{HOSTILE}", base_ref=HOSTILE, page=f"javascript:{HOSTILE}")
    desk.sign_in()
    shown = desk.page()
    assert "<script" not in shown and "<img" not in shown and "javascript:" not in shown and "‮" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "{{7*7}}" in shown


def test_every_page_bars_scripts_frames_and_copies(desk: Desk) -> None:
    desk.sign_in()
    for path in ("/approvals", "/approvals/demo", "/approvals/nobody", "/signin"):
        headers = desk.client.get(path).headers
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; style-src 'self'; form-action 'self'; frame-anc"
        )
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    assert desk.client.get("/pages/style.css").mimetype == "text/css"


def test_a_form_of_another_site_or_another_visit_does_nothing(desk: Desk) -> None:
    desk.wait()
    desk.sign_in()
    word = desk.word()
    assert desk.approve(word="x" * len(word)).status_code == 403
    assert desk.client.post("/approvals/demo", data={"commit": SHA}).status_code == 403
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://["):
        assert desk.approve(word=word, headers={"Origin": origin}).status_code == 403, origin
        assert desk.client.post("/signin", data={"token": desk.token}, headers={"Origin": origin}).status_code == 403
    assert desk.builds() == []
    assert desk.approve(word=word, headers={"Origin": "http://localhost"}).status_code == 303


def test_a_session_is_worth_no_more_than_its_token(desk: Desk) -> None:
    desk.project("other")
    desk.wait(name="other")
    desk.wait()
    worker = tokens.create(desk.db, "w", TokenScope.WORKER)
    for wrong in (worker, "mr_pat_wrong", "x" * 5000):
        answer = desk.sign_in(wrong)
        assert (answer.status_code, "Set-Cookie" in answer.headers) == (401, False)
    desk.sign_in(tokens.create(desk.db, "mine", TokenScope.PROJECT, project="demo"))
    assert "other" not in desk.page("/approvals")
    assert desk.client.get("/approvals/other").status_code == 404
    assert desk.approve(name="other").status_code == 404
    assert desk.client.get("/v1/projects").status_code == 401  # the cookie opens pages alone
    mine = next(one.principal.token_id for one in tokens.find(desk.db) if one.principal.name == "mine")
    tokens.revoke(desk.db, mine)
    assert desk.client.get("/approvals").status_code == 303


def test_a_cookie_that_was_made_or_changed_by_others_opens_nothing(desk: Desk) -> None:
    desk.sign_in()
    cookie = desk.client.get_cookie(COOKIE)
    assert cookie is not None
    for value in ("", "x", "AAAA", cookie.value[:-8] + "AAAAAAA=", cookie.value * 15, "é"):
        desk.client.set_cookie(COOKIE, value)
        assert desk.client.get("/approvals").status_code == 303, value
    desk.client.set_cookie(COOKIE, cookie.value)
    assert desk.client.get("/approvals").status_code == 200


def test_signing_out_ends_it(desk: Desk) -> None:
    desk.sign_in()
    assert desk.client.post("/signout").status_code == 403
    assert desk.client.post("/signout", data={"word": desk.word()}).status_code == 303
    assert desk.client.get("/approvals").status_code == 303


def test_who_signed_in_is_sent_nowhere_but_to_our_pages(desk: Desk) -> None:
    for back in ("https://evil.example", "//evil.example", "/v1/projects", "/approvals\\evil", "/approvals\r\nX: y", ""):
        assert desk.sign_in(next=back).location == "/approvals", back


def test_a_link_from_elsewhere_is_followed_once_more_by_ourselves(desk: Desk) -> None:
    answer = desk.client.get("/signin?next=/approvals/demo", headers={"Sec-Fetch-Site": "cross-site"})
    assert 'http-equiv="refresh" content="0; url=/approvals/demo"' in answer.get_data(as_text=True)


def test_behind_https_the_cookie_is_for_https_alone(sqlite_database: Database, settings: Settings, store: DirectoryStore) -> None:
    public = settings.model_copy(update={"public_url": "https://farm.example"})
    app = create_app(public, sqlite_database, store, Bell(f"redis+socket://{settings.home}/nothing.sock"))
    token = tokens.create(sqlite_database, "a", TokenScope.ADMIN)
    answer = app.test_client().post("/signin", data={"token": token}, headers={"Origin": "https://farm.example"})
    assert (answer.status_code, "Secure" in answer.headers["Set-Cookie"]) == (303, True)


def test_words_and_links() -> None:
    def at(provider: Provider, page: str) -> str | None:
        return changes_at(provider, SourceEvent(kind=EventKind.PUSH, commit=SHA, page=page))

    assert plain("a\x00b‮c\n") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"
    assert at(Provider.GITHUB, "https://github.com/o/r/pull/2") == f"https://github.com/o/r/pull/2/files/{SHA}"
    assert at(Provider.GITLAB, "https://gl.example/g/r/-/merge_requests/2") == "https://gl.example/g/r/-/merge_requests/2/diffs"
    assert at(Provider.BITBUCKET, "https://bitbucket.org/o/r/pull-requests/2") == "https://bitbucket.org/o/r/pull-requests/2/diff"
    for wrong in ("", "javascript:alert(1)", "data:text/html,x", "//x/y", "https://u:p@h/x", "https://[", "https://h/\x0ax"):
        assert at(Provider.GITHUB, wrong) is None, wrong
