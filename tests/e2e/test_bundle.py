"""A worker that is its own sandbox, carried into images by the bundle: what a task of ECS on Fargate does, in Docker containers.

All scenarios are built so, with the same expectations as on the Docker engine, but for those that cannot be, which say why.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from millrace.client import build_path
from tests.e2e import test_scenarios
from tests.support import engine_images
from tests.support.farm import Farm, running_farm
from tests.support.gitserver import http_server, make_repository
from tests.support.tasks import Tasks, tasks_of

pytestmark = pytest.mark.docker
STANDARD, BARE = "millrace/standard:latest", engine_images.BUSYBOX
ELSEWHERE = {
    "11_missing_image": "a task whose image cannot be pulled never starts; the provider tells of it",
    "49_cache_of_folders": "caches are copied, never mounted; 35 to 37 show those",
}
"""Scenarios that mean something else where the worker is the sandbox."""


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    """Its own worker is of another fleet: what is built here, tasks build."""
    with running_farm(MILLRACE_FLEET="elsewhere") as up:
        yield up


@pytest.fixture(scope="module")
def tasks(farm: Farm) -> Iterator[Tasks]:
    engine = docker.APIClient()
    try:
        engine_images.make(engine)
    finally:
        engine.close()
    with tasks_of(farm) as made:
        yield made


@pytest.fixture
def served(tasks: Tasks) -> Iterator[Tasks]:
    with tasks.for_each_build():
        yield tasks


def environment(image: str) -> dict[str, str]:
    return {"type": "LINUX_CONTAINER", "image": image, "computeType": "BUILD_GENERAL1_SMALL"}


def outcome(build: dict[str, Any]) -> tuple[str, str, int | None]:
    ours = build["millrace"]
    return ours["state"], ours["reason"], ours["exitCode"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [folder for folder in test_scenarios.SCENARIOS if folder.name not in ELSEWHERE],
    ids=lambda path: path.name,
)
def test_scenario(farm: Farm, served: Tasks, folder: Path, tmp_path: Path) -> None:
    test_scenarios.test_scenario(farm, folder, tmp_path)


@pytest.mark.parametrize("image", [STANDARD, BARE])
def test_a_build_in_an_image_that_knows_nothing_of_millrace(farm: Farm, served: Tasks, image: str, tmp_path: Path) -> None:
    assert farm.cli("secret", "set", "bundle-canary", text="s3cr3t-of-the-build").returncode == 0
    build_id = farm.build(
        ["echo $A and $SECRET", "mkdir -p out && pwd >out/where", "cd /tmp", "test $(pwd) = /tmp", "echo 'to stderr' >&2"],
        project="bundle",
        environment={
            **environment(image),
            "environmentVariables": [
                {"name": "A", "value": "plain", "type": "PLAINTEXT"},
                {"name": "SECRET", "value": "bundle-canary", "type": "PARAMETER_STORE"},
            ],
        },
        more="artifacts:\n  files: [out/**/*]\n",
    )
    build = farm.ended(build_id)
    log = farm.log_of(build_id)
    assert outcome(build) == ("SUCCEEDED", "succeeded", None), log
    assert "plain and ***\n" in log
    assert "s3cr3t-of-the-build" not in log
    assert "to stderr\n" in log
    (artifact,) = farm.client.get(f"{build_path(build_id)}/artifacts")["artifacts"]
    farm.client.download(build_id, artifact["name"], artifact["identifier"], tmp_path / "the.zip")
    assert (tmp_path / "the.zip").stat().st_size > 100
    assert all(phase.get("phaseStatus") in ("SUCCEEDED", None) for phase in build["phases"])


@pytest.mark.parametrize("image", [STANDARD, BARE])
def test_a_command_that_fails_fails_the_build(farm: Farm, served: Tasks, image: str) -> None:
    build_id = farm.build(["echo before", "exit 7", "echo after"], project="bundle", environment=environment(image))
    assert outcome(farm.ended(build_id)) == ("FAILED", "user.exit_code", 7)
    assert "before\n" in farm.log_of(build_id)
    assert "\nafter\n" not in farm.log_of(build_id)


@pytest.mark.parametrize("image", [STANDARD, BARE])
def test_a_build_is_stopped(farm: Farm, served: Tasks, image: str) -> None:
    build_id = farm.build(["echo begun; sleep 300"], project="bundle", environment=environment(image))
    farm.await_log(build_id, "begun", within_s=60)
    farm.client.post(f"{build_path(build_id)}/stop")
    assert outcome(farm.ended(build_id, 30)) == ("STOPPED", "user.cancelled", None)


@pytest.mark.slow
def test_a_build_that_takes_too_long_ends_in_time(farm: Farm, served: Tasks) -> None:
    commands = ["echo begun; trap '' TERM; (trap '' TERM; sleep 300) & sleep 300"]
    build_id = farm.build(commands, project="bundle", environment=environment(BARE), timeoutInMinutes=1)
    build = farm.ended(build_id, 150)
    assert outcome(build) == ("TIMED_OUT", "user.timeout", None)


@pytest.mark.parametrize("image", [STANDARD, BARE])
def test_a_build_that_kills_all_it_sees_ends_itself_and_not_the_worker(farm: Farm, served: Tasks, image: str) -> None:
    build_id = farm.build(["echo begun", "kill -9 -1; sleep 5; echo not here"], project="bundle", environment=environment(image))
    assert outcome(farm.ended(build_id)) == ("FAILED", "user.killed", None)
    assert len(farm.show(build_id)["millrace"]["attempts"]) == 1
    assert "\nnot here\n" not in farm.log_of(build_id)


def test_what_the_worker_knows_is_hidden_from_its_build(farm: Farm, served: Tasks) -> None:
    """Root of the same container looks for the worker's token wherever the kernel shows processes."""
    build_id = farm.build(
        [
            "env | grep -cE 'MILLRACE_(WORKER_TOKEN|API_URL)' || true",
            "cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n' | grep -cE '^MILLRACE_(WORKER_TOKEN|API_URL)' || true",
            "for p in 1 $PPID; do ls -l /proc/$p/fd >/dev/null 2>&1 && echo fd $p; done; true",
            "head -c 1 /proc/1/environ; head -c 1 /proc/1/mem; cat /proc/1/maps; echo looked $?",
            "python3 -c \"import ctypes; print('ptrace', ctypes.CDLL(None).ptrace(16, 1, 0, 0))\"",
            "grep CapEff /proc/self/status",
            "ls -ld /millrace; touch /millrace/x || echo 'read-only as it should be'",
        ],
        project="bundle",
        environment=environment(STANDARD),
    )
    build = farm.ended(build_id)
    log = farm.log_of(build_id)
    assert outcome(build) == ("SUCCEEDED", "succeeded", None), log
    assert served.token not in log
    assert [line for line in log.splitlines() if re.fullmatch("[0-9]+", line)] == ["0", "0"], log
    assert "\nfd 1\n" not in log
    assert "ptrace -1" in log
    assert "looked 1" in log
    assert "CapEff:\t00000000a00404fb" in log
    assert "read-only as it should be" in log


def test_told_to_leave_a_task_hands_its_build_back(farm: Farm, tasks: Tasks) -> None:
    build_id = farm.build(["echo begun; sleep 300"], project="bundle", environment=environment(BARE))
    task = tasks.start(build_id, BARE, environment={**settings(tasks, build_id), "MILLRACE_DRAIN_S": "2"})
    farm.await_log(build_id, "begun", within_s=60)
    began = time.monotonic()
    task.kill(signal.SIGTERM)
    assert task.wait(timeout=100)["StatusCode"] == 0
    assert time.monotonic() - began < 30
    assert farm.show(build_id)["millrace"]["state"] == "QUEUED"
    (attempt,) = farm.show(build_id)["millrace"]["attempts"]
    assert attempt["reason"] == "infra.worker_shutdown"
    farm.client.post(f"{build_path(build_id)}/stop")
    farm.ended(build_id)


def settings(tasks: Tasks, build_id: str, image: str = BARE) -> dict[str, str]:
    return {
        "MILLRACE_API_URL": tasks.farm.api_url,
        "MILLRACE_WORKER_TOKEN": tasks.token,
        "MILLRACE_ENGINE": "own",
        "MILLRACE_OWN_IMAGE": image,
        "MILLRACE_BUILD": build_id,
        "MILLRACE_LOG_FORMAT": "json",
    }


def test_a_task_in_another_image_than_its_builds_says_so(farm: Farm, tasks: Tasks) -> None:
    build_id = farm.build(["true"], project="bundle", environment=environment(STANDARD))
    task = tasks.start(build_id, BARE, environment=settings(tasks, build_id, image="other:1"))
    assert task.wait(timeout=60)["StatusCode"] == 0
    (attempt,) = farm.show(build_id)["millrace"]["attempts"]
    assert attempt["reason"] == "infra.image_pull"
    assert "a container of other:1" in attempt["message"]
    farm.client.post(f"{build_path(build_id)}/stop")
    farm.ended(build_id)


@pytest.mark.parametrize("image", [STANDARD, BARE])
def test_a_git_source_needs_no_git_in_the_image(farm: Farm, served: Tasks, image: str, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "repository.git")
    with http_server(tmp_path) as server:
        build_id = farm.build(
            [],
            project=f"bundle-git-{image == BARE}",
            environment=environment(image),
            source={
                "type": "GITHUB_ENTERPRISE",
                "location": f"{server.url}/repository.git",
                "buildspec": "version: 0.2\nphases:\n  build:\n    commands: [cat README]\n",
            },
        )
        build = farm.ended(build_id)
    log = farm.log_of(build_id)
    assert outcome(build) == ("SUCCEEDED", "succeeded", None), log
    assert "\nthird\n" in log
    assert build["resolvedSourceVersion"] == repository.third


def test_the_scenarios_that_are_left_out_are_there() -> None:
    names = {folder.name for folder in test_scenarios.SCENARIOS}
    assert set(ELSEWHERE) <= names, json.dumps(sorted(names))
