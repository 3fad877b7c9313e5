"""What goes into artifacts, and what never does."""

import hashlib
import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv.artifacts import Hashed, Outside, check_name, collect, pack_file, pack_zip, part_size
from buildenv.buildspec import ArtifactsSpec
from millrace.errors import BuildProblem
from millrace.vocabulary import Reason

NOWHERE = Outside(lambda path: iter(()), Path("unused"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "src"
    for name in ("a.txt", "dist/b.js", "dist/sub/c.js", "dist/.dot", "my-build-1/d", "my-build-2/e"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def names(root: Path, *files: str, said: list[str] | None = None, **more: object) -> list[str]:
    spec = ArtifactsSpec(files=files, **more)  # type: ignore[arg-type]
    return [item.name for item in collect(spec, root, NOWHERE, (said if said is not None else []).append)]


def reason_of(root: Path, *files: str, **more: object) -> tuple[Reason, str]:
    with pytest.raises(BuildProblem) as caught:
        names(root, *files, **more)
    return caught.value.reason, caught.value.message


def test_patterns_bases_and_exclusions(tree: Path) -> None:
    assert names(tree, "**/*") == ["a.txt", "dist/.dot", "dist/b.js", "dist/sub/c.js", "my-build-1/d", "my-build-2/e"]
    assert names(tree, "dist/*") == ["dist/.dot", "dist/b.js"]
    assert names(tree, "**/*", base_directory="dist") == [".dot", "b.js", "sub/c.js"]
    assert names(tree, "**/*", base_directory="my-build*") == ["d", "e"]
    assert names(tree, "**/*", exclude_paths=("**/.*", "my-build-*/**/*")) == ["a.txt", "dist/b.js", "dist/sub/c.js"]
    assert names(tree, "dist/**/*", discard_paths=True) == [".dot", "b.js", "c.js"]


def test_what_matches_nothing_is_told_and_only_all_of_it_is_an_error(tree: Path) -> None:
    said: list[str] = []
    assert names(tree, "nope/*", "a.txt", said=said) == ["a.txt"]
    assert "Skipping invalid file path nope/*" in said
    assert reason_of(tree, "nope/*") == (Reason.ARTIFACTS_NOT_FOUND, "no matching artifact paths found")
    assert reason_of(tree, "*", base_directory="cdk.out")[1] == "no matching base directory path found for cdk.out"


def test_links_stay_inside_or_are_refused(tree: Path) -> None:
    (tree / "dist" / "inside").symlink_to("b.js")
    (tree / "dist" / "folder").symlink_to("sub")
    (tree / "dist" / "dangling").symlink_to("nowhere")
    said: list[str] = []
    assert names(tree, "dist/*", said=said) == ["dist/.dot", "dist/b.js", "dist/inside"]
    assert any("dist/folder" in line for line in said)
    assert "dist/folder" in names(tree, "dist/*", enable_symlinks=True)
    (tree / "out").symlink_to("/etc/passwd")
    reason, message = reason_of(tree, "out")
    assert (reason, "leaves the source folder" in message) == (Reason.ARTIFACTS_NOT_FOUND, True)
    os.remove(tree / "out")
    (tree / "up").symlink_to("../..")
    assert "leaves" in reason_of(tree, "**/*")[1]


def test_pipes_are_skipped_without_a_hang(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    said: list[str] = []
    assert names(tree, "*", said=said) == ["a.txt"]
    assert "Skipping pipe: it is no regular file" in said


def test_a_zip_holds_bytes_and_modes_and_knows_its_hashes(tree: Path, tmp_path: Path) -> None:
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o755)
    found = collect(ArtifactsSpec(files=("**/*",)), tree, NOWHERE, lambda _text: None)
    packed = pack_zip(found, tmp_path / "x.zip", max_bytes=10**6)
    data = packed.path.read_bytes()
    assert (packed.size_bytes, packed.file_count) == (len(data), 7)
    assert packed.sha256 == hashlib.sha256(data).hexdigest()
    assert packed.md5 == hashlib.md5(data, usedforsecurity=False).hexdigest()
    with zipfile.ZipFile(packed.path) as archive:
        assert archive.testzip() is None
        assert archive.read("dist/sub/c.js") == b"dist/sub/c.js"
        assert stat.S_IMODE(archive.getinfo("run.sh").external_attr >> 16) == 0o755
    again = pack_zip(found, tmp_path / "y.zip", max_bytes=10**6)
    assert again.sha256 == packed.sha256


def test_a_link_is_kept_as_a_link_where_asked(tree: Path, tmp_path: Path) -> None:
    (tree / "link").symlink_to("a.txt")
    found = collect(ArtifactsSpec(files=("link",), enable_symlinks=True), tree, NOWHERE, lambda _text: None)
    packed = pack_zip(found, tmp_path / "x.zip", max_bytes=10**6)
    with zipfile.ZipFile(packed.path) as archive:
        info = archive.getinfo("link")
        assert stat.S_ISLNK(info.external_attr >> 16)
        assert archive.read(info) == b"a.txt"


@pytest.mark.parametrize("name", ["nl\nname", "bell\x07", "x" * 901, "del\x7f"])
def test_a_name_that_no_object_can_have_is_refused(name: str) -> None:
    with pytest.raises(BuildProblem, match="no artifact can be named"):
        check_name(name)
    check_name("dir/a b ünï?#%.txt")


def test_too_large_and_changing_files_are_errors_and_never_torn(tree: Path, tmp_path: Path) -> None:
    (tree / "big").write_bytes(os.urandom(100_000))
    (found,) = collect(ArtifactsSpec(files=("big",)), tree, NOWHERE, lambda _text: None)
    with pytest.raises(BuildProblem) as caught:
        pack_zip([found], tmp_path / "x.zip", max_bytes=1000)
    assert caught.value.reason is Reason.ARTIFACT_TOO_LARGE
    with pytest.raises(BuildProblem, match="more than 1000 bytes"):
        pack_file(found, tmp_path / "y", max_bytes=1000)
    (tree / "big").unlink()
    (tree / "big").symlink_to("/etc/passwd")
    with pytest.raises((BuildProblem, OSError)):
        pack_file(found, tmp_path / "z", max_bytes=10**6)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(min_value=1, max_value=50))
def test_the_parts_of_a_file_are_hashed_as_it_is_written(pieces: list[bytes], part_bytes: int) -> None:
    hashed = Hashed(io.BytesIO(), part_bytes)
    for piece in pieces:
        hashed.write(piece)
    whole = b"".join(pieces)
    parts = [whole[at : at + part_bytes] for at in range(0, len(whole), part_bytes)]
    assert hashed.parts() == tuple(hashlib.md5(part, usedforsecurity=False).hexdigest() for part in parts)
    assert hashed.md5.hexdigest() == hashlib.md5(whole, usedforsecurity=False).hexdigest()
    assert hashed.sha256.hexdigest() == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 64 * 2**20, 64 * 2**20 + 1, 5 * 2**30, 64 * 10**9, 5 * 2**40])
def test_a_file_of_any_size_that_s3_takes_has_parts_that_s3_takes(size: int) -> None:
    part = part_size(size, 64 * 2**20)
    assert 5 * 2**20 <= part <= 5 * 2**30 + 2**28
    assert -(-size // part) <= 1001
