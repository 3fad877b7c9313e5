"""Webhooks over the whole API in one process: what starts builds, what does not, and what is refused unread."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import hypothesis
import pytest
import yaml
from flask.testing import FlaskClient
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from api.app import create_app
from api.webhooks.routes import read
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import TokenScope
from millrace.webhook import Provider, WebhookSettings
from scheduler import approvals, filters, leases, queries, secrets, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.models import Delivery
from tests.support.records import a_claim_request, a_project
from tests.support.webhooks import OTHER_SHA, SHA, SOURCES, ZERO, examples, github_pull_request, github_push, sent

DATA = Path(__file__).parents[1] / "data" / "webhooks"
BAD_INPUT = yaml.safe_load((Path(__file__).parents[1] / "badinput" / "webhooks.yaml").read_text())
EVERYTHING = [
    [
        {
            "type": "EVENT",
            "pattern": "PUSH, PULL_REQUEST_CREATED, PULL_REQUEST_UPDATED, PULL_REQUEST_REOPENED, PULL_REQUEST_MERGED, "
            "PULL_REQUEST_CLOSED, RELEASED, PRERELEASED, WORKFLOW_JOB_QUEUED",
        }
    ]
]


@dataclass
class Farm:
    """An API in this process, and what a user and a git server do with it."""

    client: FlaskClient
    db: Database
    token: str

    def user(self, method: str, path: str, **options: Any) -> TestResponse:
        return self.client.open(path, method=method, headers={"Authorization": f"Bearer {self.token}"}, **options)

    def ok(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.user(method, path, **options)
        assert answer.status_code < 300, answer.get_data(as_text=True)
        data: dict[str, Any] = answer.get_json(silent=True) or {}
        return data

    def hook(self, provider: str = "github", project: str = "demo", **wanted: Any) -> "Hook":
        """A project of a provider's with a webhook."""
        a_project(self.db, project, source=SOURCES[provider])
        made = self.ok("POST", f"/v1/projects/{project}/webhook", json={"filterGroups": EVERYTHING, **wanted})
        return Hook(self, provider, project, urlsplit(made["payloadUrl"]).path, made["secret"])

    def builds(self, project: str = "demo") -> list[queries.BuildRecord]:
        return list(queries.find_builds(self.db, project=project, states=[], limit=100, cursor=None)[0])


@dataclass
class Hook:
    """A project's webhook, and the server that calls it."""

    farm: Farm
    provider: str
    project: str
    path: str
    secret: str

    def send(self, payload: Any, **options: Any) -> TestResponse:
        return self.post(**sent(self.provider, options.pop("secret", self.secret), payload, **options))

    def post(self, data: bytes, headers: dict[str, str]) -> TestResponse:
        return self.farm.client.post(self.path, data=data, headers=headers)

    def deliveries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.farm.ok("GET", f"/v1/projects/{self.project}/webhook/deliveries")["deliveries"]
        return found


@pytest.fixture
def farm(database: Database, settings: Settings, store: DirectoryStore) -> Iterator[Farm]:
    """On each database; with nobody to ring for."""
    app = create_app(settings, database, store, Bell(f"redis+socket://{settings.home}/nothing.sock"))
    yield Farm(app.test_client(), database, tokens.create(database, "admin", TokenScope.ADMIN))


@pytest.fixture
def one(sqlite_database: Database, settings: Settings, store: DirectoryStore) -> Iterator[Farm]:
    """On SQLite, for what is not about the database."""
    app = create_app(settings, sqlite_database, store, Bell(f"redis+socket://{settings.home}/nothing.sock"))
    yield Farm(app.test_client(), sqlite_database, tokens.create(sqlite_database, "admin", TokenScope.ADMIN))


# What a build sees


def test_a_push_starts_a_build_of_its_very_commit(farm: Farm) -> None:
    answer = farm.hook().send(github_push())
    assert answer.status_code == 201
    (event,) = answer.get_json()["events"]
    (build,) = farm.builds()
    assert event == {
        "outcome": "build",
        "event": "PUSH",
        "why": "filter group 1 matches",
        "ref": "refs/heads/main",
        "commit": SHA,
        "buildId": build.id,
    }
    assert (build.initiator, build.settings.source_version, build.settings.source_commit) == ("GitHub-Hookshot/044aadd", SHA, SHA)
    shown = farm.ok("GET", f"/v1/builds/{build.id}")
    assert shown["millrace"]["webhook"] == {
        "provider": "github",
        "event": "PUSH",
        "trigger": "branch/main",
        "headRef": "refs/heads/main",
        "commit": SHA,
        "prevCommit": OTHER_SHA,
        "actorAccountId": "21031067",
        "fromFork": False,
    }
    assert "webhook" not in {name for name in shown if name != "millrace"}


def test_a_pull_request_builds_its_head_and_names_its_base(one: Farm) -> None:
    assert one.hook().send(github_pull_request(), event="pull_request").status_code == 201
    (build,) = one.builds()
    cause = build.settings.webhook
    assert cause is not None
    assert (build.settings.source_version, build.settings.source_commit) == ("pr/2", SHA)
    assert (cause.event, cause.trigger, cause.head_ref, cause.base_ref) == (
        "PULL_REQUEST_CREATED",
        "pr/2",
        "refs/heads/changes",
        "refs/heads/main",
    )


def test_a_tag_builds_and_so_does_a_release(one: Farm) -> None:
    hook = one.hook()
    annotated = github_push(ref="refs/tags/v1", after=OTHER_SHA, before=ZERO, head_commit={"id": SHA, "message": "x"})
    assert hook.send(annotated).status_code == 201
    release = {
        **github_push(),
        "action": "released",
        "release": {"id": 1, "tag_name": "v1", "name": "One", "published_at": "2019-05-15T15:19:25Z"},
    }
    assert hook.send(release, event="release").status_code == 201
    newer, older = one.builds()
    assert (older.settings.source_version, older.settings.webhook.trigger) == (SHA, "tag/v1")  # type: ignore[union-attr]
    assert (newer.settings.source_version, newer.settings.webhook.trigger) == ("refs/tags/v1", "tag/v1")  # type: ignore[union-attr]


def test_newer_builds_of_a_branch_or_pull_request_supersede_older_ones(one: Farm) -> None:
    a_project(one.db, "demo", source=SOURCES["github"], millrace={"cancelSuperseded": True})
    made = one.ok("POST", "/v1/projects/demo/webhook", json={"filterGroups": EVERYTHING})
    hook = Hook(one, "github", "demo", urlsplit(made["payloadUrl"]).path, made["secret"])
    hook.send(github_push())
    hook.send(github_push(ref="refs/heads/other"))
    hook.send(github_pull_request(), event="pull_request")
    hook.send(github_push(before=SHA, after=OTHER_SHA))
    hook.send(
        github_pull_request("synchronize", head={"ref": "changes", "sha": OTHER_SHA, "repo": {"id": 186853002}}),
        event="pull_request",
    )
    assert [build.state.value for build in one.builds()] == ["QUEUED", "QUEUED", "STOPPED", "QUEUED", "STOPPED"]


def test_what_comes_late_does_not_supersede_what_is_newer(one: Farm) -> None:
    a_project(one.db, "demo", source=SOURCES["github"], millrace={"cancelSuperseded": True})
    made = one.ok("POST", "/v1/projects/demo/webhook", json={"filterGroups": EVERYTHING})
    hook = Hook(one, "github", "demo", urlsplit(made["payloadUrl"]).path, made["secret"])
    hook.send(github_push(before=SHA, after=OTHER_SHA), delivery="second")
    late = hook.send(github_push(before="0" * 40, after=SHA), delivery="first")
    assert late.status_code == 204
    assert "superseded: refs/heads/" in late.headers["Millrace-Outcome"]
    assert OTHER_SHA in hook.deliveries()[0]["why"]
    assert hook.send(github_push(before="0" * 40, after=SHA), delivery="first").status_code == 204
    head = {"ref": "changes", "repo": {"id": 186853002}}
    hook.send(
        github_pull_request("synchronize", head={**head, "sha": OTHER_SHA}, updated_at="2026-01-02T00:00:00Z"),
        event="pull_request",
    )
    hook.send(github_pull_request(head={**head, "sha": SHA}, updated_at="2026-01-01T00:00:00Z"), event="pull_request")
    assert [(build.state.value, build.settings.source_commit) for build in one.builds()] == [("QUEUED", OTHER_SHA)] * 2


@pytest.mark.parametrize(
    "name", ["$(touch${IFS}/tmp/x)", "`id`", "a;rm -rf $HOME", "x'\"\\\n", "-rf", "‮gnp", "\ud800", "é" * 300]
)
def test_a_name_made_of_shell_code_is_text_and_nothing_else(one: Farm, name: str) -> None:
    hook = one.hook()
    push = hook.send(github_push(ref=f"refs/heads/{name}"))
    assert push.status_code == 201, push.get_data(as_text=True)
    release = {**github_push(), "action": "released", "release": {"id": 1, "tag_name": name}}
    answer = hook.send(release, event="release")
    assert answer.status_code == (201 if name == "-rf" else 204)  # behind refs/tags/ that one is no option
    build = one.builds()[-1]
    assert build.settings.webhook is not None
    assert build.settings.webhook.head_ref == f"refs/heads/{name}"[:300].replace("\ud800", "?")
    assert build.settings.source_version == SHA
    assert name == "-rf" or "no build could be queued" in hook.deliveries()[0]["why"]


def test_a_name_with_a_zero_byte_is_not_taken_for_the_name_without(one: Farm) -> None:
    hook = one.hook(filterGroups=[[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "^refs/heads/main$"}]])
    assert hook.send(github_push(ref="refs/heads/ma\0in")).status_code == 204
    assert hook.deliveries()[0]["ref"] == "refs/heads/ma\ufffdin"


# Once, and only once


def test_a_delivery_that_comes_again_or_five_times_at_once_is_one_build(farm: Farm) -> None:
    hook = farm.hook()
    delivery = sent("github", hook.secret, github_push())
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: hook.post(**delivery), range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
    assert len({answer.get_json()["events"][0]["buildId"] for answer in answers}) == 1
    assert len(farm.builds()) == 1
    assert [item["outcome"] for item in hook.deliveries()] == ["build"]


def test_the_same_event_under_another_id_is_no_second_build(one: Farm) -> None:
    hook = one.hook()
    first = hook.send(github_push()).get_json()["events"][0]
    again = hook.send(github_push()).get_json()["events"][0]
    assert (again["outcome"], again["buildId"]) == ("duplicate", first["buildId"])
    push_of_the_same_commit = github_push(before=ZERO, repository={**github_push()["repository"], "pushed_at": 1557999999})
    assert hook.send(push_of_the_same_commit).get_json()["events"][0]["outcome"] == "duplicate"
    there = github_push(before=SHA, after=OTHER_SHA)
    assert hook.send(there).get_json()["events"][0]["outcome"] == "build"
    back = github_push(before=OTHER_SHA, after=SHA, repository={**github_push()["repository"], "pushed_at": 1557999999})
    assert hook.send(back).get_json()["events"][0]["outcome"] == "build"
    assert hook.send(there).get_json()["events"][0]["outcome"] == "duplicate"
    assert len(one.builds()) == 3


def test_what_started_nothing_is_judged_anew_once_the_filters_are_mended(one: Farm) -> None:
    hook = one.hook(filterGroups=[[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "^refs/heads/mian$"}]])
    delivery = sent("github", hook.secret, github_push())
    first = hook.post(**delivery)
    assert (first.status_code, first.get_data()) == (204, b"")
    assert "HEAD_REF '^refs/heads/mian$' does not match 'refs/heads/main'" in first.headers["Millrace-Outcome"]
    one.ok("PUT", "/v1/projects/demo/webhook", json={"filterGroups": EVERYTHING})
    assert hook.post(**delivery).status_code == 201
    assert [item["outcome"] for item in hook.deliveries()] == ["build"]


def test_a_build_and_its_delivery_come_in_one_commit_or_not_at_all(one: Farm) -> None:
    hook = one.hook()
    one.ok("PUT", "/v1/projects/demo", json={**_settings(one), "concurrentBuildLimit": 1})
    assert hook.send(github_push()).status_code == 201
    with one.db.reading() as session:
        rows = session.query(Delivery).all()
    assert [row.build_id for row in rows] == [build.id for build in one.builds()]


# Forks, runners, repositories


def test_a_pull_request_from_a_fork_starts_nothing_and_waits(one: Farm) -> None:
    hook = one.hook()
    answer = hook.send(github_pull_request(head_repo=99), event="pull_request")
    assert (answer.status_code, answer.get_json()["events"][0]["outcome"]) == (202, "approval")
    assert hook.send(github_pull_request("closed", head_repo=99, merged=True), event="pull_request").status_code == 202
    assert one.builds() == []
    assert {item["outcome"] for item in hook.deliveries()} == {"approval"}


def test_an_approval_starts_the_build_of_that_very_commit_without_what_strangers_must_not_have(farm: Farm) -> None:
    hook = farm.hook(millrace={"forkFleet": "strangers"})
    given = _settings(farm)
    given["environment"] = {**given["environment"], "privilegedMode": True}
    given["artifacts"] = {"type": "S3", "location": "releases"}
    given["secondaryArtifacts"] = [{"type": "S3", "location": "releases", "artifactIdentifier": "x"}]
    farm.ok("PUT", "/v1/projects/demo", json=given)
    hook.send(github_pull_request(head_repo=99), event="pull_request")
    approved = farm.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": SHA})
    assert approved.status_code == 201, approved.get_json()
    (build,) = farm.builds()
    assert approved.get_json()["buildId"] == build.id
    assert (build.settings.source_commit, build.settings.fork, build.fleet, build.initiator) == (
        SHA,
        "pr/2",
        "strangers",
        "admin",
    )
    assert build.settings.webhook is not None
    assert build.settings.webhook.buildspec_ref == "refs/heads/main"
    assert not build.settings.environment.privileged_mode
    assert [one.location for one in (build.settings.artifacts, *build.settings.secondary_artifacts)] == [None, None]
    assert farm.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": SHA}).status_code == 404
    (noted,) = hook.deliveries()
    assert (noted["outcome"], noted["why"], noted["buildId"]) == ("build", "approved by admin", build.id)
    assert hook.send(github_pull_request(head_repo=99), event="pull_request").get_json()["events"][0]["outcome"] == "duplicate"


def test_an_approval_is_bound_to_its_commit(one: Farm) -> None:
    hook = one.hook()
    hook.send(github_pull_request(head_repo=99), event="pull_request")
    newer = {"ref": "changes", "sha": OTHER_SHA, "repo": {"id": 99}}
    hook.send(github_pull_request("synchronize", head=newer), event="pull_request")
    answer = one.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": SHA})
    assert (answer.status_code, OTHER_SHA in answer.get_json()["detail"]) == (409, True)
    for commit, status in (("f" * 40, 404), ("main", 422), (OTHER_SHA[:12], 404)):
        assert one.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": commit}).status_code == status
    assert one.builds() == []
    assert one.ok("POST", "/v1/projects/demo/webhook/approve", json={"commit": OTHER_SHA})["outcome"] == "build"
    newest = {"ref": "changes", "sha": "a" * 40, "repo": {"id": 99}}
    assert hook.send(github_pull_request("synchronize", head=newest), event="pull_request").status_code == 202
    assert len(one.builds()) == 1


def test_an_older_state_of_a_pull_request_that_comes_late_is_not_where_it_is(one: Farm) -> None:
    hook = one.hook()
    newer = {"ref": "changes", "sha": OTHER_SHA, "repo": {"id": 99}}
    hook.send(github_pull_request("synchronize", head=newer, updated_at="2026-01-02T00:00:00Z"), event="pull_request")
    hook.send(github_pull_request(head_repo=99, updated_at="2026-01-01T00:00:00Z"), event="pull_request")
    assert {row.event.commit: row.moved_to for row in approvals.waiting(one.db)} == {OTHER_SHA: None, SHA: OTHER_SHA}
    answer = one.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": SHA})
    assert (answer.status_code, OTHER_SHA in answer.get_json()["detail"]) == (409, True)
    assert one.ok("POST", "/v1/projects/demo/webhook/approve", json={"commit": OTHER_SHA})["outcome"] == "build"
    assert one.user("POST", "/v1/projects/demo/webhook/approve", json={"commit": SHA}).status_code == 409
    assert len(one.builds()) == 1


def test_where_the_policy_is_disabled_forks_build_at_once_and_still_as_strangers(one: Farm) -> None:
    hook = one.hook(pullRequestBuildPolicy={"requiresCommentApproval": "DISABLED"}, millrace={"forkBuildspec": "head"})
    assert hook.send(github_pull_request(head_repo=99), event="pull_request").status_code == 201
    (build,) = one.builds()
    assert build.settings.webhook is not None
    assert (build.settings.fork, build.settings.webhook.buildspec_ref) == ("pr/2", None)
    assert hook.send(github_pull_request("reopened"), event="pull_request").status_code == 201
    assert one.builds()[0].settings.fork is None


def test_a_build_from_a_fork_is_given_no_secret_but_what_fetches_its_source(one: Farm, settings: Settings) -> None:
    secrets.put(one.db, secrets.keys_of(settings), "token", "open-sesame")
    secrets.put(one.db, secrets.keys_of(settings), "deploy", "hidden-word")
    hook = one.hook(pullRequestBuildPolicy={"requiresCommentApproval": "DISABLED"})
    source = {**SOURCES["github"], "auth": {"type": "SECRETS_MANAGER", "resource": "token"}}
    one.ok("PUT", "/v1/projects/demo", json={**_settings(one), "source": source})
    hook.send(github_pull_request(head_repo=99), event="pull_request")
    claim = leases.claim(one.db, a_claim_request(), settings)
    assert claim is not None

    def ask(name: str, value: str) -> TestResponse:
        wanted = {"references": [{"name": name, "type": "SECRETS_MANAGER", "value": value}]}
        path = f"/worker/v1/attempts/{claim.build_id}/1/grant/secrets"
        return one.client.post(path, json=wanted, headers={"Authorization": f"Bearer {claim.token}"})

    assert ask("MILLRACE_SOURCE_AUTH_0", "token").get_json()["values"] == {"MILLRACE_SOURCE_AUTH_0": "open-sesame"}
    for name, value in (("WORD", "deploy"), ("WORD", "token"), ("MILLRACE_SOURCE_AUTH_0", "deploy")):
        answer = ask(name, value)
        assert (answer.status_code, answer.get_json()["detail"]) == (404, f"a build from a fork gets no secrets: {name}")


def test_a_projects_own_token_sends_no_strangers_into_other_fleets(one: Farm) -> None:
    one.hook()
    mine = {"Authorization": f"Bearer {tokens.create(one.db, 'mine', TokenScope.PROJECT, project='demo')}"}
    path = "/v1/projects/demo/webhook"
    assert one.client.put(path, json={"millrace": {"forkFleet": "big"}}, headers=mine).status_code == 403
    one.ok("PUT", path, json={"millrace": {"forkFleet": "big"}})
    assert one.client.put(path, json={"millrace": {"forkFleet": "big"}}, headers=mine).status_code == 200


def test_all_pull_requests_wait_where_the_policy_says_so(one: Farm) -> None:
    hook = one.hook(pullRequestBuildPolicy={"requiresCommentApproval": "ALL_PULL_REQUESTS"})
    assert hook.send(github_pull_request(), event="pull_request").status_code == 202
    assert hook.send(github_push()).status_code == 201


def test_a_repository_is_known_by_its_number_once_it_has_called(one: Farm) -> None:
    hook = one.hook()
    stranger = {"id": 7, "full_name": "other/app", "clone_url": "https://github.com/other/app.git"}
    answer = hook.send(github_push(repository=stranger))
    assert answer.status_code == 204
    assert "about the repository other/app" in answer.headers["Millrace-Outcome"]
    assert hook.send({"zen": "x", **{"repository": github_push()["repository"]}}, event="ping").status_code == 200
    renamed = {"id": 186853002, "full_name": "new/name", "clone_url": "https://github.com/new/name.git"}
    assert hook.send(github_push(repository=renamed)).status_code == 201
    took_its_name = {**github_push()["repository"], "id": 8}
    assert hook.send(github_push(repository=took_its_name, after=OTHER_SHA)).status_code == 204
    assert len(one.builds()) == 1


def test_a_project_that_moves_learns_its_repository_anew_and_cannot_change_its_server(one: Farm) -> None:
    hook = one.hook()
    assert hook.send(github_push()).status_code == 201
    moved = {**_settings(one), "source": {"type": "GITHUB", "location": "https://github.com/other/app"}}
    one.ok("PUT", "/v1/projects/demo", json=moved)
    assert hook.send(github_push(after=OTHER_SHA)).status_code == 204
    stranger = {"id": 7, "full_name": "other/app", "clone_url": "https://github.com/other/app.git"}
    assert hook.send(github_push(repository=stranger, after=OTHER_SHA)).status_code == 201
    answer = one.user("PUT", "/v1/projects/demo", json={**moved, "source": SOURCES["gitlab"]})
    assert (answer.status_code, "webhook of github" in answer.get_json()["detail"]) == (409, True)


# Signatures


@pytest.mark.parametrize("provider", ["github", "bitbucket", "gitlab", "git"])
def test_what_is_not_signed_with_the_secret_is_never_read(one: Farm, provider: str) -> None:
    hook = one.hook(provider)
    good = sent(provider, hook.secret, {}, body=b"{ not even JSON")
    assert hook.post(**good).status_code == 400  # the signature holds, and so it was read
    signing = [name for name in good["headers"] if name.lower().endswith(("signature", "signature-256", "token"))]
    unsigned = {name: value for name, value in good["headers"].items() if name not in signing}
    wrong = [
        {"data": good["data"], "headers": unsigned},
        {"data": good["data"], "headers": {**unsigned, "X-Hub-Signature": "sha1=" + "a" * 40}},
        {"data": good["data"], "headers": {**unsigned, **dict.fromkeys(signing, "")}},
        {"data": good["data"], "headers": {**unsigned, **dict.fromkeys(signing, "sha256=")}},
        {"data": good["data"], "headers": {**unsigned, **dict.fromkeys(signing, "v1,ü")}},
        sent(provider, "whsec_AAAA", {}, body=good["data"]),
        sent(provider, "", {}, body=good["data"]),
    ]
    if provider != "gitlab":  # its token says nothing of the body
        wrong.append({"data": good["data"] + b" ", "headers": good["headers"]})
    for delivery in wrong:
        answer = hook.post(**delivery)
        assert answer.status_code == 401, delivery
        assert "secret" in answer.get_json()["hint"]
    assert hook.deliveries() == []


def test_gitlabs_signing_token_is_the_same_secret_and_covers_body_and_id(one: Farm) -> None:
    hook = one.hook("gitlab")
    signed = sent("git", hook.secret, {"object_kind": "issue"})
    assert hook.post(**signed).status_code == 204
    assert hook.post(signed["data"] + b" ", signed["headers"]).status_code == 401
    assert hook.post(signed["data"], {**signed["headers"], "webhook-id": "other"}).status_code == 401
    several = {**signed["headers"], "webhook-signature": f"v1,AAAA {signed['headers']['webhook-signature']}"}
    assert hook.post(signed["data"], several).status_code == 204
    both = {**signed["headers"], "X-Gitlab-Token": hook.secret, "webhook-signature": "v1,AAAA"}
    assert hook.post(signed["data"], both).status_code == 401


def test_an_old_secret_holds_beside_the_new_one_for_as_long_as_was_said(one: Farm) -> None:
    hook = one.hook()
    made = one.ok("PUT", "/v1/projects/demo/webhook", json={"rotateSecret": True})
    assert made["secret"] != hook.secret
    assert hook.send({"zen": "x"}, event="ping").status_code == 200
    assert hook.send({"zen": "x"}, event="ping", secret=made["secret"]).status_code == 200
    newest = one.ok("PUT", "/v1/projects/demo/webhook", json={"rotateSecret": True, "overlapMinutes": 0})
    assert hook.send({"zen": "x"}, event="ping", secret=made["secret"]).status_code == 401
    assert hook.send({"zen": "x"}, event="ping").status_code == 401
    assert hook.send({"zen": "x"}, event="ping", secret=newest["secret"]).status_code == 200
    assert one.ok("GET", "/v1/projects/demo/webhook")["millrace"]["oldSecretUntil"] is None


def test_a_webhook_is_shown_changed_and_removed(farm: Farm) -> None:
    hook = farm.hook()
    shown = farm.ok("GET", "/v1/projects/demo/webhook")
    assert (shown["filterGroups"][0][0]["excludeMatchedPattern"], shown["status"], "secret" in shown) == (False, "ACTIVE", False)
    assert shown["payloadUrl"].endswith(hook.path)
    assert farm.user("POST", "/v1/projects/demo/webhook", json={}).status_code == 409
    changed = farm.ok("PUT", "/v1/projects/demo/webhook", json={"branchFilter": "main"})
    assert (changed["branchFilter"], changed["filterGroups"], len(changed["millrace"]["warnings"])) == ("main", [], 1)
    assert farm.ok("PUT", "/v1/projects/demo/webhook", json={"filterGroups": EVERYTHING})["filterGroups"] == shown["filterGroups"]
    wrong = farm.user("PUT", "/v1/projects/demo/webhook", json={"filterGroups": [[{"type": "HEAD_REF", "pattern": "("}]]})
    assert (wrong.status_code, [one["field"] for one in wrong.get_json()["errors"]]) == (
        422,
        ["filterGroups.0", "filterGroups.0.0.pattern"],
    )
    assert farm.ok("POST", "/v1/projects/demo/webhook/test", json={"payload": github_push()})["events"][0]["outcome"] == "build"
    assert farm.user("DELETE", "/v1/projects/demo/webhook").status_code == 204
    assert farm.user("GET", "/v1/projects/demo/webhook").status_code == 404
    assert hook.send(github_push()).status_code == 404
    again = farm.ok("POST", "/v1/projects/demo/webhook", json={})
    assert again["secret"] != hook.secret
    other = Hook(farm, "github", "demo", urlsplit(again["payloadUrl"]).path, again["secret"])
    assert other.send({"zen": "x"}, event="ping").status_code == 200
    assert len(other.deliveries()) == 1
    assert farm.user("DELETE", "/v1/projects/demo").status_code == 204
    a_project(farm.db, "demo", source=SOURCES["github"])
    assert other.deliveries() == []


def test_secrets_are_sealed_and_never_shown_again(one: Farm, settings: Settings) -> None:
    hook = one.hook()
    one.ok("PUT", "/v1/projects/demo/webhook", json={"rotateSecret": True})
    for path in ("webhook", "webhook/deliveries"):
        assert "whsec_" not in json.dumps(one.ok("GET", f"/v1/projects/demo/{path}"))
    raw = Path(settings.home.parent / "records.db").read_bytes()
    assert hook.secret.encode() not in raw and hook.secret.removeprefix("whsec_").encode() not in raw


# Forms of payloads


def test_a_form_is_read_as_json_is(one: Farm) -> None:
    hook = one.hook()
    body = urlencode({"payload": json.dumps(github_push())}).encode()
    delivery = sent("github", hook.secret, None, body=body)
    delivery["headers"]["Content-Type"] = "application/x-www-form-urlencoded"
    assert hook.post(**delivery).status_code == 201


@pytest.mark.parametrize("row", BAD_INPUT, ids=lambda row: f"{row['row']} {row['name']}")
def test_bad_input(one: Farm, row: dict[str, Any]) -> None:
    hook = one.hook(row.get("provider", "github"))
    changes = {name: ZERO if value == "ZERO" else value for name, value in row.get("push", {}).items()}
    payload = row["payload"] if "payload" in row else github_push(**changes)
    if "pull_request" in row:
        payload = github_pull_request(**row["pull_request"])
    if "commits" in row:
        payload["commits"] = payload["commits"] * row["commits"]
    body = row["body"].encode() if "body" in row else b"x" * row["bytes"] if "bytes" in row else None
    if row.get("form"):
        body = urlencode({"payload": json.dumps(payload)}).encode()
    delivery = sent(hook.provider, hook.secret, payload, event=row.get("event", "push"), body=body)
    for name, value in row.get("headers", {}).items():
        delivery["headers"].pop(name) if value is None else delivery["headers"].__setitem__(name, value)
    answer = hook.post(**delivery)
    if row.get("twice"):
        answer = hook.post(**delivery)
    said = answer.get_data(as_text=True) + answer.headers.get("Millrace-Outcome", "")
    assert answer.status_code == row["status"], said
    for word in row["words"]:
        assert word in said
    assert len(one.builds()) == row.get("builds", 0)
    if row["status"] == 204:
        assert any(word in hook.deliveries()[0]["why"] for word in row["words"])


# Payloads that others wrote


def test_every_example_of_githubs_does_what_the_table_says(one: Farm) -> None:
    expected = yaml.safe_load((DATA / "github.yaml").read_text())
    hook = one.hook()
    found = {}
    for example in examples():
        answer = hook.send(example["payload"], event=example["event"])
        outcome = answer.headers["Millrace-Outcome"].partition(":")[0]
        found[f"{example['event']} {example['number']}"] = f"{answer.status_code} {outcome}"
    assert found == expected


OTHERS = yaml.safe_load((DATA / "others.yaml").read_text())["rows"]


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row["name"])
def test_documented_payloads_do_what_the_table_says(one: Farm, row: dict[str, Any]) -> None:
    hook = one.hook("center" if row.get("center") else row["provider"])
    delivery = sent(row["provider"], hook.secret, row["payload"], event=row["event"])
    answer = hook.post(**delivery)
    assert answer.status_code == row["status"], answer.headers["Millrace-Outcome"]
    assert [item["outcome"] for item in reversed(hook.deliveries())] == row["outcomes"]
    causes = [build.settings.webhook for build in reversed(one.builds())]
    assert len(causes) == len(row.get("cause", []))
    for cause, wanted in zip(causes, row.get("cause", []), strict=True):
        assert cause is not None
        assert {name: getattr(cause, name) for name in wanted} == wanted
    builds = {event.get("buildId") for event in answer.get_json()["events"]} if answer.status_code == 201 else set()
    again = hook.post(**delivery)
    assert again.status_code in ({201: 200, 202: 200}.get(row["status"], row["status"]),)
    assert builds <= {event.get("buildId") for event in (again.get_json(silent=True) or {"events": []})["events"]}
    assert len(one.builds()) == len(causes)


@pytest.mark.parametrize("provider", ["github", "bitbucket", "gitlab", "git"])
@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_payloads_of_any_shape_are_read_or_refused_and_never_break(provider: str, data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(_OF[provider]))
    payload = data.draw(_mangled(whole["payload"]))
    heard = read(Provider(provider), payload, whole["event"])
    for event in heard.events:
        filters.decide(WebhookSettings.model_validate({"filterGroups": EVERYTHING}), event)
        assert event.trigger and (event.commit is None or set(event.commit) <= set("0123456789abcdef"))


_OF: dict[str, list[dict[str, Any]]] = {
    "github": [one for one in examples() if one["event"] in ("push", "pull_request", "release", "workflow_job", "issue_comment")][
        ::4
    ],
    "bitbucket": [row for row in OTHERS if row["provider"] == "bitbucket"],
    "gitlab": [row for row in OTHERS if row["provider"] == "gitlab"],
    "git": [
        {
            "event": "push",
            "payload": {"ref": "refs/heads/main", "after": SHA, "before": OTHER_SHA, "paths": ["a"], "message": "m"},
        }
    ],
}
_ODD = st.sampled_from([None, True, -1, 2**70, 1.5, "", "x", "\x00", "\ud800", "refs/heads/", [], [None], {}, {"id": {}}, [[]]])


@st.composite
def _mangled(draw: st.DrawFn, value: Any) -> Any:
    """The value with something in it, or itself below the top, replaced by what does not belong there."""
    if isinstance(value, dict) and value:
        name = draw(st.sampled_from(sorted(value)))
        inner = draw(_mangled(value[name]) if draw(st.booleans()) else _ODD)
        return {**value, name: inner}
    if isinstance(value, list) and value:
        return [draw(_mangled(value[0])), *value[1:]]
    return draw(_ODD)


def _settings(farm: Farm) -> dict[str, Any]:
    shown = farm.ok("GET", "/v1/projects/demo")
    return {name: value for name, value in shown.items() if name not in ("arn", "created", "lastModified", "badge")}
