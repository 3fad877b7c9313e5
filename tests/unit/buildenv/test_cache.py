"""What goes into a cache and comes out of it; a cache made by somebody else gets nothing past its declared paths."""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from buildenv import cache
from buildenv.cache import Paths, Unusable
from millrace.errors import BuildProblem

SRC = "/codebuild/output/src1/src"


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size) if entry.isreg() else None)
    return body.getvalue()


def entry(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3, mode: int = 0o640) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime, info.uid = kind, link, mode, 1_600_000_000, 1234
    info.size = size if kind == tarfile.REGTYPE else 0
    return info


def paths(*patterns: str) -> Paths:
    return Paths(patterns=patterns, source_inside=SRC)


def packed(tmp_path: Path, wanted: Paths, given: dict[str, bytes], said: list[str] | None = None) -> cache.Packed | None:
    def copy_out(root: str) -> Iterator[bytes]:
        if root not in given:
            raise FileNotFoundError(root)
        data = given[root]
        return (data[at : at + 1000] for at in range(0, len(data), 1000))

    return cache.pack(wanted, copy_out, tmp_path / "c.tar.zst", max_bytes=10**6, say=(said if said is not None else []).append)


def unpacked(tmp_path: Path, wanted: Paths, archive: Path, said: list[str], has: frozenset[str] = frozenset()) -> dict[str, str]:
    target = tmp_path / "plain.tar"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    cache.unpack(wanted, archive, digest, target, has=has.__contains__, say=said.append)
    with tarfile.open(target) as tar:
        return {info.name: info.linkname for info in tar}


def test_everything_comes_back_where_the_next_build_has_its_source(tmp_path: Path) -> None:
    long = "d" * 120 + "/" + "f" * 120
    wanted = paths("deps/**/*", "/root/.m2/**/*", "plain")
    given = {
        f"{SRC}/deps": tar_of(
            entry("deps", kind=tarfile.DIRTYPE),
            entry("deps/a"),
            entry(f"deps/{long}"),
            entry("deps/link", kind=tarfile.SYMTYPE, link="/usr/bin/python3"),
            entry("deps/hard", kind=tarfile.LNKTYPE, link="deps/a"),
            entry("deps/fifo", kind=tarfile.FIFOTYPE),
        ),
        "/root/.m2": tar_of(entry(".m2", kind=tarfile.DIRTYPE), entry(".m2/repo/x.jar")),
        f"{SRC}/plain": tar_of(entry("plain", kind=tarfile.DIRTYPE), entry("plain/below/it")),
    }
    made = packed(tmp_path, wanted, given)
    assert made is not None
    assert made.file_count == 6
    assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
    there = Paths(patterns=wanted.patterns, source_inside="/codebuild/output/src2/src")
    said: list[str] = []
    found = unpacked(tmp_path, there, made.path, said)
    new = "codebuild/output/src2/src"
    assert found == {
        f"{new}/deps/a": "",
        f"{new}/deps/{long}": "",
        f"{new}/deps/link": "/usr/bin/python3",
        f"{new}/deps/hard": f"{new}/deps/a",
        "root/.m2/repo/x.jar": "",
        f"{new}/plain": "",
        f"{new}/plain/below/it": "",
    }
    assert said == []
    with tarfile.open(tmp_path / "plain.tar") as tar:
        kept = tar.getmember(f"{new}/deps/a")
        assert (kept.mode, kept.uid, kept.mtime) == (0o640, 1234, 1_600_000_000)


def test_what_came_with_the_source_stays(tmp_path: Path) -> None:
    made = packed(tmp_path, paths("d/**/*"), {f"{SRC}/d": tar_of(entry("d/mine"), entry("d/cached"))})
    assert made is not None
    found = unpacked(tmp_path, paths("d/**/*"), made.path, [], has=frozenset({"d/mine"}))
    assert list(found) == ["codebuild/output/src1/src/d/cached"]


@pytest.mark.parametrize(
    "evil",
    [
        entry("root/etc/passwd"),
        entry("source/other/file"),
        entry("root/codebuild/readonly/runner.sh"),
        entry("source/deps/link", kind=tarfile.LNKTYPE, link="root/etc/shadow"),
        entry("source/deps/dev", kind=tarfile.CHRTYPE),
    ],
    ids=lambda info: info.name,
)
def test_entries_outside_the_declared_paths_are_left_out(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    archive = tmp_path / "evil.tar.zst"
    archive.write_bytes(zstandard.compress(tar_of(entry("source/deps/good"), evil)))
    said: list[str] = []
    assert list(unpacked(tmp_path, paths("deps/**/*", "/codebuild/readonly/**/*"), archive, said)) == [
        f"{SRC.strip('/')}/deps/good"
    ]
    assert len(said) == 1
    assert said[0].startswith("Skipping cache entry: path ")
    assert said[0].endswith("is not within allowed cache paths")


@pytest.mark.parametrize(
    "body",
    [b"", b"no zstd", zstandard.compress(b"no tar at all" * 1000), zstandard.compress(tar_of(entry("source/a", size=5000)))[:-20]]
    + [zstandard.compress(tar_of(entry(name))) for name in ("source/../x", "elsewhere/x", "/abs", "source/")],
    ids=range(8),
)
def test_a_cache_that_is_broken_is_no_cache(tmp_path: Path, body: bytes) -> None:
    archive = tmp_path / "broken.tar.zst"
    archive.write_bytes(body)
    with pytest.raises(Unusable):
        unpacked(tmp_path, paths("**/*"), archive, [])


def test_other_bytes_than_were_stored_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(zstandard.compress(tar_of(entry("source/a"))))
    with pytest.raises(Unusable, match="other bytes"):
        cache.unpack(paths("a"), tmp_path / "a", "0" * 64, tmp_path / "t", has=lambda _name: False, say=lambda _text: None)


def test_nothing_found_and_too_much_are_told_apart(tmp_path: Path) -> None:
    said: list[str] = []
    assert packed(tmp_path, paths("none/**/*", "/proc/**/*", "/**/*"), {}, said) is None
    assert "Skipping cache path none/**/*: there is nothing" in said
    assert "Skipping invalid cache path /proc/**/*" in said
    assert "Skipping invalid cache path /**/*" in said
    (tmp_path / "c.tar.zst").unlink()
    with pytest.raises(Unusable, match="more than 1 bytes"):
        cache.pack(paths("d"), lambda _root: iter([tar_of(entry("d"))]), tmp_path / "c.tar.zst", max_bytes=1, say=said.append)


def test_the_paths_are_part_of_the_identity() -> None:
    assert paths("a", "b").version() == paths("b", "a", "b").version()
    assert paths("a").version() != paths("a", "b").version()


@pytest.mark.parametrize("key", ["", "x" * 513, "a\nb", "../up", "a/../b", "\x7f"])
def test_keys_that_no_cache_can_have_are_refused(key: str) -> None:
    with pytest.raises(BuildProblem):
        cache.check_key(key)


def test_an_ordinary_key_is_taken() -> None:
    assert cache.check_key("npm-Linux-0123/abc..def") == "npm-Linux-0123/abc..def"
