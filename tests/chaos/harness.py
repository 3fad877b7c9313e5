"""The rows of the fault matrix: what a row is, what it works with, and what must hold after each.

`python -m tests.chaos [F-07 ...]` runs rows and prints one JSON line for each, which docs/faults.md is made from.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import httpx

from tests.support.farm import SHORT_LEASES, Farm, new_farm, wait_until

T = TypeVar("T")
ROWS: dict[str, "Row"] = {}
_LEFT_S: Final = 120.0
"""The janitor's 90 s, and a little."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the matrix. `done`: what is done to the farm; `holds`: what must hold then; `target`: the figure."""

    name: str
    done: str
    holds: str
    target: str
    run: "Callable[[Chaos], None]"


def row(name: str, *, done: str, holds: str, target: str) -> "Callable[[Callable[[Chaos], None]], Callable[[Chaos], None]]":
    """Make a function a row of the matrix."""

    def made(run: "Callable[[Chaos], None]") -> "Callable[[Chaos], None]":
        assert name not in ROWS, name
        ROWS[name] = Row(name=name, done=done, holds=holds, target=target, run=run)
        return run

    return made


@dataclass
class Chaos:
    """What a row works with. `measured` is what it found; `accepted` are the builds that the farm said yes to;
    `logs` the last words of a farm that did not hold.
    """

    seed: int
    measured: dict[str, object] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    logs: str = ""

    def measure(self, what: str, value: object) -> None:
        """Note a figure."""
        self.measured[what] = round(value, 2) if isinstance(value, float) else value

    @contextmanager
    def farm(self, *, prefix: tuple[str, ...] = (), **settings: str) -> Iterator[Farm]:
        """A farm of real processes that is up, and where the invariants hold when the row is over.

        As shipped, containers are parked; and each build of real containers has a cache, so that folders are mounted into it.
        """
        with new_farm(**SHORT_LEASES | {"MILLRACE_PARKED": "1"} | settings) as farm:
            farm.prefix = prefix
            farm.caches = settings.get("MILLRACE_ENGINE") != "fake"
            farm.start()
            self.accepted = []
            try:
                yield farm
                self.check(farm)
            except Exception:
                for part in ("worker", "scheduler", "api"):
                    self.logs += "".join(f"{part}: {line}\n" for line in farm.part_log(part).splitlines()[-30:])
                raise

    def submit(self, farm: Farm, **overrides: Any) -> float:
        """Ask for a build of `demo`; how long the answer took. The build is noted; AssertionError unless it was accepted."""
        began = time.monotonic()
        answer = httpx.post(
            f"{farm.api_url}/v1/builds",
            json={"projectName": "demo", **overrides},
            headers={"Authorization": f"Bearer {farm.token}"},
            timeout=30,
        )
        assert answer.status_code == 201, f"{answer.status_code} {answer.text}"
        self.accepted.append(answer.json()["id"])
        return time.monotonic() - began

    def submit_many(self, farm: Farm, count: int, **overrides: Any) -> None:
        """As many builds, four at a time."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _n: self.submit(farm, **overrides), range(count)))

    def settled(self, farm: Farm, within_s: float) -> float:
        """Wait until all accepted builds have ended; how long that took."""
        began = time.monotonic()
        left = set(self.accepted)

        def look() -> bool:
            for build in list(left):
                if not farm.show(build)["buildComplete"]:
                    return False
                left.discard(build)
            return True

        wait_until(look, within_s)
        return time.monotonic() - began

    def states(self, farm: Farm) -> dict[str, int]:
        """How many accepted builds have which status."""
        found: dict[str, int] = {}
        for build in self.accepted:
            status = farm.show(build)["buildStatus"]
            found[status] = found.get(status, 0) + 1
        return found

    def attempts(self, farm: Farm) -> int:
        """How many attempts there were, of all accepted builds."""
        return sum(farm.show(build)["millrace"]["attempt"] for build in self.accepted)

    def check(self, farm: Farm) -> None:
        """The invariants, by `millrace fsck`: what was accepted is there and has ended, and nothing is left of any attempt."""
        journal = farm.home / "journal"
        lines = [{"op": "start", "key": f"{n}", "status": 201, "build": build} for n, build in enumerate(self.accepted)]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        until = time.monotonic() + _LEFT_S
        while True:
            asked = farm.cli("fsck", "--json", "--journal", str(journal), "--at-rest", "--host", "--objects", "0")
            said = json.loads(asked.stdout)
            wrong = [f"{one['number']}: {fault['what']}" for one in said.get("invariants", ()) for fault in one["faults"]]
            if asked.returncode == 0:
                break
            assert time.monotonic() < until, f"fsck: {wrong or said}"
            time.sleep(5)
        self.measure("builds", len(self.accepted))
        self.measure("fsck", f"{sum(one['standing'] == 'ok' for one in said['invariants'])} invariants hold")
