"""Other ways to run a command in a fresh container of one image. `scripts/peers` gets those that are not Docker itself."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import docker
import httpx

from tests.support.postgres import spare_port

IMAGE: Final = "millrace/standard:latest"
_WORKERS: Final = 4
_POLL_S: Final = 0.02


class Runner(Protocol):
    """`one` runs one build that does nothing: seconds from request to first command (None: it does not tell) and to verdict.
    `many` runs `count` of them, `parallel` at once, and returns the seconds they took. `processes` are its own standing ones.
    """

    name: str

    def one(self) -> tuple[float | None, float]: ...

    def many(self, count: int, parallel: int) -> float: ...

    def processes(self) -> list[int]: ...


def in_parallel(work: "Runner", count: int, parallel: int) -> float:
    """`many` for what has no queue of its own."""
    began = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda _n: work.one(), range(count)))
    return time.perf_counter() - began


class DockerRun:
    """`docker run --rm IMAGE true`, the yardstick of all that has to do with latency."""

    name = "docker run"

    def one(self) -> tuple[float | None, float]:
        began = time.perf_counter()
        subprocess.run(["docker", "run", "--rm", IMAGE, "true"], check=True)
        return None, time.perf_counter() - began

    def many(self, count: int, parallel: int) -> float:
        return in_parallel(self, count, parallel)

    def processes(self) -> list[int]:
        return []


class BareLoop:
    """Create, start, wait, remove over one connection each: the yardstick of throughput."""

    name = "bare loop"

    def one(self) -> tuple[float | None, float]:
        client = docker.APIClient(version="auto", timeout=60)
        began = time.perf_counter()
        made = client.create_container(IMAGE, ["true"], host_config=client.create_host_config(network_mode="bridge"))
        client.start(made)
        client.wait(made)
        client.remove_container(made, force=True)
        took = time.perf_counter() - began
        client.close()
        return None, took

    def many(self, count: int, parallel: int) -> float:
        return in_parallel(self, count, parallel)

    def processes(self) -> list[int]:
        return []


class GitlabCiLocal:
    """The command line of that name: a job in a container of the image, in a folder that is a git repository."""

    name = "gitlab-ci-local"

    def __init__(self, program: Path, folder: Path) -> None:
        self._program, self._folder = program, folder

    def one(self) -> tuple[float | None, float]:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            Path(folder, ".gitlab-ci.yml").write_text(f"nothing:\n  image: {IMAGE}\n  script: ['true']\n")
            who = ["-c", "user.name=bench", "-c", "user.email=bench@example.com"]
            for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
                subprocess.run(["git", *command], cwd=folder, check=True)
            subprocess.run(["git", "remote", "add", "origin", "git@example.com:team/app.git"], cwd=folder, check=True)
            began = time.perf_counter()
            done = subprocess.run(
                [self._program, "--pull-policy", "if-not-present"], cwd=folder, capture_output=True, text=True, check=False
            )
            took = time.perf_counter() - began
            if done.returncode:
                raise RuntimeError(f"gitlab-ci-local: {done.stdout[-500:]} {done.stderr[-500:]}")
            return None, took

    def many(self, count: int, parallel: int) -> float:
        return in_parallel(self, count, parallel)

    def processes(self) -> list[int]:
        return []


_MASTER: Final = """
from buildbot.plugins import schedulers, steps, util, worker

c = BuildmasterConfig = {{}}
names = [f"w{{n}}" for n in range({workers})]
c["workers"] = [
    worker.DockerLatentWorker(
        name, "pass", docker_host="unix:///var/run/docker.sock", image="{image}", masterFQDN="{host}:{pb}", max_builds=1,
        build_wait_timeout=0,
    )
    for name in names
]
c["protocols"] = {{"pb": {{"port": "tcp:{pb}:interface={host}"}}}}
c["schedulers"] = [schedulers.ForceScheduler(name="force", builderNames=["nothing"])]
factory = util.BuildFactory([steps.ShellCommand(command=["true"])])
c["builders"] = [util.BuilderConfig(name="nothing", workernames=names, factory=factory)]
c["www"] = {{"port": "tcp:{www}:interface=127.0.0.1", "plugins": {{}}}}
c["db"] = {{"db_url": "sqlite:///state.sqlite"}}
c["buildbotNetUsageData"] = None
c["collapseRequests"] = False  # two that wait are alike, and each is to be built
"""
_TAC: Final = """
import os
from twisted.application import service
from buildbot_worker.bot import Worker

application = service.Application("buildbot-worker")
host, _, port = os.environ["BUILDMASTER"].partition(":")
port = int(port or os.environ["BUILDMASTER_PORT"])
Worker(host, port, os.environ["WORKERNAME"], os.environ["WORKERPASS"], "/buildbot", 600).setServiceParent(application)
"""
_DOCKERFILE: Final = f"""
FROM {IMAGE}
COPY lib /opt/lib
COPY buildbot.tac /buildbot/buildbot.tac
ENV PYTHONPATH=/opt/lib PYTHONDONTWRITEBYTECODE=
RUN python3 -m compileall -q /opt/lib; true
WORKDIR /buildbot
ENTRYPOINT []
CMD ["python3", "-c", "from twisted.scripts.twistd import run; run()", "--pidfile=", "-ny", "buildbot.tac"]
"""


class Buildbot:
    """A Buildbot master with Docker's latent workers: each build gets a fresh container with Buildbot's worker in it."""

    name = "Buildbot"

    def __init__(self, master: "subprocess.Popen[bytes]", url: str) -> None:
        self._master = master
        self._client = httpx.Client(base_url=f"{url}/api/v2/", timeout=60)
        self._parallel = 0

    def _asked(self) -> int:
        call = {"jsonrpc": "2.0", "method": "force", "id": 1, "params": {"builderNames": ["nothing"]}}
        answer = self._client.post("forceschedulers/force", json=call).json()
        _set, requests = answer["result"]
        return int(next(iter(requests.values())))

    def _await(self, requests: list[int], within_s: float) -> None:
        until = time.monotonic() + within_s
        for request in requests:
            while True:
                (shown,) = self._client.get(f"buildrequests/{request}").json()["buildrequests"]
                if shown["complete"]:
                    if shown["results"] != 0:
                        raise RuntimeError(f"Buildbot: {json.dumps(shown)}")
                    break
                if time.monotonic() > until:
                    raise RuntimeError(f"Buildbot: request {request} did not end in {within_s} s: {json.dumps(shown)}")
                time.sleep(_POLL_S)

    def one(self) -> tuple[float | None, float]:
        began = time.perf_counter()
        self._await([self._asked()], 120)
        took = time.perf_counter() - began
        time.sleep(0.5)  # its container goes meanwhile
        return None, took

    def many(self, count: int, parallel: int) -> float:
        """At most `parallel` are asked for at once."""
        return in_parallel(self, count, parallel)

    def processes(self) -> list[int]:
        return [self._master.pid]

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def buildbot(peers: Path, folder: Path) -> Iterator[Buildbot]:
    """A master on spare ports, with its image."""
    image = "millrace-bench/buildbot-worker:latest"
    (peers / "worker" / "buildbot.tac").write_text(_TAC)
    subprocess.run(
        ["docker", "build", "-q", "-t", image, "-f", "-", str(peers / "worker")],
        input=_DOCKERFILE.encode(),
        check=True,
        capture_output=True,
        env={**os.environ, "DOCKER_BUILDKIT": "0"},
    )
    client = docker.from_env(timeout=30)
    host = client.networks.get("bridge").attrs["IPAM"]["Config"][0].get("Gateway", "172.17.0.1")
    client.close()
    program = peers / "buildbot" / "bin" / "buildbot"
    subprocess.run([program, "create-master", "-q", folder], check=True, stdout=subprocess.DEVNULL)
    www = spare_port()
    text = _MASTER.format(workers=_WORKERS, image=image, host=host, pb=spare_port(), www=www)
    Path(folder, "master.cfg").write_text(text)
    log = open(folder / "out", "wb")  # noqa: SIM115  # the process has it from here
    master = subprocess.Popen([program, "start", "--nodaemon", folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    log.close()
    runner = Buildbot(master, f"http://127.0.0.1:{www}")
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{www}/api/v2/", timeout=5)
                break
            if master.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"Buildbot did not start: {(folder / 'out').read_text()[-2000:]}")
            time.sleep(0.2)
        yield runner
    finally:
        runner.close()
        master.terminate()
        master.wait(60)


@contextlib.contextmanager
def gitlab_ci_local(peers: Path, folder: Path) -> Iterator[GitlabCiLocal]:
    """Ready to run; the image that it moves files with is stood in for by ours, as no registry is asked."""
    program = peers / "gitlab-ci-local" / "node_modules" / ".bin" / "gitlab-ci-local"
    if not program.exists():
        raise RuntimeError("gitlab-ci-local is not there: it takes npm")
    subprocess.run(["docker", "tag", IMAGE, "docker.io/firecow/gitlab-ci-local-util:latest"], check=True)
    yield GitlabCiLocal(program, folder)


if __name__ == "__main__":
    where = Path(subprocess.run(["scripts/peers"], check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as scratch:
        for make in (buildbot, gitlab_ci_local):
            place = Path(scratch, make.__name__)
            place.mkdir()
            with make(where, place) as peer:
                for _ in range(3):
                    print(peer.name, peer.one(), file=sys.stderr)  # noqa: T201
