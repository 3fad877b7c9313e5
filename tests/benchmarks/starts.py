"""From request to first command and to verdict of a build that does nothing, against `docker run` of its image, in alternation.

Run by `make bench`; the targets are 0.15 and 0.4 of `docker run`, and 1.3 for a build whose image was not asked for before.
"""

import os
import statistics
import subprocess
import time

from tests.support.farm import running_farm

ROUNDS = int(os.environ.get("ROUNDS", "30"))
IMAGE = "millrace/standard:latest"
DOCKER_RUN = ["docker", "run", "--rm", IMAGE, "true"]


def main() -> None:
    """Measure on a farm of its own, as shipped, but for its address."""
    bare, first, whole = [], [], []
    with running_farm(MILLRACE_PARKED="2", MILLRACE_LEASE_TTL_S="30", MILLRACE_SWEEP_EVERY_S="5") as farm:
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))
        for _ in range(ROUNDS):
            time.sleep(1.5)  # the next container is parked
            build = farm.client.post("/v1/builds", {"projectName": "demo"})["id"]
            for event in farm.client.follow(build):
                if event.kind == "end":
                    break
            marks = farm.show(build)["millrace"]["marks"]
            first.append(marks["first_command"] - marks["accepted"])
            whole.append(marks["verdict"] - marks["accepted"])
            began_bare = time.perf_counter()
            subprocess.run(DOCKER_RUN, check=True)
            bare.append((time.perf_counter() - began_bare) * 1000)
    yardstick = statistics.median(bare)
    for what, times, target in (("first command", first, 0.15), ("verdict", whole, 0.4)):
        middle, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(  # noqa: T201  # this is its output
            f"request to {what}: {middle:.0f} ms (p95 {p95:.0f}), {middle / yardstick:.2f} x docker run ({yardstick:.0f} ms);"
            f" target <= {target} x"
        )


if __name__ == "__main__":
    main()
