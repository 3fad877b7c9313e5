"""Which caches there are, and who may have them (CodeBuild: caching-s3).

A cache belongs to a namespace, its project's or the one that its `cacheNamespace` names, and to the paths that it was made of.
"""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import CacheQuery, FinishReport
from millrace.errors import InvalidInput
from millrace.ids import cache_prefix
from millrace.project import BuildSettings
from millrace.storage import Store
from scheduler.db import Database, now_ms
from scheduler.models import Build, CacheEntry, Project

_SETTLES_MS: Final = 3_600_000
"""How long a replaced cache stays for those who are fetching it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The cache that answers a query."""

    key: str
    exact: bool
    object_key: str
    size_bytes: int
    sha256: str
    build_id: str


def find(session: Session, build: Build, query: CacheQuery) -> Found | None:
    """The cache of the first key, else the newest that begins with the next, and so on."""
    mine = sa.select(CacheEntry).where(
        CacheEntry.namespace == _namespace(session, build), CacheEntry.version == query.version, CacheEntry.replaced_ms == 0
    )
    for number, key in enumerate(query.keys):
        fits = CacheEntry.key == key if number == 0 else CacheEntry.key.startswith(key, autoescape=True)
        row = session.scalars(mine.where(fits).order_by(CacheEntry.created_ms.desc(), CacheEntry.id.desc()).limit(1)).first()
        if row is not None:
            return Found(
                key=row.key,
                exact=number == 0,
                object_key=row.object_key,
                size_bytes=row.size_bytes,
                sha256=row.sha256,
                build_id=row.build_id,
            )
    return None


def check(build_id: str, attempt_no: int, report: FinishReport) -> None:
    """Raises InvalidInput where a cache that is reported is not this attempt's."""
    for item in report.caches:
        if not item.object_key.startswith(cache_prefix(build_id, attempt_no)):
            raise InvalidInput(f"{item.object_key!r} is not an object of attempt {attempt_no} of {build_id}")


def keep(session: Session, build: Build, report: FinishReport) -> None:
    """Make the caches of a report known, in its commit. A key that is taken stays; what has no key takes the last one's place."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    namespace = _namespace(session, build) if report.caches else ""
    for item in report.caches:
        if not item.key:
            session.execute(
                sa.update(CacheEntry)
                .where(CacheEntry.namespace == namespace, CacheEntry.version == item.version, CacheEntry.key == "")
                .where(CacheEntry.replaced_ms == 0)
                .values(replaced_ms=now)
            )
        try:
            with session.begin_nested():
                session.add(
                    CacheEntry(
                        namespace=namespace,
                        build_id=build.id,
                        attempt_no=build.attempt_no,
                        created_ms=now,
                        replaced_ms=0,
                        **item.model_dump(),
                    )
                )
        except sa.exc.IntegrityError:
            continue  # another build was faster: its cache stands


def drop_replaced(db: Database, store: Store, bucket: str) -> None:
    """Remove what an hour ago was replaced."""
    with db.reading() as session:
        old = session.scalars(
            sa.select(CacheEntry).where(CacheEntry.replaced_ms > 0, CacheEntry.replaced_ms < now_ms() - _SETTLES_MS).limit(200)
        ).all()
    for row in old:
        store.delete(bucket, row.object_key)

        def work(session: Session, row_id: int = row.id) -> None:
            session.execute(sa.delete(CacheEntry).where(CacheEntry.id == row_id))

        db.run(work)


def _namespace(session: Session, build: Build) -> str:
    shared = BuildSettings.model_validate(build.settings).cache.cache_namespace
    if shared:
        return f"shared/{shared}"
    return f"project/{session.execute(sa.select(Project.uuid).where(Project.name == build.project_name)).scalar_one()}"
