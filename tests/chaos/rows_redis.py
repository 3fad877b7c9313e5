"""Redis restarted, flushed, away, black-holed, its clients killed, full: F-07 to F-12. Real Redis and farm, no containers.

The link of the farm to Redis is the fault proxy. A free worker asks for work by itself every ten seconds, so that no build waits
for ever; what these rows look for beside is that the bell itself is heard again: a build that is claimed within a second.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import redis as redis_client

from tests.chaos.harness import Chaos, row
from tests.chaos.proxy import Faults, Proxy
from tests.support import redis
from tests.support.farm import Farm, wait_until

_HEARD_MS = 1500


@contextmanager
def farm_on_redis(chaos: Chaos, **settings: str) -> Iterator[tuple[Farm, redis.RedisServer, Proxy]]:
    """A farm whose only way to a real Redis is a proxy; its `demo` project runs a command that takes half a second."""
    with redis.running() as server, Proxy(server.socket, seed=chaos.seed) as link:
        broker = f"redis://127.0.0.1:{link.port}/0"
        with chaos.farm(**{"MILLRACE_BROKER_URL": broker, "MILLRACE_ENGINE": "fake", "FAKE_SLEEP_S": "0.2"} | settings) as farm:
            chaos.accepted.append(farm.build(["work"]))
            chaos.settled(farm, 60)
            yield farm, server, link


def lag_ms(chaos: Chaos, farm: Farm) -> int:
    """How long a build that finds a free worker waits to be claimed."""
    chaos.submit(farm)
    marks = farm.ended(chaos.accepted[-1], 60)["millrace"]["marks"]
    return int(marks["claimed"] - marks["accepted"])


def heard_again(chaos: Chaos, farm: Farm, within_s: float) -> float:
    """Wait until three builds after another are claimed at once, as by a bell; when the first of them was, from now."""
    began = time.monotonic()
    good = 0
    since = 0.0
    while good < 3:
        assert time.monotonic() - began < within_s, "the worker does not hear the bell"
        asked = time.monotonic() - began
        if lag_ms(chaos, farm) < _HEARD_MS:
            since = asked if good == 0 else since
            good += 1
        else:
            good = 0
    return since


def worker_pids(farm: Farm) -> int:
    """How many times a worker was started."""
    return farm.part_log("worker").count('"worker.started"')


@row(
    "F-07",
    done="Redis is killed and started again with its append-only file, 20 builds queued, 2 running",
    holds="dispatch resumes, and the worker is not restarted",
    target="worker listens again <= 15 s",
)
def restarted(chaos: Chaos) -> None:
    with farm_on_redis(chaos) as (farm, server, _link):
        server.stop()
        server.start("--appendonly", "yes")
        wait_until(lambda: farm.client.ready()["status"] == "ok", 30)
        chaos.submit_many(farm, 20)
        server.stop()
        server.start("--appendonly", "yes")
        began = time.monotonic()
        with server.client() as client:
            wait_until(lambda: any(one["cmd"] == "brpop" for one in client.client_list()), 60)
        chaos.measure("worker listens again, s after", time.monotonic() - began)
        chaos.settled(farm, 120)
        chaos.measure("all 20 ended, s after", time.monotonic() - began)
        heard_again(chaos, farm, 15)
        assert worker_pids(farm) == 1


@row(
    "F-08",
    done="FLUSHALL with 200 builds queued and 2 running",
    holds="all are started; the bell is rung again and heard, which needs none of the keys that were there",
    target="bell rung again <= 30 s, 0 lost",
)
def flushed(chaos: Chaos) -> None:
    with farm_on_redis(chaos, MILLRACE_SLOTS="4", FAKE_SLEEP_S="1") as (farm, server, _link):  # still some when bells ring again
        chaos.submit_many(farm, 200)
        with server.client() as client:
            client.flushall()
            client.config_resetstat()
            began = time.monotonic()
            wait_until(lambda: "cmdstat_lpush" in client.info("commandstats"), 60)
            chaos.measure("bell rung again, s after", time.monotonic() - began)
        chaos.settled(farm, 290)
        chaos.measure("all 200 ended, s after", time.monotonic() - began)
        chaos.measure("bell heard again, s", heard_again(chaos, farm, 60))
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        assert chaos.attempts(farm) == len(chaos.accepted)


@row(
    "F-09",
    done="Redis refuses connections for 2 minutes (not 10: no pause of ours is longer than 30 s), a build every 4 s",
    holds="every request is accepted; /readyz says degraded; the outbox keeps the bells",
    target="100 % 2xx; outbox drained <= 60 s after",
)
def away(chaos: Chaos) -> None:
    with farm_on_redis(chaos) as (farm, server, link):
        link.faults = Faults(refuse=True)
        until = time.monotonic() + 120
        slowest = 0.0
        while time.monotonic() < until:
            slowest = max(slowest, chaos.submit(farm))
            answer = httpx.get(f"{farm.api_url}/readyz", timeout=10)
            assert (answer.status_code, answer.json()["status"]) == (200, "degraded"), answer.text
            time.sleep(4)
        chaos.measure("requests accepted meanwhile", len(chaos.accepted) - 1)
        chaos.measure("slowest answer meanwhile, s", slowest)
        link.heal()
        began = time.monotonic()
        wait_until(lambda: farm.client.ready()["status"] == "ok", 30)
        chaos.measure("bell heard again, s after", heard_again(chaos, farm, 60))
        chaos.settled(farm, 60)
        with server.client() as client:
            wait_until(lambda: client.llen("millrace.default") == 0, 60)
        chaos.measure("drained, s after", time.monotonic() - began)
        assert worker_pids(farm) == 1


@row(
    "F-10",
    done="the link to Redis swallows every byte both ways for 120 s, connections stay open; then they are gone",
    holds="the worker is not deaf afterwards; builds asked for meanwhile run",
    target="bell heard again <= 60 s",
)
def black_hole(chaos: Chaos) -> None:
    with farm_on_redis(chaos) as (farm, _server, link):
        link.faults = Faults(silent_up=True, silent_down=True)
        until = time.monotonic() + 120
        slowest, waited = 0.0, 0
        while time.monotonic() < until:
            slowest = max(slowest, chaos.submit(farm))
            marks = farm.ended(chaos.accepted[-1], 60)["millrace"]["marks"]
            waited = max(waited, int(marks["claimed"] - marks["accepted"]))
            time.sleep(3)
        chaos.measure("slowest answer meanwhile, s", slowest)
        chaos.measure("longest wait for a free worker meanwhile, s", waited / 1000)
        link.drop()
        link.heal()
        chaos.measure("bell heard again, s after", heard_again(chaos, farm, 60))
        chaos.measure("workers started", worker_pids(farm))


@row(
    "F-11",
    done="CLIENT KILL TYPE normal every second for 60 s, a build every second",
    holds="nothing crashes, nothing runs twice",
    target="0 doubled",
)
def clients_killed(chaos: Chaos) -> None:
    with farm_on_redis(chaos) as (farm, server, _link):
        over = threading.Event()
        killed = [0]

        def kill() -> None:
            while not over.wait(1):
                with server.client() as client, suppress(redis_client.ConnectionError):
                    killed[0] += int(client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                chaos.submit(farm)
                time.sleep(1)
        finally:
            over.set()
            killer.join()
        chaos.measure("connections killed", killed[0])
        chaos.settled(farm, 120)
        chaos.measure("attempts more than builds", chaos.attempts(farm) - len(chaos.accepted))
        assert chaos.measured["attempts more than builds"] == 0
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        chaos.measure("bell heard again, s after", heard_again(chaos, farm, 60))
        assert worker_pids(farm) == 1


@row(
    "F-12",
    done="CONFIG SET maxmemory 1 with noeviction for 30 s, a build every 2 s",
    holds="every request is accepted, the outbox keeps the bells, the worker hears again",
    target="0 lost; bell heard again <= 60 s",
)
def full(chaos: Chaos) -> None:
    with farm_on_redis(chaos) as (farm, server, _link), server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            chaos.submit(farm)
            time.sleep(2)
        chaos.measure("bells that failed", farm.part_log("api").count('"bell.failed"'))
        client.config_set("maxmemory", 0)
        chaos.measure("bell heard again, s after", heard_again(chaos, farm, 60))
        chaos.settled(farm, 60)
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        chaos.measure("workers started", worker_pids(farm))
