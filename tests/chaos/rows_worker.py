"""Workers, hosts, networks and clients that fail: F-01 to F-06, F-13, F-14, F-37 to F-39, F-47, F-48, F-50, F-51."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import httpx
import redis as redis_client

from millrace.client import build_path
from tests.chaos.harness import Chaos, row
from tests.chaos.proxy import Faults, Proxy
from tests.support import metadata
from tests.support.farm import Farm, wait_until

AS_SHIPPED = {
    "MILLRACE_LEASE_TTL_S": "30",
    "MILLRACE_RENEW_EVERY_S": "5",
    "MILLRACE_SELF_FENCE_S": "25",
    "MILLRACE_SWEEP_EVERY_S": "5",
}
"""The lease's times as they are by default; tests have shorter ones elsewhere."""
ONCE_MORE = "echo attempt $MILLRACE_ATTEMPT; test $MILLRACE_ATTEMPT -gt 1 || sleep 600"
"""A command that only its second attempt ends."""


def begun(chaos: Chaos, farm: Farm, commands: list[str], **changes: Any) -> str:
    """A build that is accepted, and runs."""
    build = farm.build(["echo it runs", *commands], **changes)
    chaos.accepted.append(build)
    farm.await_log(build, "it runs\n")
    return build


def requeued_after(farm: Farm, build: str, since: float) -> float:
    """Seconds from `since` (as time.time) until the build's first attempt was taken back."""

    def look() -> float:
        first = farm.show(build)["millrace"]["attempts"][0]
        return float(first["ended"] or 0)

    return wait_until(look, 90) - since


def worker_processes(farm: Farm) -> list[int]:
    """The worker, the parent of its attempts, and the attempts."""
    events = [json.loads(line) for line in farm.part_log("worker").splitlines() if line.startswith("{")]
    pids = [event["pid"] for event in events if event["event"] in ("nursery.started", "attempt.spawned")]
    return [farm.pid_of("millrace.cli worker"), *pids]


def api_of(farm: Farm) -> int:
    """The API's first process; 0 where the supervisor has not started it again, as what a killed one left answers a while."""
    with suppress(AssertionError):
        return farm.pid_of("millrace.cli api")
    return 0


def send(number: int, *pids: int) -> None:
    """A signal to those that are there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end_host(farm: Farm) -> None:
    """Kill the worker, the attempts and their containers."""
    names = farm.containers()
    send(signal.SIGKILL, *worker_processes(farm))
    client = docker.from_env(timeout=30)
    for name in names:
        with suppress(docker.errors.APIError):
            client.containers.get(name).kill()
    client.close()


@row(
    "F-01",
    done="the process of an attempt is killed while a command runs",
    holds="the worker sees it, removes the container, hands the build back; the second attempt succeeds",
    target="R <= 15 s",
)
def attempt_killed(chaos: Chaos) -> None:
    with chaos.farm(**AS_SHIPPED) as farm:
        build = begun(chaos, farm, [ONCE_MORE])
        killed = time.time()
        send(signal.SIGKILL, farm.attempt_pid(build))
        chaos.measure("handed back, s after", requeued_after(farm, build, killed))
        assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
        chaos.measure("ended by the second attempt, s after", time.time() - killed)
        assert chaos.attempts(farm) == 2


@row(
    "F-02",
    done="the worker is killed while two builds run; its supervisor starts it again",
    holds="the attempts go on without it and end as they would have",
    target="0 builds lost, 0 attempts more",
)
def worker_killed(chaos: Chaos) -> None:
    with chaos.farm(MILLRACE_PARKED="1", **AS_SHIPPED) as farm:
        for _ in range(2):
            begun(chaos, farm, ["sleep 20; echo done > out.txt"], more="artifacts:\n  files: [out.txt]\n")
        send(signal.SIGKILL, farm.pid_of("millrace.cli worker"))
        chaos.settled(farm, 90)
        assert chaos.states(farm) == {"SUCCEEDED": 2}
        chaos.measure("attempts of 2 builds", chaos.attempts(farm))
        assert chaos.attempts(farm) == 2


@row(
    "F-03",
    done="all processes of a worker and all its containers are killed at once, as when its host dies",
    holds="the lease runs out, and another attempt runs",
    target="re-queued <= 40 s, running again <= 60 s",
)
def host_killed(chaos: Chaos) -> None:
    with chaos.farm(MILLRACE_PARKED="1", **AS_SHIPPED) as farm:
        build = begun(chaos, farm, [ONCE_MORE])
        killed = time.time()
        end_host(farm)
        after = requeued_after(farm, build, killed)
        chaos.measure("queued again, s after", after)
        farm.await_log(build, "attempt 2\n", 60)
        chaos.measure("runs again, s after", time.time() - killed)
        assert after <= 40
        assert time.time() - killed <= 60
        assert farm.ended(build)["buildStatus"] == "SUCCEEDED"


@row(
    "F-04",
    done="the process of an attempt is stopped for 70 s (the lease lasts 30) while its command ends, then goes on",
    holds="another attempt has the build; every call of the old one is refused, nothing of it is visible",
    target="0 stale writes visible",
)
def frozen_long(chaos: Chaos) -> None:
    command = "echo attempt $MILLRACE_ATTEMPT | tee out.txt; sleep 8"
    with chaos.farm(**AS_SHIPPED) as farm:
        build = begun(chaos, farm, [command], more="artifacts:\n  files: [out.txt]\n")
        old = farm.attempt_pid(build)
        send(signal.SIGSTOP, old)
        began = time.monotonic()
        ended = farm.ended(build, 90)
        assert (ended["buildStatus"], ended["millrace"]["attempt"]) == ("SUCCEEDED", 2)
        time.sleep(max(0.0, 70 - (time.monotonic() - began)))
        before = (farm.show(build), farm.log_of(build))
        send(signal.SIGCONT, old)
        wait_until(lambda: "attempt.fenced" in farm.part_log("worker"), 60)
        wait_until(lambda: all(name.startswith("millrace-place-") for name in farm.containers()), 90)  # those wait for a build
        assert (farm.show(build), farm.log_of(build)) == before
        assert {item["key"].split("/")[2] for item in before[0]["millrace"]["artifacts"]} == {"2"}
        chaos.measure("stale writes visible", 0)


@row(
    "F-05",
    done="the worker and the process of an attempt are stopped for 20 s (the lease lasts 30), then go on",
    holds="the build goes on as if nothing had been",
    target="0 needless attempts",
)
def frozen_short(chaos: Chaos) -> None:
    with chaos.farm(**AS_SHIPPED) as farm:
        build = begun(chaos, farm, ["for i in $(seq 25); do echo line $i; sleep 1; done"])
        pids = [farm.pid_of("millrace.cli worker"), farm.attempt_pid(build)]
        send(signal.SIGSTOP, *pids)
        time.sleep(20)
        send(signal.SIGCONT, *pids)
        ended = farm.ended(build, 90)
        assert (ended["buildStatus"], ended["millrace"]["attempt"]) == ("SUCCEEDED", 1)
        assert "line 25\n" in farm.log_of(build)
        chaos.measure("attempts", 1)


@row(
    "F-06",
    done="SIGTERM to a worker with a build that ends within its drain time (45 s; the lease lasts 30), and one that does not",
    holds="heartbeats go on in the drain; the one ends, the other is handed back and not charged",
    target="0 builds failed; slot free <= drain + 30 s",
)
def drained(chaos: Chaos) -> None:
    with chaos.farm(MILLRACE_DRAIN_S="45", **AS_SHIPPED) as farm:
        short = begun(chaos, farm, ["sleep 36"], project="short")
        long = begun(chaos, farm, [ONCE_MORE], project="long")
        began = time.time()
        send(signal.SIGTERM, farm.pid_of("millrace.cli worker"))
        back = requeued_after(farm, long, began)
        chaos.measure("handed back, s after", back)
        assert 44 < back < 75
        one, other = farm.ended(short), farm.ended(long, 90)
        assert (one["buildStatus"], one["millrace"]["attempt"]) == ("SUCCEEDED", 1)
        assert (other["buildStatus"], other["millrace"]["attempt"]) == ("SUCCEEDED", 2)
        assert other["millrace"]["attempts"][0]["reason"] == "infra.worker_shutdown"


@row(
    "F-51",
    done="EC2's metadata says that a spot instance is taken back, or SIGTERM comes to its worker; SIGKILL to it 120 s later",
    holds="the build is handed back before, uncharged, and runs again elsewhere, however long builds may take in a drain",
    target="back in the queue <= 100 s",
)
def spot(chaos: Chaos) -> None:
    with metadata.running() as machine:
        told = {"MILLRACE_NOTICES": "ec2", "MILLRACE_METADATA_URL": machine.url, "MILLRACE_DRAIN_S": "3600"}
        with chaos.farm(**told, **AS_SHIPPED) as farm:
            _taken_away(chaos, farm, "a notice", lambda _worker: machine.take_back(in_s=120), machine.stay)
    with chaos.farm(MILLRACE_DRAIN_S="60", **AS_SHIPPED) as farm:
        _taken_away(chaos, farm, "SIGTERM", lambda worker: send(signal.SIGTERM, worker), lambda: None)


def _taken_away(chaos: Chaos, farm: Farm, how: str, take: Callable[[int], None], over: Callable[[], None]) -> None:
    build = begun(chaos, farm, [ONCE_MORE])
    pids = worker_processes(farm)
    began = time.time()
    take(pids[0])
    back = requeued_after(farm, build, began)
    over()  # the worker that the supervisor starts next is on a machine that stays
    chaos.measure(f"back in the queue, s after {how}", back)
    assert back <= 100
    chaos.settled(farm, 60)
    time.sleep(max(0.0, 120 - (time.time() - began)))
    send(signal.SIGKILL, *pids)
    ended = farm.show(build)
    assert [attempt["reason"] for attempt in ended["millrace"]["attempts"]] == ["infra.worker_shutdown", "succeeded"]


@contextmanager
def fake_farm(chaos: Chaos, **settings: str) -> Iterator[Farm]:
    """A farm without containers, whose `demo` project runs for a moment."""
    with chaos.farm(MILLRACE_ENGINE="fake", **{"FAKE_SLEEP_S": "0.2", **settings}) as farm:
        chaos.accepted.append(farm.build(["work"]))
        chaos.settled(farm, 60)
        yield farm


def broker(farm: Farm) -> "redis_client.Redis[bytes]":
    """The farm's own Redis."""
    return redis_client.Redis(unix_socket_path=str(farm.home / "data" / "redis" / "redis.sock"))


@row(
    "F-13",
    done="every message is put into the queue three times more, shuffled, and garbage between; 60 builds",
    holds="each build is claimed once",
    target="0 second claims",
)
def doubled(chaos: Chaos) -> None:
    dice = random.Random(chaos.seed)
    with fake_farm(chaos, MILLRACE_SLOTS="3") as farm, broker(farm) as bell:
        over = threading.Event()

        def meddle() -> None:
            while not over.wait(0.02):
                waiting = bell.lrange("millrace.default", 0, -1)
                copies = [message for message in waiting for _ in range(3)]
                dice.shuffle(copies)
                for message in copies[:50]:
                    bell.lpush("millrace.default", message)

        meddler = threading.Thread(target=meddle)
        meddler.start()
        chaos.submit_many(farm, 60)
        chaos.settled(farm, 180)
        over.set()
        meddler.join()
        bell.delete("millrace.default")
        chaos.measure("attempts of 61 builds", chaos.attempts(farm))
        assert chaos.attempts(farm) == len(chaos.accepted)
        assert chaos.states(farm) == {"SUCCEEDED": 61}


@row(
    "F-14",
    done="every message is taken away, not 5 % of them; a build every second, 20 of them",
    holds="free workers ask by themselves",
    target="delay in the queue <= 30 s",
)
def dropped(chaos: Chaos) -> None:
    with fake_farm(chaos, MILLRACE_SLOTS="4") as farm, broker(farm) as bell:
        over = threading.Event()

        def take() -> None:
            while not over.is_set():
                bell.blpop(["millrace.default"], timeout=1)

        thieves = [threading.Thread(target=take) for _ in range(8)]
        for thief in thieves:
            thief.start()
        for _ in range(20):
            chaos.submit(farm)
            time.sleep(1)
        chaos.settled(farm, 120)
        over.set()
        for thief in thieves:
            thief.join()
        marks = [farm.show(build)["millrace"]["marks"] for build in chaos.accepted]
        longest = max(mark["claimed"] - mark["accepted"] for mark in marks) / 1000
        chaos.measure("longest delay, s", longest)
        assert longest <= 30


@contextmanager
def far_worker(
    farm: Farm, api_url: str, *, command: Sequence[str] = ("-m", "millrace.cli", "worker"), **settings: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Another worker, of the fleet `far`, that reaches the API at `api_url`; without containers."""
    token = json.loads((farm.home / "data" / "secrets.json").read_text())["worker_token"]
    environment = {
        **farm.environment,
        "MILLRACE_DATA_DIR": str(farm.home / "far"),
        "MILLRACE_API_URL": api_url,
        "MILLRACE_WORKER_TOKEN": token,
        "MILLRACE_FLEET": "far",
        "MILLRACE_BROKER_URL": f"redis+socket://{farm.home / 'data' / 'redis' / 'redis.sock'}",
        "MILLRACE_ENGINE": "fake",
        "MILLRACE_DRAIN_S": "1",
        **settings,
    }
    with open(farm.home / "far.log", "ab") as out:
        worker = subprocess.Popen([sys.executable, *command], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(90)


FAR: dict[str, Any] = {
    "environment": {
        "type": "LINUX_CONTAINER",
        "image": "millrace/standard:latest",
        "computeType": "BUILD_GENERAL1_SMALL",
        "fleet": {"fleetArn": "far"},
    }
}


def port_of(farm: Farm) -> int:
    """Of its API."""
    return int(farm.api_url.rpartition(":")[2])


@row(
    "F-37",
    done="a worker is cut off from the API for 20 s, and another time for 60 s (the lease lasts 30), while a build runs",
    holds="20 s: nothing happens; 60 s: the worker fences itself, one more attempt ends the build",
    target="log whole; 1 more attempt",
)
def cut_off(chaos: Chaos) -> None:
    with (
        chaos.farm(**AS_SHIPPED) as farm,
        Proxy(("127.0.0.1", port_of(farm)), seed=chaos.seed) as link,
        far_worker(farm, f"http://127.0.0.1:{link.port}", FAKE_SLEEP_S="40"),
    ):
        for cut_s, attempts in ((20, 1), (60, 2)):
            build = farm.build(["work"], **FAR)
            chaos.accepted.append(build)
            wait_until(lambda build=build: farm.show(build)["millrace"]["state"] == "RUNNING", 60)  # type: ignore[misc]
            link.faults = Faults(silent_up=True, silent_down=True)
            time.sleep(cut_s)
            link.heal()
            ended = farm.ended(build, 180)
            said = ended["millrace"]
            assert (ended["buildStatus"], said["attempt"]) == ("SUCCEEDED", attempts), said["attempts"]
            chaos.measure(f"attempts after {cut_s} s", said["attempt"])


@row(
    "F-39",
    done="a worker's link to the API has 300 ms of delay, and is reset now and then; 40 builds",
    holds="they take longer, and that is all",
    target="0 failures",
)
def slow_link(chaos: Chaos) -> None:
    with chaos.farm(**AS_SHIPPED) as farm, Proxy(("127.0.0.1", port_of(farm)), seed=chaos.seed) as link:
        link.faults = Faults(delay_s=0.15)
        with far_worker(farm, f"http://127.0.0.1:{link.port}", MILLRACE_SLOTS="8", FAKE_SLEEP_S="0.2"):
            chaos.accepted.append(farm.build(["work"], **FAR))
            chaos.submit_many(farm, 39)
            over = threading.Event()

            def reset() -> None:
                while not over.wait(3):
                    link.drop()

            meddler = threading.Thread(target=reset)
            meddler.start()
            took = chaos.settled(farm, 240)
            over.set()
            meddler.join()
        chaos.measure("all 40 ended, s", took)
        assert chaos.states(farm) == {"SUCCEEDED": 40}
        chaos.measure("attempts", chaos.attempts(farm))
        assert chaos.attempts(farm) == 40


@row(
    "F-47",
    done="300 builds of a moment are stopped at a moment that may be any of theirs (not 1,000, for time)",
    holds="each has one end: STOPPED, or what it came to before",
    target="0 anomalies",
)
def stop_races(chaos: Chaos) -> None:
    dice = random.Random(chaos.seed)
    with fake_farm(chaos, MILLRACE_SLOTS="4", FAKE_SLEEP_S="0.05") as farm:

        def race(pause_s: float) -> str:
            headers = {"Authorization": f"Bearer {farm.token}"}
            with httpx.Client(base_url=farm.api_url, headers=headers, timeout=30) as client:
                build: str = client.post("/v1/builds", json={"projectName": "demo"}).json()["id"]
                time.sleep(pause_s)
                assert client.post(f"{build_path(build)}/stop").status_code == 200
                return build

        with ThreadPoolExecutor(4) as pool:
            chaos.accepted += pool.map(race, [dice.uniform(0, 1.2) for _ in range(300)])
        chaos.settled(farm, 240)
        states = chaos.states(farm)
        chaos.measure("ends", json.dumps(states))
        assert set(states) <= {"STOPPED", "SUCCEEDED"}
        assert len(states) == 2


@row(
    "F-48",
    done="a build is stopped while its worker is cut off from the API",
    holds="the farm ends it STOPPED when the lease is over",
    target="<= 90 s",
)
def stop_unheard(chaos: Chaos) -> None:
    with (
        chaos.farm(**AS_SHIPPED) as farm,
        Proxy(("127.0.0.1", port_of(farm)), seed=chaos.seed) as link,
        far_worker(farm, f"http://127.0.0.1:{link.port}", FAKE_SLEEP_S="600"),
    ):
        build = farm.build(["work"], **FAR)
        chaos.accepted.append(build)
        wait_until(lambda: farm.show(build)["millrace"]["state"] == "RUNNING", 60)
        link.faults = Faults(silent_up=True, silent_down=True)
        farm.client.post(f"{build_path(build)}/stop")
        began = time.monotonic()
        assert farm.ended(build, 120)["buildStatus"] == "STOPPED"
        chaos.measure("STOPPED, s after", time.monotonic() - began)
        assert time.monotonic() - began < 90
        link.heal()


@row(
    "F-50",
    done="three schedulers at once; whichever leads is killed every 5 s; 100 builds",
    holds="one acts at a time, and what it leaves another takes up",
    target="0 double effects",
)
def many_schedulers(chaos: Chaos) -> None:
    with fake_farm(chaos, MILLRACE_SLOTS="3") as farm:
        more = []
        environment = {**farm.environment, "MILLRACE_SIGNING_KEY": "x" * 64}
        with open(farm.home / "more.log", "ab") as out:
            for _ in range(2):
                command = [sys.executable, "-m", "millrace.cli", "scheduler"]
                more.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
        try:
            chaos.submit_many(farm, 100)
            kills = 0
            while not all(farm.show(build)["buildComplete"] for build in chaos.accepted[-5:]) and kills < 12:
                with suppress(AssertionError):  # its supervisor waits before it starts it again
                    send(signal.SIGKILL, farm.pid_of("millrace.cli scheduler"))
                    kills += 1
                time.sleep(5)
            chaos.settled(farm, 120)
        finally:
            for one in more:
                one.terminate()
                one.wait(60)
        chaos.measure("schedulers killed", kills)
        assert chaos.states(farm) == {"SUCCEEDED": 101}
        assert chaos.attempts(farm) == 101


@row(
    "F-20",
    done="the API is killed 7 times while builds are asked for, each with a key and asked again until it is answered",
    holds="each key has one build, whether the kill came before the commit or between it and the answer (F-21)",
    target="0 duplicates, 0 lost",
)
def api_killed(chaos: Chaos) -> None:
    with fake_farm(chaos, MILLRACE_SLOTS="2") as farm:
        over = threading.Event()
        made: dict[str, set[str]] = {}
        unanswered = 0

        def ask(number: int) -> None:
            nonlocal unanswered
            key, tries = f"key-{number}", 0
            while not over.is_set() or tries:
                tries += 1
                with suppress(httpx.TransportError):
                    answer = httpx.post(
                        f"{farm.api_url}/v1/builds",
                        json={"projectName": "demo"},
                        headers={"Authorization": f"Bearer {farm.token}", "Idempotency-Key": key},
                        timeout=10,
                    )
                    if answer.status_code in (200, 201):
                        made.setdefault(key, set()).add(answer.json()["id"])
                        return
                unanswered += 1
                time.sleep(0.2)

        def keep_asking(lane: int) -> None:
            for number in range(lane, 2000, 4):
                if over.is_set():
                    return
                ask(number)

        lanes = [threading.Thread(target=keep_asking, args=(lane,)) for lane in range(4)]
        for lane in lanes:
            lane.start()
        for _ in range(7):
            wait_until(farm.client.alive, 90)
            time.sleep(2)
            send(signal.SIGKILL, wait_until(lambda: api_of(farm), 90))
        time.sleep(2)
        over.set()
        for lane in lanes:
            lane.join()
        wait_until(farm.client.alive, 90)
        assert all(len(builds) == 1 for builds in made.values())
        chaos.accepted += [build for builds in made.values() for build in builds]
        listed = set(chaos.accepted)
        chaos.measure("builds asked for", len(made))
        chaos.measure("requests without an answer", unanswered)
        assert len(listed) == len(made) + 1
        chaos.settled(farm, 280)
        assert farm.show(chaos.accepted[-1])["buildNumber"] >= len(made)
        highest = max(farm.show(build)["buildNumber"] for build in chaos.accepted[-50:])
        assert highest == len(listed), "a build was made that nobody was told of"


@row(
    "F-22",
    done="the API's server is told to start its processes anew (HUP) every 4 s, six times, under 20 requests a second",
    holds="requests that are under way end",
    target="<= 0.1 % answers of 5xx",
)
def rolled(chaos: Chaos) -> None:
    with fake_farm(chaos, MILLRACE_API_WORKERS="2") as farm:
        over = threading.Event()
        answers: list[int] = []

        def look() -> None:
            headers = {"Authorization": f"Bearer {farm.token}"}
            while not over.wait(0.2):
                try:
                    answers.append(httpx.get(f"{farm.api_url}/v1/builds?limit=1", headers=headers, timeout=20).status_code)
                except httpx.TransportError:
                    answers.append(599)

        clients = [threading.Thread(target=look) for _ in range(4)]
        for client in clients:
            client.start()
        for _ in range(6):
            send(signal.SIGHUP, farm.pid_of("millrace.cli api"))
            time.sleep(4)
        over.set()
        for client in clients:
            client.join()
        bad = sum(status >= 500 for status in answers)
        chaos.measure("requests", len(answers))
        chaos.measure("5xx or broken off", bad)
        assert bad <= len(answers) / 1000
        assert Path(f"/proc/{farm.pid_of('millrace.cli api')}").exists()
