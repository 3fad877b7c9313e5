"""A load that really happens: builds that the fake engine runs, sent to a fleet at their times; and what came of it.

`python -m tests.support.replay` prints what came of one, beside what the simulator says of it.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.fleet import Scaling
from millrace.settings import Settings
from millrace.vocabulary import Reason
from scheduler.db import Database
from scheduler.fleets import history
from scheduler.fleets.loads import Arrival, Trace, trace_of
from scheduler.fleets.outcome import Result, Setting, point
from scheduler.fleets.simulate import simulate
from scheduler.models import Attempt, Decision, Instance, Worker
from tests.support.farm import Farm, running_farm, wait_until

SPEC = "version: 0.2\nphases:\n  build:\n    commands:\n      - work\n"


@dataclass(frozen=True, kw_only=True)
class Happened:
    """What a fleet really did with a load. `trace` is that load as it was: when builds came, how long each held a slot.

    `boot_s`: how long after it was asked for a slot took its first build, in the mean over all slots, as builds waited for each.
    `leave_s`: how long after a worker was asked to leave, or after its last build if that was later, it was gone; in the mean.
    """

    trace: Trace
    boot_s: float
    leave_s: float
    peak: int
    worker_s: float
    started: int

    @property
    def waits_s(self) -> list[float]:
        """In the order of arrivals."""
        return [arrival.waited_s or 0.0 for arrival in self.trace.arrivals]

    def wait(self, percent: float) -> float:
        """A percentile."""
        return point(self.waits_s, percent)


def replay(farm: Farm, fleet: str, slots: int, arrivals: Sequence[Arrival], *, within_s: float = 300) -> Happened:
    """Send the builds, wait until all have ended and the fleet has no worker, and tell what happened."""
    farm.client.post("/v1/projects", _project(fleet))
    begin_ms = round(time.time() * 1000) - 1000
    began, sent = time.monotonic(), []
    for arrival in arrivals:
        time.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
        variables = [{"name": "FAKE_SLEEP_S", "value": f"{arrival.length_s:.3f}"}]
        body = {"projectName": "replayed", "environmentVariablesOverride": variables}
        sent.append(farm.client.post("/v1/builds", body)["id"])
    for build_id in sent:
        ended = farm.ended(build_id, within_s)
        assert ended["buildStatus"] == "SUCCEEDED", json.dumps(ended, indent=1)
    database = Database(Settings(data_dir=farm.home / "data").database)
    try:
        wait_until(lambda: not _there(database, fleet), within_s)
        found = history.of(database, fleet, begin_ms, begin_ms + 86_400_000)
        with database.reading() as session:
            ends = session.execute(sa.select(Attempt.build_id, Attempt.attempt_no, Attempt.worker_id, Attempt.reason)).all()
            assert len(found.held) == len(arrivals), [end for end in ends if end.reason != Reason.SUCCEEDED]
            return _told(session, fleet, slots, found.held)
    finally:
        database.dispose()


def _told(session: Session, fleet: str, slots: int, held: Sequence[history.Held]) -> Happened:
    asked_ms = [
        decision.at_ms
        for decision in session.scalars(sa.select(Decision).where(Decision.fleet == fleet).order_by(Decision.id))
        if decision.wanted > decision.load["idle"] + decision.load["busy"] + decision.load["booting"]
    ]
    boots_ms, leaves_ms, stays = [], [], []
    for instance in session.scalars(sa.select(Instance).where(Instance.fleet == fleet)).all():
        assert instance.gone_ms is not None
        begin_ms = max(at_ms for at_ms in asked_ms if at_ms <= instance.found_ms)
        stays.append((begin_ms, instance.gone_ms))
        tries = session.scalars(sa.select(Attempt).where(Attempt.worker_id == instance.id).order_by(Attempt.claimed_ms)).all()
        boots_ms += [attempt.claimed_ms - begin_ms for attempt in tries[:slots]]
        worker = session.get_one(Worker, instance.id)
        assert worker.leave_ms is not None
        leaves_ms.append(instance.gone_ms - max([worker.leave_ms, *(attempt.ended_ms or 0 for attempt in tries)]))
    there, peak = 0, 0
    for _at, change in sorted([(begin, 1) for begin, _end in stays] + [(end, -1) for _begin, end in stays]):
        there += change
        peak = max(peak, there)
    return Happened(
        trace=trace_of("what happened", [(one.at_ms / 1000, one.length_ms / 1000, one.waited_ms / 1000) for one in held]),
        boot_s=statistics.mean(boots_ms) / 1000,
        leave_s=statistics.mean(leaves_ms) / 1000,
        peak=peak,
        worker_s=sum(end - begin for begin, end in stays) / 1000,
        started=len(stays),
    )


def _there(database: Database, fleet: str) -> bool:
    with database.reading() as session:
        query = sa.select(sa.func.count()).where(Instance.fleet == fleet, Instance.gone_ms.is_(None))
        return bool(session.scalar(query))


def _project(fleet: str) -> dict[str, Any]:
    return {
        "name": "replayed",
        "source": {"type": "NO_SOURCE", "buildspec": SPEC},
        "artifacts": {"type": "NO_ARTIFACTS"},
        "environment": {
            "type": "LINUX_CONTAINER",
            "image": "millrace/base:latest",
            "computeType": "BUILD_GENERAL1_SMALL",
            "fleet": {"fleetArn": fleet},
        },
    }


def two_bursts() -> list[Arrival]:
    """28 builds at once, some more one by one, and 16 at once when the fleet is at zero again."""
    draw = random.Random(3)
    at = [0.0] * 28 + [22 + 1.5 * number for number in range(8)] + [95.0] * 16
    return [Arrival(at_s=moment, length_s=draw.uniform(2, 5)) for moment in at]


def beside() -> tuple[Happened, Result, str]:
    """What a farm of worker processes does with `two_bursts`, what the simulator says of it, and both in a sentence."""
    scaling, slots = Scaling(maximum=3, shrink_after_s=12), 2
    leases = {"MILLRACE_LEASE_TTL_S": "60", "MILLRACE_RENEW_EVERY_S": "5", "MILLRACE_SELF_FENCE_S": "50"}  # for busy machines
    with running_farm(MILLRACE_ENGINE="fake", MILLRACE_WORKERS="0", **leases) as farm:
        settings = {"provider": {"type": "process"}, "worker": {"slots": slots}}
        farm.client.put("/v1/fleets/replayed", {**settings, "scaling": scaling.model_dump(mode="json", by_alias=True)})
        happened = replay(farm, "replayed", slots, two_bursts())
    said = simulate(happened.trace, Setting(scaling=scaling, slots=slots, boot_s=happened.boot_s, leave_s=happened.leave_s))
    both = (
        f"median wait {happened.wait(50):.2f} s, simulated {said.wait(50):.2f} s; p95 {happened.wait(95):.2f} s, simulated "
        f"{said.wait(95):.2f} s; at most {happened.peak} workers, simulated {said.peak}; worker seconds {happened.worker_s:.1f}, "
        f"simulated {said.worker_s:.1f}; started {happened.started}, simulated {said.started}; boot {happened.boot_s:.2f} s, "
        f"leaving {happened.leave_s:.2f} s"
    )
    return happened, said, both


if __name__ == "__main__":
    sys.stdout.write(beside()[2] + "\n")
