"""What a claim costs while 100, 10,000 and 100,000 builds wait, on SQLite and PostgreSQL, in one run.

Run by `make bench`; the target is at most 1.5 times the cost with 100. A round is what a worker's slot does: claim, then finish.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from millrace.log import configure
from millrace.settings import Settings
from scheduler import leases, lifecycle
from scheduler.db import Database, now_ms
from scheduler.leases import hash_token
from scheduler.models import Base, Build
from tests.support import postgres
from tests.support.records import a_build, a_claim_request, a_project, a_report

QUEUED = (100, 10_000, 100_000)
PROJECTS = 20
ROUNDS = int(os.environ.get("ROUNDS", "60"))


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """The address of an empty database of each kind."""
    with tempfile.TemporaryDirectory(prefix="mr-bench-") as folder, postgres.running() as server, server.database() as url:
        yield {"SQLite": f"sqlite:///{folder}/records.db", "PostgreSQL": url}


def fill(db: Database, settings: Settings, count: int) -> None:
    """So many builds that wait, evenly over the projects, in rows like the first one's."""
    first = a_build(db, settings, project="p0")
    with db.transaction() as session:
        row = session.get_one(Build, first)
        like = {column.name: getattr(row, column.name) for column in Build.__table__.columns}
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        for start in range(1, count, 5000):
            session.execute(
                sa.insert(Build),
                [
                    {**like, "id": f"p{n % PROJECTS}:{n}", "project_name": f"p{n % PROJECTS}", "number": n + 10, "queued_ms": now}
                    for n in range(start, min(count, start + 5000))
                ],
            )


def measure(db: Database, settings: Settings) -> tuple[float, float]:
    """Median milliseconds of a claim, and of a claim and its finish."""
    claims, rounds = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        claim = leases.claim(db, a_claim_request(), settings)
        claimed = time.perf_counter()
        if claim is None:
            raise AssertionError("builds wait, and none was claimed")
        lifecycle.finish(db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
        claims.append((claimed - began) * 1000)
        rounds.append((time.perf_counter() - began) * 1000)
    return statistics.median(claims), statistics.median(rounds)


def main() -> None:
    """Measure each size in alternation between the databases; the size with 100 is the yardstick."""
    configure("json", "ERROR", service="bench")
    with tempfile.TemporaryDirectory(prefix="mr-bench-") as home, databases() as urls:
        settings = Settings(data_dir=Path(home))
        for kind, url in urls.items():
            yardstick = 0.0
            for count in QUEUED:
                db = Database(url)
                db.migrate()
                with db.transaction() as session:
                    for table in reversed(Base.metadata.sorted_tables):
                        session.execute(sa.delete(table))
                for number in range(PROJECTS):
                    a_project(db, f"p{number}")
                fill(db, settings, count)
                claim, whole = measure(db, settings)
                db.dispose()
                yardstick = yardstick or claim
                print(  # noqa: T201  # this is its output
                    f"claim with {count:>7,} queued on {kind:<10}: {claim:6.2f} ms, {claim / yardstick:4.2f} x that with 100;"
                    f" with its finish {whole:6.2f} ms; target <= 1.5 x"
                )


if __name__ == "__main__":
    main()
