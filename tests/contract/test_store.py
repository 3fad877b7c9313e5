"""What every object store must do: a directory, and S3 on a real MinIO server."""

import hashlib
import io
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import httpx
import pytest
from minio.credentials import Provider, StaticProvider

from millrace.contract import Grant
from millrace.errors import Forbidden, InfraProblem, InvalidInput
from millrace.storage import Store, check_key, pieces
from millrace.storage.directory import DirectoryStore, read_token
from millrace.storage.keys import RoleKeys
from millrace.storage.s3 import S3Store
from millrace.vocabulary import Reason
from tests.support.minio import MinioServer, minio_server, require_program
from tests.support.rolekeys import task_role, temporary_keys

KEY = b"k" * 32


@dataclass
class Case:
    """A store, and what a test must know of it: a bucket of its own, and how a grant is used."""

    store: Store
    bucket: str
    minio: MinioServer | None

    def put(self, key: str, data: bytes, *, sha256: str | None = None, size_bytes: int | None = None) -> None:
        """Store bytes."""
        self.store.put(self.bucket, key, io.BytesIO(data), size_bytes=size_bytes, sha256=sha256)

    def get(self, key: str, offset: int = 0) -> bytes:
        """Read them again."""
        with self.store.open(self.bucket, key, offset=offset) as body:
            return body.read()

    def use(self, grant: Grant, body: bytes | None = None) -> tuple[int, bytes]:
        """Do what a grant allows, as its holder would, or one who sends something else: status and body."""
        if self.minio is not None:
            length = {"Content-Length": str(len(body))} if body is not None else {}
            answer = httpx.request(grant.method, grant.url, content=body, headers=grant.headers | length)
            return answer.status_code, answer.content
        granted = read_token(KEY, grant.url.removeprefix("/objects/"), grant.method)  # what the API's route does
        try:
            if granted.method == "GET":
                with self.store.open(granted.bucket, granted.key) as stored:
                    return 200, stored.read()
            self.store.put(
                granted.bucket, granted.key, io.BytesIO(body or b""), size_bytes=granted.size_bytes, sha256=granted.sha256
            )
        except InvalidInput:
            return 422, b""
        return 200, b""


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    require_program()
    with minio_server(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(params=["directory", *(pytest.param(name, marks=pytest.mark.minio) for name in ("s3", "s3-by-role"))])
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    bucket = f"test-{secrets.token_hex(6)}"
    if request.param == "directory":
        yield Case(DirectoryStore(tmp_path / "objects", KEY), bucket, None)
        return
    server: MinioServer = request.getfixturevalue("minio")
    if request.param == "s3":
        yield Case(s3(server, bucket), bucket, server)
        return
    with task_role(temporary_keys(server)) as address:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
        yield Case(s3(server, bucket, keys=RoleKeys()), bucket, server)


def s3(server: MinioServer, bucket: str, *, keys: Provider | None = None) -> S3Store:
    return S3Store(
        f"127.0.0.1:{server.port}",
        keys=keys or StaticProvider(server.access_key, server.secret_key),
        region="us-east-1",
        secure=False,
        bucket=bucket,
    )


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Chopped:
    """A body that comes in small pieces, as from a network."""

    def __init__(self, data: bytes, piece: int = 10) -> None:
        self._file, self._piece = io.BytesIO(data), piece

    def read(self, size: int = -1) -> bytes:
        return self._file.read(self._piece if size < 0 else min(size, self._piece))


class Breaking:
    """A body whose sender goes away in the middle."""

    def __init__(self) -> None:
        self._first = True

    def read(self, size: int = -1) -> bytes:
        if self._first:
            self._first = False
            return b"half"
        raise ConnectionResetError("the sender went away")


def test_what_was_put_is_read_again_with_size_hash_and_notes(case: Case) -> None:
    data = b"hello \x00\xff" * 1000
    put = case.store.put(case.bucket, "a/b.bin", io.BytesIO(data), metadata={"build": "p:1"})
    seen = case.store.stat(case.bucket, "a/b.bin")
    assert seen == put
    assert (put.size_bytes, put.sha256, dict(put.metadata)) == (len(data), sha(data), {"build": "p:1"})
    assert case.get("a/b.bin") == data
    assert case.get("a/b.bin", offset=7) == data[7:]


def test_an_empty_object_is_an_object(case: Case) -> None:
    case.put("empty", b"", size_bytes=0, sha256=sha(b""))
    seen = case.store.stat(case.bucket, "empty")
    assert seen is not None
    assert (seen.size_bytes, seen.sha256) == (0, sha(b""))
    assert case.get("empty") == b""


def test_an_offset_at_or_beyond_the_end_reads_nothing(case: Case) -> None:
    case.put("k", b"1234")
    assert case.get("k", offset=4) == b""
    assert case.get("k", offset=400) == b""


def test_a_body_in_small_pieces_and_larger_than_memory_is_kept_whole(case: Case) -> None:
    data = secrets.token_bytes(1024) * 9 * 1024
    case.store.put(case.bucket, "big", cast(BinaryIO, Chopped(data, 100_000)))
    with case.store.open(case.bucket, "big") as body:
        assert b"".join(pieces(body, sha256=sha(data), size_bytes=len(data), what="big")) == data


def test_a_second_put_replaces_the_first(case: Case) -> None:
    case.put("k", b"first, and longer")
    case.put("k", b"second")
    seen = case.store.stat(case.bucket, "k")
    assert seen is not None
    assert (case.get("k"), seen.sha256, seen.size_bytes) == (b"second", sha(b"second"), 6)


@pytest.mark.parametrize("announced", [{"sha256": sha(b"other")}, {"size_bytes": 3}, {"size_bytes": 5}])
def test_a_body_that_is_not_what_was_announced_leaves_what_was_there(case: Case, announced: dict[str, int | str]) -> None:
    case.put("k", b"good")
    with pytest.raises(InvalidInput, match="announced"):
        case.store.put(case.bucket, "k", io.BytesIO(b"evil"), **announced)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="announced"):
        case.store.put(case.bucket, "new", io.BytesIO(b"evil"), **announced)  # type: ignore[arg-type]
    assert case.get("k") == b"good"
    assert [stored.key for stored in case.store.list(case.bucket, "")] == ["k"]


def test_a_body_that_breaks_off_leaves_nothing(case: Case) -> None:
    with pytest.raises((InfraProblem, ConnectionResetError)):
        case.store.put(case.bucket, "k", cast(BinaryIO, Breaking()))
    assert case.store.stat(case.bucket, "k") is None
    assert list(case.store.list(case.bucket, "")) == []


def test_what_is_not_there_is_said_plainly(case: Case) -> None:
    for again in range(2):
        with pytest.raises(FileNotFoundError), case.store.open(case.bucket, "none"):
            pass
        with pytest.raises(FileNotFoundError), case.store.open(case.bucket, "none", offset=5):
            pass
        assert case.store.stat(case.bucket, "none") is None
        assert list(case.store.list(case.bucket, "n")) == []
        assert case.store.delete_prefix(case.bucket, "n") == 0
        case.store.delete(case.bucket, "none")
        if not again:
            case.put("other/x", b"now there is a bucket")


def test_a_folder_of_objects_is_no_object(case: Case) -> None:
    case.put("a/b", b"x")
    assert case.store.stat(case.bucket, "a") is None
    with pytest.raises(FileNotFoundError), case.store.open(case.bucket, "a"):
        pass
    case.store.delete(case.bucket, "a")
    assert case.get("a/b") == b"x"


def test_listing_is_by_key_and_prefix_text(case: Case) -> None:
    for key in ("logs/2", "logs/1", "logs/10", "logs2/1", "log", "logs/ü/x", "logs/1.json"):
        case.put(key, key.encode())
    assert [o.key for o in case.store.list(case.bucket, "logs/")] == [
        "logs/1",
        "logs/1.json",
        "logs/10",
        "logs/2",
        "logs/ü/x",
    ]
    assert [o.key for o in case.store.list(case.bucket, "logs/1")] == ["logs/1", "logs/1.json", "logs/10"]
    assert [o.size_bytes for o in case.store.list(case.bucket, "log")][:1] == [3]
    assert len(list(case.store.list(case.bucket, ""))) == 7
    for hostile in ("/etc/", "../", "logs/../"):
        assert list(case.store.list(case.bucket, hostile)) == []


def test_deleting_removes_just_that_and_may_be_done_twice(case: Case) -> None:
    for key in ("a/1", "a/2", "ab", "b/1"):
        case.put(key, b"x")
    case.store.delete(case.bucket, "a/1")
    case.store.delete(case.bucket, "a/1")
    assert [o.key for o in case.store.list(case.bucket, "")] == ["a/2", "ab", "b/1"]
    assert case.store.delete_prefix(case.bucket, "a") == 2
    assert case.store.delete_prefix(case.bucket, "a") == 0
    assert [o.key for o in case.store.list(case.bucket, "")] == ["b/1"]


def test_a_prefix_of_more_than_a_thousand_objects_goes_whole(case: Case) -> None:
    for number in range(1005):
        case.put(f"many/{number:04}", b"")
    assert len(list(case.store.list(case.bucket, "many/"))) == 1005
    assert case.store.delete_prefix(case.bucket, "many/") == 1005
    assert list(case.store.list(case.bucket, "")) == []


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", "a/./b", "a\0b", "a\nb", "a\x7f", "x" * 256, "\ud800"],
)
def test_a_key_that_could_mean_another_place_is_refused(case: Case, key: str) -> None:
    for attempt in (
        lambda: case.put(key, b"x"),
        lambda: case.get(key),
        lambda: case.store.stat(case.bucket, key),
        lambda: case.store.delete(case.bucket, key),
        lambda: case.store.presign("GET", case.bucket, key, expires_in_s=5),
    ):
        with pytest.raises(InvalidInput):
            attempt()


@pytest.mark.parametrize(
    "bucket", ["", ".", "..", ".meta", ".tmp", "A", "ab", "a/b", "a_b", "x" * 64, "192.168.0.1", "a..b", "a\0b", "-ab"]
)
def test_a_bucket_has_a_name_that_s3_would_take(case: Case, bucket: str) -> None:
    for attempt in (
        lambda: case.store.put(bucket, "k", io.BytesIO(b"")),
        lambda: case.store.stat(bucket, "k"),
        lambda: list(case.store.list(bucket, "")),
        lambda: case.store.delete_prefix(bucket, ""),
        lambda: case.store.presign("PUT", bucket, "k", expires_in_s=5),
    ):
        with pytest.raises(InvalidInput):
            attempt()


@pytest.mark.parametrize(
    "key", ["a b+c%20d?e#f&g=h", "ü/日本/🦀", "x" * 255, "a.json", ".hidden/.meta", "-rf", "a\\b", "~", "a*?[b]", "'\"<>|;$(x)"]
)
def test_odd_but_honest_keys_work_everywhere(case: Case, key: str) -> None:
    data = key.encode()
    case.put(key, data)
    assert case.get(key) == data
    assert [o.key for o in case.store.list(case.bucket, key[:2])] == [key]
    got = case.store.presign("GET", case.bucket, key, expires_in_s=60)
    assert case.use(got) == (200, data)
    put = case.store.presign("PUT", case.bucket, key, expires_in_s=60, size_bytes=3, sha256=sha(b"new"))
    assert case.use(put, b"new")[0] == 200
    assert case.get(key) == b"new"
    case.store.delete(case.bucket, key)
    assert case.store.stat(case.bucket, key) is None


def test_two_keys_are_never_the_same_object(case: Case) -> None:
    keys = ["a", "A", "a.json", "b/c", "b/c.json", "b.json/c", "é", "e\u0301", "a%2Fb"]
    for key in keys:
        case.put(key, key.encode())
    assert [case.get(key) for key in keys] == [key.encode() for key in keys]
    notes = [case.store.stat(case.bucket, key) for key in keys]
    assert [note.sha256 for note in notes if note] == [sha(key.encode()) for key in keys]


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c/d")])
def test_a_key_that_is_both_object_and_folder_is_refused_or_kept_apart(case: Case, first: str, second: str) -> None:
    case.put(first, b"first")
    try:
        case.put(second, b"second")
    except InvalidInput as error:
        assert "part of it is an object" in error.message
        assert case.store.stat(case.bucket, second) is None
    else:
        assert case.get(second) == b"second"
    assert case.get(first) == b"first"


def test_a_grant_puts_just_the_announced_bytes(case: Case) -> None:
    data = b"artifact"
    grant = case.store.presign("PUT", case.bucket, "g/a", expires_in_s=60, size_bytes=len(data), sha256=sha(data))
    assert (grant.method, grant.key, grant.expires_in_s) == ("PUT", "g/a", 60)
    assert case.use(grant, b"artifacT")[0] >= 400
    assert case.use(grant, b"artifact and more")[0] >= 400
    assert case.store.stat(case.bucket, "g/a") is None
    assert case.use(grant, data)[0] == 200
    assert case.use(grant, data)[0] == 200, "a PUT may be sent twice"
    seen = case.store.stat(case.bucket, "g/a")
    assert seen is not None
    assert (seen.sha256, seen.size_bytes, case.get("g/a")) == (sha(data), len(data), data)


def test_a_grant_to_get_is_for_that_object_only(case: Case) -> None:
    case.put("mine", b"mine")
    case.put("yours", b"yours")
    grant = case.store.presign("GET", case.bucket, "mine", expires_in_s=60)
    assert case.use(grant) == (200, b"mine")
    if case.minio is None:
        with pytest.raises(Forbidden):
            read_token(KEY, grant.url.removeprefix("/objects/"), "PUT")
    else:
        assert httpx.put(grant.url, content=b"x").status_code == 403
        assert httpx.get(grant.url.replace("/mine?", "/yours?")).status_code == 403
    assert case.get("mine") == b"mine"


def test_many_writers_of_one_key_leave_one_of_their_objects_whole(case: Case) -> None:
    bodies = [bytes([65 + number]) * 5000 for number in range(8)]
    failed: list[Exception] = []

    def write(body: bytes) -> None:
        try:
            for _ in range(5):
                case.put("deep/er/k", body)
                case.store.delete(case.bucket, f"deep/er/other-{body[:1].decode()}")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    seen, data = case.store.stat(case.bucket, "deep/er/k"), case.get("deep/er/k")
    assert data in bodies
    assert seen is not None
    assert seen.sha256 == sha(data)


def test_writing_and_emptying_the_same_folder_at_once_loses_nothing(case: Case) -> None:
    failed: list[Exception] = []

    def churn(name: str) -> None:
        try:
            for _ in range(25):
                case.put(f"shared/{name}", b"x")
                case.store.delete(case.bucket, f"shared/{name}")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=churn, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert list(case.store.list(case.bucket, "")) == []


def test_a_healthy_store_passes_its_check(case: Case) -> None:
    case.store.check()
    case.store.check()


@pytest.mark.parametrize(("sha256", "size_bytes"), [("0" * 64, 4), (sha(b"data"), 5), (sha(b"data"), 3)])
def test_damage_shows_when_an_object_is_read(case: Case, sha256: str, size_bytes: int) -> None:
    case.put("k", b"data")
    with case.store.open(case.bucket, "k") as body, pytest.raises(InfraProblem, match="damaged") as caught:
        list(pieces(body, sha256=sha256, size_bytes=size_bytes, what="artifact k"))
    assert caught.value.reason is Reason.STORAGE


def test_a_key_has_at_most_1024_bytes(case: Case) -> None:
    with pytest.raises(InvalidInput, match="1024"):
        case.put("/".join(["x" * 200] * 6), b"")


def test_keys_and_buckets_of_our_own_making_are_fine() -> None:
    check_key("millrace", "artifacts/0b8f6a4e-0000-4000-8000-000000000000/1/app.zip")


def test_a_copy_is_the_same_object_with_metadata_of_its_own(case: Case) -> None:
    store = case.store
    stored = store.put(case.bucket, "from/here", io.BytesIO(b"body"), metadata={"old": "1"})
    store.put(f"{case.bucket}-b", "to/there", io.BytesIO(b"before"))
    store.copy(case.bucket, "from/here", f"{case.bucket}-b", "to/there", metadata={"codebuild-buildarn": "arn"})
    copied = store.stat(f"{case.bucket}-b", "to/there")
    assert copied is not None
    assert (copied.size_bytes, copied.sha256, dict(copied.metadata)) == (4, stored.sha256, {"codebuild-buildarn": "arn"})
    with store.open(f"{case.bucket}-b", "to/there") as body:
        assert body.read() == b"body"
    with pytest.raises(FileNotFoundError):
        store.copy(case.bucket, "not/there", f"{case.bucket}-b", "x", metadata={})
    with pytest.raises(InvalidInput):
        store.copy(case.bucket, "from/here", f"{case.bucket}-b", "../x", metadata={})


PART = 5 * 1024**2
PARTS = secrets.token_bytes(PART), secrets.token_bytes(PART), b"the end"


def part_grant(case: Case, upload: str, number: int, body: bytes) -> Grant:
    """A grant for a part, as one can be used."""
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    granted = case.store.presign_part(case.bucket, "in/parts", upload, number, expires_in_s=60, size_bytes=len(body), md5=md5)
    return Grant(method="PUT", url=granted.url, headers=granted.headers, key="in/parts", expires_in_s=60)


def test_parts_become_one_object_that_is_seen_only_then(case: Case) -> None:
    whole = b"".join(PARTS)
    upload = case.store.begin_parts(case.bucket, "in/parts", sha256=sha(whole))
    tags = [hashlib.md5(part, usedforsecurity=False).hexdigest() for part in PARTS]
    assert case.use(part_grant(case, upload, 2, PARTS[2]), PARTS[2])[0] == 200  # sent again below: the last one counts
    for number in (3, 1, 2):
        assert case.use(part_grant(case, upload, number, PARTS[number - 1]), PARTS[number - 1])[0] == 200
    assert case.use(part_grant(case, upload, 1, PARTS[0]), PARTS[0][:-1])[0] >= 400, "another length than was granted"
    assert case.store.stat(case.bucket, "in/parts") is None
    for _ in range(2):
        case.store.complete_parts(case.bucket, "in/parts", upload, tags, size_bytes=len(whole), sha256=sha(whole))
    stored = case.store.stat(case.bucket, "in/parts")
    assert stored is not None
    assert (stored.size_bytes, stored.sha256) == (len(whole), sha(whole))
    assert case.get("in/parts") == whole
    case.store.abort_parts(case.bucket, "in/parts", upload)
    assert [item.key for item in case.store.list(case.bucket, "")] == ["in/parts"]


def test_parts_that_are_not_all_there_or_not_as_announced_become_nothing(case: Case) -> None:
    whole = b"".join(PARTS)
    upload = case.store.begin_parts(case.bucket, "in/parts", sha256=sha(whole))
    tags = [hashlib.md5(part, usedforsecurity=False).hexdigest() for part in PARTS]
    for number in (1, 2):
        assert case.use(part_grant(case, upload, number, PARTS[number - 1]), PARTS[number - 1])[0] == 200
    with pytest.raises(InvalidInput, match="in/parts"):
        case.store.complete_parts(case.bucket, "in/parts", upload, tags, size_bytes=len(whole), sha256=sha(whole))
    assert case.store.stat(case.bucket, "in/parts") is None
    case.store.abort_parts(case.bucket, "in/parts", upload)
    case.store.abort_parts(case.bucket, "in/parts", upload)
    assert list(case.store.list(case.bucket, "")) == []
    with pytest.raises(InvalidInput, match="in/parts"):
        case.store.complete_parts(case.bucket, "in/parts", upload, tags[:2], size_bytes=2 * PART, sha256=sha(whole))


@pytest.mark.minio
def test_s3_refuses_a_part_of_other_bytes(minio: MinioServer) -> None:
    bucket = f"test-{secrets.token_hex(6)}"
    case = Case(s3(minio, bucket), bucket, minio)
    upload = case.store.begin_parts(bucket, "in/parts", sha256="0" * 64)
    status, said = case.use(part_grant(case, upload, 1, PARTS[0]), PARTS[1])
    assert (status, b"BadDigest" in said) == (400, True)
    forged = part_grant(case, upload, 1, PARTS[0])
    other = forged.model_copy(update={"url": forged.url.replace("partNumber=1", "partNumber=2")})
    assert case.use(other, PARTS[0])[0] == 403
