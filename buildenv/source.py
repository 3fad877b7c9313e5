"""Fetches a build's source: by git, hardened against hostile addresses and repositories, or as an archive of the object store.

Servers on private networks are the normal case of a farm that runs itself, so only link-local addresses (a cloud's metadata) are
barred; whatever a name or a redirect leads to, it has to speak TLS with a certificate for its name, or ssh with a known key.
"""

import ipaddress
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from buildenv.archive import unpack
from buildenv.git import Credential, Git, HarmfulRepository, ServerRefused
from buildenv.mirror import Mirror, Mirrors
from millrace.contract import Grant, GrantRequest
from millrace.errors import BuildProblem, InvalidInput, NotFound
from millrace.project import ProjectSource, check_source_version
from millrace.storage import check_key
from millrace.vocabulary import Reason, SourceType

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_SCP: Final = re.compile(r"(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*):(?P<path>[^-\s][^\s]*)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PULL_REQUEST: Final = re.compile(r"pr/[0-9]+")
_PINNED: Final = re.compile(r"(?P<ref>refs/[^^]+)\^\{(?P<commit>[0-9a-f]{40})\}")


@dataclass(frozen=True, kw_only=True)
class FetchedSource:
    """What was fetched. `resolved_version` is the full commit id, None for what is not git; `repo_url` is for variables. `other`
    is the text of the file of another branch that was asked for; None where there is none.
    """

    resolved_version: str | None
    repo_url: str
    other: str | None = None


def check_location(source: ProjectSource, git_roots: Sequence[Path]) -> None:
    """Raises InvalidInput where the location could never be fetched, or should not be. Grammar only, nothing is looked up.

    S3: `bucket/key` of an archive; a prefix that ends with a slash is not served.
    Git: `https://host/path`, `ssh://user@host/path`, `user@host:path`, and for type GIT an absolute path below one of
    `git_roots`. `http://` only to this machine itself. No credentials in the address; no link-local address.
    """
    location = source.location or ""
    if source.type is SourceType.S3:
        bucket, _, key = _object_name(location).partition("/")
        check_key(bucket, key)
    if not source.is_git:
        return
    if any(ord(char) <= 32 or ord(char) == 127 for char in location) or location.startswith("-"):
        raise _wrong(location, "it has blanks or control characters, or begins with '-'")
    if source.type is SourceType.GIT and location.startswith("/"):
        _check_path(location, git_roots)
        return
    scp = _SCP.fullmatch(location)
    if scp is not None and "://" not in location:
        _check_host(location, scp["host"])
        return
    try:
        address = urlsplit(location)
        host, _port = address.hostname, address.port
    except ValueError as error:
        raise _wrong(location, "its host or port is none") from error
    if address.password is not None or (address.username is not None and address.scheme != "ssh"):
        raise InvalidInput(
            "the source's address holds credentials", hint="Leave them out: an address is shown in logs and answers."
        )
    if address.scheme not in ("https", "ssh", "http"):
        raise _wrong(location, f"the protocol {address.scheme or '(none)'!r} is not taken")
    if not host or not address.path.strip("/"):
        raise _wrong(location, "it has no host or no path")
    if address.username is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", address.username):
        raise _wrong(location, "the user name is odd")
    if address.scheme == "http" and host not in _LOOPBACK:
        raise _wrong(location, "http:// carries no proof of what comes; https:// does")
    _check_host(location, host)


def _wrong(location: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"the source location {re.sub('//.*@', '//***@', location)[:200]!r} cannot be used: {why}",
        hint="Use https://host/path.git, ssh://user@host/path.git, or a path that MILLRACE_GIT_ROOTS allows.",
    )


def _check_path(location: str, git_roots: Sequence[Path]) -> None:
    real = Path(os.path.realpath(location))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in git_roots):
        raise InvalidInput(
            f"the local path {location!r} is not below a folder that MILLRACE_GIT_ROOTS allows",
            hint="Have the operator add its folder to MILLRACE_GIT_ROOTS.",
        )


def _check_host(location: str, host: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9a-fA-F:]+", host):
        raise _wrong(location, f"the host {host!r} is odd")
    number: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        number = ipaddress.IPv6Address(host) if ":" in host else ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:  # a name; inet_aton knows every way to write an IPv4 address: short, octal, hexadecimal, one number
        return
    except ValueError as error:
        raise _wrong(location, f"the host {host!r} is no IPv6 address") from error
    mapped = getattr(number, "ipv4_mapped", None) or number
    if mapped.is_link_local or mapped.is_multicast or mapped.is_unspecified or str(mapped) == "fd00:ec2::254":
        raise _wrong(location, f"{host} is an address that no git server has")


def fetch(
    source: ProjectSource,
    version: str | None,
    dest: Path,
    *,
    grant: Callable[[GrantRequest], Grant],
    download: Callable[[Grant, Path], None],
    git_roots: Sequence[Path],
    ca_bundle: Path | None,
    say: Callable[[str], None],
    stop: threading.Event,
    deadline: float,
    credential: Credential | None = None,
    mirrors: Mirrors | None = None,
    commit: str | None = None,
    other: tuple[str, str] | None = None,
) -> FetchedSource:
    """Put the source into the empty folder `dest`, with the help of `mirrors` if any. `deadline` is of `time.monotonic`.

    `commit` is the one that git checks out, whatever has become of `version` since it was noted. `other` is a ref, and the path
    of a file that is read of it, too.

    Raises BuildProblem (SOURCE_NOT_FOUND, BAD_SOURCE), InfraProblem (SOURCE_UNREACHABLE, STORAGE) or BuildStopped.
    """
    dest.mkdir(parents=True, exist_ok=True)
    if source.type is SourceType.NO_SOURCE:
        return FetchedSource(resolved_version=None, repo_url="")
    try:
        check_location(source, git_roots)
        if version:
            check_source_version(version)
    except InvalidInput as error:
        raise BuildProblem(error.message, reason=Reason.BAD_SOURCE, hint=error.hint) from error
    except ValueError as error:
        raise BuildProblem(str(error), reason=Reason.BAD_SOURCE) from error
    if source.type is SourceType.S3:
        if version:
            raise BuildProblem(
                f"the source version {version!r} cannot be had: versions of an S3 object are not served",
                reason=Reason.BAD_SOURCE,
                hint="Leave sourceVersion out.",
            )
        return _fetch_object(source, dest, grant, download, say)
    git = Git(source.location or "", dest, ca_bundle, say, stop, deadline, credential)
    try:
        checkout = _Checkout(source, git, dest, say, mirrors, commit)
        resolved = checkout.checkout(version)
        text = checkout.read(*other) if other is not None else None
        return FetchedSource(resolved_version=resolved, repo_url=source.location or "", other=text)
    finally:
        git.close()


def heads(
    source: ProjectSource,
    *,
    git_roots: Sequence[Path],
    ca_bundle: Path | None,
    stop: threading.Event,
    patience_s: float,
    credential: Credential | None = None,
) -> dict[str, str]:
    """The branches of a repository, as `refs/heads/...`, with their commits. Raises as `fetch` does, and InvalidInput."""
    check_location(source, git_roots)
    with tempfile.TemporaryDirectory(prefix="millrace-heads-") as folder:
        deadline = time.monotonic() + patience_s
        git = Git(source.location or "", Path(folder), ca_bundle, lambda _text: None, stop, deadline, credential)
        try:
            listed = git.remote("ls-remote", "--heads", "--", source.location or "")
        finally:
            git.close()
    found = (line.split("\t", 1) for line in listed.splitlines() if "\t" in line)
    return {ref: commit for commit, ref in found if ref.startswith("refs/heads/")}


def _object_name(location: str) -> str:
    """`bucket/key`, however it was written."""
    return location.removeprefix("arn:aws:s3:::").removeprefix("s3://")


def _fetch_object(
    source: ProjectSource,
    dest: Path,
    grant: Callable[[GrantRequest], Grant],
    download: Callable[[Grant, Path], None],
    say: Callable[[str], None],
) -> FetchedSource:
    name = _object_name(source.location or "")
    try:
        granted = grant(GrantRequest(kind="source", name=name))
    except NotFound as error:
        raise BuildProblem(f"the source {name!r} is not in the object store", reason=Reason.SOURCE_NOT_FOUND) from error
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        archive = Path(folder) / "source"
        download(granted, archive)
        count = unpack(archive, dest)
    say(f"Unpacked {count} file(s) from {name}")
    return FetchedSource(resolved_version=None, repo_url=f"s3://{name}")


class _Checkout:
    """One checkout by the git program."""

    def __init__(
        self,
        source: ProjectSource,
        git: Git,
        dest: Path,
        say: Callable[[str], None],
        mirrors: Mirrors | None,
        noted: str | None,
    ) -> None:
        self._source, self._git, self._dest, self._say, self._noted = source, git, dest, say, noted
        self._url = source.location or ""
        self._mirror = Mirror(mirrors, self._url, git, dest, say) if mirrors is not None else None

    def checkout(self, version: str | None) -> str:
        """Check `version` out, detached; the full commit id."""
        self._say(f"Cloning {self._url}" + (f" at {version}" if version else ""))
        try:
            commit = self._checked_out(version)
        except ServerRefused:
            raise
        except BuildProblem as problem:
            if self._mirror is None or not self._mirror.discard(problem.message):
                raise
            self._mirror = None
            for entry in self._dest.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            commit = self._checked_out(version)
        config = self._source.git_submodules_config
        if config is not None and config.fetch_submodules:
            self._git.allow("https:ssh")  # a .gitmodules file is the repository's own word
            self._git.remote("submodule", "update", "--init", "--recursive", "--quiet")
        self._say(f"Checked out {commit}")
        return commit

    def read(self, ref: str, path: str) -> str | None:
        """A file as it is at a ref of the server's; None where there is none. After the checkout, which stays as it is."""
        there = self._fetch_ref(ref, self._source.git_clone_depth or 0)
        status, text, _said = self._git.attempt("cat-file", "blob", f"{there}:{path}")
        return text if status == 0 else None

    def _checked_out(self, version: str | None) -> str:
        self._git.run("init", "--quiet", ".")
        self._git.run("remote", "add", "origin", self._url)
        commit = self._fetch(version) if self._noted is None else self._fetch_noted(version, self._noted)
        self._git.run("checkout", "--quiet", "--force", "--detach", commit, "--")
        return commit

    def _fetch(self, version: str | None) -> str:
        depth = self._source.git_clone_depth or 0
        pinned = _PINNED.fullmatch(version or "")
        if pinned is not None:
            if self._mirror is not None:
                self._mirror.fetch_all()
            self._fetch_ref(pinned["ref"], 0)
            return self._commit(pinned["commit"], version)
        if version and _COMMIT.fullmatch(version):
            return self._fetch_commit(version, depth)
        ref = self._resolve(version)
        if ref is None:  # no branch and no tag: perhaps the beginning of a commit id
            self._fetch_all()
            return self._commit(version or "HEAD", version)
        if not depth:
            self._fetch_all()
            here = ref.replace("refs/heads/", "refs/remotes/origin/", 1)
            if self._git.attempt("show-ref", "--verify", "--quiet", "--", here)[0] == 0:  # it came with all the others
                return self._commit(here, version)
        return self._commit(self._fetch_ref(ref, depth), version)

    def _fetch_noted(self, version: str | None, commit: str) -> str:
        """Have a commit here that was noted when its branch or pull request was at it. Both may have moved on."""
        depth = self._source.git_clone_depth or 0
        ways: list[Callable[[], str]] = []
        if depth:
            ways.append(lambda: self._fetch_ref(commit, depth))
        if version is not None and _PULL_REQUEST.fullmatch(version):
            ref = self._resolve(version) or version
            ways.append(lambda: self._fetch_ref(ref, 0))
        for way in ways:
            try:
                way()
                return self._commit(self._whole(commit), commit)
            except HarmfulRepository:
                raise
            except BuildProblem:  # the server gives no single commits, has no refs of pull requests, or this one has moved on
                continue
        return self._fetch_commit(commit, 0)

    def _fetch_commit(self, commit: str, depth: int) -> str:
        if depth:
            try:
                self._fetch_ref(commit, depth)
                return self._commit(commit, commit)
            except BuildProblem:
                self._say("The server does not give a single commit; cloning it all")
        self._fetch_all()
        try:
            return self._commit(self._whole(commit), commit)
        except BuildProblem:
            pass
        try:
            self._fetch_ref(commit, 0)  # on no branch and no tag, but some servers give it when asked by name
            return self._commit(commit, commit)
        except HarmfulRepository:
            raise
        except BuildProblem as problem:
            raise self._git.not_found(
                f"commit gone: it has no commit {commit}, or no longer; a force-push or the removal of a branch takes some away"
            ) from problem

    def _whole(self, commit: str) -> str:
        """The id that an abbreviated one stands for; never a branch or tag that somebody named so."""
        if len(commit) in (40, 64):
            return commit
        found = self._git.attempt("rev-parse", f"--disambiguate={commit}")[1].split()
        commits = [one for one in found if self._git.attempt("cat-file", "-t", one)[1].strip() == "commit"]
        if len(commits) != 1:
            raise self._git.not_found(f"it has no commit {commit}" if not commits else f"several commits begin with {commit}")
        return commits[0]

    def _resolve(self, version: str | None) -> str | None:
        """The full name of the ref that `version` means, or None where the server has none of that name."""
        if not version or version == "HEAD":
            if not self._git.remote("ls-remote", "--exit-code", "origin", "HEAD", missing_is_2=True):
                raise self._git.not_found("the repository is empty, or has no default branch")
            return "HEAD"
        if version.startswith("refs/"):
            return version
        if _PULL_REQUEST.fullmatch(version):
            number = version.removeprefix("pr/")
            kind = self._source.type
            if kind in (SourceType.GITLAB, SourceType.GITLAB_SELF_MANAGED):
                return f"refs/merge-requests/{number}/head"
            return f"refs/pull-requests/{number}/from" if kind is SourceType.BITBUCKET else f"refs/pull/{number}/head"
        names = [f"refs/heads/{version}", f"refs/tags/{version}"]
        listed = self._git.remote("ls-remote", "origin", *names)
        there = {line.split("\t")[1] for line in listed.splitlines() if "\t" in line}
        found = next((name for name in names if name in there), None)
        if found is None and not re.fullmatch(r"[0-9a-f]{4,39}", version):
            raise self._git.not_found(f"it has no branch and no tag named {version!r}")
        return found

    def _fetch_all(self) -> None:
        if self._mirror is None or not self._mirror.fetch_all():
            self._git.remote("fetch", "--quiet", "--tags", "--force", "origin", "+refs/heads/*:refs/remotes/origin/*")

    def _fetch_ref(self, ref: str, depth: int) -> str:
        """Have a ref, or a commit, here; what it is called."""
        found = self._mirror.fetch_ref(ref, depth) if depth and self._mirror is not None else None
        if found is None:
            shallow = [f"--depth={depth}"] if depth else []
            self._git.remote("fetch", "--quiet", "--no-tags", *shallow, "origin", ref)
        return found or "FETCH_HEAD"

    def _commit(self, name: str, version: str | None) -> str:
        status, output, _said = self._git.attempt("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if status != 0:
            raise self._git.not_found(f"it has no commit {version or name}")
        return output.strip()
