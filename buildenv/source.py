"""Fetches a build's source: by git, hardened against hostile addresses and repositories, or as an archive of the object store.

What git may do is said by a fixed environment and fixed options; nothing of the build's own environment reaches it. By ssh it
goes with the key and the known_hosts of the worker's own user, and asks nobody anything.
Servers on private networks are the normal case of a farm that runs itself, so only link-local addresses (a cloud's metadata) are
barred; whatever a name or a redirect leads to, it has to speak TLS with a certificate for its name, or ssh with a known key.
"""

import contextlib
import ipaddress
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from buildenv.archive import unpack
from millrace.contract import Grant, GrantRequest
from millrace.errors import BuildProblem, BuildStopped, InfraProblem, InvalidInput, NotFound
from millrace.project import ProjectSource, check_source_version
from millrace.storage import check_key
from millrace.vocabulary import Reason, SourceType

_TRIES: Final = 3
_LOOK_EVERY_S: Final = 0.1
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_SCP: Final = re.compile(r"(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*):(?P<path>[^-\s][^\s]*)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PINNED: Final = re.compile(r"(?P<ref>refs/[^^]+)\^\{(?P<commit>[0-9a-f]{40})\}")
_AWAY: Final = re.compile(
    r"could not resolve host|name or service not known|temporary failure in name|connection (refused|reset|timed out|closed)"
    r"|failed to connect|couldn't connect|operation timed out|no route to host|network is unreachable|early eof"
    r"|hung up unexpectedly|returned error: (?:5\d\d|429)|gnutls_handshake|rpc failed|operation too slow",
    re.IGNORECASE,
)
_DENIED: Final = re.compile(
    r"authentication failed|could not read (username|password)|permission denied|returned error: 40[13]"
    r"|terminal prompts disabled",
    re.IGNORECASE,
)
_UNTRUSTED: Final = re.compile(
    r"host key verification failed|certificate verification failed|ssl certificate problem|self.signed certificate"
    r"|no alternative certificate subject|certificate subject name",
    re.IGNORECASE,
)
_HARMFUL: Final = re.compile(
    r"fsck error|index-pack failed|unpack-objects failed|file too large|transport '.*' not allowed", re.I
)
_USERS: Final = {
    SourceType.GITLAB: "oauth2",
    SourceType.GITLAB_SELF_MANAGED: "oauth2",
    SourceType.BITBUCKET: "x-token-auth",
}
"""The user names that go with a token; GitHub takes any."""
_ASKPASS: Final = """#!/bin/sh
case $1 in
    *"//$MILLRACE_HOST'"* | *"//$MILLRACE_HOST/"* | *"@$MILLRACE_HOST'"* | *"@$MILLRACE_HOST/"*) ;;
    *) exit 1 ;;
esac
case $1 in
    Username*) cat "$HOME/username" ;;
    *) cat "$HOME/password" ;;
esac
"""
"""Answers git's question for the source's own host only: a submodule or a redirect elsewhere gets nothing."""
_SSH: Final = "ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=15 -o ForwardAgent=no"
_MAX_FILE_BYTES: Final = 20 * 1024**3
"""No file that git writes may grow beyond this, so that no repository fills the worker's disk."""
_OPTIONS: Final = (
    "protocol.ext.allow=never",
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "safe.directory=*",
    "submodule.recurse=false",
    "advice.detachedHead=false",
    "init.defaultBranch=main",
    "transfer.fsckObjects=true",
    "fetch.fsck.zeroPaddedFilemode=ignore",  # old, harmless repositories have these three
    "fetch.fsck.badTimezone=ignore",
    "fetch.fsck.missingSpaceBeforeDate=ignore",
    "http.lowSpeedLimit=1000",
    "http.lowSpeedTime=60",
    "gc.auto=0",
)


@dataclass(frozen=True, kw_only=True)
class FetchedSource:
    """What was fetched. `resolved_version` is the full commit id, None for what is not git; `repo_url` is for variables."""

    resolved_version: str | None
    repo_url: str


@dataclass(frozen=True, kw_only=True)
class Credential:
    """What a git server over https is told, and for which host (with its port, where one is named) it is."""

    host: str
    username: str
    password: str

    @classmethod
    def read(cls, secret: str, source: ProjectSource) -> "Credential":
        """A secret as it is kept for a source: a bare token, or CodeBuild's own JSON (`Token`, and `Username` for Bitbucket).

        Raises BuildProblem where it is neither.
        """
        token, username = secret.strip(), _USERS.get(source.type, "x-access-token")
        if token.startswith("{"):
            try:
                kept = json.loads(token)
                token, username = str(kept["Token"]).strip(), str(kept.get("Username") or username)
            except (ValueError, KeyError, TypeError) as error:
                raise BuildProblem(
                    "the secret of the source's auth is JSON without a 'Token'", reason=Reason.SECRET_UNAVAILABLE
                ) from error
        if not token or any(ord(char) <= 32 or ord(char) == 127 for char in token + username):
            raise BuildProblem(
                "the secret of the source's auth is empty, or holds blanks or control characters",
                reason=Reason.SECRET_UNAVAILABLE,
                hint="Keep the token alone, or CodeBuild's JSON with 'Token'.",
            )
        return cls(host=urlsplit(source.location or "").netloc.rpartition("@")[2], username=username, password=token)

    def line(self) -> tuple[str, str, str]:
        """As a build's own git is told."""
        return self.host, self.username, self.password


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
) -> FetchedSource:
    """Put the source into the empty folder `dest`. `deadline` is of `time.monotonic`.

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
    git = _Git(source, dest, ca_bundle, say, stop, deadline, credential)
    try:
        return FetchedSource(resolved_version=git.checkout(version), repo_url=source.location or "")
    finally:
        git.close()


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


class _Git:
    """One checkout by the git program."""

    def __init__(
        self,
        source: ProjectSource,
        dest: Path,
        ca_bundle: Path | None,
        say: Callable[[str], None],
        stop: threading.Event,
        deadline: float,
        credential: Credential | None,
    ) -> None:
        self._source, self._dest = source, dest
        self._url = source.location or ""
        self._say, self._stop, self._deadline = say, stop, deadline
        self._home = tempfile.mkdtemp(prefix="millrace-git-")
        # Also as a file, for the processes that git starts itself without handing its -c options on.
        settings = "".join(f'[{name}]\n\t{key} = "{value}"\n' for name, key, value in map(_setting, _OPTIONS))
        (Path(self._home) / ".gitconfig").write_text(settings)
        local = self._url.startswith("/")
        protocols = "file" if local else "http:https:ssh" if self._url.startswith("http://") else "https:ssh"
        self._environment = {
            "PATH": os.defpath + ":/usr/local/bin",
            "HOME": self._home,
            "LC_ALL": "C",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ALLOW_PROTOCOL": protocols,
            "GIT_SSH_COMMAND": _SSH,
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        if ca_bundle is not None:
            self._environment["GIT_SSL_CAINFO"] = str(ca_bundle)
        if credential is not None:
            self._give(credential)

    def _give(self, credential: Credential) -> None:
        """Through files that only this user reads: never by argument, address or environment."""
        home = Path(self._home)
        for name, text, mode in (
            ("username", credential.username, 0o600),
            ("password", credential.password, 0o600),
            ("askpass", _ASKPASS, 0o700),
        ):
            (home / name).touch(mode=mode)
            (home / name).write_text(text + "\n", encoding="utf-8")
        self._environment |= {"GIT_ASKPASS": str(home / "askpass"), "MILLRACE_HOST": credential.host}

    def close(self) -> None:
        """Remove what git was given as its home."""
        shutil.rmtree(self._home, ignore_errors=True)

    def checkout(self, version: str | None) -> str:
        """Check `version` out, detached; the full commit id."""
        self._say(f"Cloning {self._url}" + (f" at {version}" if version else ""))
        self._run("init", "--quiet", ".")
        self._run("remote", "add", "origin", self._url)
        commit = self._fetch(version)
        self._run("checkout", "--quiet", "--force", "--detach", commit, "--")
        config = self._source.git_submodules_config
        if config is not None and config.fetch_submodules:
            self._environment["GIT_ALLOW_PROTOCOL"] = "https:ssh"  # a .gitmodules file is the repository's own word
            self._remote("submodule", "update", "--init", "--recursive", "--quiet")
        self._say(f"Checked out {commit}")
        return commit

    def _fetch(self, version: str | None) -> str:
        depth = self._source.git_clone_depth or 0
        pinned = _PINNED.fullmatch(version or "")
        if pinned is not None:
            self._fetch_ref(pinned["ref"], 0)
            return self._commit(pinned["commit"], version)
        if version and _COMMIT.fullmatch(version):
            return self._fetch_commit(version, depth)
        ref = self._resolve(version)
        if ref is None:  # no branch and no tag: perhaps the beginning of a commit id
            self._fetch_all()
            return self._commit(version or "HEAD", version)
        if depth:
            self._fetch_ref(ref, depth)
            return self._commit("FETCH_HEAD", version)
        self._fetch_all()
        self._fetch_ref(ref, 0)
        return self._commit("FETCH_HEAD", version)

    def _fetch_commit(self, commit: str, depth: int) -> str:
        if depth:
            try:
                self._fetch_ref(commit, depth)
                return self._commit(commit, commit)
            except BuildProblem:
                self._say("The server does not give a single commit; cloning it all")
        self._fetch_all()
        try:
            return self._commit(commit, commit)
        except BuildProblem:
            self._fetch_ref(commit, 0)  # on no branch and no tag, but some servers give it when asked by name
            return self._commit(commit, commit)

    def _resolve(self, version: str | None) -> str | None:
        """The full name of the ref that `version` means, or None where the server has none of that name."""
        if not version or version == "HEAD":
            if not self._remote("ls-remote", "--exit-code", "origin", "HEAD", missing_is_2=True):
                raise self._not_found("the repository is empty, or has no default branch")
            return "HEAD"
        if version.startswith("refs/"):
            return version
        if re.fullmatch(r"pr/[0-9]+", version):
            number = version.removeprefix("pr/")
            kind = self._source.type
            if kind in (SourceType.GITLAB, SourceType.GITLAB_SELF_MANAGED):
                return f"refs/merge-requests/{number}/head"
            return f"refs/pull-requests/{number}/from" if kind is SourceType.BITBUCKET else f"refs/pull/{number}/head"
        names = [f"refs/heads/{version}", f"refs/tags/{version}"]
        listed = self._remote("ls-remote", "origin", *names)
        there = {line.split("\t")[1] for line in listed.splitlines() if "\t" in line}
        found = next((name for name in names if name in there), None)
        if found is None and not re.fullmatch(r"[0-9a-f]{4,39}", version):
            raise self._not_found(f"it has no branch and no tag named {version!r}")
        return found

    def _fetch_all(self) -> None:
        self._remote("fetch", "--quiet", "--tags", "--force", "origin", "+refs/heads/*:refs/remotes/origin/*")

    def _fetch_ref(self, ref: str, depth: int) -> None:
        shallow = [f"--depth={depth}"] if depth else []
        self._remote("fetch", "--quiet", "--no-tags", *shallow, "origin", ref)

    def _commit(self, name: str, version: str | None) -> str:
        status, output, _said = self._try("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if status != 0:
            raise self._not_found(f"it has no commit {version or name}")
        return output.strip()

    def _not_found(self, why: str) -> BuildProblem:
        return BuildProblem(f"git clone of {self._url} failed: {why}", reason=Reason.SOURCE_NOT_FOUND)

    def _remote(self, *arguments: str, missing_is_2: bool = False) -> str:
        """A git command that talks to the server: tried again where the network fails; its failures named."""
        for attempt in range(1, _TRIES + 1):
            status, output, said = self._try(*arguments)
            if status == 0:
                return output
            if status == 2 and missing_is_2:
                return ""
            if not _AWAY.search(said):
                raise self._refused(said)
            if attempt < _TRIES:
                self._say(f"The git server does not answer; trying again ({attempt} of {_TRIES - 1})")
                if self._stop.wait(min(2.0**attempt, max(0.0, self._deadline - time.monotonic()))):
                    break
        self._check_time()
        raise InfraProblem(
            f"the git server of {self._url} could not be reached: {_last_line(said)}",
            reason=Reason.SOURCE_UNREACHABLE,
            status_code="CLIENT_ERROR",
            hint="Check the address, and that the worker's network reaches it.",
        )

    def _refused(self, said: str) -> BuildProblem:
        what = _last_line(said)
        if _DENIED.search(said):
            return self._not_found(f"the server wants credentials, or rejected them ({what})")
        if _UNTRUSTED.search(said):
            return BuildProblem(
                f"git clone of {self._url} failed: the server is not trusted ({what})",
                reason=Reason.BAD_SOURCE,
                hint="Add its host key to the worker's known_hosts, or its CA to the worker's bundle.",
            )
        if _HARMFUL.search(said):
            return BuildProblem(f"git clone of {self._url} failed: git refuses what it got ({what})", reason=Reason.BAD_SOURCE)
        return self._not_found(what)

    def _run(self, *arguments: str) -> str:
        status, output, said = self._try(*arguments)
        if status != 0:
            raise BuildProblem(f"git {arguments[0]} failed: {_last_line(said)}", reason=Reason.BAD_SOURCE)
        return output

    def _try(self, *arguments: str) -> tuple[int, str, str]:
        self._check_time()
        options = [part for option in _OPTIONS for part in ("-c", option)]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    ["git", *options, *arguments],
                    cwd=self._dest,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise InfraProblem(
                    "the worker has no git program", reason=Reason.SOURCE_UNREACHABLE, hint="Install git on the worker's host."
                ) from error
            try:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
                while not self._over():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_EVERY_S)
                        break
            except ProcessLookupError:  # it was faster than the limit
                process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self._check_time()
            out.seek(0)
            err.seek(0)
            return process.returncode, out.read().decode(errors="replace"), err.read(100_000).decode(errors="replace")

    def _over(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self._deadline

    def _check_time(self) -> None:
        if self._stop.is_set():
            raise BuildStopped("stopped while the source was fetched", reason=Reason.CANCELLED)
        if time.monotonic() > self._deadline:
            raise BuildStopped("the build's time was over while the source was fetched", reason=Reason.TIMEOUT)


def _setting(option: str) -> tuple[str, str, str]:
    """`section.key=value` in its parts, the section as a configuration file has it."""
    name, _, value = option.partition("=")
    *sections, key = name.split(".")
    return sections[0] + (f' "{sections[1]}"' if len(sections) > 1 else ""), key, value


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if line.lower().startswith(("fatal:", "error:", "remote:", "ssh:"))]
    return (telling or lines or ["no reason given"])[0][:300]
