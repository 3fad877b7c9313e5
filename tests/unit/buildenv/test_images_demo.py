"""The projects that the demonstration builds: how the real one is got, and that both buildspecs are sound."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from buildenv import buildspec
from demo import fetch as demo

NAME = "thing-1.2"


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """A pin of a small archive of ours, which lies in the cache as if pip had fetched it."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as tar:
        entry = tarfile.TarInfo(f"{NAME}/setup.py")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"pass"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.tar.gz").write_bytes(body.getvalue())
    return _pin(tmp_path, hashlib.sha256(body.getvalue()).hexdigest())


def _pin(folder: Path, sha256: str) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"# A comment.\nthing==1.2 \\\n    --hash=sha256:{sha256}\n")
    return requirements


@pytest.fixture
def pip_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")


@pytest.mark.usefixtures("pip_is_away")
def test_a_second_fetch_needs_no_index_and_gives_a_fresh_project(tmp_path: Path, requirements: Path) -> None:
    project = demo.fetch(tmp_path / "cache", requirements)
    assert project == tmp_path / "cache" / NAME
    assert (project / "setup.py").read_text() == "pass"
    assert (project / "buildspec.yml").read_bytes() == (demo.HERE / "buildspec.yml").read_bytes()
    (project / "left-by-a-build").touch()
    (project / "setup.py").write_text("changed")
    demo.fetch(tmp_path / "cache", requirements)
    assert sorted(path.name for path in project.iterdir()) == ["buildspec.yml", "setup.py"]
    assert (project / "setup.py").read_text() == "pass"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [NAME, f"{NAME}.tar.gz"]


@pytest.mark.usefixtures("pip_is_away", "requirements")
def test_an_archive_that_is_not_the_pinned_one_is_never_unpacked(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        demo.fetch(tmp_path / "cache", _pin(tmp_path, "0" * 64))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{NAME}.tar.gz"]


@pytest.mark.usefixtures("pip_is_away")
def test_the_command_says_that_the_index_is_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main([str(tmp_path / "new")]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "is a package index reachable?" in said.err


@pytest.mark.parametrize("text", ["", "thing==1.2\n", "thing>=1 \\\n    --hash=sha256:" + "0" * 64 + "\n"])
def test_a_requirement_without_one_version_and_hash_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "requirements.txt").write_text(text)
    with pytest.raises(ValueError, match="pins 0"):
        demo.pinned(tmp_path / "requirements.txt")


def test_the_real_project_is_pinned() -> None:
    assert demo.pinned(demo.HERE / "requirements.txt").name == "simplejson"


@pytest.mark.parametrize("path", ["buildspec.yml", "hello/buildspec.yml"])
def test_our_buildspecs_have_no_problem_and_no_warning(path: str) -> None:
    spec = buildspec.parse((demo.HERE / path).read_text(), where=path)
    assert spec.warnings == ()
    assert spec.artifacts is not None
