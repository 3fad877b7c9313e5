"""A worker that offers cpus and labels, by the command line and the API, with real containers."""

from typing import Any

import pytest

from millrace.client import build_path
from millrace.errors import MillraceError
from tests.support.farm import Farm, running_farm, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.redis]


def start(farm: Farm, **overrides: Any) -> str:
    build_id: str = farm.client.post("/v1/builds", {"projectName": "demo", **overrides})["id"]
    return build_id


def state(farm: Farm, build_id: str) -> str:
    return str(farm.show(build_id)["millrace"]["state"])


def test_builds_run_beside_one_another_as_far_as_the_workers_cpus_go() -> None:
    with running_farm(MILLRACE_SLOTS="4", MILLRACE_CPUS="3", MILLRACE_LABELS="ssd,zone=a") as farm:
        first = farm.build(["echo up", "while [ ! -e /tmp/go ]; do sleep 0.1; done"])
        farm.await_log(first, "up")
        second = start(farm, buildspecOverride="version: 0.2\nphases: {build: {commands: [echo ok]}}")
        said = farm.client.get(f"{build_path(second)}/queue")
        assert [bound["limit"] for bound in said["limits"]] == ["room"]
        assert "with 2 vCPU and 4 GiB free" in said["says"]
        assert said["limits"][0]["moreWorkers"]["cpus"] == 3
        why = farm.cli("why", second)
        assert "room: wait until builds end, or add 1 worker with 3 vCPU and any memory" in " ".join(why.stdout.split())
        small = {"computeTypeOverride": "ATTRIBUTE_BASED_COMPUTE", "computeConfigurationOverride": {"vCpu": 1, "memory": 1}}
        limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || true"
        third = start(
            farm,
            **small,
            workerLabelsOverride=["zone=a"],
            buildspecOverride=f"version: 0.2\nphases: {{build: {{commands: ['{limit}']}}}}",
        )
        assert farm.ended(third)["buildStatus"] == "SUCCEEDED"  # it fits beside the first one, and so goes before the second
        assert str(1024**3) in farm.log_of(third)
        assert state(farm, second) == "QUEUED"
        away = start(farm, workerLabelsOverride=["gpu"])
        assert "with label gpu; none living has it" in farm.client.get(f"{build_path(away)}/queue")["says"]
        farm.client.post(f"{build_path(first)}/stop", {})
        assert farm.ended(second)["buildStatus"] == "SUCCEEDED"
        wait_until(lambda: farm.client.get("/v1/fleets/default")["freeSlots"] == 4)
        assert state(farm, away) == "QUEUED"


def test_what_cannot_be_is_refused_by_field() -> None:
    with running_farm(MILLRACE_ENGINE="fake") as farm:
        farm.ended(farm.build(["true"]))
        for overrides, field in (
            ({"computeTypeOverride": "ATTRIBUTE_BASED_COMPUTE"}, "computeTypeOverride"),
            ({"computeTypeOverride": "HUGE"}, "computeTypeOverride"),
            ({"computeConfigurationOverride": {"vCpu": 0}}, "computeConfigurationOverride.vCpu"),
            ({"workerLabelsOverride": ["a b"]}, "workerLabelsOverride.0"),
        ):
            with pytest.raises(MillraceError) as caught:
                start(farm, **overrides)
            assert field in str(caught.value), overrides
