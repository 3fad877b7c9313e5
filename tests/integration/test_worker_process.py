"""Real worker processes that leave, lack room, or hear nothing, and what the farm says of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import redis

from scheduler.db import Database
from scheduler.fleets import marks
from tests.chaos.rows_worker import FAR, far_worker
from tests.support.disks import tmpfs
from tests.support.farm import Farm, running_farm, wait_until
from worker.watchdog import EXIT_DEAF

pytestmark = [pytest.mark.docker, pytest.mark.slow]
DEAF = """
import os, sys
from millrace.settings import load
from worker import app, watchdog
watchdog.DEAF_S, watchdog._ROUND_S = 2.0, 0.2
app._listen = lambda *_: None
sys.exit(app.main(load(os.environ), os.environ))
"""
"""A worker whose consumer has died, with a watchdog that does not wait as long as others."""


def fleet(farm: Farm, name: str) -> dict[str, object]:
    """As it is shown; before its first worker has come, as one without."""
    shown: list[dict[str, object]] = farm.client.get("/v1/fleets")["fleets"]
    return next((one for one in shown if one["name"] == name), {"notClaiming": [], "workers": 0, "freeSlots": 0})


def readiness(farm: Farm) -> dict[str, object]:
    answer: dict[str, object] = httpx.get(f"{farm.api_url}/readyz", timeout=10).json()
    return answer


def test_a_worker_without_room_says_so_and_takes_builds_when_there_is_some() -> None:
    settings = {"MILLRACE_MIN_FREE_BYTES": str(32 * 1024**2)}
    with tmpfs("64m") as disk, running_farm(MILLRACE_WORK_DIR=str(disk / "work"), **settings) as farm:
        (disk / "filler").write_bytes(bytes(48 * 1024**2))
        wait_until(lambda: fleet(farm, "default")["notClaiming"], 30)  # a claim that began before has had its answer
        build = farm.build(["echo well"])
        said = farm.cli("why", build).stdout
        assert "MiB of disk are free below" in said, said
        assert "mend what keeps workers from taking builds" in " ".join(said.split())
        assert "takes no builds: only" in farm.cli("fleet", "ls").stdout
        wait_until(lambda: "of disk are free" in json.dumps(readiness(farm)), 30)
        assert readiness(farm)["status"] == "degraded"
        (disk / "filler").unlink()
        assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
        wait_until(lambda: not fleet(farm, "default")["notClaiming"], 30)


def listeners(farm: Farm) -> int:
    """How many workers of the farm wait for bells."""
    with redis.Redis(unix_socket_path=str(farm.home / "data" / "redis" / "redis.sock")) as broker:
        clients: list[dict[str, str]] = broker.client_list()  # type: ignore[assignment]
    return sum(one["cmd"] == "brpop" for one in clients)


def test_a_worker_that_leaves_says_so_while_its_build_ends_and_is_gone_at_once() -> None:
    with running_farm() as farm:
        with far_worker(farm, farm.api_url, FAKE_SLEEP_S="12", MILLRACE_DRAIN_S="60") as worker:
            build = farm.build(["work"], **FAR)
            wait_until(lambda: farm.show(build)["millrace"]["state"] == "RUNNING", 60)
            assert listeners(farm) == 2
            worker.send_signal(signal.SIGTERM)
            (says,) = wait_until(lambda: fleet(farm, "far")["notClaiming"], 5)  # type: ignore[misc]
            assert "is leaving" in says
            assert fleet(farm, "far")["freeSlots"] == 0
            wait_until(lambda: listeners(farm) == 1, 8)  # no bell is lost on one that heeds none
            ended = farm.ended(build)
            assert (ended["buildStatus"], ended["millrace"]["attempt"]) == ("SUCCEEDED", 1), "its lease was renewed meanwhile"
            assert worker.wait(30) == 0
        assert fleet(farm, "far")["workers"] == 0


def test_a_worker_that_the_farm_asks_to_leave_ends_its_build_however_long_that_takes() -> None:
    with running_farm() as farm:
        with far_worker(farm, farm.api_url, FAKE_SLEEP_S="15", MILLRACE_SLOTS="1") as worker:
            build = farm.build(["work"], **FAR)
            wait_until(lambda: farm.show(build)["millrace"]["state"] == "RUNNING", 60)
            later = farm.build(["work"], **FAR)
            owner = farm.show(build)["millrace"]["workerId"]
            records = Database(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")
            assert marks.ask_to_leave(records, "far", [owner], "too many") == [owner]
            records.dispose()
            ended = farm.ended(build)
            assert (ended["buildStatus"], ended["millrace"]["attempt"]) == ("SUCCEEDED", 1)
            assert worker.wait(30) == 0
        assert farm.show(later)["millrace"]["state"] == "QUEUED"


def test_a_worker_that_hears_no_bells_ends_for_its_supervisor_to_start_another(tmp_path: Path) -> None:
    with running_farm() as farm:
        token = json.loads((farm.home / "data" / "secrets.json").read_text())["worker_token"]
        environment = {
            **farm.environment,
            "MILLRACE_DATA_DIR": str(tmp_path / "deaf"),
            "MILLRACE_API_URL": farm.api_url,
            "MILLRACE_WORKER_TOKEN": token,
            "MILLRACE_FLEET": "far",
            "MILLRACE_BROKER_URL": f"redis+socket://{farm.home / 'data' / 'redis' / 'redis.sock'}",
            "MILLRACE_ENGINE": "fake",
            "FAKE_SLEEP_S": "8",
        }
        out = open(tmp_path / "out", "wb")  # noqa: SIM115  # the process has it from here
        worker = subprocess.Popen([sys.executable, "-c", DEAF], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        out.close()
        try:
            time.sleep(3)
            assert worker.poll() is None, "no bell has rung yet"
            build = farm.build(["work"], **FAR)
            assert worker.wait(30) == EXIT_DEAF
        finally:
            worker.kill()
            worker.wait()
        said = (tmp_path / "out").read_text()
        assert "worker.deaf" in said
        assert "poll_forever" in said, "where its threads were is said, too"
        with far_worker(farm, farm.api_url):
            assert farm.ended(build, 90)["buildStatus"] == "SUCCEEDED"
