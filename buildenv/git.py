"""The git program, run so that neither an address nor a repository nor our own environment makes it do more than it should.

What git may do is said by a fixed environment and fixed options; nothing of the build's own environment reaches it. By ssh it
goes with the key and the known_hosts of the worker's own user, and asks nobody anything.
"""

import contextlib
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from millrace.errors import BuildProblem, BuildStopped, InfraProblem
from millrace.project import ProjectSource
from millrace.vocabulary import Reason, SourceType

_TRIES: Final = 3
_LOOK_EVERY_S: Final = 0.1
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
    r"fsck error|index-pack failed|invalid index-pack output|unpack-objects failed|file too large|transport '.*' not allowed",
    re.I,
)
_ABSENT: Final = re.compile(
    r"couldn't find remote ref|repository '.*' not found|does not appear to be a git repository|not our ref|unadvertised object"
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


class ServerRefused(BuildProblem):
    """The server's own word, or one about it: asked again it would say the same."""


class HarmfulRepository(ServerRefused):
    """git refuses what came."""


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


class Git:
    """git in one folder, for one repository on a server."""

    def __init__(
        self,
        url: str,
        folder: Path,
        ca_bundle: Path | None,
        say: Callable[[str], None],
        stop: threading.Event,
        deadline: float,
        credential: Credential | None,
    ) -> None:
        self._url, self._folder = url, folder
        self._where: tuple[str, ...] = ()
        self._keep: tuple[int, ...] = ()
        self._say, self._stop, self._deadline = say, stop, deadline
        self._home = tempfile.mkdtemp(prefix="millrace-git-")
        # Also as a file, for the processes that git starts itself without handing its -c options on.
        settings = "".join(f'[{name}]\n\t{key} = "{value}"\n' for name, key, value in map(_setting, _OPTIONS))
        (Path(self._home) / ".gitconfig").write_text(settings)
        local = self._url.startswith("/")
        protocols = "file" if local else "http:https:ssh" if self._url.startswith("http://") else "https:ssh"
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}:/usr/local/bin",  # a bundled worker has its own git
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

    def allow(self, protocols: str) -> None:
        """Let git speak these protocols from here on, and no others."""
        self._environment["GIT_ALLOW_PROTOCOL"] = protocols

    def elsewhere(self, folder: Path, *, bare: bool = False, keep: int | None = None, protocols: str = "") -> "Git":
        """The same in another folder. `bare`: that is a repository by itself, and none is looked for above it. `keep` is a file
        that git holds open, and with it the file's lock, however long it outlives us.
        """
        other = copy.copy(self)
        other._folder, other._environment = folder, dict(self._environment)
        other._where = ("--git-dir=.",) if bare else ()
        other._keep = () if keep is None else (keep,)
        if protocols:
            other.allow(protocols)
        return other

    def pause(self, seconds: float) -> None:
        """Wait, unless the build is stopped. Raises BuildStopped."""
        self._stop.wait(seconds)
        self.check_time()

    def close(self) -> None:
        """Remove what git was given as its home."""
        shutil.rmtree(self._home, ignore_errors=True)

    def not_found(self, why: str) -> BuildProblem:
        """The problem that there is no such thing on the server."""
        return ServerRefused(f"git clone of {self._url} failed: {why}", reason=Reason.SOURCE_NOT_FOUND)

    def remote(self, *arguments: str, missing_is_2: bool = False) -> str:
        """A git command that talks to the server: tried again where the network fails; its failures named."""
        for attempt in range(1, _TRIES + 1):
            status, output, said = self.attempt(*arguments)
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
        self.check_time()
        raise InfraProblem(
            f"the git server of {self._url} could not be reached: {_last_line(said)}",
            reason=Reason.SOURCE_UNREACHABLE,
            status_code="CLIENT_ERROR",
            hint="Check the address, and that the worker's network reaches it.",
        )

    def _refused(self, said: str) -> BuildProblem:
        what = _last_line(said)
        if _DENIED.search(said):
            return self.not_found(f"the server wants credentials, or rejected them ({what})")
        if _UNTRUSTED.search(said):
            return ServerRefused(
                f"git clone of {self._url} failed: the server is not trusted ({what})",
                reason=Reason.BAD_SOURCE,
                hint="Add its host key to the worker's known_hosts, or its CA to the worker's bundle.",
            )
        if _HARMFUL.search(said):
            return HarmfulRepository(
                f"git clone of {self._url} failed: git refuses what it got ({what})", reason=Reason.BAD_SOURCE
            )
        if _ABSENT.search(said):
            return self.not_found(what)
        return BuildProblem(f"git clone of {self._url} failed: {what}", reason=Reason.SOURCE_NOT_FOUND)

    def run(self, *arguments: str) -> str:
        """A git command that stays on this host; what it printed. Raises BuildProblem."""
        status, output, said = self.attempt(*arguments)
        if status != 0:
            raise BuildProblem(f"git {arguments[0]} failed: {_last_line(said)}", reason=Reason.BAD_SOURCE)
        return output

    def attempt(self, *arguments: str) -> tuple[int, str, str]:
        """Any git command: its status, what it printed, and what it said of errors. Raises BuildStopped."""
        self.check_time()
        options = [part for option in _OPTIONS for part in ("-c", option)]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    ["git", *self._where, *options, *arguments],
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                    pass_fds=self._keep,
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
            self.check_time()
            out.seek(0)
            err.seek(0)
            return process.returncode, out.read().decode(errors="replace"), err.read(100_000).decode(errors="replace")

    def _over(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self._deadline

    def check_time(self) -> None:
        """Raises BuildStopped where the build was stopped, or its time is over."""
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
