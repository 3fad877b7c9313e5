"""Which caches there are, and who may have them (CodeBuild: caching-s3).

A cache belongs to a namespace, its project's or the one that its `cacheNamespace` names, and to the paths that it was made of.
It has a layer of its own, and may lie on those of another cache: a layer is removed when no cache needs it any more.
A build from a fork finds the caches of its namespace, and keeps its own where no trusted build looks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import CacheQuery, CacheReport, FinishReport
from millrace.errors import InvalidInput, NotFound
from millrace.ids import cache_prefix
from millrace.log import get_logger
from millrace.project import BuildSettings
from millrace.storage import Store
from scheduler.db import Database, now_ms
from scheduler.models import Attempt, Build, CacheEntry, CacheLayerBelow, Project

log = get_logger(__name__)
_SETTLES_MS: Final = 3_600_000
"""How long a replaced cache stays for those who are fetching it."""
_LOOKUPS: Final = 10
"""How many an attempt keeps."""
_FORK: Final = "\x1f"
"""Between a namespace and where an untrusted build comes from; no `cacheNamespace` has it in it."""


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


def find(session: Session, build: Build, attempt: Attempt, query: CacheQuery) -> Found | None:
    """The cache of the first key, else the newest that begins with the next, and so on. The attempt keeps what was asked for."""
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    row, exact, why = _answer(session, _namespaces(session, build), query)
    asked = {"keys": [*query.keys], "version": query.version, "layered": query.layered, "at": now, "why": why}
    if row is None:
        attempt.cache_lookups = [*(attempt.cache_lookups or ()), asked][-_LOOKUPS:]
        return None
    row.used_ms = now
    below = _below(session, row)
    size = row.size_bytes + sum(layer.size_bytes for layer in below)
    hit = {"key": row.key, "exact": exact, "build": row.build_id, "layers": len(below) + 1, "sizeBytes": size}
    attempt.cache_lookups = [*(attempt.cache_lookups or ()), {**asked, "found": hit}][-_LOOKUPS:]
    return Found(
        key=row.key,
        exact=exact,
        object_key=row.object_key,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        build_id=row.build_id,
        below=below,
    )


def _answer(session: Session, namespaces: tuple[str, ...], query: CacheQuery) -> tuple[CacheEntry | None, bool, str]:
    """The cache, whether its key is the first one, and why it is that, or none."""
    here = sa.select(CacheEntry).where(CacheEntry.namespace.in_(namespaces), CacheEntry.replaced_ms == 0)
    mine = here.where(CacheEntry.version == query.version)
    fit = mine if query.layered else mine.where(~sa.exists().where(CacheLayerBelow.entry_id == CacheEntry.id))
    own_first = sa.case((CacheEntry.namespace == namespaces[0], 0), else_=1)
    newest = (CacheEntry.created_ms.desc(), CacheEntry.id.desc())
    for number, key in enumerate(query.keys):
        is_it = CacheEntry.key == key if number == 0 else _begins(CacheEntry.key, key)
        row = session.scalars(fit.where(is_it).order_by(own_first, *newest).limit(1)).first()
        if row is not None:
            said = (
                "the last one that was saved" if not key else "its key is there" if number == 0 else f"the newest of {key!r}..."
            )
            return row, number == 0, said
    if (other := session.scalars(mine.order_by(*newest).limit(3)).all()) and query.keys:
        if fit is not mine and any(row.key == query.keys[0] for row in other):
            return None, False, "it has several layers, and this worker copies caches"
        return None, False, f"no key fits; the newest are {', '.join(repr(row.key) for row in other)}"
    count = session.scalar(sa.select(sa.func.count()).select_from(here.subquery())) or 0
    return None, False, f"none of {count} caches was made of these paths" if count else "there is no cache yet"


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
    """Make the caches of a report known, in its commit. A key that is taken stays, but where the attempt could not use what it
    found by it; what has no key takes the last one's place.
    """
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    namespaces = _namespaces(session, build) if report.caches else ("",)
    namespace = namespaces[0]
    for item in report.caches:
        below = _standing(session, namespaces, item, now)
        if below is None:
            continue  # what it lies on is going: the next build makes it whole
        taken = sa.and_(CacheEntry.namespace == namespace, CacheEntry.version == item.version, CacheEntry.key == item.key)
        if item.key:
            taken = sa.and_(taken, CacheEntry.build_id.in_(_useless(session, build, item)))
        session.execute(sa.update(CacheEntry).where(taken, CacheEntry.replaced_ms == 0).values(replaced_ms=now))
        try:
            with session.begin_nested():
                entry = CacheEntry(
                    namespace=namespace,
                    build_id=build.id,
                    attempt_no=build.attempt_no,
                    created_ms=now,
                    replaced_ms=0,
                    used_ms=now,
                    **item.model_dump(exclude={"base"}),
                )
                session.add(entry)
                session.flush()
                session.add_all(CacheLayerBelow(entry_id=entry.id, seq=seq, **asdict(layer)) for seq, layer in enumerate(below))
        except sa.exc.IntegrityError:
            continue  # another build was faster: its cache stands


def note_uses(attempt: Attempt, uses: Sequence[tuple[bool, str]]) -> None:
    """Keep with what an attempt asked for what became of each cache that answered: whether it was used, and how, or why not."""
    lookups = [dict(one) for one in attempt.cache_lookups or ()]
    answered = [one for one in lookups if "found" in one]
    for one, (used, says) in zip(reversed(answered), reversed(uses), strict=False):
        one |= {"used": used, "became": says}
    if uses:
        attempt.cache_lookups = lookups


def _useless(session: Session, build: Build, item: CacheReport) -> list[str]:
    """The builds whose cache the attempt found by the same key: had it been of use, as it is not where its bytes are wrong, the
    attempt would have saved none.
    """
    attempt = session.get_one(Attempt, (build.id, build.attempt_no))
    asked = [one for one in attempt.cache_lookups or () if one["version"] == item.version]
    hits = [one["found"] for one in asked if "found" in one]
    return [hit["build"] for hit in hits if hit["exact"] and hit["key"] == item.key]


def _standing(session: Session, namespaces: tuple[str, ...], item: CacheReport, now: int) -> tuple[Layer, ...] | None:
    """The layers that a new cache lies on; None where they may be removed before long."""
    if item.base is None:
        return ()
    base = session.scalars(
        sa.select(CacheEntry)
        .where(CacheEntry.namespace.in_(namespaces), CacheEntry.version == item.version, CacheEntry.object_key == item.base)
        .where(sa.or_(CacheEntry.replaced_ms == 0, CacheEntry.replaced_ms > now - _SETTLES_MS // 2))
        .with_for_update()
    ).first()
    return None if base is None else (*_below(session, base), _layer(base))


def lose(db: Database, object_key: str) -> None:
    """Take away a cache of which the store has lost a layer, so that the next build with its key can save it anew."""

    def work(session: Session) -> None:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        is_it = sa.and_(CacheEntry.object_key == object_key, CacheEntry.replaced_ms == 0)
        session.execute(sa.update(CacheEntry).where(is_it).values(replaced_ms=now))

    db.run(work)
    log.warning("cache.lost", object_key=object_key)


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


def make_room(db: Database, most_bytes: int) -> int:
    """Take away what was not used for longest, until the layers of all others have at most so many bytes; how many caches.

    They are found no more from now on; `drop_replaced` removes what lies in the store.
    """

    def work(session: Session) -> int:
        rows = session.scalars(
            sa.select(CacheEntry).where(CacheEntry.replaced_ms == 0).order_by(_last_used(), CacheEntry.id).with_for_update()
        ).all()
        layers: dict[int, dict[str, int]] = {row.id: {row.object_key: row.size_bytes} for row in rows}
        for below in session.scalars(sa.select(CacheLayerBelow).where(CacheLayerBelow.entry_id.in_(layers))):
            layers[below.entry_id][below.object_key] = below.size_bytes
        needed = Counter(key for keys in layers.values() for key in keys)
        left = sum({key: size for keys in layers.values() for key, size in keys.items()}.values())
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        gone = 0
        for row in rows:
            if left <= most_bytes:
                break
            row.replaced_ms = now + gone  # unlike another's of the same key
            gone += 1
            for key, size in layers[row.id].items():
                needed[key] -= 1
                left -= size if not needed[key] else 0
        return gone

    with db.reading() as session:
        own = sa.select(CacheEntry.object_key, CacheEntry.size_bytes).where(CacheEntry.replaced_ms == 0)
        under = (
            sa.select(CacheLayerBelow.object_key, CacheLayerBelow.size_bytes)
            .join(CacheEntry, CacheEntry.id == CacheLayerBelow.entry_id)
            .where(CacheEntry.replaced_ms == 0)
        )
        held = session.scalar(sa.select(sa.func.sum(sa.union(own, under).subquery().c.size_bytes))) or 0
    if held <= most_bytes:
        return 0
    gone = db.run(work)
    log.info("caches.made_room", caches=gone, held_bytes=int(held), most_bytes=most_bytes)
    return gone


def _last_used() -> sa.ColumnElement[int]:
    return sa.case((CacheEntry.used_ms > CacheEntry.created_ms, CacheEntry.used_ms), else_=CacheEntry.created_ms)


@dataclass(frozen=True, kw_only=True)
class CacheRecord:
    """A cache as it is listed. `project` None: projects share it, by the name `shared`. `fork`: only builds from there find it.

    `size_bytes` is that of all its layers, `own_bytes` that of the one that is its own, in the object store.
    """

    project: str | None
    shared: str | None
    fork: str | None
    key: str
    version: str
    layers: int
    size_bytes: int
    own_bytes: int
    build_id: str
    created_ms: int
    used_ms: int


def find_all(
    db: Database, *, project: str | None, shared: str | None = None, limit: int, before: int | None
) -> tuple[list[CacheRecord], int | None]:
    """The caches of a project, of those who share a name, or all, the newest first; and where the next page begins."""
    with db.reading() as session:
        query = sa.select(CacheEntry).where(CacheEntry.replaced_ms == 0)
        if project is not None or shared is not None:
            query = query.where(_within(_home(session, project, shared)))
        if before is not None:
            query = query.where(CacheEntry.id < before)
        rows = session.scalars(query.order_by(CacheEntry.id.desc()).limit(limit + 1)).all()
        names = {uuid: name for name, uuid in session.execute(sa.select(Project.name, Project.uuid))}
        return [_record(session, row, names) for row in rows[:limit]], rows[limit - 1].id if len(rows) > limit else None


def of_build(db: Database, build_id: str) -> tuple[list[dict[str, Any]], list[CacheRecord]]:
    """What the attempts of a build asked for, each with its number as `attempt`; and the caches that it saved."""
    with db.reading() as session:
        asked = session.execute(
            sa.select(Attempt.attempt_no, Attempt.cache_lookups).where(Attempt.build_id == build_id).order_by(Attempt.attempt_no)
        )
        lookups = [{"attempt": number, **one} for number, several in asked for one in several or ()]
        rows = session.scalars(sa.select(CacheEntry).where(CacheEntry.build_id == build_id, CacheEntry.replaced_ms == 0)).all()
        names = {uuid: name for name, uuid in session.execute(sa.select(Project.name, Project.uuid))}
        return lookups, [_record(session, row, names) for row in rows]


def remove(db: Database, *, project: str | None, shared: str | None = None, key: str | None) -> int:
    """Take away the caches of a project, or of those who share a name, or only those of `key`; how many there were.

    Builds that are fetching one now can; `drop_replaced` removes it an hour later. Raises NotFound for an unknown project.
    """

    def work(session: Session) -> int:
        query = sa.select(CacheEntry).where(CacheEntry.replaced_ms == 0, _within(_home(session, project, shared)))
        rows = session.scalars((query if key is None else query.where(CacheEntry.key == key)).with_for_update()).all()
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        for row in rows:
            row.replaced_ms = now
        return len(rows)

    gone = db.run(work)
    log.info("caches.removed", project=project, shared=shared, caches=gone)
    return gone


def _record(session: Session, row: CacheEntry, names: Mapping[str, str]) -> CacheRecord:
    home, _, fork = row.namespace.partition(_FORK)
    kind, _, name = home.partition("/")
    below = _below(session, row)
    return CacheRecord(
        project=names.get(name, f"({name})") if kind == "project" else None,
        shared=name if kind == "shared" else None,
        fork=fork or None,
        key=row.key,
        version=row.version,
        layers=len(below) + 1,
        size_bytes=row.size_bytes + sum(layer.size_bytes for layer in below),
        own_bytes=row.size_bytes,
        build_id=row.build_id,
        created_ms=row.created_ms,
        used_ms=max(row.used_ms, row.created_ms),
    )


def _home(session: Session, project: str | None, shared: str | None) -> str:
    """Where a project's caches are, or those of several."""
    if shared:
        return f"shared/{shared}"
    uuid = session.scalar(sa.select(Project.uuid).where(Project.name == project))
    if uuid is None:
        raise NotFound(f"there is no project {project!r}", hint="GET /v1/projects lists them.")
    return f"project/{uuid}"


def _within(home: str) -> sa.ColumnElement[bool]:
    return sa.or_(CacheEntry.namespace == home, _begins(CacheEntry.namespace, f"{home}{_FORK}"))


def _begins(column: sa.orm.InstrumentedAttribute[str], text: str) -> sa.ColumnElement[bool]:
    """Letter by letter: to SQLite's LIKE, small and large letters are the same."""
    return sa.func.substr(column, 1, len(text)) == text


def is_trusted(namespace: str) -> bool:
    """Whether builds that come from no fork look there."""
    return _FORK not in namespace


def _namespaces(session: Session, build: Build) -> tuple[str, ...]:
    """Where a build keeps its caches; and where else it looks."""
    wanted = BuildSettings.model_validate(build.settings)
    home = _home(session, build.project_name, wanted.cache.cache_namespace)
    if wanted.fork is None:
        return (home,)
    whose = f"{build.project_name} " if wanted.cache.cache_namespace else ""  # each project's repository counts from one
    return f"{home}{_FORK}{whose}{wanted.fork}", home
