"""Artifacts reach the bucket that their project names, under CodeBuild's keys, whole, once, and only of the winning attempt."""

import io
from pathlib import Path
from typing import Any

import pytest

from millrace.contract import ArtifactReport
from millrace.errors import AttemptFenced, InfraProblem
from millrace.ids import staging_prefix, uuid_of
from millrace.project import ProjectArtifacts
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import Reason
from scheduler import leases, lifecycle, publication, queries
from scheduler.db import Database
from scheduler.leases import hash_token
from tests.support.records import a_build, a_claim, a_project, a_report

BUILD = "demo:00000001-0000-4000-8000-000000000001"
UUID = "00000001-0000-4000-8000-000000000001"


def an_artifact(name: str, **more: Any) -> ArtifactReport:
    values = {"key": "k", "size_bytes": 1, "sha256": "0" * 64, "md5": "0" * 32, "packaging": "ZIP", "file_count": 1, **more}
    return ArtifactReport(name=name, **values)


@pytest.mark.parametrize(
    ("wanted", "report", "key"),
    [
        ({"path": "MyArtifacts", "name": "MyArtifact.zip"}, {}, "MyArtifacts/MyArtifact.zip"),
        (
            {"path": "MyArtifacts", "name": "MyArtifact.zip", "namespaceType": "BUILD_ID"},
            {},
            f"MyArtifacts/{UUID}/MyArtifact.zip",
        ),
        ({"name": "/"}, {"packaging": "NONE"}, "a/file"),
        ({"path": "MyArtifacts", "name": "/", "namespaceType": "BUILD_ID"}, {"packaging": "NONE"}, f"MyArtifacts/{UUID}/a/file"),
        ({"path": "/p/"}, {}, "p/demo"),
        ({}, {"packaging": "NONE"}, "demo/a/file"),
        ({"name": "kept"}, {"set_name": "said/by/shell"}, "said/by/shell"),
        ({"path": "p", "namespaceType": "BUILD_ID"}, {"s3_prefix": "prefix"}, f"prefix/{UUID}/demo"),
        ({"path": "p"}, {"s3_prefix": "prefix"}, "p/demo"),
        ({"path": "p"}, {"set_name": "../../up//x"}, "p/up/x"),
        ({"name": "/"}, {}, "a/file"),
    ],
)
def test_the_key_follows_codebuilds_rule(wanted: dict[str, Any], report: dict[str, Any], key: str) -> None:
    artifacts = ProjectArtifacts.model_validate({"type": "S3", "location": "bucket", **wanted})
    assert publication.key_of(artifacts, "demo", BUILD, an_artifact("a/file", **report)) == key


def finished(db: Database, settings: Settings, store: DirectoryStore, *names: str, packaging: str = "ZIP", **more: Any) -> str:
    build_id = a_build(db, settings)
    claim = a_claim(db, settings)
    reports = []
    for name in names:
        key = staging_prefix(build_id, 1) + name
        stored = store.put(settings.bucket, key, io.BytesIO(name.encode()))
        size, sha256 = stored.size_bytes, str(stored.sha256)
        reports.append(an_artifact(name, key=key, size_bytes=size, sha256=sha256, packaging=packaging, **more))
    lifecycle.finish(db, build_id, 1, hash_token(claim.token), a_report(artifacts=tuple(reports)))
    return build_id


def read(store: DirectoryStore, bucket: str, key: str) -> bytes:
    with store.open(bucket, key) as body:
        return body.read()


def test_objects_are_copied_with_their_metadata_and_once(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases", "namespaceType": "BUILD_ID", "packaging": "ZIP"})
    build_id = finished(database, settings, store, "demo.zip")
    assert publication.publish(database, store, settings) == 1
    key = f"{uuid_of(build_id)}/demo"
    assert read(store, "releases", key) == b"demo.zip"
    stored = store.stat("releases", key)
    assert stored is not None
    assert stored.metadata["codebuild-buildarn"].endswith(f":build/{build_id}")
    assert stored.metadata["codebuild-content-sha256"] == stored.sha256
    assert publication.publish(database, store, settings) == 0
    record = queries.get_build(database, build_id)
    assert record is not None
    assert [(one.public_key, one.published) for one in record.artifacts] == [(key, True)]


def test_without_a_bucket_nothing_is_published(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database)
    finished(database, settings, store, "demo.zip")
    assert publication.publish(database, store, settings) == 0


def test_a_fenced_attempt_publishes_nothing(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases"})
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    lifecycle.request_stop(database, build_id)
    staged = an_artifact("x", key=staging_prefix(build_id, 1) + "x")
    lifecycle.finish(database, build_id, 1, hash_token(claim.token), a_report(artifacts=(staged,)))
    with pytest.raises(AttemptFenced):
        lifecycle.finish(database, build_id, 2, hash_token(claim.token), a_report())
    assert publication.publish(database, store, settings) == 0
    assert leases.expire(database) == []


class Failing(DirectoryStore):
    """A store that does not take some buckets for a while."""

    away = True

    def copy(self, bucket: str, key: str, to_bucket: str, *rest: Any, **more: Any) -> None:
        if self.away and to_bucket == "releases":
            raise InfraProblem("the store is away", reason=Reason.STORAGE)
        super().copy(bucket, key, to_bucket, *rest, **more)


def test_what_fails_is_published_later_and_holds_up_nothing_else(database: Database, settings: Settings, tmp_path: Path) -> None:
    store = Failing(str(tmp_path / "objects"), b"k" * 32)
    secondary = [{"type": "S3", "location": "others", "artifactIdentifier": "more", "name": "n", "packaging": "NONE"}]
    a_project(database, artifacts={"type": "S3", "location": "releases", "packaging": "ZIP"}, secondaryArtifacts=secondary)
    finished(database, settings, store, "one")
    finished(database, settings, store, "two", packaging="NONE", identifier="more")
    with pytest.raises(InfraProblem):
        publication.publish(database, store, settings)
    assert read(store, "others", "n/two") == b"two"
    store.away = False
    assert publication.publish(database, store, settings) == 1
    assert read(store, "releases", "demo") == b"one"


def test_an_object_that_is_gone_does_not_wait_for_ever(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases", "packaging": "ZIP"})
    build_id = finished(database, settings, store, "x")
    store.delete(settings.bucket, staging_prefix(build_id, 1) + "x")
    assert publication.publish(database, store, settings) == 1
    assert publication.publish(database, store, settings) == 0
