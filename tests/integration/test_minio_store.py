"""S3Store against a MinIO server that is away, comes back, or refuses; and its own signatures against the SDK of AWS."""

import io
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from millrace.errors import InfraProblem
from millrace.settings import load
from millrace.storage import open_store
from millrace.storage.s3 import S3Store
from millrace.vocabulary import Reason
from tests.support.minio import MinioServer, minio_server, require_program

pytestmark = pytest.mark.minio
BUCKET = "outage"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MinioServer]:
    require_program()
    with minio_server(tmp_path) as running:
        yield running


def store_of(server: MinioServer, secret_key: str | None = None) -> S3Store:
    store = open_store(
        load(
            {
                "MILLRACE_STORE_URL": server.url,
                "MILLRACE_STORE_ACCESS_KEY": server.access_key,
                "MILLRACE_STORE_SECRET_KEY": secret_key or server.secret_key,
                "MILLRACE_BUCKET": BUCKET,
            }
        )
    )
    assert isinstance(store, S3Store)
    return store


def test_a_store_that_is_away_is_our_fault_and_works_again_when_it_is_back(server: MinioServer) -> None:
    store = store_of(server)
    store.check()
    store.put(BUCKET, "k", io.BytesIO(b"kept"))
    server.stop()
    for attempt in (
        store.check,
        lambda: store.put(BUCKET, "k", io.BytesIO(b"lost")),
        lambda: store.stat(BUCKET, "k"),
        lambda: list(store.list(BUCKET, "")),
        lambda: store.delete(BUCKET, "k"),
        lambda: store.open(BUCKET, "k").__enter__(),
    ):
        with pytest.raises(InfraProblem) as caught:
            attempt()
        assert caught.value.reason is Reason.STORAGE
        assert caught.value.hint
    server.start()
    store.check()
    with store.open(BUCKET, "k") as body:
        assert body.read() == b"kept"


def test_a_short_outage_is_survived_by_trying_again(server: MinioServer) -> None:
    store = store_of(server)
    store.put(BUCKET, "first", io.BytesIO(b"x"))
    server.stop()
    back = threading.Timer(0.1, server.start)
    back.start()
    ended = time.monotonic() + 30
    try:
        while True:
            try:
                store.put(BUCKET, "second", io.BytesIO(b"y" * 1000))
                break
            except InfraProblem:
                assert time.monotonic() < ended
    finally:
        back.join()
    with store.open(BUCKET, "second") as body:
        assert body.read() == b"y" * 1000


def test_wrong_keys_are_found_by_the_check(server: MinioServer) -> None:
    with pytest.raises(InfraProblem) as caught:
        store_of(server, secret_key="wrong-wrong-wrong").check()
    assert caught.value.reason is Reason.STORAGE
    assert "wrong-wrong" not in caught.value.message


def test_a_store_that_goes_away_in_the_middle_of_a_body_is_our_fault(server: MinioServer) -> None:
    store = store_of(server)
    store.put(BUCKET, "big", io.BytesIO(secrets.token_bytes(64 * 1024**2)))
    with pytest.raises(InfraProblem) as caught, store.open(BUCKET, "big") as body:
        assert body.read(1000)
        server.stop()
        while body.read(1024**2):
            pass
    assert caught.value.reason is Reason.STORAGE


def test_a_grant_runs_out(server: MinioServer) -> None:
    store = store_of(server)
    store.put(BUCKET, "k", io.BytesIO(b"x"))
    grant = store.presign("GET", BUCKET, "k", expires_in_s=1)
    put = store.presign("PUT", BUCKET, "k", expires_in_s=1, size_bytes=1, sha256="0" * 64)
    end = time.monotonic() + 10
    while httpx.get(grant.url).status_code != 403:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert httpx.put(put.url, headers=put.headers, content=b"x").status_code == 403


def test_a_grant_signs_all_its_headers_just_as_the_sdk_of_aws_does(server: MinioServer) -> None:
    store = store_of(server)
    url = f"{server.url}/{BUCKET}/a%20b/k"
    headers = {"Content-Length": "3", "x-amz-meta-sha256": "ab" * 32, "x-amz-checksum-sha256": "q6urqw=="}
    request = AWSRequest(method="PUT", url=url, headers=headers)
    S3SigV4QueryAuth(Credentials(server.access_key, server.secret_key), "s3", "us-east-1", expires=60).add_auth(request)
    theirs = httpx.URL(request.prepare().url)
    now = datetime.strptime(theirs.params["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    ours = httpx.URL(store._signed(url, headers, 60, now))
    assert dict(ours.params) == dict(theirs.params)
    assert ours.path == theirs.path


def test_what_is_too_large_for_one_copy_is_copied_in_parts(server: MinioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minio.api.MAX_PART_SIZE", 5 * 1024**2)  # in truth 5 GiB, S3's limit for one copy
    store = store_of(server)
    body = secrets.token_bytes(12 * 1024**2)
    stored = store.put(BUCKET, "large", io.BytesIO(body))
    store.copy(BUCKET, "large", "releases", "large.zip", metadata={"codebuild-buildarn": "arn"})
    copied = store.stat("releases", "large.zip")
    assert copied is not None
    assert (copied.sha256, dict(copied.metadata)) == (stored.sha256, {"codebuild-buildarn": "arn"})
    with store.open("releases", "large.zip") as read:
        assert read.read() == body
