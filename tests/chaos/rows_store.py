"""The object store refusing, slow, answering errors, giving and taking wrong bytes: F-33 to F-36. MinIO behind the proxy."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from millrace.errors import MillraceError
from millrace.ids import uuid_of
from millrace.settings import load
from millrace.storage import open_store
from millrace.storage.s3 import S3Store
from tests.chaos.harness import Chaos, row
from tests.chaos.proxy import Faults, Proxy, Rule
from tests.support.farm import Farm, wait_until
from tests.support.minio import MinioServer, minio_server

_KEPT = "artifacts:\n  files:\n    - out.bin\n"
_CACHED = _KEPT + "cache:\n  key: k1\n  paths:\n    - kept/**/*\n"


@contextmanager
def farm_on_minio(chaos: Chaos, **settings: str) -> Iterator[tuple[Farm, MinioServer, Proxy]]:
    """A farm whose only way to its object store, a real MinIO, is a proxy."""
    with (
        tempfile.TemporaryDirectory(prefix="mr-s3-") as folder,
        minio_server(Path(folder)) as server,
        Proxy(("127.0.0.1", server.port), http=True, seed=chaos.seed) as link,
    ):
        where = {
            "MILLRACE_STORE_URL": f"http://127.0.0.1:{link.port}",
            "MILLRACE_STORE_ACCESS_KEY": server.access_key,
            "MILLRACE_STORE_SECRET_KEY": server.secret_key,
        }
        with chaos.farm(**where, **settings) as farm:
            yield farm, server, link
            link.heal()


def build(chaos: Chaos, farm: Farm, size_bytes: int, *, before: str = "true", more: str = _KEPT) -> str:
    """A build that leaves so many random bytes as its artifact."""
    commands = [before, f"head -c {size_bytes} /dev/urandom > out.bin", "mkdir -p kept && echo ${LEFT:-new} > kept/x"]
    chaos.accepted.append(farm.build(commands, more=more, cache={"type": "S3", "location": "caches"}))
    return chaos.accepted[-1]


def heartbeats_held(farm: Farm) -> bool:
    """No lease was lost."""
    return farm.part_log("scheduler").count('"lease.expired"') == 0


@row(
    "F-33",
    done="the store refuses connections for 2 minutes from before the upload on, 2 builds",
    holds="the upload is tried again, the lease is kept, then it succeeds",
    target="0 failed builds, no other attempt",
)
def away(chaos: Chaos) -> None:
    with farm_on_minio(chaos) as (farm, _server, link):
        builds = [build(chaos, farm, 3_000_000, before="sleep 5") for _ in range(2)]
        for one in builds:
            farm.await_log(one, "sleep 5")
        link.faults = Faults(refuse=True)
        time.sleep(120)
        assert not any(farm.show(one)["buildComplete"] for one in builds)
        link.heal()
        chaos.measure("all ended, s after", chaos.settled(farm, 120))
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        assert chaos.attempts(farm) == len(builds)
        assert heartbeats_held(farm)


@row(
    "F-34",
    done="10 KB/s for an artifact of 400 KB; then a link that falls silent in the middle of an upload and stays so for 90 s",
    holds="slow bytes are waited for; a silence of 60 s ends the try, not the build; the lease is kept",
    target="0 failed builds, no other attempt",
)
def slow(chaos: Chaos) -> None:
    with farm_on_minio(chaos) as (farm, _server, link):
        link.faults = Faults(bytes_per_s=10_000)
        build(chaos, farm, 400_000)
        chaos.measure("400 KB at 10 KB/s, s", chaos.settled(farm, 200))
        assert float(str(chaos.measured["400 KB at 10 KB/s, s"])) > 30
        link.faults = Faults(bytes_per_s=1_000_000)
        build(chaos, farm, 30_000_000)
        wait_until(lambda: link.requests[-1].startswith(f"PUT /millrace/artifacts/{uuid_of(chaos.accepted[-1])}"), 60)
        time.sleep(2)
        link.faults = Faults(silent_up=True, silent_down=True)
        time.sleep(90)
        assert not farm.show(chaos.accepted[-1])["buildComplete"]
        link.drop()
        link.heal()
        chaos.measure("ended after a silence of 90 s, s after", chaos.settled(farm, 120))
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        assert chaos.attempts(farm) == len(chaos.accepted)
        assert heartbeats_held(farm)


@row(
    "F-35",
    done="the store answers a fifth of all requests with 500 or 503, 20 builds with 6 MB each",
    holds="what fails is sent again, and nothing is left half done",
    target="0 corrupt objects, 0 dangling uploads",
)
def errors(chaos: Chaos) -> None:
    with farm_on_minio(chaos, MILLRACE_SLOTS="4") as (farm, server, link):
        link.rules = [Rule(share=0.1, status=500), Rule(share=0.11, status=503, headers={"Retry-After": "1"})]
        for _ in range(20):
            build(chaos, farm, 6_000_000)
        chaos.measure("all ended, s", chaos.settled(farm, 290))
        chaos.measure("requests", len(link.requests))
        chaos.measure("of them failed by the proxy", sum(rule.hits for rule in link.rules))
        link.heal()
        store = store_of(farm)
        dangling = 0
        for stored in store.list("millrace", ""):
            dangling += len(store._client._list_multipart_uploads("millrace", prefix=stored.key).uploads)
        chaos.measure("dangling uploads", dangling)
        assert dangling == 0
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        assert server.process is not None


def store_of(farm: Farm) -> S3Store:
    store = open_store(load({name: value for name, value in farm.environment.items() if name.startswith("MILLRACE_")}))
    assert isinstance(store, S3Store)
    return store


@row(
    "F-36",
    done="the store says 200 to an upload and keeps nothing; takes flipped bytes; gives a cache and an artifact flipped or short",
    holds="a lost upload begins the build anew, flipped bytes are refused and sent again, a bad cache is a miss and a warning, "
    "a bad artifact never arrives whole",
    target="0 wrong bytes used",
)
def lying(chaos: Chaos) -> None:
    with farm_on_minio(chaos) as (farm, _server, link):
        link.rules = [Rule(match="^PUT /millrace/artifacts/", times=1, status=200, headers={"ETag": '"0"'})]
        build(chaos, farm, 300_000, more=_CACHED)
        swallowed = farm.ended(chaos.accepted[-1], 90)
        chaos.measure("upload swallowed: attempts", swallowed["millrace"]["attempt"])
        assert (swallowed["buildStatus"], swallowed["millrace"]["attempt"]) == ("SUCCEEDED", 2)

        link.rules = [Rule(match="^PUT /millrace/artifacts/", times=2, flip_up=True)]
        flipped = build(chaos, farm, 300_000)
        assert farm.ended(flipped, 90)["buildStatus"] == "SUCCEEDED"
        chaos.measure("flipped on the way in: refused by the store", link.rules[0].hits)
        assert farm.show(flipped)["millrace"]["attempt"] == 1

        for name, rule in (("flipped", Rule(flip=True)), ("short", Rule(shorten=0.5))):
            rule.match = "^GET /millrace/caches?/"
            link.rules = [rule]
            cached = build(chaos, farm, 1000, more=_CACHED)
            assert farm.ended(cached, 120)["buildStatus"] == "SUCCEEDED"
            assert rule.hits, "the cache was not asked for"
            log = farm.log_of(cached)
            assert "Warning: the cache is not restored" in log, log
            chaos.measure(f"{name} cache", "a miss and a warning")

        name = farm.show(flipped)["millrace"]["artifacts"][0]["name"]
        for rule in (Rule(flip=True), Rule(shorten=0.5), Rule(truncate=0.5)):
            rule.match = "^GET /millrace/artifacts/"
            link.rules = [rule]
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / "got"
                try:
                    farm.client.download(flipped, name, None, target)
                except MillraceError:
                    continue
                raise AssertionError(f"a damaged artifact was taken for whole: {rule}")
        chaos.measure("damaged artifacts that arrived whole", 0)
