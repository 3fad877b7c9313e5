"""What the object store holds, against what the records say of it. So many objects are read back as the scope says."""

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa

from millrace.chunks import Chunk, Tally, Unsound, compare, read_list
from millrace.errors import InfraProblem
from millrace.ids import cache_prefix, log_list_key, staging_prefix
from millrace.storage import PIECE_BYTES, Store
from scheduler import caches
from scheduler.db import now_ms
from scheduler.fsck.terms import SHOWN, TERMINAL_NAMES, Fault, NotHere, Said, Scope, said
from scheduler.models import Artifact, Attempt, Build, LogChunk

DROP_LOSERS: Final = "drop-losers"
_DAY_MS: Final = 86_400_000
_HOUR_MS: Final = 3_600_000


def the_store(scope: Scope) -> Store:
    """The store, known to answer. Raises InfraProblem."""
    if scope.store is None:
        raise NotHere("no object store was given")
    scope.store.check()
    return scope.store


def _read(store: Store, bucket: str, key: str) -> tuple[int, str] | None:
    """Size and SHA-256 of an object as it is read back; None where it is gone."""
    digest, size = hashlib.sha256(), 0
    try:
        with store.open(bucket, key) as body:
            while piece := body.read(PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
    except FileNotFoundError:
        return None
    return size, digest.hexdigest()


def _newest(scope: Scope, query: sa.Select[Any]) -> list[Any]:
    ordered = query.where(*scope.recent()).order_by(Build.submitted_ms.desc(), Build.id.desc())
    with scope.db.reading() as session:
        return list(session.execute(ordered.limit(scope.objects)).all())


def artifacts_read_back(scope: Scope) -> Said:
    """8: what a build made is there, byte for byte."""
    store = the_store(scope)
    rows = _newest(
        scope,
        sa.select(Artifact.build_id, Artifact.name, Artifact.key, Artifact.size_bytes, Artifact.sha256).join(
            Build, Build.id == Artifact.build_id
        ),
    )
    faults = []
    for row in rows:
        problem = _problem(store, scope.settings.bucket, row.key, row.size_bytes, row.sha256)
        if problem is not None:
            what = f"artifact {row.name} of {row.build_id} ({row.key}) {problem}"
            hint = "Restore the object from a backup, or build again."
            faults.append(Fault(what=what, ids=(row.build_id,), hint=hint))
        if len(faults) > SHOWN:
            break
    return said(f"{len(rows)} artifacts, newest first", faults)


def _problem(store: Store, bucket: str, key: str, size_bytes: int, sha256: str | None) -> str | None:
    try:
        found = _read(store, bucket, key)
    except InfraProblem as problem:
        store.check()  # the store as a whole is away: that is no fault of this object
        return f"cannot be read: {problem.message}"
    if found is None:
        return "is not in the object store"
    if found[0] != size_bytes or (sha256 is not None and found[1] != sha256):
        return f"reads back as {found[0]} bytes with SHA-256 {found[1]}, recorded are {size_bytes} bytes with {sha256 or 'none'}"
    return None


def logs_are_whole(scope: Scope) -> Said:
    """9: the chunks of a log join up and give its root; the whole is what its worker wrote, or is marked as incomplete."""
    store = the_store(scope)
    faults = _torn_chunks(scope)
    rows = _newest(
        scope,
        sa.select(
            Attempt.build_id,
            Attempt.attempt_no,
            Attempt.log_key,
            Attempt.log_bytes,
            Attempt.log_sha256,
            Attempt.log_complete,
            Attempt.log_root,
        )
        .join(Build, Build.id == Attempt.build_id)
        .where(Attempt.ended_ms.is_not(None), Attempt.log_bytes > 0),
    )
    for row in rows:
        sha256 = row.log_sha256 if row.log_complete else None
        if row.log_key is None:
            problem = _problem_here(scope, row, sha256)
        else:
            problem = _problem_there(store, scope.settings.bucket, row, sha256)
        if problem is not None and len(faults) <= SHOWN:
            what = f"the log of attempt {row.attempt_no} of {row.build_id} {problem}"
            faults.append(Fault(what=what, ids=(row.build_id,), hint="Restore the object from a backup."))
    return said(f"{len(rows)} logs of ended attempts, newest first, and all chunks of those that go on", faults)


def _torn_chunks(scope: Scope) -> list[Fault]:
    chunks = (
        sa.select(
            LogChunk.build_id,
            LogChunk.attempt_no,
            sa.func.count().label("count"),
            sa.func.max(LogChunk.seq).label("last"),
            sa.func.sum(LogChunk.size).label("size"),
            sa.func.max(LogChunk.offset + LogChunk.size).label("end"),
        )
        .group_by(LogChunk.build_id, LogChunk.attempt_no)
        .subquery()
    )
    torn = (
        sa.select(Attempt.build_id, Attempt.attempt_no, Attempt.log_chunks, Attempt.log_bytes, chunks.c.count, chunks.c.size)
        .outerjoin(chunks, sa.and_(chunks.c.build_id == Attempt.build_id, chunks.c.attempt_no == Attempt.attempt_no))
        .where(Attempt.log_key.is_(None), Attempt.log_bytes > 0)
        .where(
            sa.or_(
                chunks.c.count.is_(None),
                chunks.c.count != Attempt.log_chunks,
                chunks.c.last != chunks.c.count - 1,
                chunks.c.size != Attempt.log_bytes,
                chunks.c.end != Attempt.log_bytes,
            )
        )
    )
    return [
        Fault(
            what=f"the log of attempt {row.attempt_no} of {row.build_id} should have {row.log_chunks} chunks with "
            f"{row.log_bytes} bytes, and has {row.count or 0} with {row.size or 0}",
            ids=(row.build_id,),
            hint="Restore the records from a backup.",
        )
        for row in scope.rows(torn)
    ]


def _problem_here(scope: Scope, row: Any, sha256: str | None) -> str | None:
    """What is wrong with the bytes of a log that still lies in the records."""
    digest, tally = hashlib.sha256(), Tally()
    with scope.db.reading() as session:
        if session.get(Attempt, (row.build_id, row.attempt_no), populate_existing=True).log_key is not None:  # type: ignore[union-attr]
            return None  # it moved meanwhile
        query = (
            sa.select(LogChunk.seq, LogChunk.offset, LogChunk.size, LogChunk.data, LogChunk.sha256)
            .where(LogChunk.build_id == row.build_id, LogChunk.attempt_no == row.attempt_no)
            .order_by(LogChunk.seq)
        )
        for chunk in session.execute(query).yield_per(8):
            data = bytes(chunk.data)
            if tally.take(data) != Chunk(chunk.seq, chunk.offset, chunk.size, chunk.sha256):
                return f"has other bytes in chunk {chunk.seq} than its record says"
            digest.update(data)
    if row.log_root not in (None, tally.root):
        return f"has the root {tally.root}, and had {row.log_root} when its attempt ended"
    return "is not what its worker wrote, by its SHA-256" if sha256 is not None and digest.hexdigest() != sha256 else None


def _problem_there(store: Store, bucket: str, row: Any, sha256: str | None) -> str | None:
    """What is wrong with a log in the object store, held against the list of its chunks, if it was put away with one."""
    if row.log_root is None:
        return _problem(store, bucket, row.log_key, row.log_bytes, sha256)
    try:
        with store.open(bucket, row.log_key) as body:
            with store.open(bucket, log_list_key(row.build_id, row.attempt_no)) as listed:
                lines = listed.read().splitlines(keepends=True)
            tally, found = compare(read_list(lines), body.read)
    except InfraProblem as problem:
        store.check()  # the store as a whole is away: that is no fault of this object
        return f"cannot be read: {problem.message}"
    except FileNotFoundError:
        return "is not in the object store, or the list of its chunks is not"
    except Unsound as problem:
        return f"is not what the list of its chunks says: {problem}"
    if tally.root != row.log_root:
        return f"has the root {tally.root}, and had {row.log_root} when its attempt ended"
    return None if sha256 in (None, found) else "is not what its worker wrote, by its SHA-256"


def _ended(scope: Scope, *conditions: sa.ColumnElement[bool], losers: bool) -> list[Any]:
    """Attempts, newest first, each with whether its two folders are to be seen; of `losers`, one of them at least is not."""
    visible = sa.select(Artifact.build_id).where(Artifact.build_id == Attempt.build_id, Artifact.attempt_no == Attempt.attempt_no)
    cached = caches.of_attempt()
    return _newest(
        scope,
        sa.select(Attempt.build_id, Attempt.attempt_no, visible.exists().label("visible"), cached.label("cached"))
        .join(Build, Build.id == Attempt.build_id)
        .where(*conditions, sa.or_(~visible.exists(), ~cached) if losers else sa.true()),
    )


def _folders(row: Any) -> Iterator[str]:
    if not row.visible:
        yield staging_prefix(row.build_id, row.attempt_no)
    if not row.cached:
        yield cache_prefix(row.build_id, row.attempt_no)


def losers_are_gone(scope: Scope) -> Said:
    """7: a day after its end, nothing is left of what an attempt uploaded that nobody may see."""
    store = the_store(scope)
    late = scope.rows(
        sa.select(Attempt.build_id, Attempt.attempt_no).where(
            Attempt.ended_ms < now_ms() - _DAY_MS - _HOUR_MS, Attempt.swept == sa.false()
        )
    )
    hint = "Is the scheduler running? /readyz says."
    faults = [
        Fault(
            what=f"attempt {row.attempt_no} of {row.build_id} ended more than a day ago, and nobody has cleared up after it",
            ids=(row.build_id,),
            repair=DROP_LOSERS,
            hint=hint,
        )
        for row in late
    ]
    rows = _ended(scope, Attempt.swept == sa.true(), losers=True)
    for row in rows:
        left = [item.key for folder in _folders(row) for item in store.list(scope.settings.bucket, folder)]
        if left and len(faults) <= SHOWN:
            what = f"attempt {row.attempt_no} of {row.build_id} lost, and {len(left)} of its objects are there: {left[0]}"
            faults.append(Fault(what=what, ids=(row.build_id, *left[:10]), repair=DROP_LOSERS))
    return said(f"{len(rows)} attempts with nothing to show, newest first", faults)


def drop_losers(scope: Scope) -> str:
    """Remove what attempts left that ended more than a day ago, and of which nothing may be seen."""
    store = the_store(scope)
    over = (Attempt.ended_ms < now_ms() - _DAY_MS, Build.state.in_(TERMINAL_NAMES))
    rows = _ended(scope, *over, Attempt.swept == sa.false(), losers=False) + _ended(scope, *over, losers=True)
    count = sum(store.delete_prefix(scope.settings.bucket, folder) for row in rows for folder in _folders(row))

    def work(session: Any) -> None:
        for row in rows:
            session.execute(
                sa.update(Attempt)
                .where(Attempt.build_id == row.build_id, Attempt.attempt_no == row.attempt_no)
                .values(swept=True)
            )

    scope.db.run(work)
    return f"removed {count} objects of {len(rows)} attempts"
