"""The checkout of a repository with a long history: by itself, with the first mirror of a worker, and with one that is there.

The repository is a made one, by a seed, and is fetched by its path: the network of a real server is not in
the figures, so what a mirror saves is more there. The mirror that is there lacks one commit each time.
"""

import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from buildenv.mirror import Mirrors
from buildenv.source import fetch
from millrace.contract import Grant, GrantRequest
from millrace.project import ProjectSource
from millrace.vocabulary import SourceType
from tests.benchmarks.samples import OURS, Sample, Scale

CHECKOUT = "checkout of a long history"
SEED = 7
_FILES = 2000
_FILE_BYTES = 6000
_CHANGE_BYTES = 5000


def history(commits: int) -> Iterator[bytes]:
    """Commits for `git fast-import`: the first one brings all files, each other one changes most of one file."""
    dice = random.Random(SEED)
    files = [dice.randbytes(_FILE_BYTES // 2).hex().encode() for _ in range(_FILES)]
    for number in range(commits):
        yield b"commit refs/heads/main\ncommitter T <t@example.org> %d +0000\ndata 2\nA\n" % (1_700_000_000 + number)
        for at in range(_FILES) if number == 0 else (dice.randrange(_FILES),):
            where = dice.randrange(_FILE_BYTES)
            files[at] = files[at][:where] + dice.randbytes(_CHANGE_BYTES // 2).hex().encode() + files[at][where + _CHANGE_BYTES :]
            path = b"d%d/e%d/f%d.txt" % (at % 10, at % 97, at)
            yield b"M 100644 inline %s\ndata %d\n%s\n" % (path, len(files[at]), files[at])


def make_repository(path: Path, commits: int) -> None:
    """At `path`, bare, in one pack."""
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", path], check=True)
    with subprocess.Popen(["git", "fast-import", "--quiet"], cwd=path, stdin=subprocess.PIPE) as importing:
        assert importing.stdin is not None
        importing.stdin.writelines(history(commits))
        importing.stdin.close()
        if importing.wait() != 0:
            raise AssertionError("git fast-import failed")


def add_commit(path: Path) -> None:
    """One more, that changes nothing."""
    who = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    made = subprocess.run(
        ["git", *who, "commit-tree", "-m", "more", "-p", "main", "main^{tree}"], cwd=path, check=True, capture_output=True
    )
    subprocess.run(["git", "update-ref", "refs/heads/main", made.stdout.decode().strip()], cwd=path, check=True)


def _nothing(*_: object) -> Grant:
    raise AssertionError("a git source asks the store for nothing")


def _no_grant(request: GrantRequest) -> Grant:
    return _nothing(request)


def _no_download(grant: Grant, path: Path) -> None:
    _nothing(grant, path)


def checkout(folder: Path, depth: int, mirrors: Mirrors | None) -> float:
    """Seconds that a checkout of `main` takes."""
    said: list[str] = []
    began = time.monotonic()
    fetch(
        ProjectSource(type=SourceType.GIT, location=str(folder / "repository.git"), git_clone_depth=depth),
        "main",
        folder / "checkout",
        grant=_no_grant,
        download=_no_download,
        git_roots=(folder,),
        ca_bundle=None,
        say=said.append,
        stop=threading.Event(),
        deadline=time.monotonic() + 600,
        mirrors=mirrors,
    )
    took_s = time.monotonic() - began
    if mirrors is not None and not any("this worker's mirror of the repository: " in line for line in said):
        raise AssertionError(f"no mirror was used: {said}")
    shutil.rmtree(folder / "checkout")
    return took_s


def samples(scale: Scale) -> Iterator[Sample]:
    """Whole, and with a depth of 1."""
    commits = 20_000 if scale.rounds >= 30 else 2000
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as name:
        folder = Path(name)
        make_repository(folder / "repository.git", commits)
        packed = sum(file.stat().st_size for file in (folder / "repository.git" / "objects" / "pack").iterdir())
        scale.about(
            f"{commits:,} commits, {packed / 1e6:.0f} MB packed, from a disk of this machine; {scale.heavy} rounds, seed {SEED}"
        )
        for _ in range(scale.heavy):
            for at, depth in (("whole", 0), ("depth 1", 1)):
                shutil.rmtree(folder / "mirrors", ignore_errors=True)
                mirrors = Mirrors(root=folder / "mirrors", project="bench")
                found = {
                    "git by itself": checkout(folder, depth, None),
                    f"{OURS}, first time on a worker": checkout(folder, depth, mirrors),
                }
                add_commit(folder / "repository.git")
                found[OURS] = checkout(folder, depth, mirrors)
                for who, took in found.items():
                    yield Sample(what=CHECKOUT, who=who, at=at, value=took, unit="s")
