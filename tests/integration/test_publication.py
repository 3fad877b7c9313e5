"""Artifacts reach the bucket that their project names, under CodeBuild's keys, whole, once, and only of the winning attempt."""

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api import render
from millrace.contract import ArtifactReport
from millrace.errors import AttemptFenced, InfraProblem
from millrace.ids import staging_prefix, uuid_of
from millrace.project import ProjectArtifacts
from millrace.settings import Settings
from millrace.storage.directory import DirectoryStore
from millrace.vocabulary import Reason
from scheduler import leases, lifecycle, publication, queries
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.leases import hash_token
from scheduler.sweeper import Sweeper
from tests.support.farm import wait_until
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
        ({"name": "kept", "overrideArtifactName": True}, {"set_name": "said/by/shell"}, "said/by/shell"),
        ({"name": "kept"}, {"set_name": "said/by/shell"}, "kept"),
        ({"name": "", "path": ""}, {}, "demo"),
        ({"path": "p", "name": "/"}, {}, "p"),
        ({"path": "p", "namespaceType": "BUILD_ID"}, {"s3_prefix": "prefix"}, f"prefix/{UUID}/demo"),
        ({"path": "p"}, {"s3_prefix": "prefix"}, "p/demo"),
        ({"path": "p", "overrideArtifactName": True}, {"set_name": "../../up//x"}, "p/up/x"),
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


def publish(db: Database, store: DirectoryStore, settings: Settings) -> int:
    return publication.Publisher(db, store, settings).publish()


def read(store: DirectoryStore, bucket: str, key: str) -> bytes:
    with store.open(bucket, key) as body:
        return body.read()


def test_objects_are_copied_with_their_metadata_and_once(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases", "namespaceType": "BUILD_ID", "packaging": "ZIP"})
    build_id = finished(database, settings, store, "demo.zip")
    assert publish(database, store, settings) == 1
    key = f"{uuid_of(build_id)}/demo"
    assert read(store, "releases", key) == b"demo.zip"
    stored = store.stat("releases", key)
    assert stored is not None
    assert stored.metadata["codebuild-buildarn"].endswith(f":build/{build_id}")
    assert stored.metadata["codebuild-content-sha256"] == stored.sha256
    assert publish(database, store, settings) == 0
    record = queries.get_build(database, build_id)
    assert record is not None
    assert [(one.public_key, one.published) for one in record.artifacts] == [(key, True)]


def test_without_a_bucket_nothing_is_published(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database)
    finished(database, settings, store, "demo.zip")
    assert publish(database, store, settings) == 0


def test_a_fenced_attempt_publishes_nothing(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases"})
    build_id = a_build(database, settings)
    claim = a_claim(database, settings)
    lifecycle.request_stop(database, build_id)
    staged = an_artifact("x", key=staging_prefix(build_id, 1) + "x")
    lifecycle.finish(database, build_id, 1, hash_token(claim.token), a_report(artifacts=(staged,)))
    with pytest.raises(AttemptFenced):
        lifecycle.finish(database, build_id, 2, hash_token(claim.token), a_report())
    assert publish(database, store, settings) == 0
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
        publish(database, store, settings)
    assert read(store, "others", "n/two") == b"two"
    store.away = False
    assert publish(database, store, settings) == 1
    assert read(store, "releases", "demo") == b"one"


def listed(db: Database, build_id: str) -> list[dict[str, Any]]:
    record = queries.get_build(db, build_id)
    assert record is not None
    return [dict(one) for one in render.artifacts(record.artifacts)]


def test_what_can_never_be_published_is_said_and_not_tried_again(
    database: Database, settings: Settings, store: DirectoryStore
) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases", "path": "p" * 250, "packaging": "NONE"})
    gone = finished(database, settings, store, "x", packaging="NONE")
    store.delete(settings.bucket, staging_prefix(gone, 1) + "x")
    long = finished(database, settings, store, "/".join(["y" * 200] * 4), packaging="NONE")
    assert publish(database, store, settings) == 1
    assert publish(database, store, settings) == 0
    (first,), (second,) = listed(database, gone), listed(database, long)
    assert (first["published"], first["publicationProblem"]) == (None, "it is no longer in the farm's bucket")
    assert second["published"] is None
    assert "more than 1024 bytes" in second["publicationProblem"]


def test_the_farms_own_bucket_is_never_written(database: Database, settings: Settings, store: DirectoryStore) -> None:
    a_project(database, artifacts={"type": "S3", "location": settings.bucket, "path": "uploads", "packaging": "ZIP"})
    build_id = finished(database, settings, store, "x")
    publish(database, store, settings)
    assert store.stat(settings.bucket, "uploads/demo") is None
    (only,) = listed(database, build_id)
    assert "the farm's own bucket" in only["publicationProblem"]


def test_an_address_belongs_to_the_build_that_ended_last(database: Database, settings: Settings, tmp_path: Path) -> None:
    store = Failing(str(tmp_path / "objects"), b"k" * 32)
    a_project(database, artifacts={"type": "S3", "location": "releases", "packaging": "ZIP"})
    older = finished(database, settings, store, "old")
    with pytest.raises(InfraProblem):
        publish(database, store, settings)
    store.away = False
    newer = finished(database, settings, store, "new")
    assert publish(database, store, settings) == 1
    assert read(store, "releases", "demo") == b"new"
    (old,), (new,) = listed(database, older), listed(database, newer)
    assert (old["published"], old["publicationProblem"]) == (None, f"replaced by build {newer}")
    assert new["published"] == "s3://releases/demo"


class Overtaken(DirectoryStore):
    """A store whose first copy is so slow that another build ends, and is published, before it is through."""

    meanwhile: Callable[[], object] | None = None

    def copy(self, *args: Any, **more: Any) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        super().copy(*args, **more)


def test_a_copy_that_is_overtaken_is_made_good(database: Database, settings: Settings, tmp_path: Path) -> None:
    store = Overtaken(str(tmp_path / "objects"), b"k" * 32)
    a_project(database, artifacts={"type": "S3", "location": "releases", "packaging": "ZIP"})
    finished(database, settings, store, "old")

    def another() -> None:
        finished(database, settings, store, "new")
        assert publish(database, store, settings) == 1
        assert read(store, "releases", "demo") == b"new"

    store.meanwhile = another
    publish(database, store, settings)
    assert read(store, "releases", "demo") == b"old"
    assert publish(database, store, settings) == 1
    assert read(store, "releases", "demo") == b"new"
    assert publish(database, store, settings) == 0


def test_artifacts_of_one_build_at_one_address_are_told_apart(
    database: Database, settings: Settings, store: DirectoryStore
) -> None:
    a_project(database, artifacts={"type": "S3", "location": "releases", "packaging": "ZIP"})
    build_id = finished(database, settings, store, "one", "two")
    assert publish(database, store, settings) == 1
    assert read(store, "releases", "demo") == b"two"
    assert [one["published"] for one in listed(database, build_id)] == [None, "s3://releases/demo"]


def test_much_is_left_to_the_scheduler_which_goes_on_sweeping_meanwhile(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    store = Overtaken(str(tmp_path / "objects"), b"k" * 32)
    a_project(sqlite_database, artifacts={"type": "S3", "location": "releases", "packaging": "NONE"})
    names = [f"file-{number}" for number in range(51)]
    build_id = finished(sqlite_database, settings, store, *names, packaging="NONE")
    publication.publish_soon(sqlite_database, store, settings, build_id)
    assert store.stat("releases", "demo/file-0") is None
    blocked = threading.Event()
    store.meanwhile = blocked.wait
    sweeper = Sweeper(sqlite_database, Bell(f"redis+socket://{settings.home}/nothing.sock"), store, settings)
    assert sweeper.sweep()
    assert sweeper.sweep(), "while a copy hangs"
    blocked.set()
    wait_until(lambda: not publication.Publisher(sqlite_database, store, settings).due())
    assert all(read(store, "releases", f"demo/{name}") == name.encode() for name in names)
