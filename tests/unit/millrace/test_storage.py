"""The directory store's own promises, grants' seals, and how a store is chosen."""

import hashlib
import io
import json
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import Forbidden, InfraProblem, InvalidInput
from millrace.settings import load
from millrace.storage import HashingReader, check_key, open_store, pieces
from millrace.storage.directory import DirectoryStore, read_token
from millrace.storage.s3 import S3Store
from millrace.vocabulary import Reason

KEY = b"k" * 32
BUCKET = "millrace"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects", KEY)


def test_a_file_that_was_dropped_into_a_bucket_is_an_object_without_a_hash(store: DirectoryStore, tmp_path: Path) -> None:
    folder = tmp_path / "objects" / BUCKET / "sources"
    folder.mkdir(parents=True)
    (folder / "app.zip").write_bytes(b"dropped")
    seen = store.stat(BUCKET, "sources/app.zip")
    assert seen is not None
    assert (seen.size_bytes, seen.sha256) == (7, None)
    with store.open(BUCKET, "sources/app.zip") as body:
        assert body.read() == b"dropped"
    assert [o.key for o in store.list(BUCKET, "")] == ["sources/app.zip"]


def test_files_with_names_that_are_no_keys_do_not_hide_the_others(store: DirectoryStore, tmp_path: Path) -> None:
    store.put(BUCKET, "good", io.BytesIO(b"x"))
    (tmp_path / "objects" / BUCKET / "line\nbreak").write_bytes(b"x")
    (tmp_path / "objects" / BUCKET / "plain").write_bytes(b"x")
    assert [o.key for o in store.list(BUCKET, "")] == ["good", "plain"]


def test_an_object_is_a_plain_file_that_an_operator_finds(store: DirectoryStore, tmp_path: Path) -> None:
    store.put(BUCKET, "a/b.txt", io.BytesIO(b"hello"))
    assert (tmp_path / "objects" / BUCKET / "a" / "b.txt").read_bytes() == b"hello"


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"\xff\xfe", b'{"size": 1, "sha256": "0"}'])
def test_a_note_that_a_crash_left_broken_only_costs_the_hash(store: DirectoryStore, tmp_path: Path, note: bytes) -> None:
    store.put(BUCKET, "k", io.BytesIO(b"hello"))
    (path,) = (tmp_path / "objects" / ".meta" / BUCKET).iterdir()
    path.write_bytes(note)
    seen = store.stat(BUCKET, "k")
    assert seen is not None
    assert (seen.size_bytes, seen.sha256) == (5, None)
    store.put(BUCKET, "k", io.BytesIO(b"again"))
    again = store.stat(BUCKET, "k")
    assert again is not None
    assert again.sha256 == hashlib.sha256(b"again").hexdigest()


def test_nothing_is_left_over_but_the_object_and_its_note(store: DirectoryStore, tmp_path: Path) -> None:
    store.put(BUCKET, "a/k", io.BytesIO(b"hello"))
    with pytest.raises(InvalidInput):
        store.put(BUCKET, "a/bad", io.BytesIO(b"hello"), sha256="0" * 64)
    store.check()
    files = sorted(p.relative_to(tmp_path / "objects").parts[0] for p in tmp_path.rglob("*") if p.is_file())
    assert files == [".meta", ".tmp", BUCKET]
    store.delete(BUCKET, "a/k")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["lock"]
    assert not (tmp_path / "objects" / BUCKET / "a").exists()


def test_the_note_of_an_object_says_whose_it_is(store: DirectoryStore, tmp_path: Path) -> None:
    store.put(BUCKET, "a/k", io.BytesIO(b"hello"))
    (path,) = (tmp_path / "objects" / ".meta" / BUCKET).iterdir()
    assert json.loads(path.read_text())["key"] == "a/k"


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("a file in the way")
    store = DirectoryStore(tmp_path / "objects", KEY)
    with pytest.raises(InfraProblem) as caught:
        store.check()
    assert caught.value.reason is Reason.STORAGE
    assert caught.value.hint


def test_reading_from_a_place_without_a_store_makes_nothing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects", KEY)
    assert store.stat(BUCKET, "k") is None
    store.delete(BUCKET, "k")
    assert list(store.list(BUCKET, "")) == []
    assert list(tmp_path.iterdir()) == []


def token(store: DirectoryStore, **more: int) -> str:
    return store.presign("GET", BUCKET, "k", expires_in_s=more.get("expires_in_s", 60)).url.removeprefix("/objects/")


def test_a_grant_says_all_that_it_grants(store: DirectoryStore) -> None:
    grant = store.presign("PUT", BUCKET, "a/k", expires_in_s=60, size_bytes=5, sha256="ab" * 32)
    read = read_token(KEY, grant.url.removeprefix("/objects/"), "PUT")
    assert (read.method, read.bucket, read.key, read.size_bytes, read.sha256) == ("PUT", BUCKET, "a/k", 5, "ab" * 32)
    assert 0 < read.expires_at_s - time.time() <= 61


def test_a_grant_is_for_one_method_one_farm_and_a_while(store: DirectoryStore, tmp_path: Path) -> None:
    for other in (token(DirectoryStore(tmp_path, b"o" * 32)), token(store, expires_in_s=-2)):
        with pytest.raises(Forbidden):
            read_token(KEY, other, "GET")
    with pytest.raises(Forbidden, match="GET"):
        read_token(KEY, token(store), "PUT")


@given(st.integers(min_value=0, max_value=400), st.integers(min_value=1, max_value=255))
def test_no_changed_bit_of_a_grant_passes(position: int, change: int) -> None:
    good = token(DirectoryStore("/nonexistent", KEY))
    payload, _, seal = good.partition(".")
    position %= len(payload)
    bad = payload[:position] + chr(ord(payload[position]) ^ change) + payload[position + 1 :]
    with pytest.raises(Forbidden):
        read_token(KEY, f"{bad}.{seal}", "GET")


@given(st.text(max_size=60))
def test_no_made_up_grant_passes(text: str) -> None:
    with pytest.raises(Forbidden):
        read_token(KEY, text, "GET")


@given(st.text(max_size=40))
def test_a_key_that_passes_stays_in_its_bucket(text: str) -> None:
    try:
        check_key(BUCKET, text)
    except InvalidInput:
        return
    path = Path("/root-of-store") / BUCKET / text
    assert path.is_relative_to(f"/root-of-store/{BUCKET}")
    assert ".." not in path.parts
    assert path.as_posix() == f"/root-of-store/{BUCKET}/{text}", "no two keys are one path"


def test_a_short_signing_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="32 bytes"):
        DirectoryStore(tmp_path, b"short")


def test_settings_choose_the_store(tmp_path: Path) -> None:
    odd = tmp_path / "a#b c%20"
    settings = load({"MILLRACE_DATA_DIR": str(odd), "MILLRACE_SIGNING_KEY": "k" * 32})
    store = open_store(settings)
    assert isinstance(store, DirectoryStore)
    store.put(BUCKET, "k", io.BytesIO(b"x"))
    assert (odd / "objects" / BUCKET / "k").is_file()
    keys = {"MILLRACE_STORE_ACCESS_KEY": "a", "MILLRACE_STORE_SECRET_KEY": "s"}
    assert isinstance(open_store(load({"MILLRACE_STORE_URL": "http://127.0.0.1:9000", **keys})), S3Store)
    assert isinstance(open_store(load({"MILLRACE_STORE_URL": "https://s3.example.com/", **keys})), S3Store)


@pytest.mark.parametrize(
    "url",
    [
        "file://host/folder",
        "file:folder",
        "folder",
        "ftp://host/x",
        "http://",
        "http://host/bucket",
        "http://me:pw-secret@host:9000",
    ],
)
def test_an_address_that_is_no_store_is_refused_without_its_secret(url: str) -> None:
    given = {"MILLRACE_STORE_URL": url, "MILLRACE_SIGNING_KEY": "k" * 32}
    keys = {"MILLRACE_STORE_ACCESS_KEY": "a", "MILLRACE_STORE_SECRET_KEY": "s"}
    with pytest.raises(InvalidInput, match="is no store") as caught:
        open_store(load(given | keys))
    assert "pw-secret" not in str(caught.value)
    assert caught.value.hint


def test_a_store_without_its_keys_says_which() -> None:
    with pytest.raises(InvalidInput, match="MILLRACE_SIGNING_KEY"):
        open_store(load({"MILLRACE_STORE_URL": "file:///x"}))
    for keys in ({}, {"MILLRACE_STORE_ACCESS_KEY": "a"}):
        for url in ("http://h:1", "https://amazonaws.com.example.org", "http://s3.eu-west-1.amazonaws.com"):
            with pytest.raises(InvalidInput, match="MILLRACE_STORE_ACCESS_KEY"):
                open_store(load({"MILLRACE_STORE_URL": url, **keys}))


def test_a_store_of_aws_is_opened_with_the_keys_of_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "ASIAROLE"), ("SECRET_ACCESS_KEY", "s"), ("SESSION_TOKEN", "a+b/c=")):
        monkeypatch.setenv(f"AWS_{name}", value)
    url = "https://s3.eu-west-1.amazonaws.com"
    store = open_store(load({"MILLRACE_STORE_URL": url, "MILLRACE_STORE_REGION": "eu-west-1"}))
    said = httpx.URL(store.presign("GET", BUCKET, "k", expires_in_s=60).url).params
    assert said["X-Amz-Credential"].startswith("ASIAROLE/")
    assert said["X-Amz-Security-Token"] == "a+b/c="


@given(st.binary(max_size=300), st.integers(min_value=1, max_value=50))
def test_a_hashing_reader_measures_what_went_through(data: bytes, size: int) -> None:
    reader = HashingReader(io.BytesIO(data))
    got = b"".join(iter(lambda: reader.read(size), b""))
    assert (got, reader.size_bytes, reader.sha256) == (data, len(data), hashlib.sha256(data).hexdigest())


def test_pieces_pass_good_bytes_and_stop_at_bad_ones() -> None:
    good = hashlib.sha256(b"data").hexdigest()
    assert b"".join(pieces(io.BytesIO(b"data"), sha256=good, size_bytes=4, what="x")) == b"data"
    assert b"".join(pieces(io.BytesIO(b"data"), sha256=None, size_bytes=4, what="x")) == b"data"
    with pytest.raises(InfraProblem, match="damaged"):
        list(pieces(io.BytesIO(b"dato"), sha256=good, size_bytes=4, what="x"))
