"""The database restarted, frozen, in conflict, locked, full: F-15 to F-19. Real PostgreSQL and SQLite, farm and worker."""

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psycopg

from tests.chaos.harness import Chaos, row
from tests.support import postgres
from tests.support.disks import tmpfs
from tests.support.farm import Farm, wait_until
from tests.support.records import a_project_json

OURS = {"MILLRACE_LEASE_TTL_S": "30", "MILLRACE_RENEW_EVERY_S": "5", "MILLRACE_SELF_FENCE_S": "25", "MILLRACE_SWEEP_EVERY_S": "5"}
"""The lease's times as they are shipped."""


@contextmanager
def farm_on_postgres(chaos: Chaos, *, engine: str = "fake", **settings: str) -> Iterator[tuple[Farm, postgres.PostgresServer]]:
    """A farm whose records lie in a PostgreSQL server of its own."""
    with (
        postgres.running() as server,
        server.database() as url,
        chaos.farm(MILLRACE_DATABASE_URL=url, MILLRACE_ENGINE=engine, MILLRACE_SLOTS="4", **settings) as farm,
    ):
        chaos.accepted.append(farm.build(["true"]))
        chaos.settled(farm, 60)
        yield farm, server


class Asking:
    """A client that asks for a build again and again, and notes what it was told and when.

    With `build_each`, only so many of its requests ask for a build; the others change a project.
    """

    def __init__(
        self, chaos: Chaos, farm: Farm, *, every_s: float, threads: int = 1, timeout_s: float = 30, build_each: int = 1
    ) -> None:
        self._chaos, self._every_s, self._over = chaos, every_s, threading.Event()
        self._build_each, self._count = build_each, 0
        self._client = httpx.Client(base_url=farm.api_url, headers={"Authorization": f"Bearer {farm.token}"}, timeout=timeout_s)
        self.told: list[tuple[float, int, str]] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        self._client.close()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._count += 1
            try:
                if self._count % self._build_each:
                    answer = self._client.put("/v1/projects/other", json=a_project_json("other"))
                else:
                    answer = self._client.post("/v1/builds", json={"projectName": "demo"})
            except httpx.TransportError as error:
                self.told.append((time.monotonic(), 0, type(error).__name__))
                continue
            self.told.append((time.monotonic(), answer.status_code, answer.headers.get("Retry-After", "")))
            if answer.status_code == 201 and answer.request.method == "POST":
                self._chaos.accepted.append(answer.json()["id"])

    def window_s(self) -> float:
        """From the first refusal to the last."""
        refused = [at for at, status, _ in self.told if status != 201]
        return refused[-1] - refused[0] if refused else 0.0

    def statuses(self) -> dict[int, int]:
        return {status: sum(one == status for _, one, _ in self.told) for status in sorted({one for _, one, _ in self.told})}


def four_that_run(chaos: Chaos, farm: Farm, seconds: int) -> list[str]:
    """Four builds of so many seconds, in real containers; the other builds of `demo` are quick."""
    builds = [farm.build([f"sleep {seconds}"], project="long") for _ in range(4)]
    chaos.accepted += builds
    for build in builds:
        farm.await_log(build, "Running command sleep", 60)
    return builds


@row(
    "F-15",
    done="PostgreSQL is stopped at once (SIGQUIT) and started again, 4 builds running, a request every 0.1 s",
    holds="the pool recovers, what runs goes on, what was accepted is there",
    target="5xx window <= 10 s, 0 lost, no attempt lost",
)
def restarted(chaos: Chaos) -> None:
    with farm_on_postgres(chaos, engine="docker", **OURS) as (farm, server):
        builds = four_that_run(chaos, farm, 30)
        with Asking(chaos, farm, every_s=0.1) as asking:
            time.sleep(2)
            server.stop()
            server.start()
            began = time.monotonic()
            wait_until(lambda: asking.told[-1][1] == 201 and asking.told[-1][0] > began, 60)
            chaos.measure("accepted again, s after the start", time.monotonic() - began)
            time.sleep(2)
        chaos.measure("window of refusals, s", asking.window_s())
        chaos.measure("answers", str(asking.statuses()))
        assert set(asking.statuses()) <= {201, 503}
        chaos.settled(farm, 240)
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        chaos.measure("attempts of the 4", sum(farm.show(build)["millrace"]["attempt"] for build in builds))
        assert chaos.measured["attempts of the 4"] == 4
        assert asking.window_s() <= 10


@row(
    "F-16",
    done="PostgreSQL is frozen (SIGSTOP of all its processes) for 60 s, 4 builds of 100 s running, then goes on",
    holds="attempts fence themselves at 25 s; no lease is taken away when it thaws, as the scheduler waits one lease",
    target="<= 1 retry per running build, 0 doubled",
)
def frozen(chaos: Chaos) -> None:
    with farm_on_postgres(chaos, engine="docker", **OURS) as (farm, server):
        four_that_run(chaos, farm, 100)
        pids = server.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(60)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        began = time.monotonic()
        wait_until(lambda: _answers(farm), 60)
        chaos.measure("API answers again, s after", time.monotonic() - began)
        chaos.settled(farm, 290)
        scheduler = farm.part_log("scheduler")
        fenced = {line["build_id"] for line in map(json.loads, _events(farm, "worker", "attempt.self_fenced"))}
        chaos.measure("attempts that fenced themselves", len(fenced))
        chaos.measure("leases taken away by the scheduler", scheduler.count('"lease.expired"'))
        chaos.measure("attempts more than builds", chaos.attempts(farm) - len(chaos.accepted))
        assert '"leases.spared"' in scheduler
        assert scheduler.count('"lease.expired"') == 0
        assert all(farm.show(build)["millrace"]["attempt"] <= 2 for build in chaos.accepted)
        assert set(chaos.states(farm)) == {"SUCCEEDED"}


def _events(farm: Farm, part: str, event: str) -> list[str]:
    return [line for line in farm.part_log(part).splitlines() if f'"event": "{event}"' in line]


def _answers(farm: Farm) -> bool:
    try:
        answer = httpx.get(f"{farm.api_url}/v1/builds", headers={"Authorization": f"Bearer {farm.token}"}, timeout=5)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


@row(
    "F-17",
    done="a script locks builds and projects in both orders, up to 50 requests a second for 20 s, one in ten a build",
    holds="the database ends one side of each deadlock; ours is tried again",
    target="0 answers of 5xx",
)
def deadlocks(chaos: Chaos) -> None:
    with farm_on_postgres(chaos) as (farm, server):
        over = threading.Event()
        found = [0]

        def fight(order: tuple[str, str]) -> None:
            with psycopg.connect(server.dsn(farm.environment["MILLRACE_DATABASE_URL"])) as connection:
                while not over.wait(0.02):
                    try:
                        with connection.transaction():
                            connection.execute("SET LOCAL deadlock_timeout = '50ms'")
                            for table in order:
                                connection.execute(f"SELECT * FROM {table} ORDER BY random() LIMIT 50 FOR UPDATE")  # noqa: S608
                                time.sleep(0.02)
                    except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                        found[0] += 1

        fighters = [
            threading.Thread(target=fight, args=(order,))
            for order in (("builds", "projects"), ("projects", "builds"), ("builds", "projects"))
        ]
        for fighter in fighters:
            fighter.start()
        try:
            farm.client.post("/v1/projects", a_project_json("other"))
            with Asking(chaos, farm, every_s=0.05, threads=4, build_each=10) as asking:
                time.sleep(20)
        finally:
            over.set()
            for fighter in fighters:
                fighter.join()
        seen = server.log().count("deadlock detected")
        chaos.measure("deadlocks", seen)
        chaos.measure("of them ended on the script's side", found[0])
        chaos.measure("answers", str(asking.statuses()))
        assert seen > 0
        assert set(asking.statuses()) <= {200, 201}
        chaos.settled(farm, 290)


@row(
    "F-18",
    done="another process holds SQLite's write lock (BEGIN EXCLUSIVE) for 4 s, then for 30 s",
    holds="4 s: requests wait; 30 s: 503 with Retry-After, and nothing half written",
    target="0 corrupt, 0 accepted and lost",
)
def locked(chaos: Chaos) -> None:
    with chaos.farm(MILLRACE_ENGINE="fake") as farm:
        chaos.accepted.append(farm.build(["work"]))
        chaos.settled(farm, 60)
        for seconds in (4, 30):
            with Asking(chaos, farm, every_s=0.2) as asking, closing(_sqlite(farm)) as other:
                time.sleep(1)
                other.execute("BEGIN EXCLUSIVE")
                time.sleep(seconds)
                other.execute("ROLLBACK")
                began = time.monotonic()
                wait_until(lambda asking=asking, began=began: asking.told[-1][0] > began and asking.told[-1][1] == 201, 30)
                chaos.measure(f"{seconds} s: accepted again, s after", time.monotonic() - began)
            chaos.measure(f"{seconds} s: answers", str(asking.statuses()))
            assert set(asking.statuses()) <= {201, 503}
            assert all(after for _, status, after in asking.told if status == 503), "503 without Retry-After"
            assert seconds == 30 or set(asking.statuses()) == {201}
            assert seconds == 4 or 503 in asking.statuses()
        chaos.settled(farm, 120)
        with closing(_sqlite(farm)) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert set(chaos.states(farm)) == {"SUCCEEDED"}


def _sqlite(farm: Farm) -> sqlite3.Connection:
    return sqlite3.connect(farm.home / "data" / "millrace.db", isolation_level=None, timeout=20)


@row(
    "F-19",
    done="the records lie on a tmpfs of 64 MiB (PostgreSQL: 192) that a file fills to the last byte for 20 s",
    holds="503 and not 2xx while it is full; it recovers by itself once there is room",
    target="0 accepted and lost",
)
def disk_full(chaos: Chaos) -> None:
    with (
        tmpfs("64m") as disk,
        chaos.farm(MILLRACE_ENGINE="fake", MILLRACE_DATABASE_URL=f"sqlite:///{disk}/records.db") as farm,
    ):
        _fill(chaos, farm, disk, "SQLite")
    with (
        tmpfs("192m") as disk,
        postgres.running(disk) as server,
        server.database() as url,
        chaos.farm(MILLRACE_ENGINE="fake", MILLRACE_DATABASE_URL=url) as farm,
    ):
        _fill(chaos, farm, disk, "PostgreSQL", revive=server.revive)


def _fill(chaos: Chaos, farm: Farm, disk: Path, name: str, revive: Callable[[], bool] = lambda: False) -> None:
    farm.client.post("/v1/projects", a_project_json())
    chaos.submit_many(farm, 3)
    chaos.settled(farm, 60)
    filler = disk / "filler"
    with Asking(chaos, farm, every_s=0.1) as asking:
        time.sleep(1)
        with open(filler, "wb") as file:
            _to_the_brim(file.fileno())
            until = time.monotonic() + 20
            while time.monotonic() < until:
                _to_the_brim(file.fileno())
                time.sleep(0.2)
        full = [status for at, status, _ in asking.told if until - 10 < at < until]
        filler.unlink()
        restarted = revive()
        began = time.monotonic()
        wait_until(lambda: asking.told[-1][0] > began and asking.told[-1][1] == 201, 60)
        chaos.measure(f"{name}: accepted again, s after", time.monotonic() - began)
    chaos.measure(f"{name}: answers", str(asking.statuses()))
    if restarted:
        chaos.measure(f"{name}: ended by itself and was started again", True)
    assert full, "nothing was asked while it was full"
    assert 201 not in full, "accepted while the disk was full"
    assert set(asking.statuses()) <= {201, 503}
    chaos.settled(farm, 120)
    assert set(chaos.states(farm)) == {"SUCCEEDED"}


def _to_the_brim(handle: int) -> None:
    for size in (1024**2, 64 * 1024, 4096):
        try:
            while os.write(handle, b"x" * size):
                pass
        except OSError:
            continue
