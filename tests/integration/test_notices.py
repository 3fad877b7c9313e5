"""Git servers are told of builds: in the shape they ask for, the newest word of each commit and context, whatever fails."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from api.app import create_app
from millrace.commands.looking import credentials
from millrace.contract import FinishReport, PhaseReport
from millrace.project import ProjectSource
from millrace.settings import Settings, for_children
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import PhaseType, Reason, TokenScope, Verdict
from millrace.webhook import EventKind, Heard, SourceEvent, WebhookSettings
from scheduler import attempts, hooks, lifecycle, notices, secrets, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.leases import hash_token
from scheduler.messenger import GIVE_UP_MS, Messenger
from scheduler.models import Build, Notice
from scheduler.providers import Access, Refused, place_of
from tests.support.apiserver import serving
from tests.support.farm import wait_until
from tests.support.providers import Standin, standing_in
from tests.support.records import EMPTY_LOG, a_build, a_claim, a_project, a_project_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOUR_MS = 3_600_000


@dataclass
class Desk:
    """A farm's records, a git server that stands in, and who tells it. `now_ms` is the clock of all sending."""

    db: Database
    settings: Settings
    server: Standin
    now_ms: int = field(default_factory=lambda: int(time.time() * 1000) + 60_000)
    token: str = "a-user's-token".replace("'", "")

    def __post_init__(self) -> None:
        self.messenger = Messenger(self.db, self.settings, self._access, clock=lambda: self.now_ms)

    def _access(self, project: str, source: ProjectSource) -> Access | None:
        return Access(username="x-token-auth", token=self.token) if self.token else None

    def project(self, kind: str = "GITHUB_ENTERPRISE", path: str = "o/r.git", name: str = "demo", **source: Any) -> None:
        source = {"type": kind, "location": f"{self.server.url}/{path}", "reportBuildStatus": True, **source}
        a_project(self.db, name, source=source, artifacts={"type": "NO_ARTIFACTS"})

    def begin(self, project: str = "demo") -> Any:
        """A build that runs and knows its commit."""
        a_build(self.db, self.settings, project)
        claim = a_claim(self.db, self.settings)
        self._phase(claim, started_at_ms=1)
        self._phase(claim, started_at_ms=1, resolved_source_version=COMMIT)
        return claim

    def _phase(self, claim: Any, **values: Any) -> None:
        report = PhaseReport(phase_type=PhaseType.DOWNLOAD_SOURCE, **values)
        attempts.record_phase(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)

    def end(self, claim: Any, verdict: Verdict = Verdict.SUCCEEDED, reason: Reason = Reason.SUCCEEDED) -> None:
        report = FinishReport(verdict=verdict, reason=reason, log=EMPTY_LOG)
        lifecycle.finish(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report)

    def send(self, later_ms: int = 0) -> int:
        self.now_ms += later_ms
        return self.messenger.run()

    def outcomes(self) -> list[tuple[str, str]]:
        """State and outcome of all notices, oldest first."""
        return [(one.state.value, one.outcome.value) for one in reversed(notices.find(self.db, project="demo")[0])]


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Iterator[Desk]:
    settings = Settings(data_dir=tmp_path / "farm", public_url="https://farm.example", signing_key=SecretStr("k" * 64))
    with standing_in() as server:
        yield Desk(database, settings, server)
        assert server.wrong == []


def test_github_hears_of_a_build_from_its_commit_to_its_end(desk: Desk) -> None:
    desk.project()
    claim = desk.begin()
    assert desk.send() == 1
    desk.end(claim, Verdict.FAILED, Reason.EXIT_CODE)
    assert desk.send() == 1
    assert desk.send() == 0
    assert [one.body for one in desk.server.told] == [
        {
            "state": state,
            "context": "AWS CodeBuild us-east-1 (demo)",
            "description": f"Build {words} for project demo",
            "target_url": f"https://farm.example/v1/builds/{claim.build_id}",
        }
        for state, words in (("pending", "running"), ("failure", "failed"))
    ]
    assert {tuple(one.where.values()) for one in desk.server.told} == {("o", "r", COMMIT)}
    assert desk.server.told[0].headers["Authorization"] == f"Bearer {desk.token}"
    assert desk.outcomes() == [("RUNNING", "SENT"), ("FAILED", "SENT")]


def test_an_apps_token_makes_one_check_run_and_moves_it(desk: Desk) -> None:
    desk.token = "ghs_of-an-app"
    desk.project()
    claim = desk.begin()
    desk.send()
    desk.end(claim)
    desk.send()
    assert [one.operation for one in desk.server.told] == ["checks/create", "checks/update"]
    assert desk.server.states("status") == ["in_progress", "completed"]
    assert desk.server.told[1].where["check_run_id"] == "1" and desk.server.told[1].body["conclusion"] == "success"
    assert desk.server.told[0].body["head_sha"] == COMMIT


def test_an_app_that_may_make_no_checks_makes_statuses(desk: Desk) -> None:
    desk.token = "ghs_of-an-app"
    desk.project()
    desk.server.answers = [(403, {}, {"message": "Resource not accessible by integration"})]
    claim = desk.begin()
    desk.send()
    desk.end(claim)
    desk.send()
    assert [one.operation for one in desk.server.told] == ["repos/create-commit-status"] * 2
    assert desk.server.asked == 3


@pytest.mark.parametrize(
    ("kind", "path", "where", "state", "name"),
    [
        ("BITBUCKET", "scm/KEY/slug.git", ("KEY", "slug", COMMIT), "FAILED", "bitbucket/data-center"),
        ("BITBUCKET", "scm/~someone/slug.git", ("~someone", "slug", COMMIT), "FAILED", "bitbucket/data-center"),
        ("GITLAB_SELF_MANAGED", "group/sub/r.git", ("group/sub/r", COMMIT), "canceled", "gitlab"),
    ],
)
def test_the_others_hear_it_in_their_words(
    desk: Desk, kind: str, path: str, where: tuple[str, ...], state: str, name: str
) -> None:
    desk.project(kind, path)
    claim = desk.begin()
    desk.send()
    lifecycle.request_stop(desk.db, claim.build_id)
    desk.end(claim, Verdict.STOPPED, Reason.CANCELLED)
    desk.send()
    assert [tuple(one.where.values()) for one in desk.server.told] == [where, where]
    assert desk.server.states() == ["running" if name == "gitlab" else "INPROGRESS", state]
    assert {one.operation for one in desk.server.told} == {name}


def test_a_word_that_gitlab_has_already_is_no_refusal(desk: Desk) -> None:
    desk.project("GITLAB_SELF_MANAGED", "group/r.git")
    desk.server.answers = [(400, {}, {"message": "Cannot transition status via :run from :running"})]
    desk.begin()
    desk.send()
    assert desk.outcomes() == [("RUNNING", "SENT")]


def test_context_and_link_may_hold_variables_but_no_secret(desk: Desk) -> None:
    config = {
        "context": "ci $AWS_REGION ${CODEBUILD_BUILD_NUMBER} $KEY $(id)",
        "targetUrl": "https://x.example/$CODEBUILD_BUILD_ID",
    }
    desk.project(buildStatusConfig=config)
    a_build(
        desk.db,
        desk.settings,
        environmentVariablesOverride=[{"name": "KEY", "value": "a-reference", "type": "SECRETS_MANAGER"}],
    )
    claim = a_claim(desk.db, desk.settings)
    desk._phase(claim, started_at_ms=1, resolved_source_version=COMMIT)
    desk.send()
    body = desk.server.told[0].body
    assert body["context"] == "ci us-east-1 1 $KEY $(id)"
    assert body["target_url"] == f"https://x.example/{claim.build_id}"


def test_projects_that_did_not_ask_for_it_leave_no_row(desk: Desk) -> None:
    desk.project(reportBuildStatus=False)
    desk.end(desk.begin())
    with desk.db.reading() as session:
        assert session.scalar(sa.select(sa.func.count(Notice.id))) == 0


def test_a_build_of_a_webhook_is_told_of_from_the_queue_on_where_there_is_a_credential(desk: Desk) -> None:
    auth = {"type": "SECRETS_MANAGER", "resource": "git"}
    config = {"context": "ci/$CODEBUILD_WEBHOOK_HEAD_REF"}
    desk.project(reportBuildStatus=False, auth=auth, buildStatusConfig=config)
    desk.project(name="open", reportBuildStatus=False)
    for project in ("demo", "open"):
        hooks.create(desk.db, secrets.keys_of(desk.settings), project, WebhookSettings())
        event = SourceEvent(kind=EventKind.PUSH, ref="refs/heads/$(touch${IFS}x)", commit=COMMIT)
        heard = Heard(what="PUSH", events=(event,), repository_id="1")
        hooks.receive(desk.db, hooks.get(desk.db, project), heard, delivery_id="1", initiator="x", settings=desk.settings)
    assert desk.send() == 1
    assert desk.server.told[0].body["description"] == "Build queued for project demo"
    assert desk.server.told[0].body["context"] == "ci/refs/heads/$(touch${IFS}x)"


def test_the_api_says_what_was_told_and_what_waits_and_only_to_whom_it_concerns(desk: Desk, tmp_path: Path) -> None:
    desk.project()
    desk.server.always = (500, {}, {})
    claim = desk.begin()
    desk.send()
    app = create_app(
        desk.settings, desk.db, DirectoryStore(tmp_path / "objects", b"k" * 32), Bell(f"redis+socket://{tmp_path}/no")
    )
    token = {"Authorization": f"Bearer {tokens.create(desk.db, 'a', TokenScope.PROJECT, project='demo')}"}
    client = app.test_client()
    shown = client.get("/v1/projects/demo/notices", headers=token).get_json()
    assert shown == client.get(f"/v1/builds/{claim.build_id}/notices", headers=token).get_json()
    (one,) = shown["notices"]
    assert (one["state"], one["outcome"], one["tries"], one["why"]) == ("RUNNING", "WAITING", 1, "the server answered 500")
    assert one["due"] > one["created"] and "settled" not in one
    assert client.get("/v1/projects/demo/notices?limti=1", headers=token).status_code == 422


def test_the_command_shows_what_was_told_and_why_not(sqlite_database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, signing_key=SecretStr("k" * 64))
    with standing_in() as git_server, serving(sqlite_database, settings) as api:
        desk = Desk(sqlite_database, settings, git_server)
        desk.project()
        git_server.answers = [(404, {}, {"message": "Not \x1b[31mFound"})]
        claim = desk.begin()
        desk.send()
        environment = {**for_children(os.environ), "MILLRACE_API_URL": api.url, "MILLRACE_TOKEN": api.token, "COLUMNS": "200"}
        for what in ("demo", claim.build_id):
            command = [sys.executable, "-m", "millrace.cli", "--data-dir", str(tmp_path), "notices", what]
            said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True).stdout
            assert "RUNNING" in said and "REFUSED" in said and "the server answered 404: Not" in said and "\x1b[31m" not in said


def test_a_project_whose_server_takes_no_status_cannot_ask_for_one(desk: Desk, tmp_path: Path) -> None:
    app = create_app(
        desk.settings, desk.db, DirectoryStore(tmp_path / "objects", b"k" * 32), Bell(f"redis+socket://{tmp_path}/no")
    )
    token = {"Authorization": f"Bearer {tokens.create(desk.db, 'a', TokenScope.ADMIN)}"}
    wanted = a_project_json(source={"type": "CODECOMMIT", "location": "https://git.example/r.git", "reportBuildStatus": True})
    answer = app.test_client().post("/v1/projects", json=wanted, headers=token)
    assert answer.status_code == 422 and "reportBuildStatus" in answer.text


def test_a_server_that_fails_for_an_hour_hears_the_last_word_once_and_soon(desk: Desk) -> None:
    """reliability.md F-49."""
    desk.project()
    desk.server.always = (500, {}, {})
    claim = desk.begin()
    for minute in range(60):
        desk.send(60_000)
        if minute == 30:
            desk.end(claim)
    assert desk.server.told == []
    assert 20 < desk.server.asked <= 70
    desk.server.always = None
    sent = [desk.send(10_000) for _ in range(30)]
    assert sent.index(1) < 13 and sum(sent) == 1
    assert desk.server.states() == ["success"]
    assert desk.outcomes() == [("RUNNING", "SUPERSEDED"), ("SUCCEEDED", "SENT")]


def test_a_server_that_fails_for_a_day_is_given_up(desk: Desk) -> None:
    desk.project()
    desk.server.always = (502, {}, {})
    desk.begin()
    desk.send()
    desk.send(GIVE_UP_MS + 1)
    assert desk.outcomes() == [("RUNNING", "GIVEN_UP")]


def test_an_older_build_that_ends_late_has_no_say_any_more(desk: Desk) -> None:
    desk.project()
    older = desk.begin()
    time.sleep(0.002)
    newer = desk.begin()
    desk.send()
    desk.end(newer)
    desk.send()
    desk.end(older, Verdict.FAILED, Reason.EXIT_CODE)
    assert desk.send() == 0
    assert desk.server.states() == ["pending", "success"]
    assert desk.outcomes()[-1] == ("FAILED", "SUPERSEDED")


def test_a_pause_that_the_server_asks_for_holds_for_all_that_the_token_sends(desk: Desk) -> None:
    desk.project()
    desk.server.answers = [(429, {"Retry-After": "600"}, {"message": "slow down"})]
    first = desk.begin()
    desk.send()
    desk.end(first)
    assert [desk.send(60_000) for _ in range(9)] == [0] * 9
    assert desk.server.asked == 1
    assert desk.send(120_000) == 1
    assert desk.server.states() == ["success"]


def test_a_dead_server_takes_three_tries_of_a_round_and_the_rest_waits(desk: Desk) -> None:
    for number in range(5):
        desk.project(name=f"p{number}")
        desk.begin(f"p{number}")
    desk.server.always = (503, {}, {})
    assert desk.send() == 0 and desk.server.asked == 3
    assert not desk.messenger.due()
    desk.server.always = None
    assert desk.send(120_000) == 5


def test_one_server_that_is_slow_holds_up_no_other(desk: Desk) -> None:
    with standing_in() as other:
        desk.project()
        a_project(
            desk.db,
            "quick",
            source={"type": "GITHUB_ENTERPRISE", "location": f"{other.url}/o/r.git", "reportBuildStatus": True},
            artifacts={"type": "NO_ARTIFACTS"},
        )
        desk.begin()
        desk.begin("quick")
        desk.server.open.clear()
        thread = threading.Thread(target=desk.send)
        thread.start()
        try:
            wait_until(lambda: other.told)
            assert thread.is_alive()
        finally:
            desk.server.open.set()
            thread.join()


def test_githubs_own_limit_is_a_pause_and_no_refusal(desk: Desk) -> None:
    desk.project()
    reset = str(int(time.time()) + 1800)
    desk.server.answers = [(403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}, {"message": "API rate limit"})]
    desk.begin()
    desk.send()
    assert desk.send(HOUR_MS // 3) == 0 and desk.server.asked == 1
    assert desk.send(HOUR_MS // 3) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 422])
def test_what_the_server_refuses_is_not_sent_again_and_says_why(desk: Desk, status: int) -> None:
    desk.project()
    desk.server.answers = [(status, {}, {"message": f"No commit found\nfor {desk.token}"})]
    desk.begin()
    desk.send()
    desk.send(HOUR_MS)
    assert desk.server.asked == 1
    ((one,), _cursor) = notices.find(desk.db, project="demo")
    assert one.outcome == "REFUSED"
    assert one.why == f"the server answered {status}: No commit found for ***"


def test_a_source_without_a_credential_says_so(desk: Desk) -> None:
    desk.token = ""
    desk.project()
    desk.begin()
    desk.send()
    ((one,), _cursor) = notices.find(desk.db, project="demo")
    assert one.outcome == "REFUSED" and "'auth' names a secret" in one.why and desk.server.asked == 0


def test_the_secret_of_the_source_is_the_token(desk: Desk) -> None:
    secrets.put(desk.db, secrets.keys_of(desk.settings), "git", '{"Token": "kept"}')
    desk.project(auth={"type": "SECRETS_MANAGER", "resource": "git"})
    desk.begin()
    provider = secrets.open_provider(desk.settings, desk.db)
    sent = Messenger(desk.db, desk.settings, credentials(desk.settings, provider), clock=lambda: desk.now_ms).run()
    assert sent == 1 and desk.server.told[0].headers["Authorization"] == "Bearer kept"


def test_a_renamed_repository_is_followed_but_no_token_goes_to_another_host(desk: Desk) -> None:
    desk.project()
    desk.server.answers = [(307, {"Location": f"/api/v3/repos/new/name/statuses/{COMMIT}"}, {})]
    claim = desk.begin()
    assert desk.send() == 1
    assert desk.server.told[0].where["owner"] == "new"
    desk.server.answers = [(307, {"Location": f"http://localhost:1/repos/o/r/statuses/{COMMIT}"}, {})]
    desk.end(claim)
    assert desk.send() == 0
    assert "gets no token" in notices.find(desk.db, project="demo")[0][0].why


def test_a_commit_that_is_none_is_never_told_of(desk: Desk) -> None:
    desk.project()
    a_build(desk.db, desk.settings)
    claim = a_claim(desk.db, desk.settings)
    desk._phase(claim, started_at_ms=1, resolved_source_version="../../user")
    desk.end(claim)
    assert desk.outcomes() == []


def test_a_damaged_record_keeps_no_build_from_moving(desk: Desk) -> None:
    desk.project()
    build = a_build(desk.db, desk.settings)
    for damage in ({"source": {"type": []}}, {"source": {"type": "GITHUB", "reportBuildStatus": 1, "buildStatusConfig": 7}}):
        with desk.db.transaction() as session:
            row = session.get(Build, build)
            assert row is not None
            row.settings = {**row.settings, **damage, "webhook": "x", "sourceCommit": COMMIT}
    lifecycle.request_stop(desk.db, build)
    assert desk.send() == 0
    assert notices.find(desk.db, build_id=build)[0][0].why == "the build's record cannot be read"


def test_places_are_read_from_every_form_of_a_clone_address() -> None:
    def place(location: str) -> tuple[str, str]:
        found = place_of(ProjectSource(type="GITHUB", location=location))
        return found.origin, found.path

    assert place("https://github.com/o/r.git") == ("https://github.com", "o/r")
    assert place("https://user:word@git.example:8443/a/b/c") == ("https://git.example:8443", "a/b/c")
    assert place("git@github.com:o/r.git") == ("https://github.com", "o/r")
    assert place("ssh://git@git.example:7999/KEY/slug.git") == ("https://git.example", "KEY/slug")
    for wrong in ("https://github.com/only", "/srv/git/r.git", "https://h/a/../b"):
        with pytest.raises(Refused, match="is no address of a repository"):
            place(wrong)


def test_what_was_refused_is_told_again_by_hand_and_what_arrived_is_not(sqlite_database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, signing_key=SecretStr("k" * 64))
    with standing_in() as git_server, serving(sqlite_database, settings) as api:
        desk = Desk(sqlite_database, settings, git_server)
        desk.project()
        claim = desk.begin()
        desk.send()
        git_server.always = (401, {}, {"message": "Bad credentials"})
        desk.end(claim)
        desk.send()
        git_server.always = None
        assert desk.outcomes()[-1] == ("SUCCEEDED", "REFUSED") and desk.send(HOUR_MS) == 0
        environment = {**for_children(os.environ), "MILLRACE_API_URL": api.url, "MILLRACE_TOKEN": api.token, "COLUMNS": "200"}
        command = [sys.executable, "-m", "millrace.cli", "--data-dir", str(tmp_path), "notices", "resend", claim.build_id]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, f"SUCCEEDED of {claim.build_id} is told again"), done.stderr
        assert desk.send(60_000) == 1
        assert git_server.states() == ["pending", "success"]
        assert desk.outcomes()[-2:] == [("SUCCEEDED", "REFUSED"), ("SUCCEEDED", "SENT")]
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert (again.returncode, "was refused or given up" in again.stderr) == (1, True)
        assert desk.outcomes()[-1] == ("SUCCEEDED", "SENT")


def test_a_newer_build_keeps_the_last_word_over_an_older_one_that_is_told_again(desk: Desk) -> None:
    desk.project()
    older = desk.begin()
    desk.server.answers = [(422, {}, {"message": "no"})]
    desk.send()
    desk.end(older)
    desk.server.answers = [(422, {}, {"message": "no"})]
    desk.send()
    time.sleep(0.002)
    desk.end(desk.begin(), Verdict.FAILED, Reason.EXIT_CODE)
    desk.send()
    notices.resend(desk.db, older.build_id)
    assert desk.send(60_000) == 0
    assert desk.server.states() == ["failure"]
