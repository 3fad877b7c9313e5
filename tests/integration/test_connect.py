"""`millrace project connect`: everything at once, the second time nothing, and where it ends early it says what is there."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from werkzeug.serving import make_server

from api.app import create_app
from millrace import cli
from millrace import log as logging
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from tests.support.forge import Forge
from tests.support.gitserver import make_certificate
from tests.support.providers import example_of, standing_in

KINDS = {
    "github": ("--type", "github-enterprise", "o/app", "{url}/o/app.git"),
    "gitlab": ("--type", "gitlab-self-managed", "group/sub/app", "{url}/group/sub/app"),
    "center": ("--type", "bitbucket", "KEY/slug", "{url}/scm/KEY/slug.git"),
    "cloud": ("--name", "app", "o/app", "https://bitbucket.org/o/app/"),
}
TOKEN = "the-token-of-mona"


@dataclass(frozen=True)
class Said:
    """What a command said."""

    returncode: int
    stdout: str
    stderr: str


@contextmanager
def an_api(db: Database, settings: Settings, folder: Path) -> Iterator[str]:
    """The API in a thread of this process; its address."""
    app = create_app(settings, db, DirectoryStore(folder / "objects", b"k" * 32), Bell(f"redis+socket://{folder}/no"))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Desk:
    """A farm's API, a git server of one kind, and somebody at a command line."""

    api: str
    token: str
    forge: Forge
    kind: str
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def url(self) -> str:
        return KINDS[self.kind][3].format(url=self.forge.standin.url)

    def connect(self, *more: str, url: str = "", token: str | None = TOKEN) -> Said:
        option, value, *_ = KINDS[self.kind]
        given = [] if option in more else [option, value]
        whose = ["--token-env", "GIT_TOKEN"] if token is not None else []
        command = ["millrace", "--data-dir", str(self.folder), "project", "connect", url or self.url, *given, *whose, *more]
        with self.monkeypatch.context() as patch:
            patch.setenv("MILLRACE_API_URL", self.api)
            patch.setenv("MILLRACE_TOKEN", self.token)
            patch.setenv("GIT_TOKEN", token or "")
            patch.setattr(logging, "configure", lambda *_, **__: None)  # of this process, which is the tests'
            patch.setattr(sys, "argv", [*command, "--no-build"])
            self.capsys.readouterr()
            status = cli.main()
        said = self.capsys.readouterr()
        return Said(status, said.out, said.err)

    def ok(self, *more: str, **options: Any) -> str:
        done = self.connect(*more, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> dict[str, Any]:
        answer = httpx.get(self.api + path, headers={"Authorization": f"Bearer {self.token}"})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    @property
    def name(self) -> str:
        return "slug" if self.kind == "center" else "app"

    def hook(self) -> dict[str, Any]:
        return self.get(f"/v1/projects/{self.name}/webhook")

    def changes(self) -> list[str]:
        """What the git server was told to change."""
        return [one.operation for one in self.forge.standin.told if "make_hook" in one.operation or "mend_hook" in one.operation]


@pytest.fixture
def desks(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    with ExitStack() as stack:
        servers = []
        settings = Settings(data_dir=tmp_path / "farm", signing_key=SecretStr("k" * 64), public_url="https://farm.example")
        api = stack.enter_context(an_api(sqlite_database, settings, tmp_path))
        token = tokens.create(sqlite_database, "admin", TokenScope.ADMIN)

        def make(kind: str = "github") -> Desk:
            tls = make_certificate(tmp_path, "api.bitbucket.org") if kind == "cloud" else None
            server = stack.enter_context(standing_in(tls))
            servers.append(server)
            if tls is not None:
                monkeypatch.setenv("HTTPS_PROXY", server.url)
                monkeypatch.setenv("MILLRACE_CA_BUNDLE", str(tls[0]))
            number = "{r-1}" if kind == "cloud" else "186853002"
            forge = Forge(server, kind, KINDS[kind][2], number=number)
            return Desk(api, token, forge, kind, tmp_path / "cli", monkeypatch, capsys)

        yield make
        assert [wrong for server in servers for wrong in server.wrong] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_is_set_up_in_one_go_and_the_second_time_nothing_changes(desks: Any, kind: str) -> None:
    desk = desks(kind)
    said = desk.ok()
    project = desk.get(f"/v1/projects/{desk.name}")
    assert project["source"]["auth"] == {"type": "SECRETS_MANAGER", "resource": f"git/{desk.name}"}
    assert (project["source"]["location"], project["source"]["reportBuildStatus"]) == (desk.url.rstrip("/"), True)
    secrets = desk.get(f"/v1/secrets?project={desk.name}")["secrets"]
    assert [(one["name"], one["version"]) for one in secrets] == [(f"/git/{desk.name}", 1)]
    hook, (theirs,) = desk.hook(), desk.forge.hooks
    assert hook["millrace"]["repositoryId"] == desk.forge.number
    assert hook["millrace"]["providerHookId"] == str(theirs.get("id", theirs.get("uuid")))
    address = theirs["config"]["url"] if kind == "github" else theirs["url"]
    assert address == hook["payloadUrl"] and address.startswith("https://farm.example/webhooks/")
    config = theirs.get("config", theirs.get("configuration", theirs))
    secret = config.get("secret", config.get("token"))
    assert secret.startswith("whsec_") and secret not in said
    for words in (
        "is made, of",
        "is kept as secret",
        "its webhook is made",
        f"webhook {hook['millrace']['providerHookId']} is made",
    ):
        assert words in said
    assert desk.ok(token=None).splitlines() == [f"project {desk.name} is there already", "its webhook is there already"]
    again = desk.ok()
    assert f"calls it already (webhook {hook['millrace']['providerHookId']})" in again
    assert desk.hook() == hook
    assert [one.rpartition("/")[2] for one in desk.changes()] == ["make_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_webhook_that_is_gone_or_not_told_of_all_is_made_or_mended(desks: Any, kind: str) -> None:
    desk = desks(kind)
    desk.ok()
    (theirs,) = desk.forge.hooks
    before = json.dumps(theirs)
    if kind == "gitlab":
        theirs["note_events"] = False
    else:
        theirs["events"] = theirs["events"][:1]
    assert "is mended" in desk.ok()
    (mended,) = desk.forge.hooks
    assert mended.get("events", []) == json.loads(before).get("events", []) and json.dumps(mended) != before  # a new secret
    assert desk.hook()["millrace"]["oldSecretUntil"] is not None
    desk.forge.hooks.clear()
    assert "is made" in desk.ok()
    assert [one.rpartition("/")[2] for one in desk.changes()] == ["make_hook", "mend_hook", "make_hook"]


def test_a_webhook_that_was_typed_in_by_hand_is_found(desks: Any) -> None:
    desk = desks()
    desk.forge.may_hook = False
    said = desk.ok()
    assert "did not take the webhook: the server answered 404" in said
    lines = dict(line.split(None, 1) for line in said.splitlines() if line.startswith(("address:", "secret:")))
    assert lines["address:"] == desk.hook()["payloadUrl"] and lines["secret:"].startswith("whsec_")
    assert "issue comments" in said
    assert desk.hook()["millrace"]["providerHookId"] is None
    again = desk.ok()
    assert "it was shown when the webhook was made" in again and lines["secret:"] not in again
    assert desk.hook()["millrace"]["oldSecretUntil"] is None
    desk.forge.may_hook = True
    events = ["push", "pull_request", "release", "issue_comment"]
    config = {"url": lines["address:"], "content_type": "json", "secret": lines["secret:"]}
    desk.forge.hooks.append(
        {
            **example_of("github/make_hook"),
            "last_response": {"code": 200, "status": "active", "message": "OK"},
            "id": 7,
            "active": True,
            "events": events,
            "config": config,
        }
    )
    assert "calls it already (webhook 7)" in desk.ok()
    assert desk.hook()["millrace"]["providerHookId"] == "7" and desk.changes() == []


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"message": "Bad credentials"}, "does not take this token: the server answered 401: Bad credentials"),
        (404, {"message": "Not Found"}, "shows this token no repository o/app"),
        (403, {"message": "Forbidden"}, "shows this token no repository o/app"),
        (502, {}, "cannot be asked for o/app: the server answered 502"),
        (200, [], "is no JSON object"),
    ],
)
def test_where_the_repository_cannot_be_seen_nothing_is_made(desks: Any, status: int, body: Any, words: str) -> None:
    desk = desks()
    desk.forge.standin.always = (status, {}, body)
    done = desk.connect()
    assert (done.returncode, words in done.stderr, "Nothing was made." in done.stderr) == (1, True, True), done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert desk.get("/v1/projects")["projects"] == []


def test_a_server_that_is_not_there_is_said_to_be_away(desks: Any) -> None:
    desk = desks()
    done = desk.connect(url="http://127.0.0.1:9/o/app.git")
    assert (done.returncode, "cannot be reached" in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert desk.get("/v1/projects")["projects"] == []


@pytest.mark.parametrize(
    ("url", "more", "words"),
    [
        ("https://git.example/o/r.git", ("--name", "x"), "what kind of git server 'git.example' is"),
        ("https://github.com/only", ("--name", "x"), "no address of a repository"),
        ("https://github.com/a/../b", ("--name", "x"), "no address of a repository"),
        ("https://mona:word@github.com/o/r", ("--name", "x"), "holds a name or a password"),
        ("https://[github.com/o/r", ("--name", "x"), "no address of a repository"),
        ("nonsense", ("--name", "x"), "what kind of git server"),
        ("https://github.com/o/r", ("--name", "../x"), "is no name of a project"),
        ("https://github.com/o/r", ("--name", "r"), "is no name of a project"),
    ],
)
def test_bad_addresses_are_refused_in_a_sentence(desks: Any, url: str, more: tuple[str, ...], words: str) -> None:
    desk = desks("cloud")
    done = desk.connect(*more, url=url)
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr
    assert desk.forge.standin.asked == 0 and "word@" not in done.stderr


def test_a_name_that_is_taken_by_another_repository_is_left_alone(desks: Any) -> None:
    desk = desks()
    desk.ok()
    desk.forge.name = "other/app"
    done = desk.connect(url=desk.url.replace("/o/app", "/other/app"))
    assert (done.returncode, "there is a project app already" in done.stderr, "--name" in done.stderr) == (1, True, True)
    assert desk.changes() == ["github/make_hook"]


def test_where_a_step_fails_it_says_what_is_there_and_goes_on_from_there(desks: Any) -> None:
    desk = desks()
    desk.token, kept = "wrong", desk.token
    assert "this token is not known" in desk.connect().stderr
    desk.token = kept
    done = desk.connect("--branches", "(")
    assert done.returncode == 1 and "branchFilter" in done.stderr, done.stderr
    assert "Done so far: project app is made" in done.stderr and "Run it again" in done.stderr
    assert "its webhook is made" in desk.ok("--branches", "^main$")
    assert desk.hook()["branchFilter"] == "^main$"


def test_without_a_token_it_says_what_is_to_be_typed_in(desks: Any) -> None:
    desk = desks("gitlab")
    desk.forge.standin.public = True
    said = desk.ok("--no-token", token=None)
    assert "Set the webhook up at the git server yourself" in said and "secret:  whsec_" in said and "At GitLab" in said
    assert "auth" not in desk.get("/v1/projects/app")["source"] and desk.forge.standin.asked == 0
    assert "has a credential now" in desk.ok()
    assert desk.get("/v1/projects/app")["source"]["auth"]["resource"] == "git/app"
    assert len(desk.forge.hooks) == 1


def test_without_a_token_a_repository_that_is_not_shown_is_not_set_up(desks: Any) -> None:
    desk = desks("gitlab")
    done = desk.connect("--no-token", token=None)
    assert done.returncode == 1
    assert "shows no repository group/sub/app without a token" in done.stderr and "--token-file" in done.stderr
    assert desk.forge.standin.wrong == ["GET /group/sub/app/info/refs"]
    desk.forge.standin.wrong.clear()
    assert desk.get("/v1/projects")["projects"] == []


def test_a_server_that_is_not_reached_from_here_is_noted(desks: Any) -> None:
    desk = desks("gitlab")
    said = desk.ok("--no-token", token=None, url="http://127.0.0.1:1/group/sub/app")
    assert "whether the repository is there cannot be seen from here" in said and "secret:  whsec_" in said


@pytest.mark.parametrize("tail", ["?x=1", "#f", "?", "/%00", "/a\nb", "%7f", " b"])
def test_an_address_with_more_than_a_place_is_refused(desks: Any, tail: str) -> None:
    desk = desks("gitlab")
    done = desk.connect("--no-token", token=None, url=f"{desk.url}{tail}x")
    assert (done.returncode, "is no address of a repository" in done.stderr) == (1, True), done.stderr
    assert desk.get("/v1/projects")["projects"] == []


def test_tokens_come_from_a_file_too_and_an_empty_one_is_none(desks: Any, tmp_path: Path) -> None:
    desk = desks()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff")
    desk.ok("--token-file", str(tmp_path / "token"), token=None)
    for name, words in (("empty", "holds no token"), ("binary", "no text in UTF-8"), ("nowhere", "No such file")):
        done = desk.connect("--token-file", str(tmp_path / name), token=None)
        assert done.returncode in (1, 2) and words in done.stderr, done.stderr
    assert desk.connect("--no-token").returncode == 2
    assert "holds no token" in desk.connect("--token-env", "NOT_SET", token=None).stderr
