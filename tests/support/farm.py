"""A whole farm of real processes, by `millrace up`, in a folder of its own and with settings that make tests quick."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import docker
from docker.errors import DockerException, ImageNotFound

from millrace.client import Client, build_path
from tests.support.need import missing

T = TypeVar("T")
QUICK = {
    "MILLRACE_BIND": "127.0.0.1:0",
    "MILLRACE_RENEW_EVERY_S": "0.5",
    "MILLRACE_SWEEP_EVERY_S": "0.5",
    "MILLRACE_DEFAULT_IMAGE": "millrace/standard:latest",
    "MILLRACE_API_WORKERS": "1",
    "MILLRACE_PARKED": "0",
    "MILLRACE_LOG_FORMAT": "json",
}
SHORT_LEASES = {"MILLRACE_LEASE_TTL_S": "6", "MILLRACE_SELF_FENCE_S": "5"}
"""For tests in which a worker is lost, and none in which the API is away: on a busy machine that takes longer to come back."""


def wait_until(condition: Callable[[], T], within_s: float = 30) -> T:
    """What `condition` returns as soon as that is true; AssertionError after `within_s`."""
    until = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < until, f"not so within {within_s} s"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """The processes that it started and that are there."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def need_engine() -> None:
    """Skip or fail where there is no engine with our images."""
    try:
        client = docker.from_env(timeout=10)
        try:
            client.images.get("millrace/standard:latest")
        finally:
            client.close()
    except ImageNotFound:
        missing("the image millrace/standard:latest", "make images")
    except DockerException:
        missing("a Docker engine", "millrace doctor --install")
    if shutil.which("redis-server") is None:
        missing("redis-server", "apt-get install redis-server")


@dataclass
class Farm:
    """One farm and its client. `prefix` is put before the command that starts it. With `caches` each build that says nothing of
    a cache has one, and adds to it."""

    home: Path
    environment: dict[str, str]
    process: "subprocess.Popen[str] | None" = None
    prefix: tuple[str, ...] = ()
    caches: bool = False
    _client: tuple[str, Client] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        out = open(self.home / "up.out", "a")  # noqa: SIM115  # the process has it from here
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "millrace.cli", "up"],
            env=self.environment,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        out.close()
        wait_until(lambda: (self.home / "data" / "farm.json").exists() or self._died(), 60)

    def _died(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "up.out").read_text()
        return False

    def stop(self, *, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.process = None
        return status

    @property
    def api_url(self) -> str:
        note: dict[str, Any] = json.loads((self.home / "data" / "farm.json").read_text())
        return str(note["api"])

    @property
    def token(self) -> str:
        return (self.home / "data" / "admin.token").read_text().strip()

    @property
    def client(self) -> Client:
        url = self.api_url
        if self._client is None or self._client[0] != url:
            self.hang_up()
            self._client = (url, Client(url, self.token))
        return self._client[1]

    def hang_up(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            self._client[1].close()
            self._client = None

    def cli(self, *arguments: str, within_s: float = 120, text: str = "") -> "subprocess.CompletedProcess[str]":
        """The command line, as a user would call it, with `text` on its stdin."""
        return subprocess.run(
            [sys.executable, "-m", "millrace.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
            input=text,
        )

    def build(self, commands: list[str], *, project: str = "demo", more: str = "", **changes: Any) -> str:
        """A build of an inline buildspec; its id."""
        if self.caches and "cache" not in changes:
            commands = ["mkdir -p kept && date >> kept/when", *commands]
            more += "cache:\n  paths: [kept/**/*]\n"
            changes["cache"] = {"type": "S3"}
        lines = "".join(f"      - {json.dumps(command)}\n" for command in commands)
        spec = f"version: 0.2\nphases:\n  build:\n    commands:\n{lines}{more}"
        settings = {
            "name": project,
            "source": {"type": "NO_SOURCE", "buildspec": spec},
            "artifacts": {"type": "S3", "packaging": "ZIP"},
            "environment": {
                "type": "LINUX_CONTAINER",
                "image": "millrace/standard:latest",
                "computeType": "BUILD_GENERAL1_SMALL",
            },
            **changes,
        }
        if any(item["name"] == project for item in self.client.get("/v1/projects")["projects"]):
            self.client.put(f"/v1/projects/{project}", settings)
        else:
            self.client.post("/v1/projects", settings)
        build_id: str = self.client.post("/v1/builds", {"projectName": project})["id"]
        return build_id

    def show(self, build_id: str) -> dict[str, Any]:
        """The build as the API shows it."""
        return self.client.get(build_path(build_id))

    def ended(self, build_id: str, within_s: float = 60) -> dict[str, Any]:
        """The build, once it has ended."""

        def look() -> dict[str, Any] | None:
            build = self.show(build_id)
            return build if build["buildComplete"] else None

        found = wait_until(look, within_s)
        assert found is not None
        return found

    def log_of(self, build_id: str) -> str:
        """The log so far."""
        return b"".join(self.client.log_text(build_id)).decode(errors="replace")

    def await_log(self, build_id: str, words: str, within_s: float = 30) -> None:
        """Wait until the log holds `words`."""
        wait_until(lambda: words in self.log_of(build_id), within_s)

    def part_log(self, part: str) -> str:
        """What a part of the farm wrote to its own log."""
        return (self.home / "data" / "logs" / f"{part}.log").read_text(errors="replace")

    def pid_of(self, words: str) -> int:
        """The process of the farm whose command line holds these words."""
        assert self.process is not None
        todo = [self.process.pid]
        while todo:
            pid = todo.pop()
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    return pid
            todo += children_of(pid)
        raise AssertionError(f"no process of the farm has {words!r}")

    def attempt_pid(self, build_id: str) -> int:
        """The process that carries the build's newest attempt."""
        events = [json.loads(line) for line in self.part_log("worker").splitlines() if '"attempt.spawned"' in line]
        return int([event["pid"] for event in events if event["build_id"] == build_id][-1])

    def containers(self) -> list[str]:
        """Names of this farm's build containers that are still there."""
        client = docker.from_env(timeout=10)
        try:
            label = f"millrace.workspaces={self.home / 'data' / 'work'}"
            found = client.api.containers(all=True, filters={"label": label})  # one call: what it lists may go at any moment
            return [str(one["Names"][0]).lstrip("/") for one in found]
        finally:
            client.close()


@contextmanager
def new_farm(**settings: str) -> Iterator[Farm]:
    """A farm that is not started yet, with its folder; stopped at the end if it runs."""
    need_engine()
    with tempfile.TemporaryDirectory(prefix="mr-farm-") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        environment |= {**QUICK, "MILLRACE_DATA_DIR": f"{folder}/data", **settings}
        farm = Farm(home=Path(folder), environment=environment)
        try:
            yield farm
        finally:
            farm.hang_up()
            if farm.process is not None:
                farm.process.send_signal(signal.SIGTERM)
                try:
                    farm.process.wait(60)
                except subprocess.TimeoutExpired:
                    farm.process.kill()
                    farm.process.wait(10)
                    raise


@contextmanager
def running_farm(**settings: str) -> Iterator[Farm]:
    """A farm that is up."""
    with new_farm(**settings) as farm:
        farm.start()
        yield farm
