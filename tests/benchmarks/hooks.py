"""500 deliveries of webhooks within a second: how long a git server waits for its answer. It is to be under 500 ms at p99.

And when the last of their builds is queued, as not all are before they are answered. Each comes at its own moment on a
connection of its own, whether those before it were answered or not, as git servers send them.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import SecretStr

from millrace.log import configure
from millrace.settings import Settings
from millrace.webhook import WebhookSettings
from scheduler import hooks
from scheduler.db import Database
from scheduler.models import Build
from scheduler.secrets import keys_of
from tests.benchmarks.claims import databases
from tests.benchmarks.samples import OURS, Sample, Scale, each
from tests.support import redis
from tests.support.apiserver import ApiServer, serving
from tests.support.farm import wait_until
from tests.support.records import a_project
from tests.support.webhooks import SOURCES, examples, sent

DELIVERIES = 500
WITHIN_S = 1.0
PROJECTS = 20
ANSWER = "delivery of a webhook to its answer"
QUEUED = "first of 500 deliveries to the last of their builds"
_PAUSE_S = 0.2


def requests(server: ApiServer, round_: int) -> list[bytes]:
    """Pushes to many projects, each of a commit of its own, in GitHub's own size; as they go over the wire."""
    (push,) = (one["payload"] for one in examples() if (one["event"], one["number"]) == ("push", 4))
    made = []
    keys = keys_of(server.settings)
    for number in range(PROJECTS):
        name = f"r{round_}p{number}"
        a_project(server.db, name, source=SOURCES["github"])
        made.append(hooks.create(server.db, keys, name, WebhookSettings()))
    found = []
    for number in range(DELIVERIES):
        record, secret = made[number % PROJECTS]
        sha = f"{round_ + 1:08x}{number:032x}"
        wanted = sent("github", secret, {**push, "after": sha, "head_commit": {**push["head_commit"], "id": sha}})
        lines = {"Host": "x", "Connection": "close", "Content-Length": str(len(wanted["data"])), **wanted["headers"]}
        head = f"POST /webhooks/github/{record.id} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in lines.items()
        )
        found.append(head.encode() + b"\r\n" + wanted["data"])
    return found


async def burst(url: str, wanted: list[bytes]) -> list[float]:
    """Seconds of each, from the moment at which it was due."""
    address = urlsplit(url)
    began = time.perf_counter() + _PAUSE_S

    async def one(number: int, request: bytes) -> float:
        due = began + number * WITHIN_S / len(wanted)
        await asyncio.sleep(due - time.perf_counter())
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(request)
        answer = await reader.read()
        took = time.perf_counter() - due
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        if head.split(b" ")[1:2] not in ([b"201"], [b"202"]):
            raise AssertionError(answer.decode(errors="replace"))
        if json.loads(body)["events"][0]["outcome"] not in ("build", "accepted"):
            raise AssertionError(answer)
        return took

    return list(await asyncio.gather(*(one(number, request) for number, request in enumerate(wanted))))


def built(db: Database) -> int:
    """How many builds are queued."""
    with db.reading() as session:
        return session.scalar(sa.select(sa.func.count(Build.id))) or 0


def samples(scale: Scale) -> Iterator[Sample]:
    """On an API as shipped, over each kind of database."""
    configure("json", "ERROR", service="bench")
    rounds = max(1, scale.heavy)
    scale.about(f"{DELIVERIES} pushes to {PROJECTS} projects within {WITHIN_S:g} s, each with a build, in {rounds} rounds")
    with databases() as urls, redis.running() as broker:
        for kind, url in urls.items():
            with tempfile.TemporaryDirectory(prefix="mr-bench-") as home:
                settings = Settings(data_dir=Path(home), signing_key=SecretStr("k" * 64))
                db = Database(url)
                db.migrate()
                with serving(db, settings, threads=32, processes=2, MILLRACE_BROKER_URL=broker.url) as server:
                    for number in range(rounds):
                        wanted = requests(server, number)
                        began = time.perf_counter() + _PAUSE_S
                        yield from each(ANSWER, OURS, asyncio.run(burst(server.url, wanted)), "s", at=kind)
                        wait_until(lambda: built(db) == DELIVERIES * (number + 1), 60)  # noqa: B023  # it is over by then
                        yield Sample(what=QUEUED, who=OURS, at=kind, value=time.perf_counter() - began, unit="s")
                db.dispose()
