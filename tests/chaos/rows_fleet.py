"""Fleets whose workers come and go: F-52, and a burst on worker containers."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from scheduler.fleets.containers import LABEL_FLEET, LABEL_GROWING
from tests.chaos.harness import Chaos, row
from tests.chaos.rows_worker import AS_SHIPPED, FAR
from tests.support import aws as clouds
from tests.support.autoscaling import a_group
from tests.support.aws import Aws
from tests.support.farm import Farm, wait_until
from tests.support.redis import RedisServer
from tests.support.worker_image import make_real

OVER = 1.2
"""So much more than was wanted may be there at a time."""


@dataclass
class Watch:
    """How many instances there were at a time, and how many were wanted, as sampled."""

    most: int = 0
    most_wanted: int = 0
    ids: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, there: set[str], wanted: int) -> None:
        self.ids |= there
        self.most = max(self.most, len(there))
        self.most_wanted = max(self.most_wanted, wanted)


@contextmanager
def watched(farm: Farm, fleet: str, there: Callable[[], set[str]]) -> Iterator[Watch]:
    """Look at a fleet three times a second meanwhile."""
    watch = Watch()

    def look() -> None:
        while not watch.over.wait(0.3):
            watch.note(there(), wanted_of(farm, fleet))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def wanted_of(farm: Farm, fleet: str) -> int:
    """The size that was decided last."""
    shown = farm.client.get(f"/v1/fleets/{fleet}")
    return int((shown.get("scaling") or {}).get("wanted", 0))


def spare_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_on_loopback() -> Iterator[str]:
    """A Redis that containers on the host's network reach; its address."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:
        server, port = RedisServer(Path(folder)), spare_port()
        server.start("--port", str(port), "--bind", "127.0.0.1")
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.stop()


def one_attempt_each(chaos: Chaos, farm: Farm) -> None:
    """No build was killed: each ended by its first attempt."""
    attempts = {build: farm.show(build)["millrace"]["attempt"] for build in chaos.accepted}
    chaos.measure("builds with more than one attempt", sum(count != 1 for count in attempts.values()))
    assert set(attempts.values()) == {1}


@row(
    "burst-containers",
    done="200 builds of a moment at once, for a fleet of worker containers (at most 6 of 2 slots) that has none; then nothing",
    holds="containers come and go again; no build is killed or lost, and nothing is left",
    target="0 killed, 0 lost, 0 left; at most 1.2 x as many containers as were wanted",
)
def burst(chaos: Chaos) -> None:
    engine = docker.APIClient(timeout=60)
    image = make_real(engine)
    with ExitStack() as stack:
        stack.callback(engine.close)
        broker = stack.enter_context(redis_on_loopback())
        farm = stack.enter_context(chaos.farm(MILLRACE_BROKER_URL=broker, MILLRACE_ENGINE="fake", **AS_SHIPPED))

        def there() -> set[str]:
            found = engine.containers(all=True, filters={"label": f"{LABEL_FLEET}=far"})
            return {str(one["Names"][0]) for one in found if LABEL_GROWING not in one["Labels"]}

        farm.client.put(
            "/v1/fleets/far",
            {
                "provider": {
                    "type": "containers",
                    "image": image,
                    "network": "host",
                    "workDir": str(farm.home / "far"),
                    "environment": {"MILLRACE_ENGINE": "fake", "FAKE_SLEEP_S": "0.5", "MILLRACE_PARKED": "0"},
                },
                "scaling": {"minimum": 0, "maximum": 6, "shrinkAfterS": 5},
                "worker": {"slots": 2},
            },
        )
        chaos.accepted.append(farm.build(["work"], **FAR))
        with watched(farm, "far", there) as watch:
            began = time.monotonic()
            chaos.submit_many(farm, 199)
            chaos.settled(farm, 600)
            chaos.measure("all 200 ended, s", time.monotonic() - began)
            wait_until(lambda: not there(), 120)
            chaos.measure("none there again, s", time.monotonic() - began)
        assert chaos.states(farm) == {"SUCCEEDED": 200}
        one_attempt_each(chaos, farm)
        chaos.measure("containers in all", len(watch.ids))
        chaos.measure("most at once", watch.most)
        chaos.measure("most wanted", watch.most_wanted)
        assert watch.most <= OVER * watch.most_wanted
        assert watch.most > 1, "it was no burst"


class Machines:
    """What runs on the instances of a group: a worker on each, but on those that never come up."""

    def __init__(self, farm: Farm, aws: Aws, group: str, *, never: Callable[[int], bool]) -> None:
        self._farm, self._aws, self._group, self._never = farm, aws, group, never
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self.launched: list[str] = []
        self.dead: dict[str, float] = {}
        """Instances that never came up, and since when they are there."""
        self.dead_s: list[float] = []
        """How long those were there that are no longer."""
        self.killed: list[str] = []
        """Those whose worker still ran when they were ended."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def there(self) -> set[str]:
        return {one.instance.id for one in list(self._aws.group(self._group).instance_states)}

    def _run(self) -> None:
        while not self._over.wait(0.3):
            there = self.there()
            for instance in there - set(self.launched):
                self.launched.append(instance)
                if self._never(len(self.launched)):
                    self.dead[instance] = time.monotonic()
                else:
                    self._workers[instance] = self._boot(instance)
            for instance in set(self.dead) - there:
                self.dead_s.append(time.monotonic() - self.dead.pop(instance))
            for instance in set(self._workers) - there:
                if self._workers[instance].poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        self._workers[instance].wait(15)  # it said goodbye, and ends
                self._end(instance)

    def _boot(self, instance: str) -> "subprocess.Popen[bytes]":
        data = self._farm.home / "data"
        environment = {
            **{name: value for name, value in self._farm.environment.items() if not name.startswith("AWS_")},
            "MILLRACE_DATA_DIR": str(self._farm.home / "machines" / instance),
            "MILLRACE_API_URL": self._farm.api_url,
            "MILLRACE_WORKER_TOKEN": json.loads((data / "secrets.json").read_text())["worker_token"],
            "MILLRACE_BROKER_URL": f"redis+socket://{data / 'redis' / 'redis.sock'}",
            "MILLRACE_FLEET": "far",
            "MILLRACE_WORKER_ID": instance,
            "MILLRACE_GENERATION": "1",
            "MILLRACE_SLOTS": "2",
            "MILLRACE_ENGINE": "fake",
            "FAKE_SLEEP_S": "2",
        }
        with open(self._farm.home / "machines.log", "ab") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "millrace.cli", "worker"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _end(self, instance: str) -> None:
        worker = self._workers.pop(instance)
        if worker.poll() is None:
            self.killed.append(instance)
            os.kill(worker.pid, signal.SIGKILL)
        worker.wait(10)

    def __enter__(self) -> "Machines":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for instance in list(self._workers):
            self._workers[instance].kill()
            self._workers.pop(instance).wait(10)


def running_machines(aws: Aws, group: str) -> list[str]:
    """What EC2 would bill."""
    named = [{"Name": "tag:aws:autoscaling:groupName", "Values": [group]}]
    found = aws.client("ec2").describe_instances(Filters=named)["Reservations"]
    machines = [machine for one in found for machine in one["Instances"]]
    return [machine["InstanceId"] for machine in machines if machine["State"]["Name"] != "terminated"]


def _half(body: bytes) -> bytes:
    return body[: len(body) // 2]


@row(
    "F-52",
    done="AWS throttles, has no capacity, answers half, refuses to end instances; the third instance of a group never joins",
    holds="it is asked again later; what never joined is ended after its time (20 s here); nothing is lost or left running",
    target="0 leaked instances, 0 builds lost or killed",
)
def provider_fails(chaos: Chaos) -> None:
    scaling: dict[str, Any] = {"minimum": 0, "maximum": 5, "shrinkAfterS": 5, "joinWithinS": 20}
    with ExitStack() as stack:
        aws = stack.enter_context(clouds.running())
        group = stack.enter_context(a_group(aws, "far"))
        farm = stack.enter_context(chaos.farm(MILLRACE_ENGINE="fake", **clouds.CREDENTIALS, **AS_SHIPPED))
        provider = {"type": "ec2", "group": group, "region": clouds.REGION, "endpointUrl": aws.url}
        farm.client.put("/v1/fleets/far", {"provider": provider, "scaling": scaling, "worker": {"slots": 2}})
        machines = stack.enter_context(Machines(farm, aws, group, never=lambda number: number == 3))
        watch = stack.enter_context(watched(farm, "far", machines.there))

        aws.fail("DescribeAutoScalingGroups", "Throttling", times=9)
        aws.fail("SetDesiredCapacity", "InsufficientInstanceCapacity", "There is no capacity in us-east-1a", times=2)
        aws.spoil("DescribeInstances", _half, times=3)
        began = time.monotonic()
        chaos.accepted.append(farm.build(["work"], **FAR))
        chaos.submit_many(farm, 29)
        wait_until(lambda: "capacity" in trouble_of(farm), 120)
        wait_until(lambda: machines.dead, 180)
        aws.fail("TerminateInstanceInAutoScalingGroup", "ResourceContention", status=500, times=4)
        chaos.settled(farm, 300)
        chaos.measure("all 30 ended, s", time.monotonic() - began)
        wait_until(lambda: machines.dead_s, 120)
        chaos.measure("what never joined was ended, s after it was there", machines.dead_s[0])
        aws.spoil("DescribeAutoScalingGroups", _half, times=2)
        wait_until(lambda: not machines.there(), 180)
        chaos.measure("none there again, s", time.monotonic() - began)
        assert chaos.states(farm) == {"SUCCEEDED": 30}
        one_attempt_each(chaos, farm)
        chaos.measure("instances in all", len(machines.launched))
        chaos.measure("of which never joined", len(machines.dead_s))
        chaos.measure("ended while their worker ran", len(machines.killed))
        chaos.measure("leaked", len(running_machines(aws, group)))
        chaos.measure("most at once, of most wanted", f"{watch.most} of {watch.most_wanted}")
        assert not running_machines(aws, group)
        assert aws.group(group).desired_capacity == 0
        assert not machines.killed


def trouble_of(farm: Farm) -> str:
    """What stands in the fleet's way, as its page says it."""
    return json.dumps((farm.client.get("/v1/fleets/far").get("scaling") or {}).get("troubles", {}))
