"""The API in one process over real records and a real directory store: what users and workers ask, and what must be refused."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from api.app import create_app
from api.auth import Scope
from millrace.contract import (
    LOG_OFFSET_HEADER,
    LOG_SHA256_HEADER,
    CacheQuery,
    CacheReport,
    Claim,
    FinishReport,
    LogFooter,
    PhaseReport,
)
from millrace.errors import ProviderTrouble
from millrace.ids import cache_prefix
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import PhaseType, Reason, StatusType, TokenScope, Trouble, Verdict
from scheduler import lifecycle, logs, tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from tests.support.records import a_claim_request, a_project_json, a_report

BAD_INPUT = yaml.safe_load((Path(__file__).parents[1] / "badinput" / "api.yaml").read_text())


@dataclass
class Api:
    """The application, and tokens for it."""

    app: Flask
    client: FlaskClient
    db: Database
    admin: str
    worker: str

    def send(self, method: str, path: str, *, token: str | None = None, **options: Any) -> TestResponse:
        headers = {"Authorization": f"Bearer {self.admin if token is None else token}", **options.pop("headers", {})}
        if token == "":
            headers.pop("Authorization")
        return self.client.open(path, method=method, headers=headers, **options)

    def ok(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.send(method, path, **options)
        assert answer.status_code < 300, answer.get_data(as_text=True)
        data: dict[str, Any] = answer.get_json(silent=True) or {}
        return data

    def build(self, project: str = "demo") -> str:
        build_id: str = self.ok("POST", "/v1/builds", json={"projectName": project})["id"]
        return build_id

    def claim(self) -> Claim:
        answer = self.send(
            "POST",
            "/worker/v1/claim",
            token=self.worker,
            data=a_claim_request().model_dump_json(by_alias=True),
            content_type="application/json",
        )
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return Claim.model_validate_json(answer.get_data())

    def attempt(self, claim: Claim, verb: str, model: Any) -> TestResponse:
        return self.send(
            "POST",
            f"/worker/v1/attempts/{claim.build_id}/{claim.attempt_no}/{verb}",
            token=claim.token,
            data=model.model_dump_json(by_alias=True, exclude_none=True),
            content_type="application/json",
        )

    def log(self, claim: Claim, seq: int, offset: int, data: bytes) -> TestResponse:
        return self.send(
            "PUT",
            f"/worker/v1/attempts/{claim.build_id}/{claim.attempt_no}/log/{seq}",
            token=claim.token,
            data=data,
            headers={LOG_OFFSET_HEADER: str(offset), LOG_SHA256_HEADER: hashlib.sha256(data).hexdigest()},
        )


@pytest.fixture
def api(sqlite_database: Database, settings: Settings, store: DirectoryStore) -> Iterator[Api]:
    """An API with nobody to ring for: the bell's Redis is not there, which no request may mind."""
    db = sqlite_database
    bell = Bell(f"redis+socket://{settings.home}/nothing.sock")
    app = create_app(settings, db, store, bell)
    made = Api(
        app=app,
        client=app.test_client(),
        db=db,
        admin=tokens.create(db, "admin", TokenScope.ADMIN),
        worker=tokens.create(db, "worker", TokenScope.WORKER),
    )
    made.ok("POST", "/v1/projects", json=a_project_json())
    yield made


# Projects and builds


def test_a_project_comes_back_as_sent_with_codebuilds_defaults(api: Api) -> None:
    shown = api.ok("GET", "/v1/projects/demo")
    for member, value in a_project_json().items():
        if member != "environment":
            assert shown[member] == value
    assert shown["arn"] == "arn:aws:codebuild:us-east-1:000000000000:project/demo"
    assert shown["cache"] == {"type": "NO_CACHE"}
    assert shown["environment"]["privilegedMode"] is False
    assert shown["badge"] == {"badgeEnabled": False}
    assert isinstance(shown["created"], float)


def test_a_project_is_replaced_listed_and_deleted(api: Api) -> None:
    changed = a_project_json(description="new", timeoutInMinutes=7)
    assert api.ok("PUT", "/v1/projects/demo", json=changed)["timeoutInMinutes"] == 7
    assert [item["name"] for item in api.ok("GET", "/v1/projects")["projects"]] == ["demo"]
    assert api.send("DELETE", "/v1/projects/demo").status_code == 204
    assert api.send("GET", "/v1/projects/demo").status_code == 404


def test_a_new_build_has_codebuilds_shape(api: Api) -> None:
    answer = api.send("POST", "/v1/builds", json={"projectName": "demo", "sourceVersion": "main", "imageOverride": "x:1"})
    assert answer.status_code == 201
    build = answer.get_json()
    assert answer.headers["Location"] == f"/v1/builds/{build['id']}"
    assert build["arn"].endswith(f":build/{build['id']}")
    assert (build["buildStatus"], build["currentPhase"], build["buildComplete"]) == ("IN_PROGRESS", "QUEUED", False)
    submitted, queued = build["phases"]
    assert (submitted["phaseType"], submitted["phaseStatus"], submitted["durationInSeconds"]) == ("SUBMITTED", "SUCCEEDED", 0)
    assert set(queued) == {"phaseType", "startTime"}
    assert build["environment"]["image"] == "x:1"
    assert build["sourceVersion"] == "main"
    assert "endTime" not in build
    assert build["millrace"]["state"] == "QUEUED"


def test_a_build_is_accepted_though_redis_is_away(api: Api) -> None:
    build = api.build()
    assert api.ok("GET", f"/v1/builds/{build}")["millrace"]["state"] == "QUEUED"


def test_an_idempotency_key_in_header_or_body_means_one_build(api: Api) -> None:
    body = {"projectName": "demo"}
    first = api.send("POST", "/v1/builds", json=body, headers={"Idempotency-Key": "k"})
    again = api.send("POST", "/v1/builds", json={**body, "idempotencyToken": "k"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.get_json()["id"] == again.get_json()["id"]
    other = api.send("POST", "/v1/builds", json={**body, "sourceVersion": "x"}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.get_json()["code"]) == (409, "idempotency_mismatch")


def test_a_queued_build_is_stopped_at_once_and_again_without_effect(api: Api) -> None:
    build = api.build()
    first = api.ok("POST", f"/v1/builds/{build}/stop")
    assert (first["buildStatus"], first["currentPhase"], first["buildComplete"]) == ("STOPPED", "COMPLETED", True)
    assert api.ok("POST", f"/v1/builds/{build}/stop") == first


def test_a_project_with_waiting_builds_is_not_deleted(api: Api) -> None:
    api.build()
    answer = api.send("DELETE", "/v1/projects/demo")
    assert (answer.status_code, answer.get_json()["code"]) == (409, "conflict")


# The road of an attempt


def test_a_worker_carries_a_build_to_its_artifacts(api: Api) -> None:
    build = api.build()
    claim = api.claim()
    assert claim.build_id == build
    assert claim.settings.source.buildspec is not None
    assert (
        api.send(
            "POST", "/worker/v1/claim", token=api.worker, json=json.loads(a_claim_request().model_dump_json(by_alias=True))
        ).status_code
        == 204
    )
    started = PhaseReport(phase_type=PhaseType.BUILD, started_at_ms=1_000)
    assert api.attempt(claim, "phase", started).status_code == 200
    text = "grüße\n".encode()
    assert api.log(claim, 0, 0, text).status_code == 200
    data = b"artifact bytes"
    sha256 = hashlib.sha256(data).hexdigest()
    wanted = {"kind": "artifact", "name": "dist/a.zip", "sizeBytes": len(data), "sha256": sha256}
    grant = api.ok("POST", f"/worker/v1/attempts/{build}/1/grant", token=claim.token, json=wanted)
    assert api.send("PUT", grant["url"], token="", data=b"other bytes!!!").status_code == 422
    assert api.send("GET", grant["url"], token="").status_code == 403
    assert api.send("PUT", grant["url"], token="", data=data).status_code == 200
    assert api.ok("GET", f"/v1/builds/{build}/artifacts") == {"artifacts": []}
    ended = started.model_copy(update={"status": StatusType.SUCCEEDED, "ended_at_ms": 2_500, "duration_ms": 1_500})
    api.attempt(claim, "phase", ended)
    footer = LogFooter(chunks=1, size_bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    artifact = {"name": "dist/a.zip", "key": grant["key"], "sizeBytes": len(data), "sha256": sha256, "md5": "0" * 32}
    report = a_report(log=footer, artifacts=({**artifact, "packaging": "ZIP", "fileCount": 1},))
    for _ in range(2):
        assert api.attempt(claim, "finish", report).get_json() == {"state": "SUCCEEDED"}
    shown = api.ok("GET", f"/v1/builds/{build}")
    assert (shown["buildStatus"], shown["currentPhase"]) == ("SUCCEEDED", "COMPLETED")
    phase = next(item for item in shown["phases"] if item["phaseType"] == "BUILD")
    assert (phase["durationInSeconds"], phase["contexts"]) == (1, [{"statusCode": "", "message": ""}])
    assert shown["artifacts"]["sha256sum"] == sha256
    assert shown["artifacts"]["location"] == f"arn:aws:s3:::millrace/{grant['key']}"
    got = api.send("GET", f"/v1/builds/{build}/artifacts/dist/a.zip")
    assert got.get_data() == data
    assert got.headers["Content-Disposition"] == "attachment; filename*=UTF-8''a.zip"
    log = api.send("GET", f"/v1/builds/{build}/logs")
    assert log.get_data() == text
    assert log.headers["X-Content-Type-Options"] == "nosniff"
    assert log.headers["Content-Type"].startswith("text/plain")


def test_a_grant_is_only_for_the_builds_own_things(api: Api) -> None:
    build = api.build()
    claim = api.claim()
    path = f"/worker/v1/attempts/{build}/1/grant"
    for name, status in (("../other/a", 422), ("/abs", 422), ("a\x00b", 422), ("x" * 300, 422)):
        wanted = {"kind": "artifact", "name": name, "sizeBytes": 1, "sha256": "0" * 64}
        assert api.send("POST", path, token=claim.token, json=wanted).status_code == status, name
    foreign = {"kind": "source", "name": "millrace/artifacts/secret"}
    assert api.send("POST", path, token=claim.token, json=foreign).status_code == 404
    assert api.send("POST", path, token="mr_att_wrong", json=foreign).status_code == 409
    unsized = {"kind": "artifact", "name": "a"}
    assert api.send("POST", path, token=claim.token, json=unsized).status_code == 422


def test_a_build_reads_uploads_and_artifacts_of_its_own_project_only(api: Api, store: DirectoryStore) -> None:
    api.ok("POST", "/v1/projects", json=a_project_json("other"))
    mine, theirs = (api.build(project).partition(":")[2] for project in ("demo", "other"))
    for build in (mine, theirs):
        api.ok("POST", f"/v1/builds/{'demo' if build is mine else 'other'}:{build}/stop")
    allowed = {
        "millrace/uploads/abc.tar.gz": 200,
        f"millrace/artifacts/{mine}/1/a.zip": 200,
        f"millrace/artifacts/{theirs}/1/a.zip": 404,
        f"millrace/logs/{mine}/1.log": 404,
        f"millrace/logs/{theirs}/1.log": 404,
        "sources/a.zip": 200,
        "sources/not-there.zip": 404,
    }
    for name in allowed:
        if "not-there" not in name:
            store.put(*name.split("/", 1), io.BytesIO(b"x"))
    for name, status in allowed.items():
        start = {"projectName": "demo", "sourceTypeOverride": "S3", "sourceLocationOverride": name}
        build = api.ok("POST", "/v1/builds", json=start)["id"]
        claim = api.claim()
        asked = {"kind": "source", "name": name}
        answer = api.send("POST", f"/worker/v1/attempts/{build}/1/grant", token=claim.token, json=asked)
        assert answer.status_code == status, (name, answer.get_data(as_text=True))
        if status == 200:
            assert api.send("GET", answer.get_json()["url"], token="").get_data() == b"x"
        api.attempt(claim, "finish", a_report())


def test_a_key_from_before_its_project_was_deleted_still_names_its_build(api: Api) -> None:
    start = {"projectName": "demo", "imageOverride": "x:1"}
    first = api.send("POST", "/v1/builds", json=start, headers={"Idempotency-Key": "k"}).get_json()["id"]
    api.ok("POST", f"/v1/builds/{first}/stop")
    assert api.send("DELETE", "/v1/projects/demo").status_code == 204
    again = api.send("POST", "/v1/builds", json=start, headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.get_json()["id"]) == (200, first)
    assert api.send("POST", "/v1/builds", json=start).status_code == 404


def test_an_upload_is_stored_once_under_its_hash(api: Api) -> None:
    data = b"\x1f\x8bnot really"
    sha256 = hashlib.sha256(data).hexdigest()
    for _ in range(2):
        answer = api.ok("POST", "/v1/uploads", data=data, content_type="application/gzip")
        assert answer == {"location": f"millrace/uploads/{sha256}.tar.gz", "sha256": sha256, "sizeBytes": len(data)}
    wrong = api.send("POST", "/v1/uploads", data=data, headers={"X-Millrace-Sha256": "0" * 64})
    assert wrong.status_code == 422


def test_an_upload_or_body_over_the_limit_is_refused(api: Api, settings: Settings, store: DirectoryStore) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 1024, "max_body_bytes": 1024})
    app = create_app(small, api.db, store, Bell("redis+socket:///nothing.sock"))
    client = app.test_client()
    headers = {"Authorization": f"Bearer {api.admin}"}
    assert client.post("/v1/uploads", data=b"x" * 2000, headers=headers).status_code == 413
    endless = client.post(
        "/v1/uploads", input_stream=io.BytesIO(b"x" * 5000), headers=headers, environ_overrides={"wsgi.input_terminated": True}
    )
    assert endless.status_code == 413
    assert client.post("/v1/projects", data=b" " * 2000, content_type="application/json", headers=headers).status_code == 413


def test_damaged_bytes_never_arrive_whole(api: Api, store: DirectoryStore) -> None:
    build = api.build()
    claim = api.claim()
    key = f"artifacts/{build.partition(':')[2]}/1/a"
    store.put("millrace", key, io.BytesIO(b"right"))
    artifact = {"name": "a", "key": key, "sizeBytes": 5, "sha256": hashlib.sha256(b"wrong").hexdigest(), "md5": "0" * 32}
    api.attempt(claim, "finish", a_report(artifacts=({**artifact, "packaging": "NONE", "fileCount": 1},)))
    damaged = api.send("GET", f"/v1/builds/{build}/artifacts/a")
    assert (damaged.status_code, damaged.get_json()["code"]) == (503, "infra_problem")
    assert "damaged" in damaged.get_json()["detail"]
    store.delete("millrace", key)
    gone = api.send("GET", f"/v1/builds/{build}/artifacts/a")
    assert (gone.status_code, "no longer" in gone.get_json()["detail"]) == (404, True)


def test_artifacts_that_the_store_lost_are_a_fault_of_ours_and_the_build_begins_anew(
    api: Api, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "backoff_ms", lambda _faults: 0)
    build = api.build()
    key = f"artifacts/{build.partition(':')[2]}/{{}}/a"
    facts = {"name": "a", "sizeBytes": 5, "sha256": "0" * 64, "md5": "0" * 32, "packaging": "NONE", "fileCount": 1}
    for attempt_no, kept in enumerate((None, b"rig"), 1):
        claim = api.claim()
        if kept is not None:
            store.put("millrace", key.format(attempt_no), io.BytesIO(kept))
        report = a_report(artifacts=({**facts, "key": key.format(attempt_no)},))
        assert api.attempt(claim, "finish", report).get_json() == {"state": "QUEUED"}
    claim = api.claim()
    store.put("millrace", key.format(3), io.BytesIO(b"right"))
    assert api.attempt(claim, "finish", a_report(artifacts=({**facts, "key": key.format(3)},))).get_json() == {
        "state": "SUCCEEDED"
    }


def test_a_report_waits_for_a_store_that_is_away(api: Api, store: DirectoryStore, tmp_path: Path) -> None:
    build = api.build()
    claim = api.claim()
    key = f"artifacts/{build.partition(':')[2]}/1/a"
    store.put("millrace", key, io.BytesIO(b"right"))
    facts = {"name": "a", "sizeBytes": 5, "sha256": "0" * 64, "md5": "0" * 32, "packaging": "NONE", "fileCount": 1}
    report = a_report(artifacts=({**facts, "key": key},))
    (tmp_path / "objects").rename(tmp_path / "elsewhere")
    (tmp_path / "objects").write_text("no folder")
    assert api.attempt(claim, "finish", report).status_code == 503
    (tmp_path / "objects").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "objects")
    assert api.attempt(claim, "finish", report).get_json() == {"state": "SUCCEEDED"}


def test_a_lost_attempt_gets_409_from_every_verb(api: Api) -> None:
    build = api.build()
    claim = api.claim()
    handed_back = FinishReport(
        verdict=Verdict.HANDED_BACK,
        reason=Reason.WORKER_SHUTDOWN,
        log=LogFooter(chunks=0, size_bytes=0, sha256=hashlib.sha256(b"").hexdigest()),
    )
    assert api.attempt(claim, "finish", handed_back).get_json() == {"state": "QUEUED"}
    wanted = {"kind": "artifact", "name": "a", "sizeBytes": 1, "sha256": "0" * 64}
    answers = [
        api.attempt(claim, "phase", PhaseReport(phase_type=PhaseType.BUILD, started_at_ms=1)),
        api.log(claim, 0, 0, b"late"),
        api.send("POST", f"/worker/v1/attempts/{build}/1/renew", token=claim.token, json={}),
        api.send("POST", f"/worker/v1/attempts/{build}/1/grant", token=claim.token, json=wanted),
        api.attempt(claim, "finish", a_report()),
    ]
    assert [(answer.status_code, answer.get_json()["code"]) for answer in answers] == [(409, "attempt_fenced")] * 5


# Rights


def test_every_route_declares_who_may_use_it(api: Api) -> None:
    scopes = {
        rule.rule: getattr(api.app.view_functions[rule.endpoint], "millrace_scope", None) for rule in api.app.url_map.iter_rules()
    }
    assert [path for path, scope in scopes.items() if scope is None] == []
    public = {path for path, scope in scopes.items() if scope is Scope.PUBLIC}
    pages = {"/signin", "/pages/style.css"}
    assert public == {"/healthz", "/readyz", "/objects/<token>", "/webhooks/<provider>/<ident>", "/badges", *pages}


def test_a_project_token_sees_its_own_project_and_nothing_of_others(api: Api) -> None:
    api.ok("POST", "/v1/projects", json=a_project_json("other"))
    mine = tokens.create(api.db, "mine", TokenScope.PROJECT, project="other")
    build = api.build("demo")
    own: str = api.ok("POST", "/v1/builds", token=mine, json={"projectName": "other"})["id"]
    hidden = [
        ("GET", "/v1/projects/demo"),
        ("PUT", "/v1/projects/demo"),
        ("GET", f"/v1/builds/{build}"),
        ("POST", f"/v1/builds/{build}/stop"),
        ("GET", f"/v1/builds/{build}/logs"),
        ("GET", f"/v1/builds/{build}/artifacts"),
        ("GET", f"/v1/builds/{build}/artifacts/a"),
        ("GET", "/v1/builds?project=demo"),
    ]
    for method, path in hidden:
        assert api.send(method, path, token=mine, json={} if method != "GET" else None).status_code == 404, path
    assert api.send("POST", "/v1/builds", token=mine, json={"projectName": "demo"}).status_code == 404
    assert api.send("POST", "/v1/projects", token=mine, json=a_project_json("third")).status_code == 403
    assert [item["id"] for item in api.ok("GET", "/v1/builds", token=mine)["builds"]] == [own]
    assert [item["name"] for item in api.ok("GET", "/v1/projects", token=mine)["projects"]] == ["other"]


def test_no_route_shows_a_project_token_that_other_projects_are_there(api: Api) -> None:
    """Every user route with a name in it, found from the application itself, answers for what is hidden as for what is not."""
    api.ok("POST", "/v1/projects", json=a_project_json("other"))
    mine = tokens.create(api.db, "mine", TokenScope.PROJECT, project="other")
    hidden = {"name": "demo", "build_id": api.build("demo")}
    nothing = {"name": "demx", "build_id": hidden["build_id"][:-4] + "0000"}
    seen = 0
    for rule in api.app.url_map.iter_rules():
        if getattr(api.app.view_functions[rule.endpoint], "millrace_scope", None) is not Scope.USER or not rule.arguments:
            continue
        of_secrets = rule.rule.startswith("/v1/secrets/")  # these name the project beside the path
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}):
            answers = []
            for names in (hidden, nothing):
                path = rule.rule.replace("<path:name>", "a.zip")
                for argument, value in names.items():
                    path = path.replace(f"<{argument}>", value)
                body = a_project_json(names["name"]) if method == "PUT" else None
                if of_secrets and method == "PUT":
                    body = {"value": "x", "project": names["name"]}
                elif of_secrets:
                    path += f"?project={names['name']}"
                answer = api.send(method, path, token=mine, json=body)
                text = answer.get_data(as_text=True)
                answers.append((answer.status_code, text.replace(names["build_id"], "ID").replace(names["name"], "NAME")))
            assert answers[0][0] == 404, (method, rule.rule, answers)
            assert answers[0] == answers[1], (method, rule.rule)
            seen += 1
    assert seen >= 7


def test_the_queue_says_what_keeps_a_build_and_names_no_other_projects_builds(api: Api) -> None:
    api.ok("POST", "/v1/projects", json=a_project_json("other"))
    first, second = api.build(), api.build("other")
    api.ok("POST", "/v1/fleets/default/pause", json={"why": "disks"})
    mine = tokens.create(api.db, "mine", TokenScope.PROJECT, project="other")
    found = api.ok("GET", f"/v1/builds/{second}/queue", token=mine)
    assert (found["position"], found["aheadCount"], found["ahead"]) == (2, 1, [{}])
    assert [bound["limit"] for bound in found["limits"]] == ["fleet_paused", "no_worker"]
    assert found["binding"] == found["limits"][0]
    assert api.ok("GET", f"/v1/builds/{second}/queue")["ahead"] == [{"id": first, "projectName": "demo"}]
    assert (
        api.send("POST", "/worker/v1/claim", token=api.worker, json=a_claim_request().model_dump(by_alias=True)).status_code
        == 204
    )
    (fleet,) = api.ok("GET", "/v1/fleets")["fleets"]
    assert (fleet["name"], fleet["waiting"], fleet["paused"]["why"], fleet["workers"]) == ("default", 2, "disks", 1)
    assert api.ok("POST", "/v1/fleets/default/resume")["paused"] is None
    assert api.ok("PUT", "/v1/fleets/default", json={"maxRunning": 1})["maxRunning"] == 1
    assert api.claim().build_id == first
    assert [b["limit"] for b in api.ok("GET", f"/v1/builds/{second}/queue")["limits"]] == ["fleet_limit"]


def test_a_fleet_that_is_set_oddly_is_noted_and_a_circle_is_refused(api: Api) -> None:
    fargate = {
        "type": "fargate",
        "cluster": "c",
        "taskDefinition": "t",
        "subnets": ["s"],
        "region": "../../",
        "endpointUrl": "http://127.0.0.1:1",
    }
    refused = api.send("PUT", "/v1/fleets/one", json={"provider": fargate, "worker": {"slots": 1}})
    assert refused.status_code == 422 and "region" in refused.get_data(as_text=True)

    def flows(to: str) -> dict[str, Any]:
        return {"overflowBehavior": "ON_DEMAND", "overflowFleet": to}

    (said,) = api.ok("PUT", "/v1/fleets/one", json=flows("two"))["warnings"]
    assert said == "the fleet two has neither a worker nor a provider: until it has, no build is moved there"
    api.ok("PUT", "/v1/fleets/two", json=flows("three"))
    refused = api.send("PUT", "/v1/fleets/three", json=flows("one"))
    assert refused.status_code == 422 and "in a circle: three to one to two to three" in refused.get_json()["detail"]
    assert api.ok("GET", "/v1/fleets/one")["settings"]["overflowFleet"] == "two"
    api.send("POST", "/worker/v1/claim", token=api.worker, json=a_claim_request(fleet="two").model_dump(by_alias=True))
    assert api.ok("PUT", "/v1/fleets/one", json=flows("two"))["warnings"] == []


def test_an_engine_that_only_the_scheduler_reaches_is_no_reason_to_refuse_a_fleet(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_self: object) -> None:
        raise ProviderTrouble(Trouble.AWAY, "no socket is there")

    monkeypatch.setattr("scheduler.fleets.containers.Containers.check", check)
    (said,) = api.ok("PUT", "/v1/fleets/one", json={"provider": {"type": "containers"}})["warnings"]
    assert said == "the engine cannot be asked from the API, the scheduler will ask it: no socket is there"
    assert api.ok("GET", "/v1/fleets/one")["settings"]["provider"]["type"] == "containers"


def test_a_fleet_shows_what_its_workers_have_left(api: Api) -> None:
    api.build()
    worker = a_claim_request(cpus=6, memory_bytes=32 * 2**30)
    api.ok("POST", "/worker/v1/claim", token=api.worker, json=worker.model_dump(by_alias=True))
    (seen,) = api.ok("GET", "/v1/fleets/default")["workersSeen"]
    assert seen["offer"] == {"cpus": 6, "memoryBytes": 32 * 2**30}
    assert seen["room"] == {"cpus": 4, "memoryBytes": 28 * 2**30}


def test_a_project_token_does_not_raise_its_project_above_others(api: Api) -> None:
    mine = tokens.create(api.db, "mine", TokenScope.PROJECT, project="demo")
    for change in ({"millrace": {"priority": 5}}, {"millrace": {"weight": 9}}, {"concurrentBuildLimit": 99}):
        answer = api.send("PUT", "/v1/projects/demo", token=mine, json=a_project_json(**change))
        assert (answer.status_code, "standing among others" in answer.get_data(as_text=True)) == (403, True)
    api.ok("PUT", "/v1/projects/demo", token=mine, json=a_project_json(millrace={"cancelSuperseded": True}))


def test_every_route_refuses_tokens_of_the_wrong_kind(api: Api) -> None:
    project = tokens.create(api.db, "p", TokenScope.PROJECT, project="demo")
    ended = tokens.create(api.db, "old", TokenScope.ADMIN, days=0)
    wrong = {
        Scope.USER: [api.worker],
        Scope.ADMIN: [api.worker, project],
        Scope.WORKER: [api.admin, project],
    }
    for rule in api.app.url_map.iter_rules():
        scope = getattr(api.app.view_functions[rule.endpoint], "millrace_scope", None)
        path = rule.rule.replace("<path:name>", "a").replace("<int:attempt_no>", "1").replace("<int:seq>", "0")
        path = path.replace("<build_id>", "demo:x").replace("<name>", "demo")
        for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"}):
            if scope is Scope.PUBLIC:
                continue
            if scope is Scope.PAGE:  # these know sessions, and no tokens
                for token in ("", api.admin, project):
                    assert api.send(method, path, token=token).status_code == 303, (method, path)
                continue
            assert api.send(method, path, token="").status_code == 401, (method, path)
            if scope in wrong:
                assert api.send(method, path, token=ended).status_code == 401, (method, path)
                assert api.send(method, path, token="x" * 5000).status_code == 401, (method, path)
                for token in wrong[scope]:
                    assert api.send(method, path, token=token).status_code == 403, (method, path)


def test_a_signed_address_cannot_be_changed(api: Api) -> None:
    build = api.build()
    claim = api.claim()
    wanted = {"kind": "artifact", "name": "a", "sizeBytes": 1, "sha256": "0" * 64}
    grant = api.ok("POST", f"/worker/v1/attempts/{build}/1/grant", token=claim.token, json=wanted)
    payload, _, seal = grant["url"].removeprefix("/objects/").partition(".")
    data = json.loads(base64.urlsafe_b64decode(payload + "=="))
    forged = base64.urlsafe_b64encode(json.dumps({**data, "key": "artifacts/x/1/a"}).encode()).decode().rstrip("=")
    assert api.send("PUT", f"/objects/{forged}.{seal}", token="", data=b"x").status_code == 403


# Bad input


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case["name"])
def test_bad_input_is_answered_clearly(api: Api, case: dict[str, Any]) -> None:
    build = api.build()

    def filled(value: Any) -> Any:
        text = json.dumps(value).replace("{project}", "demo").replace("{build}", build)
        return json.loads(text)

    options: dict[str, Any] = {"headers": case.get("headers", {})}
    if case.get("project"):
        options["json"] = a_project_json(case.get("rename", "demo"))
    elif "json" in case:
        options["json"] = filled(case["json"])
    else:
        body = bytes.fromhex(case["body_hex"]) if "body_hex" in case else filled(case.get("body", "")).encode()
        options |= {"data": body + case.get("repeat", "").encode() * case.get("times", 0)}
        if case["method"] in ("POST", "PUT"):
            options["content_type"] = case.get("content_type", "application/json")
    token = api.worker if case.get("token") == "worker" else case.get("token")
    answer = api.send(case["method"], filled(case["path"]), token=token, **options)
    text = answer.get_data(as_text=True)
    assert answer.status_code == case["status"], text
    assert answer.content_type == "application/problem+json"
    assert answer.get_json()["code"]
    for word in case["words"]:
        assert word in text, text
    assert "Traceback" not in text


def test_a_fault_of_ours_shows_a_number_and_no_traceback(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: object, **_more: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("scheduler.queries.get_build", broken)
    answer = api.send("GET", "/v1/builds/x")
    body = answer.get_json()
    assert (answer.status_code, body["code"]) == (500, "internal")
    assert "secret detail" not in answer.get_data(as_text=True)
    assert body["detail"].rpartition(" ")[2] in capsys.readouterr().out


# Health


def test_readiness_names_each_part_and_a_dead_bell_only_degrades(api: Api) -> None:
    answer = api.send("GET", "/readyz", token="")
    body = answer.get_json()
    assert (answer.status_code, body["status"]) == (200, "degraded")
    assert {part: said["status"] for part, said in body["parts"].items()} == {
        "database": "ok",
        "schema": "ok",
        "broker": "degraded",
        "store": "ok",
        "scheduler": "degraded",
        "workers": "degraded",
    }
    assert api.send("GET", "/healthz", token="").status_code == 200


# Retries and what a project's own token may reach


def test_a_retry_is_answered_as_a_start(api: Api) -> None:
    old = api.build()
    assert api.send("POST", f"/v1/builds/{old}/retry").status_code == 409
    api.ok("POST", f"/v1/builds/{old}/stop")
    answer = api.send("POST", f"/v1/builds/{old}/retry", headers={"Idempotency-Key": "k"})
    assert answer.status_code == 201
    made = answer.get_json()
    assert (made["millrace"]["retryOf"], made["buildNumber"], answer.headers["Location"]) == (old, 2, f"/v1/builds/{made['id']}")
    again = api.send("POST", f"/v1/builds/{old}/retry", headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.get_json()["id"]) == (200, made["id"])
    by_token = api.send("POST", f"/v1/builds/{old}/retry", json={"idempotencyToken": "k"})
    assert by_token.get_json()["id"] == made["id"]
    assert api.send("POST", "/v1/builds/demo:none/retry").status_code == 404
    refused = api.send("POST", f"/v1/builds/{old}/retry", json={"imageOverride": "x"})
    assert (refused.status_code, refused.get_json()["errors"][0]["field"]) == (422, "imageOverride")


def test_auto_retries_are_linked_by_arn(api: Api) -> None:
    api.ok("PUT", "/v1/projects/demo", json=a_project_json(autoRetryLimit=1))
    first = api.build()
    config = api.ok("GET", f"/v1/builds/{first}")["autoRetryConfig"]
    assert config == {"autoRetryLimit": 1, "autoRetryNumber": 0, "nextAutoRetry": None, "previousAutoRetry": None}
    report = a_report(Verdict.FAILED, Reason.EXIT_CODE)
    assert api.attempt(api.claim(), "finish", report).status_code == 200
    shown = api.ok("GET", f"/v1/builds/{first}")
    second = api.ok("GET", "/v1/builds")["builds"][0]
    assert shown["autoRetryConfig"]["nextAutoRetry"] == second["arn"]
    assert second["autoRetryConfig"] | {"autoRetryLimit": 0} == {
        "autoRetryLimit": 0,
        "autoRetryNumber": 1,
        "nextAutoRetry": None,
        "previousAutoRetry": shown["arn"],
    }


@pytest.mark.parametrize(
    "wanted",
    [
        {"artifactsOverride": {"type": "S3", "location": "other-bucket"}},
        {"secondaryArtifactsOverride": [{"type": "S3", "location": "other-bucket", "artifactIdentifier": "a"}]},
        {"cacheOverride": {"type": "S3", "cacheNamespace": "theirs"}},
        {"privilegedModeOverride": True},
        {"fleetOverride": {"fleetArn": "big"}},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
def test_a_projects_own_token_reaches_no_further_than_its_settings(api: Api, wanted: dict[str, Any]) -> None:
    token = tokens.create(api.db, "p", TokenScope.PROJECT, project="demo")
    answer = api.send("POST", "/v1/builds", token=token, json={"projectName": "demo", **wanted})
    assert answer.status_code == 403, answer.get_data(as_text=True)
    by_admin = api.ok("POST", "/v1/builds", json={"projectName": "demo", **wanted})["id"]
    api.ok("POST", f"/v1/builds/{by_admin}/stop")
    again = api.send("POST", f"/v1/builds/{by_admin}/retry", token=token)
    assert again.status_code == 403, again.get_data(as_text=True)
    assert api.send("POST", f"/v1/builds/{by_admin}/retry").status_code == 201
    settings = {name.removesuffix("Override"): value for name, value in wanted.items()}
    if settings.keys() & {"privilegedMode", "fleet"}:
        settings = {"environment": {**a_project_json()["environment"], **settings}}
    changed = api.send("PUT", "/v1/projects/demo", token=token, json=a_project_json(**settings))
    assert changed.status_code == 403, changed.get_data(as_text=True)
    assert api.send("PUT", "/v1/projects/demo", token=token, json=a_project_json(description="mine")).status_code == 200


def test_who_follows_is_told_at_once_that_a_log_is_at_its_limit_and_later_what_is_missing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 10)
    build = api.build()
    claim = api.claim()
    assert api.log(claim, 0, 0, b"12345").status_code == 200
    answer = api.send("GET", f"/v1/builds/{build}/logs", headers={"Accept": "text/event-stream"})
    events = (event.decode() for event in answer.iter_encoded())
    try:
        for said in ("12345", "67890"):
            event = next(event for event in events if "event: log" in event)
            assert json.loads(event.split("data: ")[1])["text"] == said
            for _ in range(2):  # the second, as if its answer was lost
                assert api.log(claim, 1, 5, b"67890, and no more").status_code == 413
        event = next(event for event in events if "event: full" in event or "event: gap" in event)
        assert event.startswith("id: 1:10:full\nevent: full\n")
        assert json.loads(event.split("data: ")[1]) == {
            "attempt": 1,
            "offset": 10,
            "says": "the log is at its limit of 10 bytes: the build goes on, and what it writes from here on is not kept",
        }
        footer = LogFooter(chunks=2, size_bytes=23, sha256=hashlib.sha256(b"1234567890, and no more").hexdigest())
        assert api.attempt(claim, "finish", a_report(log=footer)).status_code == 200
        rest = [event for event in events if "event: phase" not in event]
    finally:
        answer.close()
    assert len(rest) == 2
    assert "event: gap" in rest[0] and '"missingBytes": 13' in rest[0]
    assert "event: end" in rest[1] and '"logComplete": false' in rest[1]
    again = api.send("GET", f"/v1/builds/{build}/logs", headers={"Accept": "text/event-stream", "Last-Event-ID": "1:10:full"})
    assert "event: gap" in again.get_data(as_text=True)


# Caches


@pytest.mark.parametrize("left", [None, b"1234"], ids=["gone", "cut"])
def test_a_cache_that_the_store_has_lost_can_be_saved_anew(
    api: Api, store: DirectoryStore, settings: Settings, left: bytes | None
) -> None:
    def a_build_that_saves() -> tuple[int, str]:
        build = api.ok("POST", "/v1/builds", json={"projectName": "demo"})["id"]
        claim, key = api.claim(), cache_prefix(build, 1) + "c"
        asked = api.attempt(claim, "grant/cache", CacheQuery(version="a" * 64, keys=("k",))).status_code
        store.put(settings.bucket, key, io.BytesIO(b"123456789"))
        item = CacheReport(key="k", version="a" * 64, object_key=key, size_bytes=9, sha256="0" * 64)
        assert api.attempt(claim, "finish", a_report(caches=(item,))).status_code == 200
        return asked, key

    a_build_that_saves()
    asked, key = a_build_that_saves()
    assert asked == 200
    store.delete(settings.bucket, key)
    if left is not None:
        store.put(settings.bucket, key, io.BytesIO(left))
    assert a_build_that_saves()[0] == 204
    assert a_build_that_saves()[0] == 200


def test_caches_are_listed_explained_and_taken_away(api: Api, store: DirectoryStore, settings: Settings) -> None:
    build = api.ok("POST", "/v1/builds", json={"projectName": "demo"})["id"]
    claim = api.claim()
    asked = api.attempt(claim, "grant/cache", CacheQuery(version="a" * 64, keys=("k",)))
    assert asked.status_code == 204
    store.put(settings.bucket, cache_prefix(build, 1) + "c", io.BytesIO(b"123456789"))
    item = CacheReport(key="k", version="a" * 64, object_key=cache_prefix(build, 1) + "c", size_bytes=9, sha256="0" * 64)
    assert api.attempt(claim, "finish", a_report(caches=(item,))).status_code == 200
    (shown,) = api.ok("GET", "/v1/caches?project=demo")["caches"]
    assert (shown["project"], shown["key"], shown["layers"], shown["sizeBytes"], shown["buildId"]) == ("demo", "k", 1, 9, build)
    told = api.ok("GET", f"/v1/builds/{build}/caches")
    assert told["lookups"][0]["why"] == "there is no cache yet"
    assert told["saved"][0]["key"] == "k"
    for path, status, words in (
        ("/v1/caches?proyect=demo", 422, "did you mean project?"),
        ("/v1/caches?project=nobody", 404, "there is no project"),
        ("/v1/caches?project=demo&namespace=x", 422, "both given"),
        ("/v1/caches?cursor=x", 422, "not a whole number"),
        ("/v1/builds/demo:nothing/caches", 404, "no build"),
    ):
        answer = api.send("GET", path)
        assert (answer.status_code, words in answer.get_data(as_text=True)) == (status, True), path
    assert api.send("DELETE", "/v1/caches").status_code == 422
    api.ok("POST", "/v1/projects", json=a_project_json("other"))
    theirs = tokens.create(api.db, "theirs", TokenScope.PROJECT, project="other")
    assert api.send("GET", "/v1/caches?project=demo", token=theirs).status_code == 404
    assert api.send("DELETE", "/v1/caches?namespace=team", token=theirs).status_code == 403
    assert api.ok("GET", "/v1/caches", token=theirs) == {"caches": []}
    assert api.ok("DELETE", "/v1/caches?project=demo&key=k") == {"removed": 1}
    assert api.ok("DELETE", "/v1/caches?project=demo") == {"removed": 0}
    assert api.ok("GET", "/v1/caches") == {"caches": []}
