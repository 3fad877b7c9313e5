"""From the moment a line is written in the container to its arrival at a client that follows the build, against `docker logs -f`.

Run by `make bench`; the target is 95 of 100 lines within a second.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Iterable

from tests.support.farm import Farm, running_farm

LINES = int(os.environ.get("LINES", "200"))
IMAGE = "millrace/standard:latest"
COMMAND = f"for n in $(seq {LINES}); do echo written at $(date +%s.%N); sleep 0.13; done"
"""Each line tells its moment; the clock is this machine's, as the containers are."""


def delays(lines: Iterable[str]) -> list[float]:
    """Milliseconds that each line was under way."""
    found = []
    for line in lines:
        now = time.time()
        found += [(now - float(moment.split()[0])) * 1000 for moment in line.split("written at ")[1:] if moment[0].isdigit()]
    return found


def through_the_farm(farm: Farm) -> list[float]:
    """The delays of a build's lines at a client of the farm."""
    build = farm.build([COMMAND], artifacts={"type": "NO_ARTIFACTS"})
    return delays(event.data["text"] for event in farm.client.follow(build) if event.kind == "log")


def through_docker() -> list[float]:
    """The same of `docker logs -f`."""
    run = ["docker", "run", "--detach", IMAGE, "sh", "-c", COMMAND]
    container = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    try:
        with subprocess.Popen(["docker", "logs", "-f", container], stdout=subprocess.PIPE, text=True, bufsize=1) as logs:
            return delays(logs.stdout or ())
    finally:
        subprocess.run(["docker", "rm", "--force", container], check=True, capture_output=True)


def main() -> None:
    """Measure on a farm of its own, as shipped, but for its address."""
    with running_farm(MILLRACE_LEASE_TTL_S="30", MILLRACE_SWEEP_EVERY_S="5") as farm:
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))
        ours, bare = through_the_farm(farm), through_docker()
    if (len(ours), len(bare)) != (LINES, LINES):
        raise AssertionError(f"of {LINES} lines {len(ours)} came through the farm, and {len(bare)} through docker logs")
    (middle, p95), (bare_middle, bare_p95) = (
        (statistics.median(all_), statistics.quantiles(all_, n=20)[-1]) for all_ in (ours, bare)
    )
    print(  # noqa: T201  # this is its output
        f"line written to line seen: {middle:.0f} ms (p95 {p95:.0f}), {middle / bare_middle:.1f} x docker logs -f "
        f"({bare_middle:.0f} ms, p95 {bare_p95:.0f}); target p95 <= 1000 ms"
    )


if __name__ == "__main__":
    main()
