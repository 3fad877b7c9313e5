"""`millrace worker --once`: one build, then the end. A farm whose own worker belongs to another fleet."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.farm import Farm, running_farm, wait_until

SOLO = {
    "type": "LINUX_CONTAINER",
    "image": "millrace/standard:latest",
    "computeType": "BUILD_GENERAL1_SMALL",
    "fleet": {"fleetArn": "solo"},
}
TASK = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running_farm() as found:
        made = found.cli("token", "create", "solo", "--scope", "worker")
        (found.home / "solo.token").write_text(made.stdout.strip())
        yield found


@pytest.fixture(scope="module")
def metadata() -> Iterator[str]:
    """What ECS answers in a container of a task on Fargate (Amazon ECS: task metadata endpoint version 4)."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/v4/container"
            arn = f"arn:aws:ecs:eu-central-1:123456789012:task/builds/{TASK}"
            body = json.dumps({"Name": "build", "ImageID": "sha256:12", "Labels": {"com.amazonaws.ecs.task-arn": arn}}).encode()
            self.send_response(200 if found else 500)
            self.end_headers()
            self.wfile.write(body if found else b"")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v4"
    server.shutdown()
    server.server_close()


def worker(farm: Farm, *arguments: str, **settings: str) -> "subprocess.Popen[str]":
    token = (farm.home / "solo.token").read_text()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")},
        "MILLRACE_API_URL": farm.api_url,
        "MILLRACE_WORKER_TOKEN": token,
        "MILLRACE_FLEET": "solo",
        "MILLRACE_DATA_DIR": str(farm.home / "solo"),
        "MILLRACE_LOG_FORMAT": "json",
        **settings,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "millrace.cli", "worker", "--once", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", within_s: float = 60) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, said


def test_it_carries_one_build_and_ends_whatever_the_verdict(farm: Farm) -> None:
    first = farm.build(["echo one; exit 3"], project="first", environment=SOLO)
    second = farm.build(["echo two"], project="second", environment=SOLO)
    status, said = ended(worker(farm))
    assert status == 0, said
    assert farm.ended(first)["millrace"]["exitCode"] == 3
    assert farm.show(second)["millrace"]["state"] == "QUEUED"
    status, said = ended(worker(farm))
    assert status == 0, said
    assert farm.ended(second)["buildStatus"] == "SUCCEEDED"
    assert "two\n" in farm.log_of(second)
    workspaces = farm.home / "solo" / "work"
    assert not workspaces.exists() or not list(workspaces.iterdir())


def test_with_nothing_to_claim_it_says_so_by_its_status(farm: Farm) -> None:
    began = time.monotonic()
    status, said = ended(worker(farm, "--within", "1", MILLRACE_FLEET="nothing-here"))
    assert status == 75
    assert "worker.nothing_to_do" in said
    assert time.monotonic() - began < 20


def test_told_to_leave_it_hands_its_build_back(farm: Farm) -> None:
    build = farm.build(["echo begun; sleep 120"], environment=SOLO)
    process = worker(farm, MILLRACE_DRAIN_S="1")
    farm.await_log(build, "begun")
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, 40)
    assert status == 0, said
    wait_until(lambda: farm.show(build)["millrace"]["state"] == "QUEUED", 5)
    farm.client.post(f"/v1/builds/{build}/stop", {})
    farm.ended(build)


def test_told_to_leave_before_it_has_a_build_it_goes_at_once(farm: Farm) -> None:
    process = worker(farm, "--within", "600", MILLRACE_FLEET="nothing-here")
    assert process.stdout is not None
    assert "worker.started" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process, 20)[0] == 75


def test_it_is_named_by_its_task(farm: Farm, metadata: str) -> None:
    build = farm.build(["echo hello"], environment=SOLO)
    status, said = ended(worker(farm, ECS_CONTAINER_METADATA_URI_V4=f"{metadata}/container"))
    assert status == 0, said
    shown: dict[str, Any] = farm.ended(build)["millrace"]
    assert shown["workerId"] == TASK


def test_a_task_that_ecs_does_not_tell_of_is_an_error(farm: Farm, metadata: str) -> None:
    status, said = ended(worker(farm, ECS_CONTAINER_METADATA_URI_V4=f"{metadata}/other"))
    assert status == 1
    assert "does not tell which task this is" in said


@pytest.mark.parametrize(
    ("arguments", "settings", "what"),
    [
        (["--build", "no-such"], {}, "is no id of a build"),
        ([], {"MILLRACE_WORKER_TOKEN": ""}, "needs MILLRACE_WORKER_TOKEN"),
        ([], {"MILLRACE_BUILD": "demo"}, "is no id of a build"),
    ],
)
def test_what_is_wrong_is_said(farm: Farm, arguments: list[str], settings: dict[str, str], what: str) -> None:
    status, said = ended(worker(farm, *arguments, **settings))
    assert status == 1
    assert what in said
    assert "Traceback" not in said


def test_one_build_needs_once_and_so_does_the_workers_own_container(farm: Farm, tmp_path: Path) -> None:
    for arguments, what in ((["--build", "demo:1"], "Add --once"), ([], "one build only")):
        done = subprocess.run(
            [sys.executable, "-m", "millrace.cli", "worker", *arguments],
            env={
                "PATH": os.environ["PATH"],
                "MILLRACE_ENGINE": "own",
                "MILLRACE_WORKER_TOKEN": "mr_wrk_1",
                "MILLRACE_DATA_DIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert what in done.stdout + done.stderr
