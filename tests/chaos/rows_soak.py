"""F-55: many short builds under faults of all kinds at random moments. `make soak N=1000 SEED=1` repeats a run's faults."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx

from tests.chaos.harness import Chaos, row
from tests.chaos.rows_worker import FAR, broker, far_worker, send
from tests.support.farm import Farm, children_of, wait_until

N: Final = int(os.environ.get("N", "200"))
PARTS: Final = ("api", "scheduler", "worker")
_SECOND_S: Final = 45.0
"""How long a part that its supervisor starts again is left alone: one that ends often is started later and later."""


class Storm:
    """Does something to the farm every few seconds, until it is told to stop."""

    def __init__(self, farm: Farm, seed: int) -> None:
        self._farm, self._dice = farm, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.memory: list[tuple[float, dict[str, int]]] = []
        self._over = threading.Event()
        self._killed = dict.fromkeys(PARTS, 0.0)
        self._thread = threading.Thread(target=self._rage, name="storm")

    def __enter__(self) -> "Storm":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _rage(self) -> None:
        kinds: list[Callable[[], str | None]] = [
            self._kill_part,
            self._freeze_part,
            self._flush,
            self._cut_clients,
            self._kill_attempt,
        ]
        while not self._over.wait(self._dice.uniform(1, 4)):
            with suppress(AssertionError, OSError, httpx.HTTPError):  # what it was to hit is just not there
                done = self._dice.choice(kinds)()
                if done:
                    self.done[done] += 1
                self.memory.append((time.monotonic(), {part: self._memory(part) for part in PARTS}))

    def _memory(self, part: str) -> int:
        top = self._farm.pid_of(f"millrace.cli {part}")
        pids = [top, *children_of(top)] if part == "api" else [top]
        kib = 0
        for pid in pids:
            kib += next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line)
        return kib // 1024

    def _kill_part(self) -> str | None:
        part = self._dice.choice(PARTS)
        if time.monotonic() - self._killed[part] < _SECOND_S:
            return None
        self._killed[part] = time.monotonic()
        send(signal.SIGKILL, self._farm.pid_of(f"millrace.cli {part}"))
        return f"{part} killed"

    def _freeze_part(self) -> str | None:
        part = self._dice.choice(PARTS)
        pid = self._farm.pid_of(f"millrace.cli {part}")
        send(signal.SIGSTOP, pid)
        self._over.wait(self._dice.choice([0.5, 2, 8]))
        send(signal.SIGCONT, pid)
        return f"{part} frozen"

    def _flush(self) -> str:
        with broker(self._farm) as bell:
            bell.flushall()
        return "Redis flushed"

    def _cut_clients(self) -> str:
        with broker(self._farm) as bell:
            for one in bell.client_list():
                bell.client_kill_filter(_id=one["id"], skipme=True)
        return "Redis clients cut"

    def _kill_attempt(self) -> str | None:
        lines = (self._farm.home / "far.log").read_text(errors="replace").splitlines()
        pids = [int(line.split('"pid": ')[1].split(",")[0]) for line in lines if '"attempt.spawned"' in line]
        living = [pid for pid in pids[-8:] if Path(f"/proc/{pid}").exists()]
        if not living:
            return None
        send(signal.SIGKILL, self._dice.choice(living))
        return "attempt killed"


def ask(farm: Farm, project: str, key: str, status: int) -> str:
    """A build that ends with this exit status; asked for again until there is an answer."""
    body: dict[str, Any] = {"projectName": project}
    if status:
        body["environmentVariablesOverride"] = [
            {"name": "FAKE_EXIT_CODE", "value": str(status)},
            {"name": "STATUS", "value": str(status)},
        ]
    while True:
        with suppress(httpx.TransportError):
            headers = {"Authorization": f"Bearer {farm.token}", "Idempotency-Key": key}
            answer = httpx.post(f"{farm.api_url}/v1/builds", json=body, headers=headers, timeout=30)
            if answer.status_code in (200, 201):
                return str(answer.json()["id"])
            assert answer.status_code in (429, 502, 503), answer.text
        time.sleep(0.3)


def rows_of(memory: list[tuple[float, dict[str, int]]], part: str) -> str:
    """A part's memory at the start, in the middle and at the end, in MiB: the median of a tenth of the looks each."""
    seen = [look[part] for _at, look in memory]
    tenth = max(1, len(seen) // 10)
    middle = len(seen) // 2
    thirds = (seen[:tenth], seen[middle : middle + tenth], seen[-tenth:])
    return " / ".join(str(sorted(some)[len(some) // 2]) for some in thirds)


@row(
    "F-55",
    done=f"{N} short builds, a tenth in real containers, while parts and attempts are killed and frozen and Redis is flushed",
    holds="all invariants; each build has the verdict that its commands earn",
    target="0 lost, 0 doubled, >= 99.9 % right verdicts, memory flat",
)
def soak(chaos: Chaos) -> None:
    dice = random.Random(chaos.seed)
    expected: dict[str, str] = {}
    with (
        chaos.farm(MILLRACE_SLOTS="2", MILLRACE_PARKED="1", MILLRACE_MAX_ATTEMPTS="10") as farm,
        far_worker(farm, farm.api_url, MILLRACE_SLOTS="4", FAKE_SLEEP_S="0.3"),
    ):
        chaos.accepted.append(farm.build(["work"], project="far", **FAR))
        chaos.accepted.append(farm.build(["exit ${STATUS:-0}"], project="near"))
        expected = dict.fromkeys(chaos.accepted, "SUCCEEDED")
        chaos.settled(farm, 60)
        with Storm(farm, chaos.seed) as storm:
            for number in range(N - 2):
                status = 3 if dice.random() < 0.2 else 0
                build = ask(farm, "near" if dice.random() < 0.1 else "far", f"soak-{number}", status)
                chaos.accepted.append(build)
                expected[build] = "FAILED" if status else "SUCCEEDED"
                waiting = [one for one in chaos.accepted[-12:-11] if one]
                for one in waiting:  # no more than a dozen wait, so that the storm lasts as long as the builds
                    wait_until(lambda one=one: _has_ended(farm, one), 240)  # type: ignore[misc]
        chaos.settled(farm, 280)
        wrong = [build for build, status in expected.items() if farm.show(build)["buildStatus"] != status]
        for what, count in sorted(storm.done.items()):
            chaos.measure(what, count)
        for part in PARTS:
            chaos.measure(f"{part}, MiB at start / middle / end", rows_of(storm.memory, part))
        chaos.measure("attempts", chaos.attempts(farm))
        chaos.measure("wrong verdicts", len(wrong))
        assert len(set(chaos.accepted)) == N
        assert len(wrong) <= N / 1000, [farm.show(build)["millrace"]["message"] for build in wrong]


def _has_ended(farm: Farm, build: str) -> bool:
    with suppress(Exception):  # the API may be away just now
        return bool(farm.show(build)["buildComplete"])
    return False
