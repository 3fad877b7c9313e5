"""From the moment a line is written in the container to its arrival at a client that follows the build, against `docker logs -f`.

The target is 95 of 100 lines within a second.
"""

import subprocess
import time
from collections.abc import Iterable, Iterator

from tests.benchmarks.samples import OURS, Sample, Scale, each
from tests.support.farm import Farm, running_farm

IMAGE = "millrace/standard:latest"
LINE = "written line to seen line"


def _command(lines: int) -> str:
    """Each line tells its moment; the clock is this machine's, as the containers are."""
    return f"for n in $(seq {lines}); do echo written at $(date +%s.%N); sleep 0.13; done"


def delays(lines: Iterable[str]) -> list[float]:
    """Seconds that each line was under way."""
    found = []
    for line in lines:
        now = time.time()
        found += [now - float(moment.split()[0]) for moment in line.split("written at ")[1:] if moment[0].isdigit()]
    return found


def through_the_farm(farm: Farm, command: str) -> list[float]:
    """The delays of a build's lines at a client of the farm."""
    build = farm.build([command], artifacts={"type": "NO_ARTIFACTS"})
    return delays(event.data["text"] for event in farm.client.follow(build) if event.kind == "log")


def through_docker(command: str) -> list[float]:
    """The same of `docker logs -f`."""
    run = ["docker", "run", "--detach", IMAGE, "sh", "-c", command]
    container = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    try:
        with subprocess.Popen(["docker", "logs", "-f", container], stdout=subprocess.PIPE, text=True, bufsize=1) as logs:
            return delays(logs.stdout or ())
    finally:
        subprocess.run(["docker", "rm", "--force", container], check=True, capture_output=True)


def samples(scale: Scale) -> Iterator[Sample]:
    """On a farm of its own, as shipped, but for its address."""
    lines = 200 if scale.rounds >= 30 else 40
    command = _command(lines)
    scale.about(f"{lines} lines, one every 0.13 s, to a client that follows")
    with running_farm(MILLRACE_LEASE_TTL_S="30", MILLRACE_SWEEP_EVERY_S="5") as farm:
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))
        ours, bare = through_the_farm(farm, command), through_docker(command)
    if (len(ours), len(bare)) != (lines, lines):
        raise AssertionError(f"of {lines} lines {len(ours)} came through the farm, and {len(bare)} through docker logs")
    yield from each(LINE, OURS, ours, "s")
    yield from each(LINE, "docker logs -f", bare, "s")
