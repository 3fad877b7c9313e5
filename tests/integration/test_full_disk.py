"""Builds whose workspace lies on a disk that they fill, on the real engine."""

import pytest

from tests.support.disks import tmpfs
from tests.support.farm import running_farm

pytestmark = pytest.mark.docker
KEPT = "artifacts:\n  files:\n    - '**/*'\n"


@pytest.mark.slow
def test_a_build_that_fills_its_disk_ends_for_that_and_the_worker_goes_on() -> None:
    settings = {"MILLRACE_MIN_FREE_BYTES": str(8 * 1024**2), "MILLRACE_SLOTS": "1"}
    with tmpfs("64m") as disk, running_farm(MILLRACE_WORK_DIR=str(disk / "work"), **settings) as farm:
        for commands in (["head -c 100000000 /dev/urandom > big"], ["head -c 45000000 /dev/urandom > big"]):
            ended = farm.ended(farm.build(commands, more=KEPT))
            assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("FAILED", "user.disk_limit"), ended["millrace"]
        assert farm.ended(farm.build(["echo well > f"], more=KEPT))["buildStatus"] == "SUCCEEDED"


@pytest.mark.slow
def test_a_process_that_the_kernel_ended_for_memory_is_told_of_though_its_command_went_on() -> None:
    hungry = "python3 -c 'bytearray(200_000_000)' || true"
    with running_farm(MILLRACE_MEMORY_BYTES=str(64 * 1024**2)) as farm:
        build = farm.build([hungry, "echo went on"])
        assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
        assert farm.log_of(build).count("ended a process of this build for want of memory") == 1
