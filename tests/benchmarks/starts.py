"""Builds that do nothing, through Millrace, bare Docker and other build systems, in alternation.

Each round runs one build with every runner, one after another; then each runs many, 1, 2 and 4 at once.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.benchmarks import peers
from tests.benchmarks.peers import IMAGE, BareLoop, DockerRun, Runner, in_parallel
from tests.benchmarks.samples import OURS, Sample, Scale
from tests.support import postgres
from tests.support.farm import Farm, children_of, running_farm
from tests.support.minio import minio_server

_ROOT: Final = Path(__file__).parents[2]
_AS_SHIPPED: Final = {
    "MILLRACE_PARKED": "2",
    "MILLRACE_LEASE_TTL_S": "30",
    "MILLRACE_RENEW_EVERY_S": "5",
    "MILLRACE_SELF_FENCE_S": "25",
    "MILLRACE_SWEEP_EVERY_S": "5",
}
_REST_S: Final = 1.0
"""Between two builds, for what is done behind them: containers go, and the next are parked."""
_COLD: Final = "millrace-bench/cold"
FIRST, WHOLE, COLD = "request to first command", "request to verdict", "request to verdict, image never used before"
PER_MINUTE: Final = "builds per minute"


class Millrace:
    """A farm, as shipped; asked as any client asks it, followed to the end by its stream of events."""

    def __init__(self, name: str, farm: Farm) -> None:
        self.name, self._farm = name, farm
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))

    def one(self, **overrides: str) -> tuple[float | None, float]:
        began, at_ms = time.perf_counter(), time.time() * 1000
        build = self._farm.client.post("/v1/builds", {"projectName": "demo", **overrides})["id"]
        for event in self._farm.client.follow(build):
            if event.kind == "end":
                break
        took = time.perf_counter() - began
        marks = self._farm.show(build)["millrace"]["marks"]
        return (marks["first_command"] - at_ms) / 1000, took

    def many(self, count: int, parallel: int) -> float:
        return in_parallel(self, count, parallel)

    def processes(self) -> list[int]:
        assert self._farm.process is not None
        return [self._farm.process.pid]


@contextlib.contextmanager
def runners(folder: Path, *, alone: bool) -> Iterator[list[Runner]]:
    """All that take part; without the peers where it is to be quick."""
    with contextlib.ExitStack() as stack:
        found: list[Runner] = [DockerRun(), BareLoop()]
        embedded = stack.enter_context(running_farm(MILLRACE_SLOTS="4", **_AS_SHIPPED))
        found.append(Millrace(OURS, embedded))
        servers = _servers(stack, folder)
        found.append(
            Millrace(
                f"{OURS}, PostgreSQL and MinIO", stack.enter_context(running_farm(MILLRACE_SLOTS="4", **servers, **_AS_SHIPPED))
            )
        )
        if not alone:
            where = Path(subprocess.run([_ROOT / "scripts" / "peers"], check=True, capture_output=True, text=True).stdout.strip())
            for make in (peers.buildbot, peers.gitlab_ci_local):
                place = folder / make.__name__
                place.mkdir()
                found.append(stack.enter_context(make(where, place)))
        yield found


def _servers(stack: contextlib.ExitStack, folder: Path) -> dict[str, str]:
    minio = stack.enter_context(minio_server(folder))
    database = stack.enter_context(stack.enter_context(postgres.running()).database())
    return {
        "MILLRACE_DATABASE_URL": database,
        "MILLRACE_STORE_URL": minio.url,
        "MILLRACE_STORE_ACCESS_KEY": minio.access_key,
        "MILLRACE_STORE_SECRET_KEY": minio.secret_key,
    }


def samples(scale: Scale) -> Iterator[Sample]:
    """All figures of builds that do nothing."""
    with tempfile.TemporaryDirectory(prefix="mr-race-") as scratch, runners(Path(scratch), alone=not scale.peers) as racing:
        scale.about(f"`true` in {IMAGE}, on Docker's bridge; {scale.rounds} rounds, then {_many(scale)} builds each")
        time.sleep(3 * _REST_S)
        for runner in racing:
            if own := runner.processes():
                yield Sample(what="memory of what stands by", who=runner.name, value=_memory_mib(own), unit="MiB")
        yield from _one_by_one(racing, scale)
        for parallel in (1, 2, 4):
            for runner in racing:
                time.sleep(3 * _REST_S)
                sys.stderr.write(f"\r{parallel} in parallel: {runner.name}                    ")
                yield from _in_parallel(runner, _many(scale), parallel)
    sys.stderr.write("\n")


def _many(scale: Scale) -> int:
    return 40 if scale.rounds >= 30 else 8


def _one_by_one(racing: list[Runner], scale: Scale) -> Iterator[Sample]:
    ours = next(runner for runner in racing if isinstance(runner, Millrace))
    with _new_images(scale.rounds + 1) as images:
        for number, image in enumerate(images):
            found: list[Sample] = []
            for runner in racing:
                time.sleep(_REST_S)
                first, whole = runner.one()
                found.append(Sample(what=WHOLE, who=runner.name, value=whole, unit="s"))
                if first is not None:
                    found.append(Sample(what=FIRST, who=runner.name, value=first, unit="s"))
                if isinstance(runner, DockerRun):
                    found.append(Sample(what=COLD, who=runner.name, value=whole, unit="s"))
            time.sleep(_REST_S)
            _first, cold = ours.one(imageOverride=image)
            found.append(Sample(what=COLD, who=OURS, value=cold, unit="s"))
            if number:  # the first round of each is warmer or colder than the others
                yield from found
            sys.stderr.write(f"\rround {number} of {scale.rounds}")


@contextlib.contextmanager
def _new_images(count: int) -> Iterator[list[str]]:
    """So many that differ in a label only, so that nothing waits for them; removed at the end."""
    names = [f"{_COLD}:{number}" for number in range(count)]
    made: list[str] = []
    try:
        for name in names:
            text = f"FROM {IMAGE}\nLABEL millrace.bench={name}.{time.time_ns()}\n"
            subprocess.run(["docker", "build", "-q", "-t", name, "-"], input=text.encode(), check=True, capture_output=True)
            made.append(name)
        yield names
    finally:
        subprocess.run(["docker", "rmi", "--force", *made], check=False, capture_output=True)


def _in_parallel(runner: Runner, count: int, parallel: int) -> Iterator[Sample]:
    at = f"{parallel} in parallel"
    busy, used = _busy_s(), _Used()
    took = runner.many(count, parallel)
    most = used.most_mib()
    yield Sample(what=PER_MINUTE, who=runner.name, at=at, value=60 * count / took, unit="1/min")
    yield Sample(what="CPU of the machine per build", who=runner.name, at=at, value=(_busy_s() - busy) / count, unit="s")
    yield Sample(what="memory of the machine per build at once", who=runner.name, at=at, value=most / parallel, unit="MiB")


def _busy_s() -> float:
    """CPU seconds that this machine has spent on anything since it started."""
    user, nice, system, _idle, _wait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / 100


class _Used:
    """Memory of the machine that is in use, above what was at first: the most of it, looked at 20 times a second."""

    def __init__(self) -> None:
        self._most = self._before = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def most_mib(self) -> float:
        self._done.set()
        self._thread.join()
        return (self._most - self._before) / 1024

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        found = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(found["MemTotal"].split()[0]) - int(found["MemAvailable"].split()[0])


def _memory_mib(tops: list[int]) -> float:
    """Of these processes and all below them, each page that is shared counted by its share (PSS)."""
    todo, kib = list(tops), 0
    while todo:
        pid = todo.pop()
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        todo += children_of(pid)
    return kib / 1024
