"""`python -m tests.benchmarks.race [--quick] [--write]`: Millrace beside bare Docker and other build systems, in alternation.

Each round runs one build that does nothing with every runner, one after another; then each runs many, 1, 2 and 4 at once. The
raw figures go to docs/performance.csv, and docs/performance.md with its plots is made from them, where --write asks for that.
"""

import argparse
import contextlib
import csv
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.benchmarks import peers, report
from tests.benchmarks.peers import BareLoop, DockerRun, Runner, in_parallel
from tests.support import postgres
from tests.support.farm import Farm, running_farm
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


class Millrace:
    """A farm, as shipped; asked as any client asks it, followed to the end by its stream of events."""

    def __init__(self, name: str, farm: Farm) -> None:
        self.name, self._farm = name, farm
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))

    def one(self) -> tuple[float | None, float]:
        began, at_ms = time.perf_counter(), time.time() * 1000
        build = self._farm.client.post("/v1/builds", {"projectName": "demo"})["id"]
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
        found.append(Millrace("Millrace", embedded))
        servers = _servers(stack, folder)
        found.append(
            Millrace(
                "Millrace, PostgreSQL and MinIO", stack.enter_context(running_farm(MILLRACE_SLOTS="4", **servers, **_AS_SHIPPED))
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


def race(alone: bool, rounds: int, many: int) -> list[dict[str, object]]:
    """All figures: what, of whom, at how many in parallel, sample, value and unit."""
    rows: list[dict[str, object]] = []

    def note(what: str, who: str, value: float, unit: str, parallel: int = 1) -> None:
        rows.append({"what": what, "who": who, "parallel": parallel, "value": round(value, 5), "unit": unit})

    with tempfile.TemporaryDirectory(prefix="mr-race-") as scratch, runners(Path(scratch), alone=alone) as taking_part:
        for runner in taking_part:
            if own := runner.processes():
                note("idle memory", runner.name, report.memory_mib(own), "MiB")
        for number in range(rounds + 1):
            for runner in taking_part:
                time.sleep(_REST_S)
                first, whole = runner.one()
                if number == 0:
                    continue  # the first of each is warmer or colder than the others
                note("request to verdict", runner.name, whole, "s")
                if first is not None:
                    note("request to first command", runner.name, first, "s")
            sys.stderr.write(f"\rround {number} of {rounds}")
        for parallel in (1, 2, 4):
            for runner in taking_part:
                time.sleep(3 * _REST_S)
                busy = report.busy_s()
                took = runner.many(many, parallel)
                note("builds per minute", runner.name, 60 * many / took, "1/min", parallel)
                note("CPU of the machine per build", runner.name, (report.busy_s() - busy) / many, "s", parallel)
                sys.stderr.write(f"\r{parallel} in parallel: {runner.name}                    ")
    sys.stderr.write("\n")
    return rows


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(prog="race")
    parser.add_argument("--quick", action="store_true", help="without the peers, and few samples")
    parser.add_argument("--write", action="store_true", help="make docs/performance.* anew")
    asked = parser.parse_args()
    rounds = int(os.environ.get("ROUNDS", "6" if asked.quick else "30"))
    rows = race(asked.quick, rounds, 20 if asked.quick else 40)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False)
    machine = f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Docker {_engine()}"
    where = report.Where(commit=commit.stdout.strip(), machine=machine, rounds=rounds)
    sys.stdout.write(report.text(rows, where))
    if asked.write:
        with open(_ROOT / "docs" / "performance.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        report.write(rows, where, _ROOT / "docs")


def _engine() -> str:
    said = subprocess.run(["docker", "version", "-f", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    return said.stdout.strip() if shutil.which("docker") else "?"


if __name__ == "__main__":
    main()
