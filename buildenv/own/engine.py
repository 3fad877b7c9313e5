"""`OwnEngine`: a build as processes of this very container.

There is one image, which is here already, and nothing can be parked. The build gets process and mount namespaces of its own
where the kernel and the container's rights allow that. Where they do not, as on Fargate, it shares the worker's: nothing is
mounted then, so what is to be seen at a path must lie there, and what is read-only for the build is so by agreement only.
docs/fargate.md says what that means for trust. `init.py` is the build's init.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from buildenv import mounts
from buildenv.engine import CAPABILITIES, ContainerSpec, ContainerState, EngineInfo, Image, Leftover, Mount
from buildenv.images import LABEL_RUNTIMES
from buildenv.own import files, init, limits
from buildenv.own.console import OwnConsole
from buildenv.shell import CONTROL_INSIDE, RUNNER_COMMAND
from millrace import __version__
from millrace.clock import now
from millrace.errors import BuildProblem, InfraProblem
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)
_RUNTIMES_FILE: Final = Path("/codebuild/image/config/runtimes.yml")
NOT_FOR_BUILDS: Final = ("MILLRACE_", "ECS_", "AWS_CONTAINER_", "AWS_EXECUTION_ENV")
"""How the names begin of what a worker is told by its environment, and a build is not."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GONE_S: Final = 60.0
_KILLED: Final = 137


class OwnEngine:
    """See `engine.Engine`. `environ` is this container's, of which the build gets what is not the worker's own.

    `image` is what this container was made from, None where that is not known: then it passes for whatever is asked for.
    `alone`: this process is the first of its namespace, and all others below it are the build's. `isolate`: whether
    namespaces of its own are tried to be had for the build.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        image: str | None = None,
        digest: str | None = None,
        alone: bool = False,
        isolate: bool = True,
    ) -> None:
        self._environ = {name: value for name, value in environ.items() if not name.startswith(NOT_FOR_BUILDS)}
        self._image, self._digest = image, digest
        self._alone, self._isolate = alone, isolate
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._sandboxes: dict[str, _Sandbox] = {}

    def info(self) -> EngineInfo:
        return EngineInfo(
            name="own",
            version=__version__,
            cpus=limits.cpus(),
            memory_bytes=limits.memory_bytes(),
            seccomp=limits.has_seccomp(),
        )

    def ensure_image(self, reference: str) -> Image:
        if self._image is not None and reference != self._image:
            raise InfraProblem(
                f"this worker is a container of {self._image}, and runs no build in {reference}",
                reason=Reason.IMAGE_PULL,
                hint="A worker that is its own sandbox must be started from the image that the build names.",
            )
        digest = self._digest or f"unknown:{hashlib.sha256(reference.encode()).hexdigest()}"
        return Image(reference=reference, digest=digest, labels=_labels())

    def create(self, spec: ContainerSpec) -> str:
        self.remove(spec.name)
        for mount in spec.mounts:
            if not mount.source.exists():
                raise InfraProblem(f"there is no {mount.source} to be seen at {mount.target}", reason=Reason.ENGINE_LOST)
        with self._lock:
            container_id = f"own-{os.getpid()}-{next(self._numbers)}"
            self._sandboxes[container_id] = _Sandbox(spec=spec)
        return container_id

    def attach(self, container_id: str) -> OwnConsole:
        return self._get(container_id).console

    def start(self, container_id: str) -> None:
        sandbox = self._get(container_id)
        spec = sandbox.spec
        told, tell = os.pipe()
        with open(told, "rb") as answer:
            try:
                with _as_ours("the build's init cannot be started"):
                    sandbox.points = _make_points(spec.mounts)
                    sandbox.start(self._plan(spec, tell), self._environment(spec))
            finally:
                os.close(tell)
            if self._understand(spec, answer.read()):
                with _as_ours("the build's namespace cannot be seen"):
                    sandbox.keep_view()

    def _plan(self, spec: ContainerSpec, status: int) -> dict[str, Any]:
        return {
            "command": list(spec.command),
            "runner": spec.command == RUNNER_COMMAND,
            "control": CONTROL_INSIDE,
            "mounts": [(str(mount.source), mount.target, mount.read_only) for mount in spec.mounts],
            "hostname": spec.hostname,
            "isolate": self._isolate,
            "keep": list(CAPABILITIES),
            "status": status,
        }

    def _environment(self, spec: ContainerSpec) -> dict[str, str]:
        return {"PATH": _PATH, "HOME": "/root", **self._environ, **spec.env}

    def _understand(self, spec: ContainerSpec, said: bytes) -> bool:
        """What the init told of the start; True where the build has namespaces of its own.

        Raises BuildProblem(BAD_IMAGE), InfraProblem(ENGINE_LOST).
        """
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError as error:
            raise _lost("the build's init ended before it had started anything") from error
        if answer["trouble"]:
            raise _lost(f"the build cannot be started: {answer['trouble']}")
        if answer["failed"] is not None:
            raise BuildProblem(
                f"the image cannot run {spec.command[0]}: {os.strerror(answer['failed'])}",
                reason=Reason.BAD_IMAGE,
                hint="The image must have /bin/sh and be of the worker's architecture.",
            )
        isolated: bool = answer["isolated"]
        if isolated:
            log.info("sandbox.isolated")
        else:
            log.info("sandbox.shared", why=answer["why"])
        return isolated

    def state(self, container_id: str) -> ContainerState:
        sandbox = self._find(container_id)
        if sandbox is None:
            return ContainerState(running=False, exit_code=None, oom_killed=False)
        running = sandbox.process is not None and not sandbox.has_ended()
        return ContainerState(
            running=running, exit_code=None if running else sandbox.exit_code(), oom_killed=sandbox.was_short_of_memory()
        )

    def stop(self, container_id: str, grace_s: float) -> None:
        sandbox = self._find(container_id)
        if sandbox is None or sandbox.process is None:
            return
        if grace_s > 0:
            with suppress(ProcessLookupError):
                sandbox.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                sandbox.process.wait(grace_s)
        if self._alone:
            init.end_all(os.getpid())
        sandbox.end()
        if self._alone:
            _reap()

    def copy_out(self, container_id: str, path: str) -> Iterator[bytes]:
        sandbox = self._find(container_id)
        if sandbox is None:
            raise FileNotFoundError(f"the container is gone, and {path} with it")
        return _pieces(files.copy_out(path, sandbox.view), path)

    def copy_in(self, container_id: str, path: str, tar: Iterable[bytes]) -> None:
        files.copy_in(path, tar, self._get(container_id).view)

    def rename(self, container_id: str, name: str) -> None:
        sandbox = self._get(container_id)
        sandbox.spec = replace(sandbox.spec, name=name)

    def pid(self, container_id: str) -> int | None:
        return None  # caches are copied: what is mounted here would be mounted for the worker, too

    def remove(self, container_id: str) -> None:
        sandbox = self._find(container_id)
        if sandbox is None:
            return
        self.stop(container_id, 0)
        sandbox.let_go()
        with self._lock:
            self._sandboxes = {key: value for key, value in self._sandboxes.items() if value is not sandbox}

    def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
        with self._lock:
            sandboxes = dict(self._sandboxes)
        return [
            Leftover(container_id=container_id, labels=sandbox.spec.labels, created_at_s=sandbox.created_at_s)
            for container_id, sandbox in sandboxes.items()
            if all(name in sandbox.spec.labels and value in ("", sandbox.spec.labels[name]) for name, value in labels.items())
        ]

    def _get(self, container_id: str) -> "_Sandbox":
        sandbox = self._find(container_id)
        if sandbox is None:
            raise _lost("the container is gone")
        return sandbox

    def _find(self, name_or_id: str) -> "_Sandbox | None":
        with self._lock:
            named = (one for one in self._sandboxes.values() if one.spec.name == name_or_id)
            return self._sandboxes.get(name_or_id) or next(named, None)


@dataclass(kw_only=True)
class _Sandbox:
    """What stands for a container: the build's init and all below it."""

    spec: ContainerSpec
    created_at_s: float = field(default_factory=lambda: now().timestamp())
    console: OwnConsole = field(default_factory=OwnConsole)
    process: subprocess.Popen[bytes] | None = None
    points: tuple[Path, ...] = ()
    ooms: int | None = None
    view: int | None = None

    def start(self, plan: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start the init. Raises OSError."""
        self.ooms = limits.ooms()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", init.__file__, json.dumps(plan)],
            stdin=self.console.child_in,
            stdout=self.console.child_out,
            pass_fds=(plan["status"],),
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        self.console.started(self.has_ended)

    def keep_view(self) -> None:
        """Keep how the build sees its files, also for when it has ended. Raises OSError."""
        if self.process is not None:
            self.view = mounts.view_of(self.process.pid)

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def exit_code(self) -> int | None:
        if self.process is None or self.process.returncode is None:
            return None
        return self.process.returncode if self.process.returncode >= 0 else 128 - self.process.returncode

    def was_short_of_memory(self) -> bool:
        """Whether the kernel ended a process of this container since the build began."""
        by_now = limits.ooms() if self.ooms is not None else None
        return by_now is not None and self.ooms is not None and by_now > self.ooms

    def end(self) -> None:
        """Kill all of it. Raises InfraProblem(ENGINE_LOST) where something will not go."""
        process = self.process
        if process is None:
            return
        until = time.monotonic() + _GONE_S
        while process.poll() is None:
            gone = init.end_all(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)  # it ends when what it started has
            if gone:
                process.kill()
            if time.monotonic() > until:
                raise _lost(f"the build's processes still run {_GONE_S:.0f} s after they were killed")

    def let_go(self) -> None:
        self.console.close()
        if self.view is not None:
            os.close(self.view)
            self.view = None
        for point in self.points:
            with suppress(OSError):  # something lies there by now
                point.rmdir() if point.is_dir() else point.unlink()
        self.points = ()


def _reap() -> None:
    """Reap what came to this process, the first of its namespace, where the build killed its init."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _make_points(mounts: Iterable[Mount]) -> tuple[Path, ...]:
    """Make what is to be mounted over, where it is missing; what was made, the innermost first."""
    made: list[Path] = []
    for mount in mounts:
        target = Path(mount.target)
        if mount.source == target:
            folder = target.parent
            folder.chmod(folder.stat().st_mode | 0o055)  # commands may run as another user than root
            continue
        missing = [folder for folder in (target, *target.parents) if not folder.exists()]
        for folder in reversed(missing):
            if folder == target and mount.source.is_file():
                folder.touch()
            else:
                folder.mkdir()
        made += missing
    return tuple(sorted(made, key=lambda path: -len(path.parts)))


def _labels() -> dict[str, str]:
    """What the image declares of its runtimes, where it is one of ours: its labels cannot be seen from inside."""
    try:
        said = yaml.safe_load(_RUNTIMES_FILE.read_text(encoding="utf-8"))
        runtimes = {name: list(about["versions"]) for name, about in said["runtimes"].items()}
        ours = all(
            about["versions"][version]["commands"] == [f"echo {name} {version}"]
            for name, about in said["runtimes"].items()
            for version in runtimes[name]
        )
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    return {LABEL_RUNTIMES: json.dumps(runtimes)} if ours else {}


def _pieces(stream: Iterator[bytes], path: str) -> Iterator[bytes]:
    with _as_ours(f"{path} cannot be read"):
        yield from stream


@contextmanager
def _as_ours(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _lost(f"{what}: {error}") from error


def _lost(message: str) -> InfraProblem:
    return InfraProblem(message, reason=Reason.ENGINE_LOST, hint="Look at the worker's own log.")
