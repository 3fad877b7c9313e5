"""Fleets of worker processes on a real farm: from nothing to what waits and back, and nothing lost on the way. No containers."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.client import build_path
from scheduler.db import Database
from scheduler.models import Attempt, Decision, Instance
from tests.support.farm import Farm, running_farm, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.slow]
IN_FLEET: dict[str, Any] = {
    "environment": {
        "type": "LINUX_CONTAINER",
        "image": "millrace/base:latest",
        "computeType": "BUILD_GENERAL1_SMALL",
        "fleet": {"fleetArn": "burst"},
    }
}
NOTHING_KEPT = {"MILLRACE_WORKERS": "0", "MILLRACE_ENGINE": "fake", "MILLRACE_PARKED": "0"}


@contextmanager
def scaled_farm(**settings: str) -> Iterator[Farm]:
    with running_farm(**{**NOTHING_KEPT, **settings}) as farm:
        yield farm


def fleet(farm: Farm) -> dict[str, Any]:
    return farm.client.get("/v1/fleets/burst")


def burst(farm: Farm, count: int) -> list[str]:
    """That many builds, asked for one after another."""
    first = farm.build(["work"], project="burst", **IN_FLEET)
    return [first, *(farm.client.post("/v1/builds", {"projectName": "burst"})["id"] for _ in range(count - 1))]


def all_ended(farm: Farm, builds: list[str], within_s: float) -> None:
    left = list(builds)

    def look() -> bool:
        while left and farm.show(left[0])["buildComplete"]:
            left.pop(0)
        return not left

    wait_until(look, within_s)


def most_at_once(stays: list[tuple[int, int]]) -> int:
    """How many were there together, of those that came and went then."""
    return max(sum(came <= moment < gone for came, gone in stays) for moment, _gone in stays)


def records(farm: Farm) -> Database:
    return Database(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")


def notes(farm: Farm) -> list[Path]:
    return sorted((farm.home / "data" / "fleet").glob("*"))


def workers_on_host(farm: Farm) -> list[int]:
    """Worker processes that know this farm's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"millrace.cli\0worker" in command and str(farm.home).encode() in environ:
            found.append(int(entry.name))
    return found


def nothing_is_left(farm: Farm, within_s: float = 60) -> None:
    wait_until(lambda: not notes(farm) and not workers_on_host(farm), within_s)
    wait_until(lambda: not fleet(farm)["instances"], 10)


def test_a_burst_of_two_hundred_builds_from_nothing_and_back_to_nothing() -> None:
    with scaled_farm(FAKE_SLEEP_S="0.2") as farm:
        set_up = farm.cli(
            "fleet", "set", "burst", "--provider", "process", "--maximum", "3", "--slots", "4", "--shrink-after", "3"
        )
        assert set_up.returncode == 0, set_up.stderr
        assert workers_on_host(farm) == []
        builds = burst(farm, 200)
        wait_until(lambda: workers_on_host(farm), 15)
        all_ended(farm, builds, 240)
        shown = [farm.show(build) for build in builds]
        assert {build["buildStatus"] for build in shown} == {"SUCCEEDED"}
        assert {build["millrace"]["attempt"] for build in shown} == {1}, "none was killed, and none had to be begun again"
        nothing_is_left(farm)
        database = records(farm)
        with database.reading() as session:
            wanted = list(session.scalars(sa.select(Decision.wanted).where(Decision.fleet == "burst")))
            there = session.execute(sa.select(Instance.found_ms, Instance.gone_ms).where(Instance.fleet == "burst")).all()
            workers = set(session.scalars(sa.select(Attempt.worker_id)))
        database.dispose()
        assert max(wanted) == 3
        assert len(there) >= len(workers) >= 3
        assert most_at_once([(came, gone) for came, gone in there]) <= 1.2 * max(wanted)
        assert farm.cli("fsck", "--at-rest", "--host").returncode == 0


def test_a_fleet_shrinks_while_long_builds_run_and_none_is_touched() -> None:
    with scaled_farm(FAKE_SLEEP_S="20") as farm:
        fleet_set(farm, "--maximum", "3", "--slots", "1", "--shrink-after", "0")
        builds = burst(farm, 3)
        for build in builds:
            wait_until(lambda build=build: farm.show(build)["millrace"]["state"] == "RUNNING", 60)  # type: ignore[misc]
        fleet_set(farm, "--maximum", "1")
        wait_until(lambda: sum(one["at"] == "draining" for one in fleet(farm)["workersSeen"]) == 2, 30)
        assert len(workers_on_host(farm)) == 3
        all_ended(farm, builds, 60)
        shown = [farm.show(build) for build in builds]
        assert {(build["buildStatus"], build["millrace"]["attempt"]) for build in shown} == {("SUCCEEDED", 1)}
        nothing_is_left(farm)


def fleet_set(farm: Farm, *options: str) -> None:
    done = farm.cli("fleet", "set", "burst", "--provider", "process", *options)
    assert done.returncode == 0, done.stderr


def test_a_scheduler_that_is_killed_while_a_fleet_grows_is_gone_on_for() -> None:
    with scaled_farm(FAKE_SLEEP_S="2") as farm:
        fleet_set(farm, "--maximum", "2", "--slots", "2", "--shrink-after", "3")
        builds = burst(farm, 8)
        wait_until(lambda: notes(farm), 15)
        os.kill(farm.pid_of("millrace.cli scheduler"), signal.SIGKILL)
        all_ended(farm, builds, 90)
        assert {farm.show(build)["millrace"]["attempt"] for build in builds} == {1}
        nothing_is_left(farm)


def test_a_worker_that_dies_is_started_again_and_stale_notes_are_dropped_at_the_next_start() -> None:
    with scaled_farm(FAKE_SLEEP_S="0.1") as farm:
        fleet_set(farm, "--minimum", "1", "--maximum", "1")
        (worker,) = wait_until(lambda: [one for one in fleet(farm)["workersSeen"] if one["at"] == "idle"], 60)
        (first,) = workers_on_host(farm)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: workers_on_host(farm) not in ([], [first]), 20)
        assert [one["id"] for one in fleet(farm)["instances"]] == [worker["id"]]
        build = farm.build(["work"], project="burst", **IN_FLEET)
        assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
        assert farm.stop(number=signal.SIGKILL) != 0
        wait_until(lambda: not workers_on_host(farm), 30)
        assert notes(farm)
        (farm.home / "data" / "farm.json").unlink()
        farm.start()
        wait_until(lambda: any(one["at"] == "idle" for one in fleet(farm)["workersSeen"] if one["id"] != worker["id"]), 60)
        assert [json.loads(note.read_text())["fleet"] for note in notes(farm)] == ["burst", "burst"]


def test_a_fleet_is_shown_drained_and_resumed() -> None:
    with scaled_farm(FAKE_SLEEP_S="600") as farm:
        fleet_set(farm, "--minimum", "1", "--maximum", "2", "--slots", "1")
        build = farm.build(["work"], project="burst", **IN_FLEET)
        wait_until(lambda: farm.show(build)["millrace"]["state"] == "RUNNING", 60)
        wait_until(lambda: "1 build runs" in farm.cli("fleet", "show", "burst").stdout, 10)
        said = farm.cli("fleet", "show", "burst").stdout
        assert re.search(r"Wanted: 1 worker, as of .*: .*1 build runs", said), said
        assert re.search(r"process-\w+ +busy +1 +1 .*\b1 *$", said, re.MULTILINE), said
        drained = farm.cli("fleet", "drain", "burst", "--why", "new disks")
        assert "1 worker leaves, once its build has ended" in drained.stdout, drained.stdout + drained.stderr
        time.sleep(12)
        assert farm.show(build)["millrace"]["state"] == "RUNNING"
        farm.client.post(f"{build_path(build)}/stop")
        nothing_is_left(farm)
        time.sleep(3)
        assert workers_on_host(farm) == [], "a paused fleet starts none"
        assert farm.cli("fleet", "resume", "burst").returncode == 0
        wait_until(lambda: workers_on_host(farm), 20)
        assert "burst" in farm.cli("fleet", "ls").stdout


def test_an_upgrade_replaces_workers_of_processes_and_the_old_ones_end_their_builds() -> None:
    with scaled_farm(FAKE_SLEEP_S="25") as farm:
        fleet_set(farm, "--minimum", "1", "--maximum", "2", "--slots", "1")
        build = farm.build(["work"], project="burst", **IN_FLEET)
        wait_until(lambda: farm.show(build)["millrace"]["state"] == "RUNNING", 60)
        said = farm.cli("fleet", "upgrade", "burst", "--canary-percent", "100")
        assert "Generation 2 begins with 100 % of the workers" in said.stdout, said.stdout + said.stderr

        def replaced() -> bool:
            seen = {one["generation"]: one["at"] for one in fleet(farm)["workersSeen"]}
            return seen.get(1) == "draining" and seen.get(2) == "idle"

        wait_until(replaced, 40)
        ended = farm.ended(build)
        assert (ended["buildStatus"], ended["millrace"]["attempt"]) == ("SUCCEEDED", 1)
        wait_until(lambda: [one["generation"] for one in fleet(farm)["instances"]] == [2], 30)
        assert farm.cli("fleet", "upgrade", "burst", "--back").returncode == 0
        wait_until(lambda: [one["generation"] for one in fleet(farm)["instances"]] == [1], 60)
