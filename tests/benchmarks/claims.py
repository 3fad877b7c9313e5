"""What a claim costs while 100, 10,000 and 100,000 builds wait, on SQLite and PostgreSQL, in one run.

A round is what a worker's slot does: claim, then finish.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.log import configure
from millrace.need import GIB, Need
from millrace.settings import Settings
from scheduler import leases, lifecycle
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Base, Build
from tests.benchmarks.samples import Sample, Scale
from tests.support import postgres
from tests.support.records import a_build, a_claim_request, a_project, a_report

PROJECTS = 20
CLAIM = "claim"
KINDS = ("SQLite", "PostgreSQL")
NEEDS = tuple(Need(cpu_millis=1000 * cpus, memory_bytes=cpus * GIB) for cpus in range(1, 6))
"""Of which a worker of 3.5 vCPU could hold three."""


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """The address of an empty database of each kind."""
    with tempfile.TemporaryDirectory(prefix="mr-bench-") as folder, postgres.running() as server, server.database() as url:
        yield dict(zip(KINDS, (f"sqlite:///{folder}/records.db", url), strict=True))


def empty(db: Database) -> None:
    """Nothing but the projects."""
    with db.transaction() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(sa.delete(table))
    for number in range(PROJECTS):
        a_project(db, f"p{number}")


def fill(db: Database, settings: Settings, count: int, needs: Sequence[Need] = ()) -> None:
    """So many builds that wait, evenly over projects and needs, in rows like the first one's."""
    first = a_build(db, settings, project="p0")
    with db.transaction() as session:
        row = session.get_one(Build, first)
        like = {column.name: getattr(row, column.name) for column in Build.__table__.columns}
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        for start in range(1, count, 5000):
            session.execute(
                sa.insert(Build),
                [
                    {
                        **like,
                        "id": f"p{n % PROJECTS}:{n}",
                        "project_name": f"p{n % PROJECTS}",
                        "number": n + 10,
                        "queued_ms": now,
                        "need": needs[n // PROJECTS % len(needs)].key if needs else like["need"],
                    }
                    for n in range(start, min(count, start + 5000))
                ],
            )


def measure(db: Database, settings: Settings, rounds: int, **offer: Any) -> Iterator[tuple[float, float]]:
    """Seconds of a claim, and of a claim and its finish."""
    for _ in range(rounds):
        began = time.perf_counter()
        claim = leases.claim(db, a_claim_request(**offer), settings)
        claimed = time.perf_counter()
        if claim is None:
            raise AssertionError("builds wait, and none was claimed")
        lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
        yield claimed - began, time.perf_counter() - began


def in_vain(db: Database, settings: Settings, rounds: int, **offer: Any) -> Iterator[float]:
    """Seconds of a claim for which nothing fits."""
    for _ in range(rounds):
        began = time.perf_counter()
        if leases.claim(db, a_claim_request(**offer), settings) is not None:
            raise AssertionError("nothing fits, and a build was claimed")
        yield time.perf_counter() - began


def who(queued: int) -> str:
    """How a size is named in the figures."""
    return f"{queued:,} queued"


def samples(scale: Scale) -> Iterator[Sample]:
    """Each size in alternation between the databases; those with the fewest are the yardstick."""
    configure("json", "ERROR", service="bench")
    rounds = 2 * scale.rounds
    scale.about(f"builds of {PROJECTS} projects wait; {rounds} claims at each size, each followed by its finish")
    with tempfile.TemporaryDirectory(prefix="mr-bench-") as home, databases() as urls:
        settings = Settings(data_dir=Path(home))
        for count in scale.queued:
            for kind, url in urls.items():
                db = Database(url)
                db.migrate()
                empty(db)
                fill(db, settings, count)
                for claim, whole in measure(db, settings, rounds):
                    yield Sample(what=CLAIM, who=who(count), at=kind, value=claim, unit="s")
                    yield Sample(what="claim and finish", who=who(count), at=kind, value=whole, unit="s")
                empty(db)
                fill(db, settings, count, NEEDS)
                for claim, _whole in measure(db, settings, rounds, cpus=3.5):
                    yield Sample(what="claim among five needs", who=who(count), at=kind, value=claim, unit="s")
                for claim in in_vain(db, settings, rounds, cpus=0.5):
                    yield Sample(what="claim where nothing fits", who=who(count), at=kind, value=claim, unit="s")
                db.dispose()
