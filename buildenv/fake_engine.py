"""An engine that runs nothing: for tests, and to rehearse a farm without Docker. Containers live in memory.

It speaks the runner's protocol and understands a few shell words (`fake_shell.py`); any other command is named in the output
and not run. It writes only where a real container could: into the folders that are mounted read-write. It obeys these variables,
given to it as a mapping; each build's own environment variables of the same names come first:

  FAKE_EXIT_CODE    status of each command that is not run; 0
  FAKE_SLEEP_S      how long each of them takes; 0
  FAKE_OOM          1: the container ends for its memory when the first of them would run
  FAKE_DIES         1: the same, with status 137 and no proof of its memory
  FAKE_PULL_FAILS   not_found or unreachable: what asking for an image ends in
  FAKE_ENGINE_LOST  info, start or run: the engine is gone from there on (run: at the first command)
"""

import hashlib
import io
import itertools
import queue
import re
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from buildenv import script
from buildenv.engine import ContainerSpec, ContainerState, EngineInfo, Image, Leftover, Mount
from buildenv.fake_shell import NOT_RUN, FakeShell
from millrace.clock import now
from millrace.errors import BuildProblem, InfraProblem
from millrace.vocabulary import GIB, Reason

KILLED: Final = 137
TERMINATED: Final = 143
NOT_FOUND: Final = 127
CHUNK_BYTES: Final = 32 * 1024
CHUNKS_WAITING: Final = 64
"""A container whose output is not read stops after so many chunks, as a full pipe would make it."""

REFERENCE: Final = re.compile(r"[a-z0-9][a-z0-9._/:@-]{0,254}(?::[A-Za-z0-9._-]{1,128})?")
WHOLE_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class FakeEngine:
    """See `engine.Engine`, and above for what `env` may hold."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = dict(env or {})
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._containers: dict[str, _Container] = {}

    def info(self) -> EngineInfo:
        self._lose_at("info")
        return EngineInfo(name="fake", version="0", cpus=2, memory_bytes=8 * GIB, seccomp=True)

    def ensure_image(self, reference: str) -> Image:
        failure = self._env.get("FAKE_PULL_FAILS", "")
        if failure == "unreachable":
            raise InfraProblem(f"the registry of image {reference} cannot be reached", reason=Reason.IMAGE_PULL)
        if failure or not REFERENCE.fullmatch(reference):
            raise BuildProblem(
                f"Unable to pull customer's container image {reference}. Reason: it does not exist",
                reason=Reason.IMAGE_NOT_FOUND,
                status_code="BUILD_CONTAINER_UNABLE_TO_PULL_IMAGE",
            )
        return Image(reference=reference, digest=f"sha256:{hashlib.sha256(reference.encode()).hexdigest()}")

    def create(self, spec: ContainerSpec) -> str:
        self._lose_at("start")
        self.remove(spec.name)
        for mount in spec.mounts:
            if not mount.source.exists():
                raise InfraProblem(f"there is no {mount.source} to mount", reason=Reason.ENGINE_LOST)
        with self._lock:
            container_id = hashlib.sha256(f"{id(self)} {next(self._numbers)}".encode()).hexdigest()
            self._containers[container_id] = _Container(spec=spec, env={**self._env, **spec.env})
        return container_id

    def attach(self, container_id: str) -> "FakeConsole":
        container = self._find(container_id)
        if container is None:
            raise InfraProblem("the container is gone", reason=Reason.ENGINE_LOST)
        return FakeConsole(container)

    def start(self, container_id: str) -> None:
        self._lose_at("start")
        container = self._find(container_id)
        if container is None:
            raise InfraProblem("the container is gone", reason=Reason.ENGINE_LOST)
        if container.spec.command[0] != "/bin/sh":
            raise BuildProblem(f"the image has no {container.spec.command[0]}", reason=Reason.BAD_IMAGE)
        container.start()

    def state(self, container_id: str) -> ContainerState:
        container = self._find(container_id)
        if container is None:
            return ContainerState(running=False, exit_code=None, oom_killed=False)
        if container.lost.is_set():
            raise InfraProblem("the fake engine is gone, as FAKE_ENGINE_LOST asks", reason=Reason.ENGINE_LOST)
        running = container.thread.is_alive()
        return ContainerState(
            running=running, exit_code=None if running else container.exit_code, oom_killed=container.oom_killed
        )

    def stop(self, container_id: str, grace_s: float) -> None:
        container = self._find(container_id)
        if container is not None:
            container.end(TERMINATED if grace_s > 0 and not container.is_runner else KILLED)

    def copy_out(self, container_id: str, path: str) -> Iterator[bytes]:
        container = self._find(container_id)
        content = None if container is None else container.files.archive(path)
        if content is None:
            raise FileNotFoundError(f"the container has no {path}")
        return (content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES))

    def copy_in(self, container_id: str, path: str, tar: Iterable[bytes]) -> None:
        container = self._find(container_id)
        if container is None:
            raise InfraProblem("the container is gone", reason=Reason.ENGINE_LOST)
        try:
            with tarfile.open(fileobj=io.BytesIO(b"".join(tar))) as archive:
                container.files.unpack(path, archive)
        except (OSError, tarfile.TarError) as error:
            raise BuildProblem(f"the engine cannot unpack into {path}: {error}", reason=Reason.BAD_IMAGE) from error

    def rename(self, container_id: str, name: str) -> None:
        container = self._find(container_id)
        if container is None:
            raise InfraProblem("the container is gone", reason=Reason.ENGINE_LOST)
        container.spec = replace(container.spec, name=name)

    def pid(self, container_id: str) -> int | None:
        return None  # no container, no namespace

    def remove(self, container_id: str) -> None:
        container = self._find(container_id)
        if container is None:
            return
        container.end(KILLED)
        with self._lock:
            self._containers = {key: value for key, value in self._containers.items() if value is not container}

    def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
        with self._lock:
            containers = dict(self._containers)
        return [
            Leftover(container_id=container_id, labels=container.spec.labels, created_at_s=container.created_at_s)
            for container_id, container in containers.items()
            if all(name in container.spec.labels and value in ("", container.spec.labels[name]) for name, value in labels.items())
        ]

    def _find(self, name_or_id: str) -> "_Container | None":
        with self._lock:
            named = (one for one in self._containers.values() if one.spec.name == name_or_id)
            return self._containers.get(name_or_id) or next(named, None)

    def _lose_at(self, moment: str) -> None:
        if self._env.get("FAKE_ENGINE_LOST") == moment:
            raise InfraProblem("the fake engine does not answer, as FAKE_ENGINE_LOST asks", reason=Reason.ENGINE_LOST)


class FakeConsole:
    """See `engine.Console`."""

    def __init__(self, container: "_Container") -> None:
        self._container = container
        self._ended = False
        self._closed = threading.Event()

    def write(self, data: bytes) -> None:
        if self._closed.is_set():
            return
        if self._container.lost.is_set():
            raise InfraProblem("the fake engine is gone, as FAKE_ENGINE_LOST asks", reason=Reason.ENGINE_LOST)
        self._container.put_line(data)

    def read(self, timeout_s: float) -> bytes | None:
        until = time.monotonic() + timeout_s
        while not self._ended and not self._closed.is_set():
            if self._container.lost.is_set():
                raise InfraProblem("the fake engine is gone, as FAKE_ENGINE_LOST asks", reason=Reason.ENGINE_LOST)
            try:
                data = self._container.output.get(timeout=max(0.0, min(0.05, until - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= until:
                    return b""
                continue
            self._ended = data is None
            if data:
                return data
        return None

    def close(self) -> None:
        self._closed.set()
        self._container.put_line(None)


class _Ended(Exception):
    """The container, or the command that runs in it, is to end."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(kw_only=True)
class _Container:
    spec: ContainerSpec
    env: dict[str, str]
    created_at_s: float = field(default_factory=lambda: now().timestamp())
    output: "queue.Queue[bytes | None]" = field(default_factory=lambda: queue.Queue(CHUNKS_WAITING))
    exit_code: int | None = None
    oom_killed: bool = False
    lost: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.files = _Files(self.spec.mounts)
        self.thread = threading.Thread(target=self._live, name=f"fake-{self.spec.name}", daemon=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._partial = b""
        self._running = False
        self._ending: int | None = None  # The whole container, with this status.
        self._term = threading.Event()  # The command that runs.
        self._wake = threading.Condition()
        self.is_runner = len(self.spec.command) == 2 and self.spec.command[1].endswith("/runner.sh")

    def start(self) -> None:
        self.thread.start()

    def end(self, status: int) -> None:
        """End it, with `status` unless it has ended by itself; returns when it has."""
        with self._wake:
            if self._ending is None:
                self._ending = status
            self._wake.notify_all()
        self._lines.put(None)
        if self.thread.ident is not None:
            self.thread.join()

    def put_line(self, data: bytes | None) -> None:
        """Something for stdin; None ends it."""
        if data is None:
            self._terminate()
            self._lines.put(None)
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if line == b"term":
                self._terminate()
            else:
                self._lines.put(line.decode(errors="replace"))

    def _terminate(self) -> None:
        with self._wake:
            if self._running:
                self._term.set()
            self._wake.notify_all()

    def _live(self) -> None:
        try:
            if self.is_runner:
                self._serve()
                status = 0
            elif self.spec.command[1:2] == ("-c",):
                status = self._shell(self.spec.env).run(self.spec.command[2])
            else:
                status = NOT_FOUND
        except _Ended as ended:
            status = ended.status
        self.exit_code = status
        self._put(None, last=True)

    def _serve(self) -> None:
        """The runner's side of its protocol; see runner.sh."""
        nonce = ""
        while (line := self._lines.get()) is not None:
            verb, _, rest = line.partition(" ")
            if verb == "hello":
                nonce = rest
                exports = {"HOME": "/root", "HOSTNAME": self.spec.hostname, "PATH": WHOLE_PATH, **self.spec.env}
                text = b"".join(
                    b"export %s=%s\n" % (name.encode(), script.quote(value.encode())) for name, value in exports.items()
                )
                self._leave("0.env", text)
                self._say(f"\x1e{nonce} 0 ready\x1e".encode())
            elif verb == "run":
                number = rest.partition(" ")[0]
                status = self._command(number)
                self._leave(f"{number}.status", f"{status}\n".encode())
                self._say(f"\x1e{nonce} {number} {status}\x1e".encode())
        if self._ending is not None:
            raise _Ended(self._ending)

    def _command(self, number: str) -> int:
        shell = self._shell({})
        _restore(shell, self.files.read(f"{_CONTROL}/{number}.run.sh"))
        self.env.update({name: value for name, value in shell.variables.items() if name.startswith("FAKE_")})
        self._steer(shell)
        if self.env.get("FAKE_ENGINE_LOST") == "run":
            self.lost.set()
            raise _Ended(KILLED)
        with self._wake:
            self._running = True
        try:
            status = shell.run(self.files.read(f"{_CONTROL}/script.sh").decode(errors="surrogateescape"))
        except _Ended as ended:
            if self._ending is not None:
                raise
            return ended.status
        finally:
            with self._wake:
                self._running = False
            self._term.clear()
        self._leave(f"{number}.state", _dump(shell))
        return status

    def _shell(self, variables: Mapping[str, str]) -> FakeShell:
        shell = FakeShell(files=self.files, say=self._say, wait=self._wait, variables=dict(variables), exported=set(variables))
        self._steer(shell)
        return shell

    def _steer(self, shell: FakeShell) -> None:
        shell.unknown_status = int(self.env.get("FAKE_EXIT_CODE", "0")) & 255
        shell.unknown_s = float(self.env.get("FAKE_SLEEP_S", "0"))

    def _leave(self, name: str, content: bytes) -> None:
        self.files.write(f"{_CONTROL}/{name}", content, append=False)

    def _say(self, data: bytes) -> None:
        if data.startswith(NOT_RUN.encode()):
            self._die_if_asked()
        for at in range(0, len(data), CHUNK_BYTES):
            self._put(data[at : at + CHUNK_BYTES])

    def _die_if_asked(self) -> None:
        self.oom_killed = self.env.get("FAKE_OOM", "") not in ("", "0")
        if self.oom_killed or self.env.get("FAKE_DIES", "") not in ("", "0"):
            self._ending = KILLED
            raise _Ended(KILLED)

    def _put(self, data: bytes | None, *, last: bool = False) -> None:
        """Wait for room as a full pipe would make it wait. The last word is put even where nobody reads: room is made for it."""
        while True:
            try:
                self.output.put(data, timeout=0.05)
                return
            except queue.Full:
                if last and self._ending is not None:
                    self.output.get_nowait()
                elif not last:
                    self._check()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._wake:
            self._check()
            while (left := until - time.monotonic()) > 0:
                self._wake.wait(left)
                self._check()

    def _check(self) -> None:
        if self._ending is not None:
            raise _Ended(self._ending)
        if self._term.is_set():
            raise _Ended(TERMINATED)


_CONTROL: Final = "/codebuild/output/tmp"

_PREAMBLE: Final = re.compile(
    rb"(?:cd (?P<cwd>" + script.WORD + rb") [^\n]*|unset -v (?P<unset>\w+)|umask \w+|:)\n", re.ASCII | re.DOTALL
)


def _restore(shell: FakeShell, wrapper: bytes) -> None:
    """Take the state out of the wrapper that `script.wrapper` makes, up to its trap."""
    at = 0
    while not wrapper.startswith(b"trap ", at):
        found = script.SET_LINE.match(wrapper, at) or script.EXPORT_LINE.match(wrapper, at) or _PREAMBLE.match(wrapper, at)
        if found is None:
            raise ValueError(f"not a wrapper: {wrapper[at : at + 60]!r}")
        fields = found.groupdict()
        if (cwd := fields.get("cwd")) is not None:
            shell.cwd = script.unquote(cwd).decode(errors="surrogateescape")
        elif (name := fields.get("name")) is not None and not name.startswith(script.OURS):
            shell.variables[name.decode()] = script.unquote(fields["value"] or b"").decode(errors="surrogateescape")
            if found.re is script.EXPORT_LINE:
                shell.exported.add(name.decode())
        at = found.end()


def _dump(shell: FakeShell) -> bytes:
    lines = [
        b"%s=%s\n" % (name.encode(), script.quote(value.encode(errors="surrogateescape")))
        for name, value in sorted(shell.variables.items())
    ]
    exports = [b"export %s\n" % name.encode() for name in sorted(shell.exported)]
    head = b"sh\n" + shell.cwd.encode(errors="surrogateescape") + b"\n\x1e\n0022\n"
    return head + b"".join(lines) + b"\x1e\n" + b"".join(exports) + b"\x1e\nend\n"


class _Files:
    """A container's files: folders of the host where some are mounted, memory elsewhere. No link leads out of a mount."""

    def __init__(self, mounts: tuple[Mount, ...]) -> None:
        self._mounts = sorted(mounts, key=lambda mount: len(mount.target), reverse=True)
        self._memory: dict[str, bytes] = {}
        self._folders = {"/", "/tmp", "/root", "/bin", "/etc"}  # noqa: S108  # a path of the made-up container

    def read(self, path: str) -> bytes:
        if (host := self._host(path, writing=False)) is not None:
            return host.read_bytes()
        if path not in self._memory:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self._memory[path]

    def write(self, path: str, data: bytes, *, append: bool) -> None:
        if (host := self._host(path, writing=True)) is not None:
            with host.open("ab" if append else "wb") as file:
                file.write(data)
            return
        if not self.is_folder(str(PurePosixPath(path).parent)):
            raise FileNotFoundError(2, "No such file or directory", path)
        self._memory[path] = (self._memory.get(path, b"") if append else b"") + data

    def make_folder(self, path: str, *, parents: bool) -> None:
        if (host := self._host(path, writing=True)) is not None:
            host.mkdir(parents=parents, exist_ok=parents)
            return
        if not parents and (self.is_folder(path) or not self.is_folder(str(PurePosixPath(path).parent))):
            raise OSError(17, "cannot create directory", path)
        self._folders |= {str(folder) for folder in (PurePosixPath(path), *PurePosixPath(path).parents)}

    def is_folder(self, path: str) -> bool:
        if (host := self._host(path, writing=False)) is not None:
            return host.is_dir()
        return path in self._folders or any(
            mount.target == path or mount.target.startswith(path.rstrip("/") + "/") for mount in self._mounts
        )

    def unpack(self, path: str, tar: tarfile.TarFile) -> None:
        """Files and folders of `tar` below `path`; other kinds of entry are more than this has."""
        for entry in tar:
            target = f"{path.rstrip('/')}/{entry.name.strip('/')}"
            if entry.isdir():
                self.make_folder(target, parents=True)
            elif entry.isreg() and (content := tar.extractfile(entry)) is not None:
                self.make_folder(str(PurePosixPath(target).parent), parents=True)
                self.write(target, content.read(), append=False)

    def archive(self, path: str) -> bytes | None:
        """A tar of one file, or of a folder with what is in it; None where there is none."""
        body = io.BytesIO()
        name = PurePosixPath(path).name
        with tarfile.open(fileobj=body, mode="w") as tar:
            host = self._host(path, writing=False)
            if host is not None and host.exists():
                tar.add(host, arcname=name)
            elif path in self._memory:
                self._add(tar, name, path)
            elif path in self._folders:
                inside = sorted(kept for kept in self._memory if kept.startswith(path.rstrip("/") + "/"))
                for kept in inside:
                    self._add(tar, name + kept[len(path.rstrip("/")) :], kept)
            else:
                return None
        return body.getvalue()

    def _add(self, tar: tarfile.TarFile, name: str, path: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(self._memory[path])
        tar.addfile(entry, io.BytesIO(self._memory[path]))

    def _host(self, path: str, *, writing: bool) -> Path | None:
        for mount in self._mounts:
            if path != mount.target and not path.startswith(mount.target.rstrip("/") + "/"):
                continue
            if writing and mount.read_only:
                raise OSError(30, "Read-only file system", path)
            root = mount.source.resolve()
            host = (root / path[len(mount.target) :].lstrip("/")).resolve()
            if not host.is_relative_to(root):
                raise OSError(13, "a link leads out of the container", path)
            return host
        return None
