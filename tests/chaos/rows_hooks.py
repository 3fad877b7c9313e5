"""Deliveries doubled, many at once, missed and overtaken: F-43 to F-46. Real git repositories and farm, no containers."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import sqlalchemy as sa

from scheduler.db import Database
from scheduler.models import Delivery
from tests.chaos.harness import Chaos, row
from tests.support.farm import Farm, children_of, wait_until
from tests.support.gitserver import Repository, git, make_repository
from tests.support.records import SPEC, a_project_json
from tests.support.webhooks import sent

_CAUGHT_S = 300.0
_BURST = 500


@dataclass
class Hooked:
    """A farm, a repository below one of its git roots, and the webhook of the project that builds it."""

    farm: Farm
    repository: Repository
    secret: str = ""
    path: str = ""

    def make(self) -> None:
        """The project and its webhook."""
        source = {"type": "GIT", "location": str(self.repository.path), "buildspec": SPEC}
        self.farm.client.post("/v1/projects", a_project_json("hooked", source=source))
        made = self.farm.client.post("/v1/projects/hooked/webhook")
        self.secret, self.path = made["secret"], f"/webhooks/git/{made['payloadUrl'].rpartition('/')[2]}"

    def push(self, branch: str, commit: str) -> dict[str, Any]:
        """A delivery of a push, as the hook in the repository sends it."""
        payload = {"ref": f"refs/heads/{branch}", "after": commit, "at": str(time.time_ns())}
        return sent("git", self.secret, payload)

    def deliver(self, delivery: dict[str, Any]) -> httpx.Response:
        """The farm's answer."""
        return httpx.post(self.farm.api_url + self.path, content=delivery["data"], headers=delivery["headers"], timeout=30)

    async def deliver_within(self, seconds: float, deliveries: list[dict[str, Any]]) -> tuple[list[float], list[bool]]:
        """Each at its own moment; how long those that got an answer waited for it, and which did."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        took: list[float] = []
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:
            began = time.monotonic() + 0.2

            async def one(number: int, delivery: dict[str, Any]) -> bool:
                due = began + number * seconds / len(deliveries)
                await asyncio.sleep(due - time.monotonic())
                try:
                    answer = await client.post(
                        self.farm.api_url + self.path, content=delivery["data"], headers=delivery["headers"]
                    )
                except httpx.TransportError:
                    return False
                took.append(time.monotonic() - due)
                return answer.status_code < 300

            said = await asyncio.gather(*(one(number, delivery) for number, delivery in enumerate(deliveries)))
        return took, said

    def builds(self) -> list[dict[str, Any]]:
        """Of the project, newest first."""
        found: list[dict[str, Any]] = self.farm.client.get("/v1/builds", project="hooked")["builds"]
        return found


@contextmanager
def hooked_farm(chaos: Chaos, **settings: str) -> Iterator[Hooked]:
    """A farm that runs builds in no containers."""
    with TemporaryDirectory(prefix="mr-hooks-") as folder:
        repository = make_repository(Path(folder) / "app.git")
        with chaos.farm(**{"MILLRACE_ENGINE": "fake", "MILLRACE_GIT_ROOTS": folder} | settings) as farm:
            hooked = Hooked(farm, repository)
            hooked.make()
            yield hooked


@row(
    "F-43",
    done="20 deliveries of webhooks are sent five times each, in parallel, and once more when they are noted as two days old",
    holds="each starts one build, and is answered with it, or that it is noted and will be acted on",
    target="exactly 1 build each",
)
def doubled(chaos: Chaos) -> None:
    with hooked_farm(chaos) as hooked:
        commits = [hooked.repository.commit(f"b{number}", {"README": f"{number}\n"}) for number in range(20)]
        deliveries = [hooked.push(f"b{number}", commit) for number, commit in enumerate(commits)]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(hooked.deliver, deliveries * 5))
        assert {answer.status_code for answer in answers} <= {200, 201, 202}
        wait_until(lambda: len(hooked.builds()) == 20, 60)
        database = Database(f"sqlite:///{hooked.farm.home / 'data' / 'millrace.db'}")
        with database.transaction() as session:
            session.execute(sa.update(Delivery).values(received_ms=Delivery.received_ms - 2 * 86_400_000))
        database.dispose()
        late = [hooked.deliver(delivery) for delivery in deliveries]
        assert [answer.status_code for answer in late] == [200] * 20
        events = [answer.json()["events"][0] for answer in [*answers, *late]]
        assert {event["outcome"] for event in events if "buildId" not in event} <= {"accepted"}
        chaos.accepted += {event["buildId"] for event in events if "buildId" in event}
        chaos.measure("noted first", sum("buildId" not in event for event in events))
        chaos.measure("deliveries", len(events))
        assert len(chaos.accepted) == 20
        chaos.settled(hooked.farm, 120)
        shown = [hooked.farm.show(build) for build in chaos.accepted]
        assert {one["resolvedSourceVersion"] for one in shown} == set(commits)
        assert len(hooked.builds()) == 20


@row(
    "F-44",
    done="500 deliveries come within a second, and all processes of the API are killed once the last of them is answered",
    holds="each that was answered is built, once; the others, sent again, too",
    target="p99 of the answers <= 500 ms; 0 dropped",
)
def burst(chaos: Chaos) -> None:
    with hooked_farm(chaos) as hooked:
        wait_until(lambda: hooked.farm.client.get("/v1/fleets")["fleets"], 60)
        commit = hooked.repository.commit("main", {"README": "all of them\n"})
        for number in range(_BURST):
            git(hooked.repository.path, "update-ref", f"refs/heads/b{number}", commit)
        deliveries = [hooked.push(f"b{number}", commit) for number in range(_BURST)]
        took, said = asyncio.run(hooked.deliver_within(1.0, deliveries))
        for process in children_of(hooked.farm.pid_of("millrace.cli api")):
            os.kill(process, signal.SIGKILL)
        chaos.measure("answered", said.count(True))
        chaos.measure("p99, ms", statistics.quantiles(took, n=100)[98] * 1000)
        for delivery, answered in zip(deliveries, said, strict=True):
            if not answered:
                assert wait_until(lambda: _tried(hooked, delivery)).status_code < 300  # noqa: B023  # it is over by then
        database = Database(f"sqlite:///{hooked.farm.home / 'data' / 'millrace.db'}")
        began = time.monotonic()

        def built() -> list[str]:
            with database.reading() as session:
                found = session.scalars(sa.select(Delivery.build_id).where(Delivery.build_id.is_not(None))).all()
            return [str(one) for one in found] if len(found) == _BURST else []

        chaos.accepted += wait_until(built, 300)
        chaos.measure("all queued after, s", time.monotonic() - began)
        database.dispose()
        assert len(set(chaos.accepted)) == _BURST
        chaos.settled(hooked.farm, 900)
        assert chaos.states(hooked.farm) == {"SUCCEEDED": _BURST}


def _tried(hooked: Hooked, delivery: dict[str, Any]) -> httpx.Response | None:
    try:
        return hooked.deliver(delivery)
    except httpx.TransportError:
        return None


@row(
    "F-45",
    done="a branch is pushed to while the farm is down, and nobody tells it of that",
    holds="the push is found and built, once",
    target="<= 300 s after the return",
)
def missed(chaos: Chaos) -> None:
    with hooked_farm(chaos) as hooked:
        first = hooked.repository.commit("main", {"README": "told\n"})
        chaos.accepted.append(hooked.deliver(hooked.push("main", first)).json()["events"][0]["buildId"])
        chaos.settled(hooked.farm, 60)
        wait_until(lambda: '"scheduler.started"' in hooked.farm.part_log("scheduler"), 30)
        time.sleep(15)  # it has looked at the repository once
        hooked.farm.stop()
        commit = hooked.repository.commit("main", {"README": "missed\n"})
        (hooked.farm.home / "data" / "farm.json").unlink(missing_ok=True)
        hooked.farm.start()
        began = time.monotonic()
        wait_until(lambda: len(hooked.builds()) == 2, _CAUGHT_S)
        chaos.measure("built after, s", time.monotonic() - began)
        newest = hooked.builds()[0]
        assert newest["sourceVersion"] == commit
        chaos.accepted.append(newest["id"])
        chaos.settled(hooked.farm, 60)
        late = hooked.deliver(hooked.push("main", commit))
        assert late.json()["events"][0]["outcome"] == "duplicate", late.text


@row(
    "F-46",
    done="30 branches are forced elsewhere while their builds wait; of half of them the server loses the old commit",
    holds="each builds the commit of its push, or fails and says that it is gone",
    target="never another commit",
)
def forced(chaos: Chaos) -> None:
    with hooked_farm(chaos) as hooked:
        wait_until(lambda: hooked.farm.client.get("/v1/fleets")["fleets"], 60)
        hooked.farm.client.post("/v1/fleets/default/pause", {"why": "a test"})
        wanted: dict[str, tuple[str, bool]] = {}
        for number in range(30):
            commit, gone = (
                hooked.repository.commit(f"b{number}", {"README": f"{number} {os.urandom(4).hex()}\n"}),
                number % 2 == 0,
            )
            if not gone:
                git(hooked.repository.path, "tag", f"kept{number}", commit)
            answer = hooked.deliver(hooked.push(f"b{number}", commit))
            wanted[answer.json()["events"][0]["buildId"]] = (commit, gone)
            git(hooked.repository.path, "update-ref", f"refs/heads/b{number}", hooked.repository.first)
        git(hooked.repository.path, "reflog", "expire", "--expire=now", "--all")
        git(hooked.repository.path, "gc", "--quiet", "--prune=now")
        chaos.accepted += wanted
        hooked.farm.client.post("/v1/fleets/default/resume")
        chaos.settled(hooked.farm, 180)
        for build, (commit, gone) in wanted.items():
            shown = hooked.farm.show(build)
            assert shown.get("resolvedSourceVersion") == (None if gone else commit), shown
            assert shown["buildStatus"] == ("FAILED" if gone else "SUCCEEDED"), shown["millrace"]
            assert not gone or f"commit gone: it has no commit {commit}" in shown["millrace"]["message"]
        chaos.measure("gone", sum(gone for _commit, gone in wanted.values()))
