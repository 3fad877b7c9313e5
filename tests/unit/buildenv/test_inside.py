"""The programs that a build finds in its container, under the shells that images have."""

import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from buildenv.workspace import INSIDE

SHELLS = [pytest.param([shell], id=shell) for shell in ("dash", "bash")] + [pytest.param(["busybox", "sh"], id="busybox")]


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> list[str]:
    words: list[str] = request.param
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return words


def said(shell: list[str], name: str, *words: str, text: str = "", **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*shell, str(INSIDE / name), *words],
        input=text,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **env},
        timeout=30,
    )
    return done.returncode, done.stdout, done.stderr


def digest(folder: Path, *names: str) -> str:
    lines = [f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(names)]
    return sha256("".join(lines).encode()).hexdigest() + "\n"


def test_files_are_hashed_by_pattern(shell: list[str], tmp_path: Path) -> None:
    names = ["lock.json", "a/lock.json", "a/b/c.txt", "x y/q+.txt", ".hidden"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for patterns, wanted in (
        (["lock.json"], ["lock.json"]),
        (["./lock.json"], ["lock.json"]),
        (["*.json"], ["lock.json"]),
        (["**/lock.json"], ["lock.json", "a/lock.json"]),
        (["a/**/*"], ["a/lock.json", "a/b/c.txt"]),
        (["**/*"], names),
        (["x y/q+.txt", "l?ck.json"], ["x y/q+.txt", "lock.json"]),
    ):
        status, out, err = said(shell, "codebuild-hash-files", *patterns, CODEBUILD_SRC_DIR=str(tmp_path))
        assert (status, out, err) == (0, digest(tmp_path, *wanted), ""), patterns


def test_hashing_nothing_is_an_error_that_says_so(shell: list[str], tmp_path: Path) -> None:
    status, out, err = said(shell, "codebuild-hash-files", "no*", CODEBUILD_SRC_DIR=str(tmp_path))
    assert (status, out) == (1, "")
    assert "no file matches no*" in err
    assert said(shell, "codebuild-hash-files")[0] == 2


def test_a_breakpoint_without_a_debug_session_goes_on(shell: list[str]) -> None:
    assert said(shell, "codebuild-breakpoint")[0] == 0


def test_credentials_are_given_for_their_own_host_only(shell: list[str], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    helper = shutil.copy(INSIDE / "git-credential-millrace", tmp_path / "bin")
    (tmp_path / "git-credentials").write_text("git.example x-token secret-1\n")

    def asked(verb: str, host: str) -> str:
        done = subprocess.run(
            [*shell, helper, verb],
            input=f"protocol=https\nhost={host}\n\n",
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        return done.stdout

    assert asked("get", "git.example") == "username=x-token\npassword=secret-1\n"
    assert asked("get", "other.example") == ""
    assert asked("store", "git.example") == ""
