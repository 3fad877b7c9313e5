"""Packing a folder for a build, by the real git, and unpacking it again."""

import hashlib
import io
import os
import socket
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from buildenv.archive import unpack
from buildenv.folder import PackedFolder, pack
from millrace.errors import InvalidInput


def git(folder: Path, *arguments: str) -> None:
    environment = {"PATH": os.defpath, "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "GIT_ALLOW_PROTOCOL": "file"}
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, check=True, capture_output=True)


def write(folder: Path, **files: str) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def packed(folder: Path) -> tuple[PackedFolder, list[str]]:
    out = io.BytesIO()
    result = pack(folder, out)
    assert (result.size_bytes, result.sha256) == (len(out.getvalue()), hashlib.sha256(out.getvalue()).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        names = tar.getnames()
    assert names == sorted(names)
    assert result.file_count == len(names)
    return result, names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is no repository, with things to leave out."""
    top = tmp_path / "a folder"
    write(top, buildspec_dot_yml="version: 0.2", src__a_dot_py="a", build__x="x", src__cache__y="y", _dot_env="kept")
    write(top, _dot_gitignore="build/\n*.log\n", src___dot_gitignore="cache\n", x_dot_log="log", keep_dot_log="kept")
    (top / ".gitignore").write_text("build/\n*.log\n!keep.log\n")
    return top


EXPECTED = [".env", ".gitignore", "buildspec.yml", "keep.log", "src/.gitignore", "src/a.py"]


def test_ignore_files_hold_in_a_folder_that_is_no_repository(folder: Path) -> None:
    assert packed(folder)[1] == EXPECTED
    assert not (folder / ".git").exists()


def test_a_repository_is_packed_with_what_is_not_committed_and_without_its_git_folder(folder: Path) -> None:
    git(folder, "init")
    git(folder, "add", "src")
    git(folder, "commit", "-m", "m")
    write(folder, src__a_dot_py="changed")
    (folder / "build" / "forced").write_text("forced in")
    git(folder, "add", "-f", "build/forced")
    assert packed(folder)[1] == sorted([*EXPECTED, "build/forced"])


def test_what_is_deleted_or_replaced_since_it_was_tracked_is_no_error(folder: Path) -> None:
    write(folder, gone="x", dir__file="x", linked__file="x")
    git(folder, "init")
    git(folder, "add", "-A")
    (folder / "gone").unlink()
    (folder / "dir" / "file").unlink()
    (folder / "dir").rmdir()
    (folder / "dir").write_text("a file now")
    (folder / "linked" / "file").unlink()
    (folder / "linked").rmdir()
    (folder / "linked").symlink_to("src")
    assert packed(folder)[1] == sorted([*EXPECTED, "dir", "linked"])


def test_a_part_of_a_repository_keeps_to_the_rules_of_all_of_it(folder: Path) -> None:
    git(folder, "init")
    write(folder, service__main_dot_py="m", service__debug_dot_log="left out by the rule at the top", service__build__o="o")
    assert packed(folder / "service")[1] == ["main.py"]


def test_a_part_that_its_repository_leaves_out_is_packed_when_it_is_named(folder: Path) -> None:
    git(folder, "init")
    assert packed(folder / "build")[1] == ["x"]


def test_repositories_inside_keep_to_their_own_rules(folder: Path) -> None:
    git(folder, "init")
    write(folder, inner__a="a", inner__tmp="t", inner___dot_gitignore="tmp\n", empty__x="x")
    git(folder / "inner", "init")
    git(folder / "empty", "init")
    assert packed(folder)[1] == sorted([*EXPECTED, "inner/.gitignore", "inner/a", "empty/x"])


def test_submodules_are_packed_and_those_not_fetched_are_empty(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, lib_dot_py="l")
    git(other, "init")
    git(other, "add", "-A")
    git(other, "commit", "-m", "m")
    git(folder, "init")
    git(folder, "submodule", "add", str(other), "sub")
    git(folder, "submodule", "add", str(other), "unfetched")
    git(folder, "submodule", "deinit", "-f", "unfetched")
    assert packed(folder)[1] == sorted([*EXPECTED, ".gitmodules", "sub/lib.py"])


def test_modes_times_and_links_inside_survive_the_way(folder: Path, tmp_path: Path) -> None:
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o4711)
    os.utime(folder / "run.sh", (1_600_000_000, 1_600_000_000))
    (folder / "src" / "up").symlink_to("../run.sh")
    with open(tmp_path / "archive", "wb") as out:
        assert pack(folder, out).file_count == len(EXPECTED) + 2
    unpack(tmp_path / "archive", tmp_path / "dest")
    there = (tmp_path / "dest" / "run.sh").stat()
    assert (stat.S_IMODE(there.st_mode), there.st_mtime) == (0o755, 1_600_000_000)
    assert os.readlink(tmp_path / "dest" / "src" / "up") == "../run.sh"
    assert (tmp_path / "dest" / "src" / "a.py").read_text() == "a"


def test_what_no_archive_may_hold_is_left_out_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "host").symlink_to("/etc/passwd")
    (folder / "src" / "out").symlink_to("../../other")
    (folder / "new\nline").write_text("x")
    (folder / "back\\slash").write_text("x")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        result, names = packed(folder)
    assert names == EXPECTED
    assert set(result.left_out) >= {"host", "src/out", "new\nline", "back\\slash"}
    with open(folder.parent / "archive", "wb") as out:
        pack(folder, out)
    unpack(folder.parent / "archive", folder.parent / "dest")


def test_the_same_files_make_the_same_archive(folder: Path) -> None:
    first, _ = packed(folder)
    assert packed(folder)[0] == first
    git(folder, "init")
    assert packed(folder)[0] == first
    write(folder, src__a_dot_py="b")
    assert packed(folder)[0] != first


def test_names_that_are_no_utf_8_are_kept(folder: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))).write_text("latin")
    with open(tmp_path / "archive", "wb") as out:
        pack(folder, out)
    unpack(tmp_path / "archive", tmp_path / "dest")
    assert b"caf\xe9" in os.listdir(os.fsencode(tmp_path / "dest"))


def test_a_repository_cannot_make_us_run_its_programs(folder: Path, tmp_path: Path) -> None:
    git(folder, "init")
    canary = tmp_path / "pwned"
    program = tmp_path / "monitor"
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    git(folder, "config", "core.fsmonitor", str(program))
    git(folder, "config", "core.pager", str(program))
    git(folder, "config", "filter.x.clean", str(program))
    (folder / ".gitattributes").write_text("* filter=x\n")
    packed(folder)
    assert not canary.exists()


def test_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InvalidInput, match="is no folder"):
            pack(path, io.BytesIO())


def test_a_broken_repository_says_what_git_said(folder: Path) -> None:
    (folder / ".git").write_text("gitdir: /nonexistent")
    with pytest.raises(InvalidInput, match="git cannot list"):
        pack(folder, io.BytesIO())


def test_an_empty_folder_is_packed_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert packed(tmp_path / "empty")[0].file_count == 0
