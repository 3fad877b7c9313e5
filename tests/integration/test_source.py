"""Fetching sources by the real git from real servers: a path, HTTP, HTTPS and ssh on loopback; and from the object store."""

import io
import os
import shutil
import socket
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from buildenv import git as git_module
from buildenv.git import Credential
from buildenv.source import FetchedSource, fetch
from millrace.contract import Grant, GrantRequest
from millrace.errors import BuildProblem, BuildStopped, InfraProblem, NotFound
from millrace.project import GitSubmodulesConfig, ProjectSource
from millrace.vocabulary import Reason, SourceType
from tests.support.farm import wait_until
from tests.support.gitserver import (
    GitServer,
    Repository,
    git,
    http_server,
    make_certificate,
    make_repository,
    ssh_server,
)
from tests.support.minio import spare_port


@dataclass
class Fetch:
    """`fetch` with what it needs filled in."""

    dest: Path
    roots: tuple[Path, ...]
    ca_bundle: Path | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    said: list[str] = field(default_factory=list)
    patience_s: float = 60
    credential: Credential | None = None

    def __call__(
        self,
        location: str | Path,
        version: str | None = None,
        *,
        kind: SourceType = SourceType.GIT,
        depth: int | None = None,
        submodules: bool | None = None,
        grant: Callable[[GrantRequest], Grant] | None = None,
        download: Callable[[Grant, Path], None] | None = None,
        commit: str | None = None,
    ) -> FetchedSource:
        shutil.rmtree(self.dest, ignore_errors=True)
        config = None if submodules is None else GitSubmodulesConfig(fetch_submodules=submodules)
        wanted = ProjectSource(type=kind, location=str(location) or None, git_clone_depth=depth, git_submodules_config=config)
        return fetch(
            wanted,
            version,
            self.dest,
            grant=grant or _no_grant,
            download=download or _no_download,
            git_roots=self.roots,
            ca_bundle=self.ca_bundle,
            say=self.said.append,
            stop=self.stop,
            deadline=time.monotonic() + self.patience_s,
            credential=self.credential,
            commit=commit,
        )

    def readme(self) -> str:
        """Which commit lies there."""
        return (self.dest / "README").read_text().strip()

    def depth(self) -> int:
        """How many commits are known."""
        return int(git(self.dest, "rev-list", "--count", "HEAD"))


def _no_grant(request: GrantRequest) -> Grant:
    raise AssertionError(f"a grant was asked for: {request}")


def _no_download(grant: Grant, path: Path) -> None:
    raise AssertionError("something was downloaded")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "git" / "team" / "app.git")


@pytest.fixture
def server(repository: Repository, tmp_path: Path) -> Iterator[GitServer]:
    with http_server(tmp_path / "git") as running:
        yield running


@pytest.fixture
def fetching(tmp_path: Path) -> Fetch:
    return Fetch(tmp_path / "work" / "src", (tmp_path / "git",))


@pytest.fixture(params=["path", "http"])
def location(request: pytest.FixtureRequest, repository: Repository) -> str:
    """The repository, by two ways that share no code in git."""
    if request.param == "path":
        return str(repository.path)
    running: GitServer = request.getfixturevalue("server")
    return f"{running.url}/team/app.git"


def test_without_a_version_it_is_the_default_branch_with_all_its_history(
    fetching: Fetch, repository: Repository, location: str
) -> None:
    for version in (None, "", "HEAD"):
        fetched = fetching(location, version)
        assert (fetched.resolved_version, fetched.repo_url) == (repository.third, location)
        assert (fetching.readme(), fetching.depth()) == ("third", 3)
        assert git(fetching.dest, "rev-parse", "HEAD") == repository.third
        detached = subprocess.run(["git", "symbolic-ref", "-q", "HEAD"], cwd=fetching.dest, check=False, capture_output=True)
        assert detached.returncode == 1
        assert git(fetching.dest, "status", "--porcelain") == ""
        assert git(fetching.dest, "remote", "get-url", "origin") == location


@pytest.mark.parametrize("depth", [None, 0, 1])
@pytest.mark.parametrize(
    ("version", "readme", "commit"),
    [
        ("main", "third", "third"),
        ("feature/x", "branch", "branch"),
        ("v1", "first", "first"),
        ("v2", "second", "second"),
        ("refs/heads/feature/x", "branch", "branch"),
        ("refs/tags/v2", "second", "second"),
        ("refs/pull/7/head", "hidden", "hidden"),
        ("pr/7", "hidden", "hidden"),
    ],
)
def test_branches_tags_refs_and_pull_requests(
    fetching: Fetch, repository: Repository, location: str, version: str, readme: str, commit: str, depth: int | None
) -> None:
    assert fetching(location, version, depth=depth).resolved_version == getattr(repository, commit)
    assert fetching.readme() == readme
    assert fetching.depth() == (1 if depth else {"first": 1, "second": 2, "third": 3, "branch": 3, "hidden": 2}[readme])


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("commit", ["first", "second", "third", "hidden"])
def test_commits_on_a_tip_below_one_and_on_no_branch(
    fetching: Fetch, repository: Repository, location: str, commit: str, depth: int | None
) -> None:
    wanted = getattr(repository, commit)
    assert fetching(location, wanted, depth=depth).resolved_version == wanted
    assert fetching.readme() == commit


def test_the_beginning_of_a_commit_id_is_enough(fetching: Fetch, repository: Repository, location: str) -> None:
    fetched = fetching(location, repository.second[:9], depth=1)
    assert fetched.resolved_version == repository.second


def test_a_commit_that_a_server_gives_only_with_its_branch_is_found_by_cloning_it_all(
    fetching: Fetch, repository: Repository, server: GitServer
) -> None:
    server.old_protocol = True
    assert fetching(f"{server.url}/team/app.git", repository.second, depth=1).resolved_version == repository.second
    assert any("cloning it all" in line for line in fetching.said)
    lost = repository.commit("lost", {"README": "lost\n"})
    git(repository.path, "branch", "-D", "lost")
    with pytest.raises(BuildProblem) as caught:
        fetching(f"{server.url}/team/app.git", lost, depth=1)
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND


def test_a_ref_with_its_commit_pins_the_commit(fetching: Fetch, repository: Repository, location: str) -> None:
    assert fetching(location, f"refs/heads/main^{{{repository.second}}}", depth=1).resolved_version == repository.second
    with pytest.raises(BuildProblem) as caught:
        fetching(location, f"refs/heads/main^{{{repository.branch}}}")
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND


@pytest.mark.parametrize(
    ("kind", "number"), [(SourceType.GITLAB, 9), (SourceType.GITLAB_SELF_MANAGED, 9), (SourceType.BITBUCKET, 5)]
)
def test_pull_requests_have_other_refs_elsewhere(
    fetching: Fetch, repository: Repository, server: GitServer, kind: SourceType, number: int
) -> None:
    fetched = fetching(f"{server.url}/team/app.git", f"pr/{number}", kind=kind)
    assert fetched.resolved_version == repository.hidden


@pytest.mark.parametrize("depth", [None, 1])
def test_a_noted_commit_is_built_though_its_pull_request_or_branch_has_moved_on(
    fetching: Fetch, repository: Repository, location: str, depth: int | None
) -> None:
    git(repository.path, "update-ref", "refs/pull/8/head", repository.first)
    git(repository.path, "branch", repository.second[:12], repository.third)  # a name that passes for an abbreviated id
    for version, commit in (
        ("pr/7", repository.hidden),
        ("pr/8", repository.branch),
        ("pr/999", repository.second),
        ("pr/999", repository.second[:12]),
        ("main", repository.first),
        (None, repository.third),
    ):
        assert fetching(location, version, depth=depth, commit=commit).resolved_version.startswith(commit)


@pytest.mark.parametrize("depth", [None, 1])
def test_a_noted_commit_that_was_forced_away_is_said_to_be_gone(
    fetching: Fetch, repository: Repository, server: GitServer, depth: int | None
) -> None:
    git(repository.path, "update-ref", "refs/heads/feature/x", repository.first)
    git(repository.path, "-c", "gc.pruneExpire=now", "gc", "--quiet", "--prune=now")
    for commit in (repository.branch, repository.branch[:12]):
        with pytest.raises(BuildProblem, match=f"commit gone: .*{commit}.*force-push") as caught:
            fetching(f"{server.url}/team/app.git", "pr/8", depth=depth, commit=commit)
        assert caught.value.reason is Reason.SOURCE_NOT_FOUND
    with pytest.raises(BuildProblem, match="commit gone"):
        fetching(f"{server.url}/team/app.git", repository.branch, depth=depth)


@pytest.mark.parametrize(
    "version", ["nope", "refs/heads/nope", "pr/999", "f" * 40, "abcdef0", "main~1", "src", "v2^{}", "HEAD~1"]
)
@pytest.mark.parametrize("depth", [None, 1])
def test_what_is_not_in_the_repository_is_not_found(fetching: Fetch, location: str, version: str, depth: int | None) -> None:
    with pytest.raises(BuildProblem) as caught:
        fetching(location, version, depth=depth)
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND
    assert location in caught.value.message


@pytest.mark.parametrize("version", ["--upload-pack=touch", "-u", "a..b", "@{u}", "a b", "a\nb", "a:b", "*", "f" * 39])
def test_versions_that_are_none_never_reach_git(fetching: Fetch, location: str, version: str) -> None:
    with pytest.raises(BuildProblem) as caught:
        fetching(location, version)
    assert caught.value.reason is Reason.BAD_SOURCE
    assert fetching.said == []


def test_an_empty_repository_says_so(fetching: Fetch, server: GitServer, tmp_path: Path) -> None:
    (tmp_path / "git" / "empty.git").mkdir()
    git(tmp_path / "git" / "empty.git", "init", "--bare", ".")
    for place in (str(tmp_path / "git" / "empty.git"), f"{server.url}/empty.git"):
        with pytest.raises(BuildProblem, match="empty") as caught:
            fetching(place)
        assert caught.value.reason is Reason.SOURCE_NOT_FOUND
        with pytest.raises(BuildProblem):
            fetching(place, "main")


def test_a_missing_repository_is_not_found(fetching: Fetch, server: GitServer, tmp_path: Path) -> None:
    for place in (str(tmp_path / "git" / "none.git"), f"{server.url}/none.git", f"{server.url}/openssl/certificate.git"):
        for depth in (None, 1):
            with pytest.raises(BuildProblem) as caught:
                fetching(place, depth=depth)
            assert caught.value.reason is Reason.SOURCE_NOT_FOUND
            assert "trusted" not in caught.value.message


def test_a_folder_that_is_no_repository_is_not_found(fetching: Fetch, tmp_path: Path, repository: Repository) -> None:
    with pytest.raises(BuildProblem) as caught:
        fetching(tmp_path / "git" / "team")
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND


def test_a_local_path_outside_what_is_allowed_is_refused(fetching: Fetch, repository: Repository, tmp_path: Path) -> None:
    fetching.roots = (tmp_path / "other",)
    with pytest.raises(BuildProblem, match="MILLRACE_GIT_ROOTS") as caught:
        fetching(repository.path)
    assert caught.value.reason is Reason.BAD_SOURCE


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_a_local_repository_of_another_user_is_fetched(fetching: Fetch, repository: Repository) -> None:
    for path in [repository.path, *repository.path.rglob("*")]:
        os.chown(path, 12345, 12345)
    assert fetching(repository.path).resolved_version == repository.third
    assert fetching(repository.path, depth=1).resolved_version == repository.third


def test_a_server_that_wants_a_password_is_told_apart_and_nothing_waits_for_one(fetching: Fetch, server: GitServer) -> None:
    server.wants_password = True
    began = time.monotonic()
    with pytest.raises(BuildProblem, match="credentials") as caught:
        fetching(f"{server.url}/team/app.git")
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND
    assert time.monotonic() - began < 10
    assert len(server.seen) == 1


def credential_of(server: GitServer, secret: str, kind: SourceType = SourceType.GITHUB) -> Credential:
    return Credential.read(secret, ProjectSource(type=kind, location=f"{server.url}/team/app.git"))


@pytest.mark.parametrize(
    ("secret", "kind", "told"),
    [
        ("t0ken-value\n", SourceType.GITHUB, "x-access-token:t0ken-value"),
        ("t0ken-value", SourceType.GITLAB, "oauth2:t0ken-value"),
        ('{"ServerType": "BITBUCKET", "Token": "app-pass", "Username": "me"}', SourceType.BITBUCKET, "me:app-pass"),
    ],
)
def test_credentials_open_a_private_repository_and_are_shown_nowhere(
    fetching: Fetch, server: GitServer, secret: str, kind: SourceType, told: str
) -> None:
    server.wants_password, server.password = True, told
    fetching.credential = credential_of(server, secret, kind)
    seen: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        fetching(f"{server.url}/team/app.git")
    finally:
        stop.set()
        watcher.join()
    assert fetching.readme() == "third"
    assert set(server.given) == {told}
    password = told.partition(":")[2]
    assert password not in "".join(fetching.said) + "".join(seen)
    left = subprocess.run(["grep", "-r", password, str(fetching.dest)], capture_output=True, check=False)
    assert left.returncode == 1, "the checkout keeps no credentials"


def test_wrong_credentials_are_rejected_at_once(fetching: Fetch, server: GitServer) -> None:
    server.wants_password, server.password = True, "x-access-token:right"
    fetching.credential = credential_of(server, "wrong")
    with pytest.raises(BuildProblem, match="credentials") as caught:
        fetching(f"{server.url}/team/app.git")
    assert "wrong" not in caught.value.message


def test_credentials_go_to_their_own_host_only(fetching: Fetch, server: GitServer, tmp_path: Path) -> None:
    with http_server(tmp_path / "git") as other:
        other.wants_password = True
        server.redirect = other.url
        fetching.credential = credential_of(server, "t0ken-value")
        with pytest.raises((BuildProblem, InfraProblem)):
            fetching(f"{server.url}/team/app.git")
        assert other.given == []


@pytest.mark.parametrize(
    "secret", ["", "  \n", "two words", "{}", '{"Token": ""}', "{not json", '{"Token": "a\\nb"}', "[1]x\x01"]
)
def test_a_secret_that_is_no_credential_says_so_without_showing_it(secret: str) -> None:
    with pytest.raises(BuildProblem) as caught:
        Credential.read(secret, ProjectSource(type=SourceType.GIT, location="https://git.example/a.git"))
    assert caught.value.reason is Reason.SECRET_UNAVAILABLE
    assert not secret.strip() or secret not in caught.value.message


def test_a_closed_port_is_the_networks_fault_after_three_tries(fetching: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(InfraProblem) as caught:
        fetching(f"http://127.0.0.1:{spare_port()}/team/app.git")
    assert caught.value.reason is Reason.SOURCE_UNREACHABLE
    assert caught.value.hint
    assert sum("trying again" in line for line in fetching.said) == 2
    assert time.monotonic() - began < 20


def test_a_name_that_does_not_resolve_is_the_networks_fault(fetching: Fetch) -> None:
    with pytest.raises(InfraProblem) as caught:
        fetching("https://no-such-host.invalid/r.git")
    assert caught.value.reason is Reason.SOURCE_UNREACHABLE


@pytest.mark.parametrize("statuses", [[503], [502, 429]])
def test_a_server_that_stumbles_is_asked_again(
    fetching: Fetch, server: GitServer, repository: Repository, statuses: list[int]
) -> None:
    server.failures = list(statuses)
    assert fetching(f"{server.url}/team/app.git").resolved_version == repository.third
    assert sum("trying again" in line for line in fetching.said) == len(statuses)


def test_a_server_that_keeps_failing_is_the_networks_fault(fetching: Fetch, server: GitServer) -> None:
    server.failures = [500] * 10
    with pytest.raises(InfraProblem, match="500"):
        fetching(f"{server.url}/team/app.git")


def test_a_server_that_is_silent_is_left_at_the_deadline(fetching: Fetch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        fetching.patience_s = 1
        began = time.monotonic()
        with pytest.raises(BuildStopped) as caught:
            fetching(f"http://127.0.0.1:{listener.getsockname()[1]}/r.git")
        assert caught.value.reason is Reason.TIMEOUT
        assert time.monotonic() - began < 5


def test_a_stop_ends_a_slow_clone_at_once_and_leaves_no_process(fetching: Fetch, server: GitServer) -> None:
    server.hold.clear()
    moments: dict[str, float] = {}

    def stop_when_it_hangs() -> None:
        assert server.holding.wait(30)
        moments["stopped"] = time.monotonic()
        fetching.stop.set()

    stopper = threading.Thread(target=stop_when_it_hangs)
    stopper.start()
    with pytest.raises(BuildStopped):
        fetching(f"{server.url}/team/app.git")
    assert time.monotonic() - moments["stopped"] < 2
    stopper.join()
    wait_until(lambda: not _processes_in(fetching.dest), within_s=2)  # killed is not gone yet


def test_a_stop_ends_the_pause_between_two_tries(fetching: Fetch) -> None:
    threading.Timer(0.5, fetching.stop.set).start()
    began = time.monotonic()
    with pytest.raises(BuildStopped):
        fetching(f"http://127.0.0.1:{spare_port()}/r.git")
    assert time.monotonic() - began < 1.9


def _processes_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(folder):
                found.append((process / "cmdline").read_text())
        except OSError:  # it went, or is not ours to look at
            continue
    return found


def test_nothing_of_our_environment_reaches_git(
    fetching: Fetch, repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    canary = tmp_path / "pwned"
    program = tmp_path / "evil"
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(f"[core]\n\tfsmonitor = {program}\n\thooksPath = {tmp_path}/hooks\n")
    (tmp_path / "hooks").mkdir()
    shutil.copy(program, tmp_path / "hooks" / "post-checkout")
    for name in ("GIT_SSH_COMMAND", "GIT_PROXY_COMMAND", "GIT_EXTERNAL_DIFF", "GIT_ASKPASS", "GIT_TRACE2_EVENT"):
        monkeypatch.setenv(name, str(program))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "ext")
    assert fetching(repository.path).resolved_version == repository.third
    assert not canary.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_what_git_was_given_as_its_home_is_gone_after(
    fetching: Fetch, repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    fetching(repository.path)
    with pytest.raises(BuildProblem):
        fetching(repository.path, "nope")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_links_modes_and_filters_of_a_hostile_repository_do_no_harm(
    fetching: Fetch, repository: Repository, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    attributes = "* filter=evil diff=evil merge=evil\n*.bin filter=lfs\n"
    files: dict[str, str | None] = {
        ".gitattributes": attributes,
        ".gitconfig": "[core]\n\tpager = touch /tmp/pwned\n",
        "big.bin": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "hooks/post-checkout": "#!/bin/sh\ntouch pwned\n",
    }
    repository.commit("main", files, links={"out": str(tmp_path / "outside"), "up": "../../.."})
    fetching(repository.path)
    assert os.readlink(fetching.dest / "out") == str(tmp_path / "outside"), "a link is a link; whoever reads must look"
    assert list((tmp_path / "outside").iterdir()) == []
    assert not (fetching.dest / "pwned").exists()
    assert (fetching.dest / "big.bin").read_text().startswith("version https://git-lfs")


def test_a_malformed_object_is_refused(fetching: Fetch, repository: Repository, server: GitServer) -> None:
    tree = subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"],
        cwd=repository.path,
        input=b"100644 .git\0" + bytes.fromhex(git(repository.path, "rev-parse", "main:README")),
        capture_output=True,
        check=True,
    )
    commit = git(repository.path, "commit-tree", "-m", "evil", tree.stdout.decode().strip())
    git(repository.path, "update-ref", "refs/heads/evil", commit)
    with pytest.raises(BuildProblem) as caught:
        fetching(f"{server.url}/team/app.git", "evil")
    assert caught.value.reason is Reason.BAD_SOURCE


def test_a_repository_larger_than_the_limit_is_refused(
    fetching: Fetch, repository: Repository, server: GitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.commit("big", {"noise": os.urandom(300_000).hex()})
    monkeypatch.setattr(git_module, "_MAX_FILE_BYTES", 100_000)
    with pytest.raises(BuildProblem) as caught:
        fetching(f"{server.url}/team/app.git", "big")
    assert caught.value.reason is Reason.BAD_SOURCE


# Submodules and TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return make_certificate(tmp_path)


@pytest.fixture
def tls_server(repository: Repository, tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[GitServer]:
    with http_server(tmp_path / "git", tls=certificate) as running:
        yield running


def test_a_server_with_the_operators_ca_is_trusted(
    fetching: Fetch, repository: Repository, tls_server: GitServer, certificate: tuple[Path, Path]
) -> None:
    fetching.ca_bundle = certificate[0]
    assert fetching(f"{tls_server.url}/team/app.git", depth=1).resolved_version == repository.third


def test_a_server_that_is_not_trusted_is_never_trusted_by_itself(fetching: Fetch, tls_server: GitServer) -> None:
    with pytest.raises(BuildProblem, match="not trusted") as caught:
        fetching(f"{tls_server.url}/team/app.git")
    assert caught.value.reason is Reason.BAD_SOURCE
    assert caught.value.hint
    assert tls_server.seen == []


def test_a_certificate_for_another_name_is_not_trusted(
    fetching: Fetch, tls_server: GitServer, certificate: tuple[Path, Path]
) -> None:
    fetching.ca_bundle = certificate[0]
    with pytest.raises(BuildProblem, match="not trusted"):
        fetching(f"{tls_server.url.replace('localhost', '127.0.0.1')}/team/app.git")


def test_a_redirect_from_https_to_http_is_not_followed(
    fetching: Fetch, server: GitServer, tls_server: GitServer, certificate: tuple[Path, Path]
) -> None:
    fetching.ca_bundle = certificate[0]
    tls_server.redirect = server.url
    with pytest.raises((BuildProblem, InfraProblem)):
        fetching(f"{tls_server.url}/team/app.git")
    assert server.seen == []


def _with_submodule(repository: Repository, url: str, commit: str, path: str = "lib") -> None:
    """A commit on main that has a submodule."""
    modules = f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n'
    blob = subprocess.run(
        ["git", "hash-object", "-w", "--stdin"], cwd=repository.path, input=modules, text=True, capture_output=True, check=True
    ).stdout.strip()
    listing = f"100644 blob {blob}\t.gitmodules\n160000 commit {commit}\t{path}\n"
    tree = subprocess.run(
        ["git", "mktree", "--missing"], cwd=repository.path, input=listing, text=True, capture_output=True, check=True
    ).stdout.strip()
    git(repository.path, "update-ref", "refs/heads/main", git(repository.path, "commit-tree", "-m", "m", tree))


def test_submodules_come_only_when_asked_for(
    fetching: Fetch, repository: Repository, tls_server: GitServer, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    other = make_repository(tmp_path / "git" / "team" / "lib.git")
    fetching.ca_bundle = certificate[0]
    for url in ("../lib.git", f"{tls_server.url}/team/lib.git"):
        _with_submodule(repository, url, other.third)
        for wanted in (None, False):
            fetching(f"{tls_server.url}/team/app.git", submodules=wanted)
            assert list((fetching.dest / "lib").iterdir()) == []
        fetching(f"{tls_server.url}/team/app.git", submodules=True)
        assert (fetching.dest / "lib" / "README").read_text() == "third\n"


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% pwned",
        "file:///etc",
        "HERE/git/team/app.git",
        "-u./payload",
        "http://localhost:1/r.git",
        "git://localhost/r.git",
        "ssh://-oProxyCommand=touch%20pwned/r.git",
        "https://localhost\n:x/r.git",
    ],
)
def test_hostile_submodules_are_refused(
    fetching: Fetch, repository: Repository, server: GitServer, url: str, tmp_path: Path
) -> None:
    _with_submodule(repository, url.replace("HERE", str(tmp_path)), repository.first)
    for place in (f"{server.url}/team/app.git", str(repository.path)):
        with pytest.raises((BuildProblem, InfraProblem)) as caught:
            fetching(place, submodules=True)
        if isinstance(caught.value, BuildProblem):
            assert caught.value.reason in (Reason.BAD_SOURCE, Reason.SOURCE_NOT_FOUND)
    assert not list(tmp_path.rglob("pwned"))


def test_a_submodule_path_with_a_carriage_return_runs_nothing(
    fetching: Fetch, repository: Repository, tls_server: GitServer, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """CVE-2025-48384: the path loses its CR on the way, and a link there leads the checkout into a hooks folder."""
    other = make_repository(tmp_path / "git" / "team" / "lib.git")
    other.commit("main", {"post-checkout": f"#!/bin/sh\ntouch {tmp_path}/pwned\n"})
    fetching.ca_bundle = certificate[0]
    _with_submodule(repository, "../lib.git", git(other.path, "rev-parse", "main"), path="sub\r")
    try:
        fetching(f"{tls_server.url}/team/app.git", submodules=True)
    except BuildProblem as problem:
        assert problem.reason in (Reason.BAD_SOURCE, Reason.SOURCE_NOT_FOUND)
    assert not (tmp_path / "pwned").exists()


# ssh


def test_by_ssh_the_workers_key_and_known_hosts_decide(
    fetching: Fetch, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ssh_server(tmp_path) as running:
        options = f"{git_module._SSH} -F none"

        def ssh(key: Path, known_hosts: Path) -> None:
            files = f"-o IdentitiesOnly=yes -o GlobalKnownHostsFile=none -i {key} -o UserKnownHostsFile={known_hosts}"
            monkeypatch.setattr(git_module, "_SSH", f"{options} {files}")

        user = os.environ.get("USER", "root")
        address = f"ssh://{user}@localhost:{running.port}"
        ssh(running.key, running.known_hosts)
        assert fetching(f"{address}{repository.path}").resolved_version == repository.third
        assert fetching(f"{address}{repository.path}", repository.second, depth=1).resolved_version == repository.second
        with pytest.raises(BuildProblem) as caught:
            fetching(f"{address}/nonexistent.git")
        assert caught.value.reason is Reason.SOURCE_NOT_FOUND

        (tmp_path / "nobody").write_text("")
        ssh(running.key, tmp_path / "nobody")
        with pytest.raises(BuildProblem, match="not trusted") as caught:
            fetching(f"{address}{repository.path}")
        assert caught.value.reason is Reason.BAD_SOURCE
        assert (tmp_path / "nobody").read_text() == "", "an unknown host key is never learnt"

        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
        ssh(tmp_path / "other", running.known_hosts)
        with pytest.raises(BuildProblem, match="credentials") as caught:
            fetching(f"{address}{repository.path}")
        assert caught.value.reason is Reason.SOURCE_NOT_FOUND
        ssh(running.key, running.known_hosts)
    with pytest.raises(InfraProblem) as unreachable:
        fetching(f"{address}{repository.path}")
    assert unreachable.value.reason is Reason.SOURCE_UNREACHABLE


# The object store, and nothing at all


def _archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o755
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize(
    "location", ["millrace/uploads/a.tar.gz", "s3://millrace/uploads/a.tar.gz", "arn:aws:s3:::millrace/uploads/a.tar.gz"]
)
def test_an_object_is_granted_downloaded_and_unpacked(fetching: Fetch, location: str) -> None:
    asked: list[GrantRequest] = []

    def grant(request: GrantRequest) -> Grant:
        asked.append(request)
        return Grant(method="GET", url="/objects/x", key="uploads/a.tar.gz", expires_in_s=60)

    def download(granted: Grant, path: Path) -> None:
        path.write_bytes(_archive({"buildspec.yml": b"version: 0.2\n", "bin/run": b"#!/bin/sh\n"}))

    fetched = fetching(location, kind=SourceType.S3, grant=grant, download=download)
    assert fetched.resolved_version is None
    assert asked == [GrantRequest(kind="source", name="millrace/uploads/a.tar.gz")]
    assert sorted(p.name for p in fetching.dest.rglob("*")) == ["bin", "buildspec.yml", "run"]
    assert stat.S_IMODE((fetching.dest / "bin/run").stat().st_mode) == 0o755
    assert list(fetching.dest.parent.iterdir()) == [fetching.dest], "the archive is gone"


def test_an_object_that_is_not_there_is_not_found(fetching: Fetch) -> None:
    def grant(request: GrantRequest) -> Grant:
        raise NotFound("there is no object")

    with pytest.raises(BuildProblem) as caught:
        fetching("millrace/uploads/none.zip", kind=SourceType.S3, grant=grant)
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND


def test_an_object_that_is_no_archive_is_a_bad_source(fetching: Fetch) -> None:
    def grant(request: GrantRequest) -> Grant:
        return Grant(method="GET", url="/x", key="k", expires_in_s=1)

    def download(granted: Grant, path: Path) -> None:
        path.write_bytes(b"no archive")

    with pytest.raises(BuildProblem) as caught:
        fetching("millrace/uploads/a.zip", kind=SourceType.S3, grant=grant, download=download)
    assert caught.value.reason is Reason.BAD_SOURCE
    assert list(fetching.dest.parent.iterdir()) == [fetching.dest]


@pytest.mark.parametrize(("location", "version"), [("millrace/folder/", None), ("millrace/a.zip", "an-object-version")])
def test_folders_and_versions_of_objects_are_not_served(fetching: Fetch, location: str, version: str | None) -> None:
    with pytest.raises(BuildProblem) as caught:
        fetching(location, version, kind=SourceType.S3)
    assert caught.value.reason is Reason.BAD_SOURCE


def test_no_source_is_an_empty_folder(fetching: Fetch) -> None:
    assert fetching("", "ignored", kind=SourceType.NO_SOURCE) == FetchedSource(resolved_version=None, repo_url="")
    assert list(fetching.dest.iterdir()) == []
