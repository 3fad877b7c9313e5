"""A whole farm of real processes on the real engine: what must hold when its parts are stopped, killed or missing."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from millrace.client import build_path
from tests.support.farm import Farm, children_of, new_farm, running_farm, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.redis]


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with running_farm() as up:
        yield up
        wait_until(lambda: up.containers() == [])


@pytest.fixture(scope="module", autouse=True)
def overdue(farm: Farm) -> str:
    """A build that goes over its time, a minute, while other tests run."""
    return farm.build(["echo begun; sleep 300"], project="overdue", timeoutInMinutes=1)


def containers_of(farm: Farm, build: str) -> list[str]:
    """Names of the build's containers that are still there."""
    return [name for name in farm.containers() if build.partition(":")[2] in name]


def is_gone(pid: int) -> bool:
    """True where the process has ended, reaped or not."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


# Stopping


def test_a_running_build_is_stopped_within_seconds_though_it_ignores_term(farm: Farm) -> None:
    build = farm.build(["echo begun; trap '' TERM; sleep 300 & sleep 300; echo never"])
    farm.await_log(build, "begun")
    began = time.monotonic()
    assert farm.cli("stop", build).returncode == 0
    ended = farm.ended(build)
    assert time.monotonic() - began < 25
    assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("STOPPED", "user.cancelled")
    phase = next(item for item in ended["phases"] if item["phaseType"] == "BUILD")
    assert (phase["phaseStatus"], "contexts" in phase) == ("STOPPED", False)
    assert [item["phaseType"] for item in ended["phases"]][-2:] == ["BUILD", "COMPLETED"]
    assert "echo never" not in farm.log_of(build).split("Running command", 2)[-1].split("begun")[-1]
    wait_until(lambda: containers_of(farm, build) == [])


# Logs


def test_a_log_is_followed_live_and_resumed_without_a_gap(farm: Farm) -> None:
    build = farm.build(["for n in $(seq 1 12); do echo line-$n-ü; sleep 0.25; done"])
    headers = {"Authorization": f"Bearer {farm.token}", "Accept": "text/event-stream"}
    text, last_id, first_at, connections = "", "", 0.0, 0
    ended: dict[str, Any] = {}
    while not ended and connections < 30:
        connections += 1
        seen = 0
        resumed = {**headers, **({"Last-Event-ID": last_id} if last_id else {})}
        with httpx.stream("GET", f"{farm.api_url}{build_path(build)}/logs", headers=resumed, timeout=30) as answer:
            assert answer.status_code == 200
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("id: "):
                    last_id = line[4:]
                elif line.startswith("data: ") and kind == "log":
                    data = json.loads(line[6:])
                    assert data["offset"] == len(text.encode())
                    text += data["text"]
                    first_at = first_at or time.time()
                    seen += 1
                    if seen == 3:
                        break  # the connection is cut off here, and taken up again
                elif line.startswith("data: ") and kind == "end":
                    ended = json.loads(line[6:])
                    break
    assert connections > 1
    assert ended == {"state": "SUCCEEDED", "reason": "succeeded", "logComplete": True}
    assert text == farm.log_of(build)
    assert all(f"line-{n}-ü" in text for n in range(1, 13))
    shown = farm.show(build)
    assert first_at < shown["endTime"], "the log came before the build's end"


def test_much_output_arrives_whole(farm: Farm) -> None:
    build = farm.build(["seq 1 400000", "head -c 3000000 /dev/zero | tr '\\0' 'x'; echo"])
    assert farm.ended(build, within_s=90)["buildStatus"] == "SUCCEEDED"
    log = farm.log_of(build)
    assert "\n399999\n400000\n" in log
    assert "x" * 3_000_000 in log
    assert log.count("\n") > 400_000


# Faults


def test_an_attempt_that_is_killed_is_tried_again_at_once(farm: Farm) -> None:
    build = farm.build(["echo attempt $MILLRACE_ATTEMPT; test $MILLRACE_ATTEMPT -gt 1 || sleep 300"], project="killed")
    farm.await_log(build, "attempt 1\n")
    os.kill(farm.attempt_pid(build), signal.SIGKILL)
    ended = farm.ended(build)
    assert ended["buildStatus"] == "SUCCEEDED"
    verdicts = [(item["verdict"], item["reason"]) for item in ended["millrace"]["attempts"]]
    assert verdicts == [("HANDED_BACK", "infra.worker_lost"), ("SUCCEEDED", "succeeded")]
    assert "attempt 2" in farm.log_of(build)
    wait_until(lambda: containers_of(farm, build) == [])


def test_a_container_that_is_killed_fails_the_build_clearly(farm: Farm) -> None:
    build = farm.build(["echo begun; sleep 300"], project="container")
    farm.await_log(build, "begun")
    (name,) = containers_of(farm, build)
    client = docker.from_env(timeout=10)
    client.containers.get(name).kill()
    client.close()
    ended = farm.ended(build)
    assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("FAILED", "user.killed")
    assert "status 137" in ended["millrace"]["message"]


def test_builds_queued_while_redis_is_down_run_and_none_is_lost(farm: Farm) -> None:
    redis = farm.pid_of("redis-server")
    os.kill(redis, signal.SIGSTOP)
    try:
        began = time.monotonic()
        builds = [farm.build(["echo hello"], project="bell") for _ in range(3)]
        assert time.monotonic() - began < 10
    finally:
        os.kill(redis, signal.SIGKILL)
    assert [farm.ended(build)["buildStatus"] for build in builds] == ["SUCCEEDED"] * 3
    wait_until(lambda: farm.client.ready()["status"] == "ok")


def test_an_api_that_is_killed_comes_back_and_the_build_goes_on(farm: Farm) -> None:
    build = farm.build(["for n in 1 2 3 4 5 6; do echo step $n; sleep 0.5; done"], project="outage")
    farm.await_log(build, "step 1")
    api = farm.pid_of("millrace.cli api")
    servers = [api, *children_of(api)]
    os.kill(api, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, servers)))  # its orphans still answer for a moment
    wait_until(lambda: farm.client.alive())
    farm.hang_up()
    ended = farm.ended(build)
    assert ended["buildStatus"] == "SUCCEEDED"
    assert len(ended["millrace"]["attempts"]) == 1
    log = farm.log_of(build)
    assert [log.count(f"\nstep {n}\n") for n in range(1, 7)] == [1] * 6


def test_containers_are_limited_and_see_no_engine(farm: Farm) -> None:
    build = farm.build(
        [
            "test ! -e /var/run/docker.sock",
            "! mount -t tmpfs none /mnt 2>/dev/null",
            "grep -q 'NoNewPrivs:.1' /proc/self/status",
            "apt-get --version >/dev/null && touch /root/x && chown 33:33 /root/x && su -s /bin/sh www-data -c id",
            "env | grep -c MILLRACE_",
        ],
        project="limits",
    )
    assert farm.ended(build)["buildStatus"] == "SUCCEEDED", farm.log_of(build)


# At its end, when the minute is over


def test_a_build_over_its_time_ends_timed_out(farm: Farm, overdue: str) -> None:
    ended = farm.ended(overdue, within_s=100)
    assert (ended["buildStatus"], ended["millrace"]["reason"]) == ("TIMED_OUT", "user.timeout")
    phase = next(item for item in ended["phases"] if item["phaseType"] == "BUILD")
    assert (phase["phaseStatus"], phase["contexts"][0]["statusCode"]) == ("TIMED_OUT", "BUILD_TIMED_OUT")


# The embedded farm itself


def test_a_second_up_in_the_same_folder_says_so(farm: Farm) -> None:
    again = farm.cli("up")
    assert again.returncode == 1
    assert "a farm runs already" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_farm_stops_cleanly_and_starts_again_with_its_history() -> None:
    with new_farm() as farm:
        farm.start()
        done = farm.build(["echo the past"])
        farm.ended(done)
        unfinished = farm.build(["echo attempt $MILLRACE_ATTEMPT; test $MILLRACE_ATTEMPT -gt 1 || sleep 300"])
        farm.await_log(unfinished, "attempt 1")
        parts = [
            farm.pid_of(words) for words in ("redis-server", "millrace.cli api", "millrace.cli scheduler", "millrace.cli worker")
        ]
        began = time.monotonic()
        assert farm.stop(number=signal.SIGINT) == 0
        assert time.monotonic() - began < 30
        assert [pid for pid in parts if Path(f"/proc/{pid}").exists()] == []
        assert farm.containers() == []
        farm.start()
        assert "the past" in farm.log_of(done)
        assert farm.show(done)["buildStatus"] == "SUCCEEDED"
        ended = farm.ended(unfinished)
        assert ended["buildStatus"] == "SUCCEEDED"
        assert [item["reason"] for item in ended["millrace"]["attempts"]] == ["infra.worker_shutdown", "succeeded"]


def test_no_part_outlives_a_supervisor_that_is_killed() -> None:
    with new_farm() as farm:
        farm.start()
        parts = [
            farm.pid_of(words) for words in ("redis-server", "millrace.cli api", "millrace.cli scheduler", "millrace.cli worker")
        ]
        assert farm.process is not None
        farm.process.kill()
        farm.process.wait(10)
        farm.process = None
        wait_until(lambda: [pid for pid in parts if Path(f"/proc/{pid}").exists()] == [])


def test_an_object_store_that_is_away_is_retried_and_then_named() -> None:
    with new_farm() as farm:
        farm.start()
        build = farm.build(["echo begun; sleep 2; echo x > out.txt"], more="artifacts:\n  files: out.txt\n")
        farm.await_log(build, "begun")
        objects = farm.home / "data" / "objects"
        aside = objects.with_name("objects-away")
        objects.rename(aside)
        objects.write_text("no folder")  # nothing can be stored below a file, whoever tries
        farm.await_log(build, "Found 1 file(s)")
        time.sleep(2)
        objects.unlink()
        aside.rename(objects)
        ended = farm.ended(build)
        assert ended["buildStatus"] == "SUCCEEDED"
        assert len(ended["millrace"]["attempts"]) == 1


def test_a_taken_port_and_wrong_settings_are_said_plainly() -> None:
    import socket

    with socket.socket() as taken, tempfile.TemporaryDirectory() as folder:  # short: a socket's path goes into it
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**os.environ, "MILLRACE_DATA_DIR": f"{folder}/d", "MILLRACE_BIND": f"127.0.0.1:{port}"}
        done = subprocess.run(
            [sys.executable, "-m", "millrace.cli", "up"], env=environment, capture_output=True, text=True, check=False
        )
    assert (done.returncode, f"cannot listen on 127.0.0.1:{port}" in done.stderr, "hint:" in done.stderr) == (1, True, True)
    environment |= {"MILLRACE_SLOTS": "many", "MILLRACE_NONSENSE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "millrace.cli", "up"], env=environment, capture_output=True, text=True, check=False
    )
    assert "MILLRACE_SLOTS" in done.stderr
    assert "MILLRACE_NONSENSE" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_that_start_the_farm_at_once_share_one() -> None:
    with new_farm() as farm:
        command = [sys.executable, "-m", "millrace.cli", "up", "--detach"]
        both = [
            subprocess.Popen(command, env=farm.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(2)
        ]
        said = [process.communicate(timeout=90)[0] for process in both]
        try:
            assert [process.returncode for process in both] == [0, 0], said
        finally:
            assert farm.cli("down").returncode == 0
