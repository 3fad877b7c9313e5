"""Parked containers on the real engine: fresh each time, used once, and gone with what they wait for."""

import json
import os
import signal
import time
from collections.abc import Iterator

import docker
import pytest

from tests.support.farm import SHORT_LEASES, Farm, running_farm, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.redis]


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running_farm(MILLRACE_PARKED="1", MILLRACE_SLOTS="1") as up:
        yield up


def parked(farm: Farm) -> list[str]:
    """The containers that wait, of which the worker knows, and that no build has taken."""
    lines = farm.part_log("worker").splitlines()
    assert all(line.startswith("{") for line in lines), [line for line in lines if not line.startswith("{")][:30]
    events = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be half written
    waiting = {e["place"] for e in events if e["event"] == "container.parked" and e["image"] == "millrace/standard:latest"}
    waiting -= {event["place"] for event in events if event["event"] == "attempt.spawned"}
    return [name for name in farm.containers() if name.removeprefix("millrace-") in waiting]


def was_parked(farm: Farm, build: str) -> bool:
    """Whether the build ran in a container that had waited for it."""
    return any(build in line and '"parked": true' in line for line in farm.part_log("worker").splitlines())


LEAVE = [
    "touch /left-behind /tmp/left-behind ../left-behind $HOME/left-behind",
    "export LEFT=behind; echo LEFT=behind >> /etc/environment",
    "(while :; do sleep 1; done) & ",
    "ip link add dummy0 type dummy 2>/dev/null; echo 1.2.3.4 left-behind >> /etc/hosts; hostname left 2>/dev/null; true",
]
FIND = [
    "ls -a / /tmp .. $HOME; env; cat /etc/environment /etc/hosts; ls /proc | grep -c '^[0-9]'",
    'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline; echo; done',
]


def test_nothing_of_one_build_is_seen_by_the_next(farm: Farm) -> None:
    assert farm.ended(farm.build(LEAVE))["buildStatus"] == "SUCCEEDED"
    wait_until(lambda: parked(farm))
    second = farm.build(LEAVE)
    assert farm.ended(second)["buildStatus"] == "SUCCEEDED"
    wait_until(lambda: parked(farm))
    third = farm.build(FIND)
    assert farm.ended(third)["buildStatus"] == "SUCCEEDED"
    assert (was_parked(farm, second), was_parked(farm, third)) == (True, True)
    said = farm.log_of(third)
    assert "CODEBUILD_BUILD_ID" in said
    assert "left-behind" not in said
    assert "LEFT=" not in said
    assert "while" not in said.replace("done; while", "")


def test_a_parked_container_is_used_once_and_known_by_its_builds_name_then(farm: Farm) -> None:
    farm.ended(farm.build(["true"]))
    (name,) = wait_until(lambda: parked(farm))
    build = farm.build(["echo begun; sleep 5"])
    farm.await_log(build, "begun")
    wait_until(lambda: f"millrace-{build.partition(':')[2]}-1" in farm.containers())
    assert name not in farm.containers()
    farm.ended(build)
    wait_until(lambda: not any(build.partition(":")[2] in one for one in farm.containers()))


def test_a_container_that_died_while_it_waited_is_not_the_builds_fault(farm: Farm) -> None:
    farm.ended(farm.build(["true"]))
    (name,) = wait_until(lambda: parked(farm))
    client = docker.from_env(timeout=10)
    client.containers.get(name).kill()
    client.close()
    build = farm.ended(farm.build(["echo fine"]))
    assert (build["buildStatus"], len(build["millrace"]["attempts"])) == ("SUCCEEDED", 1)


def test_a_build_of_another_kind_gets_a_container_of_its_own(farm: Farm) -> None:
    farm.ended(farm.build(["true"]))
    wait_until(lambda: parked(farm))
    other = {"type": "LINUX_CONTAINER", "image": "millrace/base:latest", "computeType": "BUILD_GENERAL1_SMALL"}
    build = farm.build(["echo $0"], project="other", environment=other)
    assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
    assert not was_parked(farm, build)


def test_an_attempt_in_a_parked_container_that_is_killed_leaves_nothing(farm: Farm) -> None:
    farm.ended(farm.build(["true"]))
    wait_until(lambda: parked(farm))
    build = farm.build(["echo attempt $MILLRACE_ATTEMPT; test $MILLRACE_ATTEMPT -gt 1 || sleep 300"], project="killed")
    farm.await_log(build, "attempt 1\n")
    assert was_parked(farm, build)
    os.kill(farm.attempt_pid(build), signal.SIGKILL)
    assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
    wait_until(lambda: not any(build.partition(":")[2] in one for one in farm.containers()))


def test_what_waits_goes_with_its_worker_and_its_farm() -> None:
    with running_farm(MILLRACE_PARKED="1", **SHORT_LEASES) as farm:
        farm.ended(farm.build(["true"]))
        wait_until(lambda: parked(farm))
        worker = next(
            int(line.split('"pid": ')[1].split(",")[0])
            for line in farm.part_log("worker").splitlines()
            if "nursery.started" in line
        )
        os.kill(worker, signal.SIGKILL)  # the parent of all attempts
        time.sleep(0.5)
        assert farm.ended(farm.build(["echo again"]))["buildStatus"] == "SUCCEEDED"
        farm.stop()
        wait_until(lambda: farm.containers() == [])
