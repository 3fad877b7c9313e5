"""How a worker moves bytes to and from a real MinIO whose link fails in every way."""

import hashlib
import io
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio.credentials import StaticProvider

from millrace.contract import Grant
from millrace.errors import BuildStopped, InfraProblem
from millrace.storage.s3 import S3Store
from millrace.vocabulary import Reason
from tests.chaos.proxy import Faults, Proxy, Rule
from tests.support.minio import MinioServer, minio_server, require_program
from worker.control import AttemptControl

pytestmark = pytest.mark.minio
BUCKET = "moving"
DATA = secrets.token_bytes(3 * 1024**2)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    require_program()
    with minio_server(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture
def link(minio: MinioServer) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", minio.port), http=True) as proxy:
        yield proxy


@pytest.fixture
def store(minio: MinioServer, link: Proxy) -> S3Store:
    return S3Store(
        f"127.0.0.1:{link.port}",
        keys=StaticProvider(minio.access_key, minio.secret_key),
        region="us-east-1",
        secure=False,
        bucket=BUCKET,
    )


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def worker(stop: threading.Event) -> Iterator[AttemptControl]:
    control = AttemptControl("http://127.0.0.1:9", "demo:x", 1, "token", stop=stop)
    yield control
    control.close()


@pytest.fixture
def got(tmp_path: Path) -> Path:
    return tmp_path / "got"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


def a_put(store: S3Store, key: str) -> Grant:
    return store.presign("PUT", BUCKET, key, expires_in_s=900, size_bytes=len(DATA), sha256=SHA256)


def a_get(store: S3Store, key: str) -> Grant:
    store.put(BUCKET, key, io.BytesIO(DATA))
    return store.presign("GET", BUCKET, key, expires_in_s=900)


def stored(store: S3Store, key: str) -> bytes:
    with store.open(BUCKET, key) as body:
        return body.read()


def test_an_upload_gets_there_whatever_the_link_did_before(
    store: S3Store, link: Proxy, worker: AttemptControl, file: Path
) -> None:
    grant = a_put(store, "up")
    link.rules = [
        Rule(match="^PUT", times=1, status=503),
        Rule(match="^PUT", times=1, status=500),
        Rule(match="^PUT", times=1, flip_up=True),
        Rule(match="^PUT", times=1, unanswered=True),
    ]
    worker.upload(grant, file, SHA256)
    assert sum(request.startswith("PUT") for request in link.requests) >= 5  # a connection that was cut just then costs one more
    assert stored(store, "up") == DATA


def test_an_upload_survives_a_store_that_refuses_for_a_while(
    store: S3Store, link: Proxy, worker: AttemptControl, file: Path
) -> None:
    grant = a_put(store, "away")
    link.faults = Faults(refuse=True)
    back = threading.Timer(2, link.heal)
    back.start()
    worker.upload(grant, file, SHA256)
    back.join()
    assert stored(store, "away") == DATA


def test_an_upload_that_waits_for_the_store_ends_when_the_build_is_stopped(
    store: S3Store, link: Proxy, worker: AttemptControl, file: Path, stop: threading.Event
) -> None:
    grant = a_put(store, "stopped")
    link.faults = Faults(refuse=True)
    threading.Timer(1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(BuildStopped):
        worker.upload(grant, file, SHA256)
    assert time.monotonic() - began < 15


def test_an_upload_ends_with_the_time_of_its_build(store: S3Store, link: Proxy, file: Path) -> None:
    grant = a_put(store, "late")
    link.faults = Faults(refuse=True)
    worker = AttemptControl("http://127.0.0.1:9", "demo:x", 1, "token", deadline_in_s=1)
    with pytest.raises(BuildStopped) as caught:
        worker.upload(grant, file, SHA256)
    worker.close()
    assert caught.value.reason is Reason.TIMEOUT


def test_a_download_that_breaks_off_goes_on_where_it_did(store: S3Store, link: Proxy, worker: AttemptControl, got: Path) -> None:
    grant = a_get(store, "down")
    link.requests.clear()
    link.rules = [Rule(match="^GET", times=1, truncate=0.5), Rule(match="^GET", times=1, truncate=0.5)]
    passed = link.passed_down
    worker.download(grant, got)
    assert got.read_bytes() == DATA
    assert len(link.requests) == 3
    assert link.passed_down - passed < len(DATA) * 1.01


def test_an_object_that_comes_with_wrong_bytes_is_asked_for_again(
    store: S3Store, link: Proxy, worker: AttemptControl, got: Path
) -> None:
    grant = a_get(store, "flipped")
    link.rules = [Rule(match="^GET", times=1, flip=True), Rule(match="^GET", times=1, shorten=0.9)]
    worker.download(grant, got)
    assert got.read_bytes() == DATA


def test_an_object_that_always_comes_with_wrong_bytes_is_given_up_soon(
    store: S3Store, link: Proxy, worker: AttemptControl, got: Path
) -> None:
    grant = a_get(store, "wrong")
    link.rules = [Rule(match="^GET", flip=True)]
    with pytest.raises(InfraProblem, match="other bytes than were stored") as caught:
        worker.download(grant, got)
    assert caught.value.reason is Reason.STORAGE


def test_what_breaks_off_on_its_way_into_the_store_leaves_nothing_there(store: S3Store, link: Proxy) -> None:
    store.check()
    link.faults = Faults(cut_up_after=8 * 1024**2)
    with pytest.raises(InfraProblem):
        store.put(BUCKET, "broken", io.BytesIO(DATA * 4))
    link.heal()
    assert store.stat(BUCKET, "broken") is None
    assert not store._client._list_multipart_uploads(BUCKET, prefix="broken").uploads  # MinIO tells of those with the whole key


def test_the_store_takes_no_bytes_that_changed_on_their_way(store: S3Store, link: Proxy) -> None:
    store.check()
    link.rules = [Rule(match="^PUT .*changed", flip_up=True, times=1)]
    store.put(BUCKET, "changed", io.BytesIO(DATA))
    assert stored(store, "changed") == DATA
    assert sum("PUT" in request and "changed" in request for request in link.requests) == 2
