"""How fast a build's output goes through the farm, against a bare attach that reads the same output and drops it.

The worker's memory is looked at while the build prints.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import docker

from tests.benchmarks.samples import OURS, Sample, Scale
from tests.support.farm import Farm, children_of, running_farm

MIB = 1024 * 1024
SIZE = 200 * MIB
IMAGE = "millrace/standard:latest"
OUTPUT = "output of a build, to its verdict"
COMMAND = f"head -c {SIZE} /dev/zero | tr '\\0' x | fold -w 99"


def bare() -> float:
    """Seconds from the start of a container to the end of its output."""
    client = docker.APIClient(version="auto", timeout=120)
    config = client.create_host_config(log_config=docker.types.LogConfig(type="none"))
    made = client.create_container(IMAGE, ["sh", "-c", COMMAND], host_config=config)
    stream = client.attach(made, stream=True, stdout=True, stderr=True)
    began = time.perf_counter()
    client.start(made)
    size = sum(len(piece) for piece in stream)
    took = time.perf_counter() - began
    client.remove_container(made, force=True)
    client.close()
    assert size > SIZE, size
    return took


def through(farm: Farm) -> tuple[float, int]:
    """Seconds that its command took, all of its log stored; and the most memory in MiB that a process of the worker had."""
    build = farm.client.post("/v1/builds", {"projectName": "demo"})["id"]
    top, most = farm.pid_of("millrace.cli worker"), 0
    while not (shown := farm.show(build))["buildComplete"]:
        todo = [top, farm.pid_of("worker.nursery")]
        for pid in [*todo, *(child for one in todo for child in children_of(one))]:
            status = Path(f"/proc/{pid}/status")
            if status.exists():
                most = max(
                    most, *(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                )
        time.sleep(0.2)
    assert shown["buildStatus"] == "SUCCEEDED", shown["millrace"]
    footer = farm.client.get(f"/v1/builds/{build}/logs/footer")
    assert footer["complete"], footer
    assert footer["stored"]["bytes"] > SIZE, footer
    marks = shown["millrace"]["marks"]
    return (marks["verdict"] - marks["first_command"]) / 1000, most


def samples(scale: Scale) -> Iterator[Sample]:
    """In alternation."""
    scale.about(f"{SIZE // MIB} MiB in lines of 100 bytes, in {scale.heavy} rounds; bare: a client that attaches and drops it")
    with running_farm(MILLRACE_PARKED="1", MILLRACE_LEASE_TTL_S="30", MILLRACE_SWEEP_EVERY_S="5") as farm:
        farm.ended(farm.build(["true"], artifacts={"type": "NO_ARTIFACTS"}))
        farm.ended(farm.build([COMMAND], artifacts={"type": "NO_ARTIFACTS"}), 300)
        for _ in range(scale.heavy):
            time.sleep(2)
            took, peak = through(farm)
            yield Sample(what=OUTPUT, who=OURS, value=SIZE / MIB / took, unit="MiB/s")
            yield Sample(what=OUTPUT, who="bare attach", value=SIZE / MIB / bare(), unit="MiB/s")
            yield Sample(what="most memory in a process of the worker meanwhile", who=OURS, value=peak, unit="MiB")
