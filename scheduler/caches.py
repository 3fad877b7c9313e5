"""Which caches there are, and who may have them (CodeBuild: caching-s3).

A cache belongs to a namespace, its project's or the one that its `cacheNamespace` names, and to the paths that it was made of.
It has a layer of its own, and may lie on those of another cache: a layer is removed when no cache needs it any more.
"""

from dataclasses import asdict, dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import CacheQuery, CacheReport, FinishReport
from millrace.errors import InvalidInput
from millrace.ids import cache_prefix
from millrace.project import BuildSettings
from millrace.storage import Store
from scheduler.db import Database, now_ms
from scheduler.models import Attempt, Build, CacheEntry, CacheLayerBelow, Project

_SETTLES_MS: Final = 3_600_000
"""How long a replaced cache stays for those who are fetching it."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a cache lies on, or its own."""

    object_key: str
    size_bytes: int
    sha256: str
    build_id: str
    attempt_no: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The cache that answers a query; `below` is what it lies on, lowest first."""

    key: str
    exact: bool
    object_key: str
    size_bytes: int
    sha256: str
    build_id: str
    below: tuple[Layer, ...] = ()


def find(session: Session, build: Build, query: CacheQuery) -> Found | None:
    """The cache of the first key, else the newest that begins with the next, and so on."""
    mine = sa.select(CacheEntry).where(
        CacheEntry.namespace == _namespace(session, build), CacheEntry.version == query.version, CacheEntry.replaced_ms == 0
    )
    if not query.layered:
        mine = mine.where(~sa.exists().where(CacheLayerBelow.entry_id == CacheEntry.id))
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
                below=_below(session, row),
            )
    return None


def _below(session: Session, row: CacheEntry) -> tuple[Layer, ...]:
    layers = session.scalars(sa.select(CacheLayerBelow).where(CacheLayerBelow.entry_id == row.id).order_by(CacheLayerBelow.seq))
    return tuple(_layer(layer) for layer in layers)


def _layer(row: CacheEntry | CacheLayerBelow) -> Layer:
    return Layer(
        object_key=row.object_key,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        build_id=row.build_id,
        attempt_no=row.attempt_no,
    )


def of_attempt() -> sa.ColumnElement[bool]:
    """Where an attempt made a cache, or a layer that a cache lies on: its objects are needed."""
    return sa.or_(
        sa.exists().where(CacheEntry.build_id == Attempt.build_id, CacheEntry.attempt_no == Attempt.attempt_no),
        sa.exists().where(CacheLayerBelow.build_id == Attempt.build_id, CacheLayerBelow.attempt_no == Attempt.attempt_no),
    )


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
        below = _standing(session, namespace, item, now)
        if below is None:
            continue  # what it lies on is going: the next build makes it whole
        if not item.key:
            session.execute(
                sa.update(CacheEntry)
                .where(CacheEntry.namespace == namespace, CacheEntry.version == item.version, CacheEntry.key == "")
                .where(CacheEntry.replaced_ms == 0)
                .values(replaced_ms=now)
            )
        try:
            with session.begin_nested():
                entry = CacheEntry(
                    namespace=namespace,
                    build_id=build.id,
                    attempt_no=build.attempt_no,
                    created_ms=now,
                    replaced_ms=0,
                    **item.model_dump(exclude={"base"}),
                )
                session.add(entry)
                session.flush()
                session.add_all(CacheLayerBelow(entry_id=entry.id, seq=seq, **asdict(layer)) for seq, layer in enumerate(below))
        except sa.exc.IntegrityError:
            continue  # another build was faster: its cache stands


def _standing(session: Session, namespace: str, item: CacheReport, now: int) -> tuple[Layer, ...] | None:
    """The layers that a new cache lies on; None where they may be removed before long."""
    if item.base is None:
        return ()
    base = session.scalars(
        sa.select(CacheEntry)
        .where(CacheEntry.namespace == namespace, CacheEntry.version == item.version, CacheEntry.object_key == item.base)
        .where(sa.or_(CacheEntry.replaced_ms == 0, CacheEntry.replaced_ms > now - _SETTLES_MS // 2))
        .with_for_update()
    ).first()
    return None if base is None else (*_below(session, base), _layer(base))


def drop_replaced(db: Database, store: Store, bucket: str) -> None:
    """Remove what an hour ago was replaced."""
    with db.reading() as session:
        old = session.scalars(
            sa.select(CacheEntry.id).where(CacheEntry.replaced_ms > 0, CacheEntry.replaced_ms < now_ms() - _SETTLES_MS).limit(200)
        ).all()
    for entry_id in old:
        drop(db, store, bucket, entry_id)


def drop(db: Database, store: Store, bucket: str, entry_id: int) -> None:
    """Remove a cache that nobody finds any more, and those of its layers that no other cache needs."""
    with db.reading() as session:
        row = session.get(CacheEntry, entry_id)
        if row is None:
            return
        layers = {layer.object_key for layer in (*_below(session, row), _layer(row))}
        others = session.scalars(
            sa.select(CacheEntry.object_key).where(CacheEntry.object_key.in_(layers), CacheEntry.id != entry_id)
        ).all()
        under = session.scalars(
            sa.select(CacheLayerBelow.object_key).where(
                CacheLayerBelow.object_key.in_(layers), CacheLayerBelow.entry_id != entry_id
            )
        ).all()
    for key in layers - {*others, *under}:
        store.delete(bucket, key)

    def work(session: Session) -> None:
        session.execute(sa.delete(CacheLayerBelow).where(CacheLayerBelow.entry_id == entry_id))
        session.execute(sa.delete(CacheEntry).where(CacheEntry.id == entry_id))

    db.run(work)


def _namespace(session: Session, build: Build) -> str:
    shared = BuildSettings.model_validate(build.settings).cache.cache_namespace
    if shared:
        return f"shared/{shared}"
    return f"project/{session.execute(sa.select(Project.uuid).where(Project.name == build.project_name)).scalar_one()}"
