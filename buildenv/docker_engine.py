"""The Docker engine, through docker-py; the only module that touches Docker. Works from API 1.41 on, with cgroup v1 and v2."""

import math
import os
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import LogConfig, Ulimit
from docker.types import Mount as DockerMount
from docker.utils import parse_repository_tag

from buildenv.engine import CAPABILITIES, ContainerSpec, ContainerState, EngineInfo, Image, Leftover
from buildenv.frames import Frames
from millrace.errors import BuildProblem, InfraProblem
from millrace.log import get_logger
from millrace.vocabulary import Reason

log = get_logger(__name__)

INFO_S: Final = 20
"""How long a worker that wants to claim waits to hear from its engine."""
QUICK_S: Final = 150
"""How long a build waits for an answer that takes milliseconds: an engine may be frozen for two minutes and fail no build."""
GONE_S: Final = 60
CREATE_S: Final = 300
"""Creating can take minutes on a loaded host, and still happen after the caller has given up: hence the fixed names."""
PULL_IDLE_S: Final = 120
PULL_TRIES: Final = 3
CPU_PERIOD_US: Final = 100_000
OPEN_FILES: Final = 65536
SHM_BYTES: Final = 256 * 1024**2
READ_BYTES: Final = 256 * 1024
WRITE_S: Final = 30.0
EXEC_FAILED: Final = (126, 127)

PULL_STATUS_CODE: Final = "BUILD_CONTAINER_UNABLE_TO_PULL_IMAGE"
"""CodeBuild's phase-context code of an image that cannot be had (CodeBuild: troubleshooting)."""


class DockerConsole:
    """The attached stream of one container. See `engine.Console`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # Keeps docker-py's response, and with it the socket, alive.
        self._socket: socket.socket = getattr(stream, "_sock", stream)
        self._socket.settimeout(WRITE_S)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._frames = Frames()
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._ended = False

    def write(self, data: bytes) -> None:
        with self._writing:
            if self._closed.is_set():
                return
            try:
                self._socket.sendall(data)
            except OSError as error:
                if not self._closed.is_set():
                    raise _lost(f"the container's stdin is closed: {error}") from error

    def read(self, timeout_s: float) -> bytes | None:
        with self._reading:
            return None if self._closed.is_set() or self._ended else self._read(timeout_s)

    def _read(self, timeout_s: float) -> bytes | None:
        until = time.monotonic() + timeout_s
        while True:
            data = self._receive(max(0.0, until - time.monotonic()))
            if data is None:
                return b""
            if self._closed.is_set():
                return None
            if not data:
                self._ended = True
                self._frames.end()
                return None
            if payload := self._frames.feed(data):
                return payload

    def _receive(self, timeout_s: float) -> bytes | None:
        """The next bytes, b"" at the end, None where none came in time."""
        try:
            if isinstance(self._socket, ssl.SSLSocket):
                return self._socket.recv(READ_BYTES) if self._socket.pending() or self._comes(timeout_s) else None
            try:
                return os.read(self._socket.fileno(), READ_BYTES)  # its time-out makes it one that does not block
            except BlockingIOError:
                return os.read(self._socket.fileno(), READ_BYTES) if self._comes(timeout_s) else None
        except OSError as error:
            if self._closed.is_set():
                return b""
            raise _lost(f"the container's output broke off: {error}") from error

    def _comes(self, timeout_s: float) -> bool:
        return bool(self._poll.poll(timeout_s * 1000))

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # Wakes a thread that reads.
        except OSError:
            log.debug("console.already_gone")
        with self._reading, self._writing:
            self._stream.close()
            self._socket.close()


class DockerEngine:
    """See `engine.Engine`. `docker_host` as in DOCKER_HOST; None is Docker's own default."""

    def __init__(self, docker_host: str | None = None) -> None:
        self._host = docker_host
        self._lock = threading.Lock()
        self._clients: dict[int, docker.APIClient] = {}
        self._version: str | None = None
        self._info: EngineInfo | None = None
        self._looks: dict[tuple[str, str], _Look] = {}
        self._created: dict[str, str] = {}

    def info(self) -> EngineInfo:
        with _talking():
            said = self._client(INFO_S).info()
        options = said.get("SecurityOptions") or []
        self._info = EngineInfo(
            name=f"docker ({said.get('Name', '?')})",
            version=said.get("ServerVersion", "?"),
            cpus=int(said["NCPU"]),
            memory_bytes=int(said["MemTotal"]),
            folder=Path(said.get("DockerRootDir") or "/var/lib/docker"),
            seccomp=any("seccomp" in option and "unconfined" not in option for option in options),
        )
        return self._info

    def ensure_image(self, reference: str) -> Image:
        if (image := self._image(reference)) is None:
            self._pull(reference)
            image = self._image(reference)
        if image is None:
            raise _no_image(reference, "it was pulled, and is not there")
        return image

    def _image(self, reference: str) -> Image | None:
        if not reference:
            raise _no_image("''", "it has no name")
        try:
            with _talking():
                said = _inspect_image(self._client(QUICK_S), reference)
        except NotFound:
            return None
        except APIError as error:
            raise _no_image(reference, _words(error)) from error
        return Image(reference=reference, digest=said["Id"], labels=(said.get("Config") or {}).get("Labels") or {})

    def _pull(self, reference: str) -> None:
        for tries_left in reversed(range(PULL_TRIES)):
            try:
                self._pull_once(reference)
                return
            except APIError as error:
                problem: Exception = error
                said = _words(error)
                if _is_the_users(error.status_code, said):
                    raise _no_image(reference, said) from error
            except requests.RequestException as error:
                problem, said = error, f"the registry sent nothing for {PULL_IDLE_S} s ({error})"
            if not tries_left or _is_unreachable(said):
                raise InfraProblem(
                    f"image {reference} is not on the worker's host, and its registry could not be asked for it: {said}",
                    reason=Reason.IMAGE_PULL,
                    status_code=PULL_STATUS_CODE,
                    hint="Check the image's name, and whether the worker's host reaches its registry; "
                    "or load the image on the host.",
                ) from problem
            log.warning("image.pull_failed", image=reference, problem=said, tries_left=tries_left)
            time.sleep(PULL_TRIES - tries_left)

    def _pull_once(self, reference: str) -> None:
        repository, tag = parse_repository_tag(reference)
        client = self._client(PULL_IDLE_S)
        for line in client.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if "error" in line:
                raise APIError(line["error"], explanation=line["error"])

    def create(self, spec: ContainerSpec) -> str:
        self.remove(spec.name)
        client = self._client(CREATE_S)
        try:
            with _talking():
                made = client.create_container(**_container(spec), host_config=client.create_host_config(**self._limits(spec)))
        except ImageNotFound as error:
            raise _no_image(spec.image, _words(error)) from error
        except APIError as error:
            raise _lost(f"the container could not be made: {_words(error)}") from error
        container_id: str = made["Id"]
        self._created[container_id] = spec.command[0]
        return container_id

    def _limits(self, spec: ContainerSpec) -> dict[str, Any]:
        host = self._info or self.info()
        memory = min(spec.memory_bytes, host.memory_bytes)
        # An engine that may not raise limits refuses more than its own, which its API does not tell; ours is the best guess.
        files = min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        return {
            "init": True,  # Reaps; without, zombies use up the pids.
            "cap_drop": None if spec.privileged else ["ALL"],
            "cap_add": None if spec.privileged else list(CAPABILITIES),
            "security_opt": None if spec.privileged else ["no-new-privileges"],
            "privileged": spec.privileged,
            "pids_limit": spec.pids,
            "mem_limit": memory,
            "memswap_limit": memory,  # Equal: no swap.
            "cpu_period": CPU_PERIOD_US,  # Not NanoCPUs, which a running container cannot be given anew.
            "cpu_quota": max(1000, int(min(spec.cpus, host.cpus) * CPU_PERIOD_US)),
            "shm_size": SHM_BYTES,
            "ulimits": [Ulimit(name="nofile", soft=files, hard=files), Ulimit(name="core", soft=0, hard=0)],
            "oom_score_adj": 500,  # The kernel ends builds before the worker.
            "ipc_mode": "private",
            "network_mode": spec.network,
            "log_config": LogConfig(type="none"),  # The console is the log; json-file is five times slower.
            "mounts": [
                DockerMount(target=mount.target, source=str(mount.source), type="bind", read_only=mount.read_only)
                for mount in spec.mounts
            ],
        }

    def attach(self, container_id: str) -> DockerConsole:
        try:
            with _talking():
                stream = self._client(QUICK_S).attach_socket(container_id, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        except APIError as error:
            raise _lost(f"the container cannot be attached to: {_words(error)}") from error
        return DockerConsole(stream)

    def start(self, container_id: str) -> None:
        program = self._created.pop(container_id, "/bin/sh")
        try:
            with _talking():
                image = self._look_at_image(container_id, program)
                if not image.has_program:
                    raise _bad_image(f"the image has no {program}")
                self._client(CREATE_S).start(container_id)
        except NotFound as error:
            raise _lost(f"the container is gone: {_words(error)}") from error
        except APIError as error:
            said = _words(error)
            if "exec" in said and _contains(said, ("no such file", "format error", "permission denied")):
                raise _bad_image(f"the image cannot run {program}: {said}") from error
            raise _lost(f"the container could not be started: {said}") from error
        if not image.fits:
            self._await_exec_failure(container_id, image, program)

    def _look_at_image(self, container_id: str, program: str) -> "_Look":
        """What decides whether `program` can run; looked up once per image, as it costs several calls."""
        client = self._client(QUICK_S)
        image_id: str = client.inspect_container(container_id)["Image"]
        key = (image_id, program)
        if key not in self._looks:
            image = _inspect_image(client, image_id)
            host = client.version()
            url = client._url("/containers/{0}/archive", container_id)  # type: ignore[attr-defined]  # the types leave it out
            answer = client.head(url, params={"path": program})
            self._looks[key] = _Look(
                platform=f"{image.get('Os')}/{image.get('Architecture')}",
                host=f"{host.get('Os')}/{host.get('Arch')}",
                has_program=answer.status_code != requests.codes.not_found,
            )
        return self._looks[key]

    def _await_exec_failure(self, container_id: str, image: "_Look", program: str) -> None:
        """An image of another architecture may run all the same, by emulation; if not, its init ends at once."""
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            state = self.state(container_id)
            if not state.running and state.exit_code in EXEC_FAILED:
                raise _bad_image(
                    f"the image is made for {image.platform}, and the worker's host, {image.host}, cannot run its {program}"
                )
            time.sleep(0.05)

    def state(self, container_id: str) -> ContainerState:
        try:
            with _talking():
                said = self._client(QUICK_S).inspect_container(container_id)["State"]
        except NotFound:
            return ContainerState(running=False, exit_code=None, oom_killed=False)
        except APIError as error:
            raise _lost(f"the container cannot be inspected: {_words(error)}") from error
        running = bool(said["Running"])
        oom = bool(said.get("OOMKilled")) or (running and _ooms(container_id, int(said.get("Pid") or 0)) > 0)
        never_started = said["Status"] == "created"
        return ContainerState(
            running=running, exit_code=None if running or never_started else int(said["ExitCode"]), oom_killed=oom
        )

    def stop(self, container_id: str, grace_s: float) -> None:
        client = self._client(math.ceil(grace_s) + QUICK_S)
        try:
            with _talking():
                if grace_s > 0:
                    client.stop(container_id, timeout=math.ceil(grace_s))
                else:
                    client.kill(container_id)
        except APIError as error:
            if self.state(container_id).running:
                raise _lost(f"the container cannot be stopped: {_words(error)}") from error
        until = time.monotonic() + GONE_S
        while self.state(container_id).running:
            if time.monotonic() > until:
                raise _lost(f"the container still runs {GONE_S} s after it was killed")
            time.sleep(0.02)

    def copy_out(self, container_id: str, path: str) -> Iterator[bytes]:
        try:
            with _talking():
                chunks, _ = self._client(QUICK_S).get_archive(container_id, path)
        except NotFound as error:
            raise FileNotFoundError(f"the container has no {path}") from error
        except APIError as error:
            raise _lost(f"{path} cannot be read from the container: {_words(error)}") from error
        return _chunks(chunks)

    def copy_in(self, container_id: str, path: str, tar: Iterable[bytes]) -> None:
        try:
            with _talking():
                self._client(CREATE_S).put_archive(container_id, path, iter(tar))
        except APIError as error:
            raise BuildProblem(
                f"the engine cannot unpack into {path} of the container: {_words(error)}", reason=Reason.BAD_IMAGE
            ) from error

    def rename(self, container_id: str, name: str) -> None:
        try:
            with _talking():
                self._client(QUICK_S).rename(container_id, name)
        except APIError as error:
            raise _lost(f"the container cannot be renamed: {_words(error)}") from error

    def pid(self, container_id: str) -> int | None:
        try:
            with _talking():
                pid = int(self._client(QUICK_S).inspect_container(container_id)["State"]["Pid"] or 0)
        except APIError as error:
            raise _lost(f"the container cannot be inspected: {_words(error)}") from error
        try:
            return pid if pid and container_id in Path(f"/proc/{pid}/cgroup").read_text() else None
        except OSError:
            return None  # the engine is on another machine, or sees other processes

    def remove(self, container_id: str) -> None:
        self._created.pop(container_id, None)
        try:
            with _talking():
                self._client(CREATE_S).remove_container(container_id, v=True, force=True)
        except NotFound:
            return
        except APIError as error:
            if error.status_code != requests.codes.conflict:  # 409: another removal of it is under way.
                raise _lost(f"the container cannot be removed: {_words(error)}") from error
            self._await_gone(container_id)

    def _await_gone(self, container_id: str) -> None:
        until = time.monotonic() + GONE_S
        while time.monotonic() < until:
            try:
                with _talking():
                    self._client(QUICK_S).inspect_container(container_id)
            except NotFound:
                return
            time.sleep(0.05)
        raise _lost(f"the container's removal has not ended after {GONE_S} s")

    def leftovers(self, labels: Mapping[str, str]) -> Iterable[Leftover]:
        wanted = [f"{name}={value}" if value else name for name, value in labels.items()]
        try:
            with _talking():
                said = self._client(QUICK_S).containers(all=True, filters={"label": wanted})
        except APIError as error:
            raise _lost(f"the containers cannot be listed: {_words(error)}") from error
        return [Leftover(container_id=one["Id"], labels=one["Labels"], created_at_s=float(one["Created"])) for one in said]

    def _client(self, timeout_s: int) -> docker.APIClient:
        """docker-py has one time-out per client, so there is one client per time-out."""
        with self._lock:
            if timeout_s not in self._clients:
                with _talking():
                    client = docker.APIClient(base_url=self._host, version=self._version or "auto", timeout=timeout_s)
                self._version = client.api_version
                self._clients[timeout_s] = client
            return self._clients[timeout_s]


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What was seen of an image: for which platform it is, on which host, and whether it has the program asked for."""

    platform: str
    host: str
    has_program: bool

    @property
    def fits(self) -> bool:
        return self.platform == self.host


def _inspect_image(client: docker.APIClient, reference: str) -> dict[str, Any]:
    said: dict[str, Any] = client.inspect_image(reference)  # type: ignore[no-untyped-call]  # untyped in types-docker
    return said


def _container(spec: ContainerSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "image": spec.image,
        "entrypoint": list(spec.command),  # In place of the image's own entry point, so that its command is set aside too.
        "user": "0:0",
        "working_dir": "/",
        "environment": dict(spec.env),
        "labels": dict(spec.labels),
        "hostname": spec.hostname,
        "stdin_open": True,  # With StdinOnce: stdin ends when the worker lets go, and the runner then ends the build.
        "tty": False,
        "stop_signal": "SIGTERM",
        "healthcheck": {"test": ["NONE"]},
    }


@contextmanager
def _talking() -> Iterator[None]:
    """Errors of reaching the engine, as ours. Its answers, APIError, are for the caller to read."""
    try:
        yield
    except APIError:
        raise
    except (requests.RequestException, DockerException) as error:
        raise InfraProblem(
            f"the Docker engine does not answer: {error}",
            reason=Reason.ENGINE_LOST,
            hint="Start the engine on the worker's host ('millrace doctor' looks at it), or set MILLRACE_DOCKER_HOST.",
        ) from error


def _chunks(chunks: Iterator[bytes]) -> Iterator[bytes]:
    with _talking():
        yield from chunks


def _words(error: APIError) -> str:
    return str(error.explanation or error).strip()


def _contains(text: str, parts: Sequence[str]) -> bool:
    return any(part in text.lower() for part in parts)


def _is_the_users(status: int | None, said: str) -> bool:
    """Whether a failed pull is the request's own fault: no such image, or none that may be had."""
    if status in (requests.codes.bad_request, requests.codes.not_found, requests.codes.unauthorized, requests.codes.forbidden):
        return True
    return _contains(
        said, ("not found", "manifest unknown", "denied", "unauthorized", "no matching manifest", "invalid reference")
    )


def _is_unreachable(said: str) -> bool:
    """Whether trying again within seconds is useless."""
    return _contains(said, ("no such host", "connection refused", "network is unreachable", "server misbehaving"))


def _no_image(reference: str, said: str) -> BuildProblem:
    return BuildProblem(
        f"Unable to pull customer's container image {reference}. Reason: {said}",
        reason=Reason.IMAGE_NOT_FOUND,
        status_code=PULL_STATUS_CODE,
        hint="Check the image's name and tag, and whether the worker's host may pull it.",
    )


def _bad_image(message: str) -> BuildProblem:
    return BuildProblem(message, reason=Reason.BAD_IMAGE, hint="The image must have /bin/sh and be of the worker's architecture.")


def _lost(message: str) -> InfraProblem:
    return InfraProblem(message, reason=Reason.ENGINE_LOST, hint="Look at the Docker engine's own log on the worker's host.")


def _ooms(container_id: str, pid: int) -> int:
    """How often the kernel ended a process of this container for its memory. 0 where that cannot be read.

    The engine's own flag misses the end of a process that is not the container's first. Read only where `pid` is a process of
    this host and of this container: the engine may be on another machine.
    """
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return 0
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if container_id not in path:
            continue
        if controllers == "":
            file = Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            file = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        try:
            counters = dict(line.split() for line in file.read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(counters.get("oom_kill", 0))
    return 0
