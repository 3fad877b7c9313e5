"""Checkouts through a worker's mirrors: what the server is asked for, what a build gets, and what may happen to a mirror."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog.testing

from buildenv.git import Credential
from buildenv.mirror import Mirrors, prune
from buildenv.source import FetchedSource, fetch
from millrace.errors import BuildProblem, BuildStopped, InfraProblem
from millrace.locks import held
from millrace.project import ProjectSource
from millrace.vocabulary import Reason, SourceType
from tests.support.farm import wait_until
from tests.support.gitserver import GitServer, Repository, git, http_server, make_repository


@dataclass
class Build:
    """The checkouts of one project's builds, each in a folder of its own."""

    root: Path
    url: str
    project: str = "demo"
    count: int = 0
    said: list[str] = field(default_factory=list)
    credential: Credential | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    dest: Path = Path()

    def __call__(self, version: str | None = None, depth: int | None = None) -> FetchedSource:
        self.count += 1
        self.dest = self.root / self.project / str(self.count)
        self.said = []
        return fetch(
            ProjectSource(type=SourceType.GIT, location=self.url, git_clone_depth=depth),
            version,
            self.dest,
            grant=lambda request: (_ for _ in ()).throw(AssertionError(request)),
            download=lambda grant, path: None,
            git_roots=(self.root,),
            ca_bundle=None,
            say=self.said.append,
            stop=self.stop,
            deadline=time.monotonic() + 60,
            credential=self.credential,
            mirrors=Mirrors(root=self.root / "mirrors", project=self.project),
        )

    def readme(self) -> str:
        return (self.dest / "README").read_text().strip()

    def new_bytes(self) -> int:
        """What the log says was fetched."""
        (line,) = [line for line in self.said if "this worker's mirror of the repository: " in line]
        return int(line.rpartition(": ")[2].split()[0])

    def refs(self) -> set[str]:
        return set(git(self.dest, "for-each-ref", "--format=%(objectname) %(refname)").splitlines())

    def kept(self) -> list[Path]:
        """The mirrors of this worker."""
        return sorted(one for one in (self.root / "mirrors").iterdir() if one.is_dir())


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = make_repository(tmp_path / "git" / "team" / "app.git")
    made.commit("main", {"noise": os.urandom(200_000).hex()})
    made.commit("main", {"README": "fourth\n"})
    return made


@pytest.fixture
def server(repository: Repository, tmp_path: Path) -> Iterator[GitServer]:
    with http_server(tmp_path / "git") as running:
        yield running


@pytest.fixture
def build(server: GitServer, tmp_path: Path) -> Build:
    return Build(tmp_path, f"{server.url}/team/app.git")


DEPTHS = pytest.mark.parametrize("depth", [None, 1])


@DEPTHS
def test_the_second_build_fetches_only_what_is_new(
    build: Build, repository: Repository, server: GitServer, depth: int | None
) -> None:
    build(depth=depth)
    assert build.said[1].startswith("Made")
    assert (build.readme(), build.new_bytes() > 200_000) == ("fourth", True)
    sent = server.sent
    build(depth=depth)
    assert build.said[1].startswith("Used")
    assert (build.readme(), build.new_bytes()) == ("fourth", 0)
    assert server.sent - sent < 5_000
    server.seen.clear()
    build("main", depth)
    assert len(server.seen) == (5 if depth else 4), "no more than to look the branch up and to fetch"
    commit, sent = repository.commit("main", {"README": "fifth\n"}), server.sent
    assert build("main", depth).resolved_version == commit
    assert build.readme() == "fifth"
    assert 0 < build.new_bytes() < 5_000
    assert server.sent - sent < 10_000
    assert git(build.dest, "fsck", "--full", "--strict") == ""
    assert int(git(build.dest, "rev-list", "--count", "HEAD")) == (depth or 6)


@pytest.mark.parametrize(
    "version", [None, "main", "feature/x", "v1", "v2", "refs/tags/v2", "pr/7", "refs/pull/7/head", "first", "hidden", "short"]
)
@DEPTHS
def test_a_checkout_by_mirror_is_as_one_without(
    build: Build, repository: Repository, tmp_path: Path, version: str | None, depth: int | None
) -> None:
    build("feature/x", 5)
    build()
    wanted = repository.second[:9] if version == "short" else getattr(repository, version or "", version)
    through = build(wanted, depth)
    mirrored, commits, config = build.refs(), git(build.dest, "rev-list", "HEAD"), (build.dest / ".git" / "config").read_text()
    shutil.rmtree(tmp_path / "mirrors")
    (tmp_path / "mirrors").touch()  # none can be made
    assert build(wanted, depth) == through
    assert any("Going on without" in line for line in build.said) or depth is None or version in ("pr/7", "refs/pull/7/head")
    assert {ref for ref in mirrored if "refs/millrace" not in ref} == build.refs()
    assert commits == git(build.dest, "rev-list", "HEAD")
    assert config == (build.dest / ".git" / "config").read_text()


@DEPTHS
def test_a_branch_that_was_rewritten_a_tag_that_moved_and_a_branch_that_went(
    build: Build, repository: Repository, depth: int | None
) -> None:
    build("v1", depth)
    build("main", depth)
    build("feature/x", depth)
    git(repository.path, "branch", "-f", "main", repository.first)
    other = repository.commit("main", {"README": "rewritten\n"})
    git(repository.path, "tag", "-f", "v1", repository.branch)
    git(repository.path, "branch", "-D", "feature/x")
    git(repository.path, "branch", "feature", repository.second)
    assert build("main", depth).resolved_version == other
    assert "refs/remotes/origin/feature/x" not in " ".join(build.refs())
    assert build("v1", depth).resolved_version == repository.branch
    assert build("feature", depth).resolved_version == repository.second
    with pytest.raises(BuildProblem, match="no branch and no tag"):
        build("feature/x", depth)


@DEPTHS
def test_another_project_has_its_own_mirror_and_its_own_rights(
    build: Build, server: GitServer, tmp_path: Path, depth: int | None
) -> None:
    server.wants_password, server.password = True, "x-access-token:right"
    source = ProjectSource(type=SourceType.GIT, location=build.url)
    build.credential = Credential.read("right", source)
    build(depth=depth)
    other = Build(tmp_path, build.url, project="other", credential=Credential.read("wrong", source))
    for project in (other, Build(tmp_path, build.url, count=9, credential=other.credential)):
        for version in (None, git(tmp_path / "git" / "team" / "app.git", "rev-parse", "main")):
            with pytest.raises(BuildProblem, match="credentials"):
                project(version, depth)
    other.credential = build.credential
    other(depth=depth)
    assert other.said[1].startswith("Made")
    assert len(build.kept()) == 2
    assert subprocess.run(["grep", "-r", "right", tmp_path / "mirrors"], check=False, capture_output=True).returncode == 1


def _spoil(mirror: Path, how: str) -> None:
    pack = max((mirror / "objects" / "pack").glob("*.pack"), key=lambda one: one.stat().st_size)
    if how == "no repository":
        (mirror / "HEAD").unlink()
    elif how == "no packs":
        shutil.rmtree(mirror / "objects")
    elif how == "wrong ref":
        (mirror / "packed-refs").write_text(f"{'1' * 40} refs/heads/main\n")
    else:
        pack.chmod(0o600)
        with open(pack, "r+b") as file:
            if how == "cut":
                file.truncate(pack.stat().st_size // 2)
            elif how == "empty":
                file.truncate(0)
            else:
                file.seek(pack.stat().st_size // 2)
                file.write(b"\xff" * 64)


@pytest.mark.parametrize("how", ["no repository", "no packs", "wrong ref", "cut", "empty", "changed"])
def test_a_damaged_mirror_is_made_anew(build: Build, repository: Repository, how: str) -> None:
    build("main")
    _spoil(build.kept()[0], how)
    commit = repository.commit("main", {"README": "fifth\n"})
    with structlog.testing.capture_logs() as logged:
        assert build("main").resolved_version == commit
    assert build.readme() == "fifth"
    assert git(build.dest, "fsck", "--full") == ""
    assert [one["event"] for one in logged] == ["mirror.rebuilt"]
    build("main")
    assert (build.said[1][:4], build.new_bytes()) == ("Used", 0)


@pytest.mark.parametrize("how", ["no repository", "no packs", "cut", "empty", "changed"])
def test_a_damaged_shallow_mirror_fails_no_build(build: Build, repository: Repository, how: str) -> None:
    build("main", 1)
    _spoil(build.kept()[0], how)
    commit = repository.commit("main", {"README": "fifth\n"})
    assert build("main", 1).resolved_version == commit
    assert build.readme() == "fifth"
    assert git(build.dest, "fsck", "--full") == ""


@DEPTHS
def test_builds_at_once_fetch_once(build: Build, server: GitServer, repository: Repository, tmp_path: Path, depth: int) -> None:
    server.hold.clear()
    builds = [Build(tmp_path, build.url, count=number * 10) for number in range(3)]
    threads = [threading.Thread(target=one, args=("main", depth)) for one in builds]
    for thread in threads:
        thread.start()
    assert server.holding.wait(30)
    wait_until(lambda: sum("Waiting for another" in line for one in builds for line in one.said) == 2)
    server.hold.set()
    for thread in threads:
        thread.join(60)
    assert [one.readme() for one in builds] == ["fourth"] * 3
    assert sorted(one.new_bytes() > 0 for one in builds) == [False, False, True]


def test_a_stop_ends_the_wait_for_another(build: Build, tmp_path: Path) -> None:
    build()
    with held(build.kept()[0].with_suffix(".lock")):
        threading.Timer(0.5, build.stop.set).start()
        with pytest.raises(BuildStopped):
            build()


@DEPTHS
def test_a_mirror_whose_fetch_was_killed_is_used_by_the_next_build(
    build: Build, server: GitServer, repository: Repository, depth: int | None
) -> None:
    build("main", depth)
    commit = repository.commit("main", {"README": "fifth\n", "more": os.urandom(100_000).hex()})
    server.hold.clear()
    stopper = threading.Thread(target=lambda: (server.holding.wait(30), build.stop.set()))
    stopper.start()
    with pytest.raises(BuildStopped):
        build("main", depth)
    stopper.join()
    server.hold.set()
    mirror = build.kept()[0]
    for left in ("packed-refs.lock", "shallow.lock", "objects/pack/tmp_pack_x"):
        (mirror / left).touch()
    build.stop.clear()
    assert build("main", depth).resolved_version == commit
    assert build.said[1].startswith("Used")
    assert not list(mirror.rglob("*.lock"))
    assert not (mirror / "objects" / "pack" / "tmp_pack_x").exists()


def test_a_git_that_outlives_its_build_keeps_the_lock(build: Build, server: GitServer, tmp_path: Path) -> None:
    build()
    server.hold.clear()
    server.holding.clear()
    repository = Repository(tmp_path / "git" / "team" / "app.git", *[""] * 5)
    repository.commit("main", {"README": "fifth\n"})
    child = os.fork()
    if child == 0:
        Build(tmp_path, build.url, count=10)("main")
        os._exit(1)
    assert server.holding.wait(30)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError), held(build.kept()[0].with_suffix(".lock")):
        pass
    server.hold.set()
    build("main")
    assert (build.readme(), build.new_bytes()) == ("fifth", 0)


def test_where_the_wait_is_too_long_a_build_fetches_by_itself(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setattr("buildenv.mirror._WAIT_S", 0.2)
    with held(build.kept()[0].with_suffix(".lock")):
        build()
    assert build.readme() == "fourth"
    assert any("another build's fetch takes too long" in line for line in build.said)


def test_a_harmful_repository_is_refused_as_without_a_mirror(build: Build, repository: Repository) -> None:
    build()
    tree = subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=repository.path,
        input=b"100644 .git\0" + bytes.fromhex(git(repository.path, "rev-parse", "main:README")),
        capture_output=True,
        check=True,
    )
    commit = git(repository.path, "commit-tree", "-m", "evil", tree.stdout.decode().strip())
    git(repository.path, "update-ref", "refs/heads/evil", commit)
    for depth in (None, 1):
        with pytest.raises(BuildProblem) as caught:
            build("evil", depth)
        assert caught.value.reason is Reason.BAD_SOURCE
    git(repository.path, "update-ref", "-d", "refs/heads/evil")
    build()
    assert build.readme() == "fourth"


@DEPTHS
def test_a_checkout_shares_no_file_with_the_mirror(build: Build, depth: int | None) -> None:
    build("main", depth)
    assert not (build.dest / ".git" / "objects" / "info" / "alternates").exists()
    assert {one.stat().st_nlink for one in build.dest.rglob("*") if one.is_file()} == {1}
    assert str(build.root / "mirrors") not in "".join(
        one.read_text(errors="replace") for one in (build.dest / ".git").iterdir() if one.is_file()
    )


@DEPTHS
def test_many_small_fetches_do_not_pile_up(
    build: Build, repository: Repository, monkeypatch: pytest.MonkeyPatch, depth: int | None
) -> None:
    monkeypatch.setattr("buildenv.mirror._MOST_PACKS", 3)
    for number in range(8):
        commit = repository.commit("main", {"README": f"{number}\n"})
        assert build("main", depth).resolved_version == commit
        assert build.readme() == str(number)
    assert len(list((build.kept()[0] / "objects" / "pack").glob("*.pack"))) <= 3
    assert git(build.dest, "fsck", "--full") == ""


def test_a_shallow_mirror_that_keeps_too_much_begins_anew(
    build: Build, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("buildenv.mirror._MOST_REFS", 2)
    said = []
    for version, content in (("main", "fourth"), ("feature/x", "branch"), ("v1", "first"), ("main", "fourth")):
        build(version, 1)
        assert build.readme() == content
        said.append(build.said[-2][:4])
    assert said == ["Made", "Used", "Made", "Used"]


@DEPTHS
def test_a_mirror_that_is_removed_under_a_build_fails_it_not(build: Build, server: GitServer, depth: int | None) -> None:
    server.hold.clear()
    building = threading.Thread(target=build, args=("main", depth))
    building.start()
    assert server.holding.wait(30)
    shutil.rmtree(build.root / "mirrors")
    server.hold.set()
    building.join(60)
    assert build.readme() == "fourth"
    assert git(build.dest, "fsck", "--full") == ""


def test_a_server_that_is_away_is_not_the_mirrors_fault(build: Build, server: GitServer, repository: Repository) -> None:
    build()
    server.failures = [503] * 100
    with pytest.raises(InfraProblem) as caught:
        build(repository.third)
    assert caught.value.reason is Reason.SOURCE_UNREACHABLE
    server.failures = []
    build(repository.third)
    assert (build.said[1][:4], build.new_bytes()) == ("Used", 0)


# Pruning


def _mirrors(build: Build, server: GitServer, count: int, tmp_path: Path) -> list[Path]:
    """So many, each used later than the one before."""
    kept: list[Path] = []
    for number in range(count):
        Build(tmp_path, build.url, project=f"p{number}")()
        (new,) = set(build.kept()) - set(kept)
        used = time.time() - 1000 * (count - number)
        os.utime(new.with_suffix(".lock"), (used, used))
        kept.append(new)
    return kept


def test_pruning_takes_the_old_then_those_used_least_lately_until_the_others_fit(
    build: Build, server: GitServer, tmp_path: Path
) -> None:
    kept = _mirrors(build, server, 4, tmp_path)
    size = sum(one.stat().st_size for one in (kept[0] / "objects" / "pack").iterdir())
    root = tmp_path / "mirrors"
    never = {"most_age_s": 1e9, "is_short": lambda: False}
    assert prune(root, most_bytes=4 * size + 100, **never) == 0  # type: ignore[arg-type]
    assert prune(root, most_bytes=4 * size + 100, most_age_s=3500, is_short=lambda: False) == 1
    assert build.kept() == sorted(kept[1:])
    with held(kept[1].with_suffix(".lock")):
        assert prune(root, most_bytes=2 * size + 100, **never) == 1  # type: ignore[arg-type]
    assert build.kept() == sorted([kept[1], kept[3]])
    short = iter([True, False])
    assert prune(root, most_bytes=10**9, most_age_s=1e9, is_short=lambda: next(short)) == 1
    assert sorted(os.listdir(root)) == sorted([kept[3].name, f"{kept[3].name}.lock"])
    (root / f"{kept[3].name}.gone").mkdir()
    assert prune(root, most_bytes=0, **never) == 1  # type: ignore[arg-type]
    assert os.listdir(root) == []
    assert prune(tmp_path / "none", most_bytes=0, **never) == 0  # type: ignore[arg-type]


def test_a_lock_that_was_pruned_while_a_build_opened_it_is_not_taken(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    lock = build.kept()[0].with_suffix(".lock")
    with held(lock):
        waiting = threading.Thread(target=build)
        waiting.start()
        wait_until(lambda: any("Waiting" in line for line in build.said))
        lock.unlink()
    waiting.join(60)
    assert build.readme() == "fourth"
    assert any("Going on without" in line for line in build.said)
