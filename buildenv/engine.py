"""What a build needs of a container engine. `DockerEngine`, `OwnEngine` and `FakeEngine` pass `tests/contract/test_engine.py`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

LABEL_BUILD = "millrace.build"
LABEL_ATTEMPT = "millrace.attempt"
LABEL_WORKER = "millrace.worker"
LABEL_PLACE = "millrace.place"
"""The name of its workspace, below that folder."""
LABEL_WORKSPACES = "millrace.workspaces"
"""The folder of workspaces that a container belongs to: a janitor leaves those of other farms on the same host alone."""

CAPABILITIES: Final[dict[str, str]] = {
    "CHOWN": "apt-get, dpkg and tar give files to their owners",
    "DAC_OVERRIDE": "root reads and writes files of other users, as every package's installation does",
    "FOWNER": "chmod and utime on files of other users: dpkg, tar, npm",
    "FSETID": "keeps the setuid and setgid bits when files are written: dpkg",
    "KILL": "ends processes of other users: service scripts, test suites",
    "SETGID": "apt-get's _apt user, su, initdb of databases under test",
    "SETUID": "the same",
    "SETFCAP": "packages that mark a program with capabilities: ping",
    "NET_BIND_SERVICE": "servers under test on ports below 1024",
    "SYS_CHROOT": "sshd under test, debootstrap, bundler's chroots",
    "AUDIT_WRITE": "su, sudo and login write an audit record and fail without",
}
"""What root inside a build needs, and for what. Docker also gives MKNOD, NET_RAW and SETPCAP: no build tool needs them."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What the engine is and has: shown by `millrace doctor`, and used to cap limits to the host."""

    name: str
    version: str
    cpus: int
    memory_bytes: int
    seccomp: bool
    folder: Path | None = None
    """Where it keeps images and containers, on its own host."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image that is on the host. `digest` names its content and is recorded; `labels` may declare runtimes."""

    reference: str
    digest: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder or file of the host, seen at `target` inside."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class ContainerSpec:
    """A fresh container to be made.

    It runs `command` as root (uid 0), with the image's entry point and user set aside, stdin open, no terminal, under an init
    that reaps. `cpus` may be a fraction; `memory_bytes` is without swap. Both are capped to what the host has.
    """

    name: str
    image: str
    command: tuple[str, ...]
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 2
    memory_bytes: int = 4 * 1024**3
    pids: int = 4096
    network: str = "bridge"
    hostname: str = "build"
    privileged: bool = False
    """All that root of the host may: for builds that run a Docker daemon of their own."""


@dataclass(frozen=True, kw_only=True)
class ContainerState:
    """What `inspect` says. `exit_code` is None while it runs or was never started; `oom_killed` only where that is proven."""

    running: bool
    exit_code: int | None
    oom_killed: bool


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A container of ours that is on the host, with our labels."""

    container_id: str
    labels: Mapping[str, str]
    created_at_s: float


class Console(Protocol):
    """The attached stdin and output of one container. stdout and stderr come merged, in order of arrival.

    One thread reads; another may write or close. After `close` both return at once.
    """

    def write(self, data: bytes) -> None:
        """Send bytes to the container's stdin. Raises InfraProblem(ENGINE_LOST) where the engine has gone."""

    def read(self, timeout_s: float) -> bytes | None:
        """The next output, b"" where none came within `timeout_s`, None at the end of the stream.

        The end says nothing on success: ask `Engine.state`. A stream cut inside a frame raises InfraProblem(ENGINE_LOST).
        """

    def close(self) -> None:
        """Let go of the stream; may be called twice."""


class Engine(Protocol):
    """Order of calls: ensure_image, create, attach, start, copy_in, state..., stop, copy_out, remove; rename at any time. Safe
    from several threads.

    Every method raises InfraProblem(ENGINE_LOST) where the engine does not answer; `stop` and `remove` may be called twice
    and on containers that are gone.
    """

    def info(self) -> EngineInfo:
        """What the engine is; also the check that it answers."""

    def ensure_image(self, reference: str) -> Image:
        """The image, pulled if the host lacks it.

        Raises BuildProblem(IMAGE_NOT_FOUND) where it does not exist or may not be pulled, InfraProblem(IMAGE_PULL) where the
        registry fails.
        """

    def create(self, spec: ContainerSpec) -> str:
        """Make the container, without starting it; its id. One of the same name is removed first."""

    def attach(self, container_id: str) -> Console:
        """Attach to stdin and output; before `start`, so that nothing is missed."""

    def start(self, container_id: str) -> None:
        """Start it. Raises BuildProblem(BAD_IMAGE) where its command cannot run (no /bin/sh, another architecture)."""

    def state(self, container_id: str) -> ContainerState:
        """What it is doing. A container that is gone is not running, exit code None."""

    def stop(self, container_id: str, grace_s: float) -> None:
        """TERM, then KILL after `grace_s`; 0 kills at once. Returns when it is not running."""

    def copy_out(self, container_id: str, path: str) -> Iterator[bytes]:
        """`path` of the container (also a stopped one) as a tar stream. Raises FileNotFoundError where there is none."""

    def copy_in(self, container_id: str, path: str, tar: Iterable[bytes]) -> None:
        """Unpack a tar stream into the folder `path` of the container, which is there; running or not.

        Raises BuildProblem(BAD_IMAGE) where the engine cannot unpack it there.
        """

    def rename(self, container_id: str, name: str) -> None:
        """Give it another name, for those who look. Raises InfraProblem(ENGINE_LOST) also where the name is taken."""

    def pid(self, container_id: str) -> int | None:
        """The number of a running container's first process on this host; None where it is none of this host's.

        Raises InfraProblem(ENGINE_LOST).
        """

    def remove(self, container_id: str) -> None:
        """Remove it with its volumes, running or not."""

    def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
        """Containers, running or not, that carry all `labels` (an empty value matches any)."""
