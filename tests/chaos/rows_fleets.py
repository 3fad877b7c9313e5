"""Fleets of worker processes that come and go while builds run: F-56 to F-58."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.client import build_path
from scheduler.db import Database
from scheduler.models import Attempt, Decision
from tests.chaos.harness import Chaos, row
from tests.support.farm import Farm, wait_until

EMPTY = {
    "MILLRACE_WORKERS": "0",
    "MILLRACE_LEASE_TTL_S": "30",
    "MILLRACE_RENEW_EVERY_S": "5",
    "MILLRACE_SELF_FENCE_S": "25",
}
"""No worker but those of fleets; leases as they are by default, as a build that lost one would count as killed here."""


def scaled(farm: Farm, **scaling: Any) -> None:
    """Have the farm's workers come by the provider `process`."""
    wanted = {"maximum": 3, "shrinkAfterS": 0, **scaling}
    farm.client.put("/v1/fleets/default", {"provider": {"type": "process"}, "worker": {"slots": 2}, "scaling": wanted})


def instances(farm: Farm) -> list[dict[str, Any]]:
    """Those that are there."""
    found: list[dict[str, Any]] = farm.client.get("/v1/fleets/default")["instances"]
    return found


def gone(farm: Farm) -> bool:
    """Whether no process of the fleet is left."""
    return not instances(farm) and not list((farm.home / "data" / "fleet").glob("*"))


def decisions(farm: Farm) -> list[int]:
    """All sizes that were decided on."""
    database = Database(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")
    try:
        with database.reading() as session:
            return list(session.scalars(sa.select(Decision.wanted).order_by(Decision.id)))
    finally:
        database.dispose()


def workers_used(farm: Farm) -> int:
    """How many workers carried a build."""
    database = Database(f"sqlite:///{farm.home / 'data' / 'millrace.db'}")
    try:
        with database.reading() as session:
            return session.scalar(sa.select(sa.func.count(sa.distinct(Attempt.worker_id)))) or 0
    finally:
        database.dispose()


def none_was_killed(chaos: Chaos, farm: Farm) -> None:
    """Each build ended well, in its first attempt."""
    found = [farm.client.get(build_path(build)) for build in chaos.accepted]
    wrong = [build["millrace"] for build in found if (build["buildStatus"], build["millrace"]["attempt"]) != ("SUCCEEDED", 1)]
    chaos.measure("builds killed or begun again", len(wrong))
    assert wrong == [], str([(one["state"], [(try_["workerId"], try_["reason"]) for try_ in one["attempts"]]) for one in wrong])


@row(
    "F-56",
    done="200 short builds come at once to a fleet of worker processes that has none, on a real engine",
    holds="workers come, at most as many as are wanted, and all leave again; no build is killed or begun again; nothing is left",
    target="0 killed, 0 lost, at most 1.2 x the workers that were wanted",
)
def burst(chaos: Chaos) -> None:
    with chaos.farm(**EMPTY) as farm:
        scaled(farm, shrinkAfterS=5)
        chaos.accepted.append(farm.build(["true"]))
        began = time.monotonic()
        chaos.submit_many(farm, 199)
        chaos.settled(farm, 900)
        chaos.measure("200 builds, s", time.monotonic() - began)
        none_was_killed(chaos, farm)
        ended = time.monotonic()
        wait_until(lambda: gone(farm), 90)
        chaos.measure("none left, s after", time.monotonic() - ended)
        most = max(decisions(farm))
        chaos.measure("workers wanted at most", most)
        chaos.measure("workers that carried builds", workers_used(farm))
        assert workers_used(farm) <= 1.2 * most


@row(
    "F-57",
    done="a fleet is set to other limits every second, at random, while builds run on it (BUDGET_S=120)",
    holds="workers come and leave all the time, and each build ends in its first attempt",
    target="0 killed, 0 lost",
)
def restless(chaos: Chaos) -> None:
    draw = random.Random(chaos.seed)
    with chaos.farm(MILLRACE_ENGINE="fake", FAKE_SLEEP_S="3", **EMPTY) as farm:
        scaled(farm)
        chaos.accepted.append(farm.build(["work"]))
        until = time.monotonic() + float(os.environ.get("BUDGET_S", "120"))
        while time.monotonic() < until:
            least = draw.randint(0, 2)
            scaled(farm, minimum=least, maximum=least + draw.randint(0, 2))
            if draw.random() < 0.5:
                chaos.submit(farm)
            time.sleep(draw.uniform(0.5, 1.5))
        scaled(farm)
        chaos.settled(farm, 300)
        none_was_killed(chaos, farm)
        wait_until(lambda: gone(farm), 90)
        chaos.measure("decisions for another size", len(decisions(farm)))
        log = farm.part_log("scheduler")
        chaos.measure("workers asked to leave", log.count('"worker.asked_to_leave"'))
        chaos.measure("instances that came", log.count('"instance.found"'))


@row(
    "F-58",
    done="the scheduler that leads is killed while a fleet grows; another one leads, and a third stands by",
    holds="the fleet has as many workers as it wants, not twice as many; no build is killed",
    target="at most 1.2 x the workers that were wanted",
)
def another_leads(chaos: Chaos) -> None:
    with chaos.farm(MILLRACE_ENGINE="fake", FAKE_SLEEP_S="2", **EMPTY) as farm:
        first = farm.pid_of("millrace.cli scheduler")
        environ = (Path("/proc") / str(first) / "environ").read_bytes().split(b"\0")
        environment = dict(item.decode().split("=", 1) for item in environ if b"=" in item)
        with open(farm.home / "second.log", "ab") as out:
            second = subprocess.Popen(
                [sys.executable, "-m", "millrace.cli", "scheduler"], env=environment, stdout=out, stderr=out
            )
        try:
            scaled(farm, shrinkAfterS=5)
            chaos.accepted.append(farm.build(["work"]))
            chaos.submit_many(farm, 15)
            wait_until(lambda: list((farm.home / "data" / "fleet").glob("*.json")), 30)
            os.kill(first, signal.SIGKILL)
            chaos.submit_many(farm, 10)
            chaos.settled(farm, 120)
            none_was_killed(chaos, farm)
            wait_until(lambda: gone(farm), 90)
            chaos.measure("workers wanted at most", max(decisions(farm)))
            chaos.measure("workers that carried builds", workers_used(farm))
            assert workers_used(farm) <= 1.2 * max(decisions(farm))
        finally:
            second.terminate()
            second.wait(30)
