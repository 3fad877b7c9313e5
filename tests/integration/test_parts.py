"""Artifacts that go to a real MinIO in parts, by grants of a real API, over a link that fails."""

import hashlib
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from buildenv import layers
from buildenv.artifacts import Found, Packed, pack_file
from millrace.contract import LEAST_PART_BYTES, Grant, GrantRequest
from millrace.errors import AttemptFenced, BuildProblem, InfraProblem, InvalidInput
from millrace.settings import Settings
from millrace.storage import open_store
from millrace.storage.s3 import S3Store
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.models import Attempt, Build
from scheduler.sweeper import Sweeper
from tests.chaos.proxy import Proxy, Rule
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.minio import MinioServer, minio_server, require_program
from tests.support.records import a_build, a_claim, a_project
from worker.control import AttemptControl

pytestmark = pytest.mark.minio
DATA = secrets.token_bytes(2 * LEAST_PART_BYTES + 7)


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
def server(sqlite_database: Database, settings: Settings, minio: MinioServer, link: Proxy) -> Iterator[ApiServer]:
    where = {"url": f"http://127.0.0.1:{link.port}", "access_key": minio.access_key, "secret_key": minio.secret_key}
    with serving(sqlite_database, settings, **{f"MILLRACE_STORE_{name.upper()}": value for name, value in where.items()}) as up:
        yield up


@pytest.fixture
def settings_of_store(settings: Settings, minio: MinioServer) -> Settings:
    """Those of a scheduler that has the same store."""
    return Settings(
        data_dir=settings.data_dir,
        signing_key=settings.signing_key,
        store_url=minio.url,
        store_access_key=minio.access_key,
        store_secret_key=minio.secret_key,
    )


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    path = tmp_path / "big.bin"
    path.write_bytes(DATA)
    item = Found(path=path, name="big.bin", size_bytes=len(DATA))
    return pack_file(item, tmp_path / "packed", max_bytes=10**9, least_part_bytes=LEAST_PART_BYTES)


@pytest.fixture
def worker(server: ApiServer) -> Iterator[AttemptControl]:
    a_project(server.db)
    a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    control = AttemptControl(server.url, claim.build_id, 1, claim.token, stop=threading.Event())
    yield control
    control.close()


def granted(worker: AttemptControl, packed: Packed, **changes: object) -> Grant:
    """What the worker is given for it."""
    wanted = GrantRequest(
        kind="artifact",
        name="big.bin",
        size_bytes=packed.size_bytes,
        sha256=packed.sha256,
        part_bytes=packed.part_bytes,
        parts=packed.parts,
    )
    return worker.grant(wanted.model_copy(update=changes))


def test_parts_get_there_over_a_bad_link(
    worker: AttemptControl, link: Proxy, packed: Packed, settings_of_store: Settings
) -> None:
    grant = granted(worker, packed)
    assert len(grant.parts) == 3
    link.rules = [
        Rule(match="^PUT .*partNumber=1", times=2, status=503),
        Rule(match="^PUT .*partNumber=2", times=1, flip_up=True),
        Rule(match="^PUT .*partNumber=3", times=1, unanswered=True),
        Rule(match="^POST .*uploadId", times=1, unanswered=True),
    ]
    worker.upload(grant, packed.path, packed.sha256)
    store = open_store(settings_of_store)
    with store.open(settings_of_store.bucket, grant.key) as body:
        assert hashlib.sha256(body.read()).hexdigest() == packed.sha256
    worker.upload(granted(worker, packed), packed.path, packed.sha256)  # all of it once more, as where its word was lost


def test_what_does_not_add_up_is_refused(worker: AttemptControl, packed: Packed) -> None:
    with pytest.raises(BuildProblem, match="are not 2 parts"):
        granted(worker, packed, parts=packed.parts[:2])
    grant = granted(worker, packed)
    with pytest.raises(InfraProblem, match=r"did not put .* together"):
        worker.upload(grant.model_copy(update={"upload": "another"}), packed.path, packed.sha256)


def test_parts_of_an_attempt_that_was_lost_are_removed(
    worker: AttemptControl, server: ApiServer, packed: Packed, settings_of_store: Settings
) -> None:
    grant = granted(worker, packed)
    first = grant.parts[0]
    assert httpx.put(first.url, headers=first.headers, content=DATA[:LEAST_PART_BYTES]).status_code == 200
    with server.db.transaction() as session:
        session.execute(sa.update(Attempt).values(ended_ms=1))
    store = open_store(settings_of_store)
    sweeper = Sweeper(server.db, Bell("redis+socket:///nothing.sock"), store, settings_of_store)
    sweeper._drop_losers()
    with server.db.reading() as session:
        assert session.scalars(sa.select(Attempt.swept)).all() == [True]
    assert httpx.put(first.url, headers=first.headers, content=DATA[:LEAST_PART_BYTES]).status_code == 404
    with pytest.raises(InvalidInput):
        store.complete_parts(
            settings_of_store.bucket, grant.key, grant.upload or "", ["0" * 32], size_bytes=1, sha256=packed.sha256
        )


def begun(settings: Settings, key: str) -> list[str]:
    """The uploads that MinIO knows of this key."""
    store = open_store(settings)
    assert isinstance(store, S3Store)
    return [str(one.upload_id) for one in store._client._list_multipart_uploads(settings.bucket, prefix=key).uploads]


def test_what_was_begun_for_an_attempt_that_was_fenced_before_it_was_noted_is_removed(
    worker: AttemptControl, server: ApiServer, packed: Packed, settings_of_store: Settings
) -> None:
    completed = granted(worker, packed)
    store = open_store(settings_of_store)
    lost = store.begin_parts(settings_of_store.bucket, completed.key, sha256=packed.sha256)  # and nobody came to note it
    worker.upload(completed, packed.path, packed.sha256)
    assert begun(settings_of_store, completed.key) == [lost]
    with server.db.transaction() as session:
        assert session.scalar(sa.select(Attempt.in_parts)) == [[completed.key, ""], [completed.key, completed.upload]]
        session.execute(sa.update(Attempt).values(ended_ms=1))
    Sweeper(server.db, Bell("redis+socket:///nothing.sock"), store, settings_of_store)._drop_losers()
    assert begun(settings_of_store, completed.key) == []
    with server.db.reading() as session:
        assert session.scalars(sa.select(Attempt.swept)).all() == [True]


def test_a_fence_between_beginning_and_noting_leaves_a_record_of_the_key(
    server: ApiServer, packed: Packed, settings_of_store: Settings, link: Proxy
) -> None:
    """The attempt loses its build while the store begins the upload."""
    a_project(server.db)
    a_build(server.db, server.settings)
    claim = a_claim(server.db, server.settings)
    control = AttemptControl(server.url, claim.build_id, 1, claim.token, stop=threading.Event())
    link.rules = [Rule(match="^POST .*uploads", times=1, late_s=2)]
    asked: list[object] = []

    def ask() -> None:
        try:
            asked.append(granted(control, packed))
        except AttemptFenced as error:
            asked.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: _in_parts(server.db), 20)
    with server.db.transaction() as session:
        session.execute(sa.update(Attempt).values(ended_ms=1))
        session.execute(sa.update(Build).values(attempt_no=2))
    asking.join()
    control.close()
    assert [type(one) for one in asked] == [AttemptFenced]
    ((noted, name),) = _in_parts(server.db)
    assert name == ""
    assert len(begun(settings_of_store, noted)) == 1
    store = open_store(settings_of_store)
    Sweeper(server.db, Bell("redis+socket:///nothing.sock"), store, settings_of_store)._drop_losers()
    assert begun(settings_of_store, noted) == []


def _in_parts(db: Database) -> list[list[str]]:
    with db.reading() as session:
        return list(session.scalar(sa.select(Attempt.in_parts)) or [])


def test_a_layer_of_a_cache_gets_there_in_parts(worker: AttemptControl, settings_of_store: Settings, tmp_path: Path) -> None:
    (tmp_path / "root" / "source" / "deps").mkdir(parents=True)
    (tmp_path / "root" / "source" / "deps" / "big").write_bytes(DATA)
    made = layers.pack(tmp_path / "root", ["source/deps"], tmp_path / "layer", max_bytes=10**9, least_part_bytes=LEAST_PART_BYTES)
    assert len(made.parts) == 3
    wanted = GrantRequest(
        kind="cache",
        name="saved.tar.zst",
        size_bytes=made.size_bytes,
        sha256=made.sha256,
        part_bytes=made.part_bytes,
        parts=made.parts,
    )
    grant = worker.grant(wanted)
    assert grant.key.startswith("caches/") and len(grant.parts) == 3
    worker.upload(grant, made.path, made.sha256, brief=True)
    with open_store(settings_of_store).open(settings_of_store.bucket, grant.key) as body:
        assert hashlib.sha256(body.read()).hexdigest() == made.sha256
