"""What an attempt reports while it runs: phases and log chunks. Everything is fenced by attempt and token."""

import hashlib
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import MAX_LOG_CHUNK_BYTES, CacheQuery, PhaseReport
from millrace.errors import Conflict, InvalidInput, TooLarge
from millrace.packing import Packed
from millrace.project import BuildSettings
from scheduler import caches, logs
from scheduler.db import Database
from scheduler.lifecycle import check_phases, held, note_phases
from scheduler.models import Attempt, Build, LogChunk


def record_phase(db: Database, build_id: str, attempt_no: int, token_hash: str, *reports: PhaseReport) -> None:
    """Write down that phases began or ended. The first one starts the build; FINALIZING makes it FINALIZING.

    Raises AttemptFenced, InvalidInput for a phase that is not the worker's to report.
    """
    check_phases(reports)

    def work(session: Session) -> None:
        build, _attempt = held(session, build_id, attempt_no, token_hash)
        note_phases(session, build, reports)

    db.run(work)


def store_log(
    db: Database,
    build_id: str,
    attempt_no: int,
    token_hash: str,
    *,
    seq: int,
    offset: int,
    data: bytes,
    sha256: str,
    packed: Packed | None = None,
) -> None:
    """Keep one chunk of the log. The same chunk twice is fine; a gap or other bytes under the same number are a Conflict.

    `packed` is the same `data`, if it came packed; it is kept so.

    Raises AttemptFenced, InvalidInput for an empty or damaged chunk, TooLarge for a chunk over its limit, and for the first that
    a log over its limit has no room for, of which so much is kept as there is.
    """
    if len(data) > MAX_LOG_CHUNK_BYTES:
        raise TooLarge(f"a log chunk has at most {MAX_LOG_CHUNK_BYTES} bytes, this one has {len(data)}")
    if not data:
        raise InvalidInput("a log chunk is not empty")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidInput("the log chunk is not what its SHA-256 says", hint="Send it again.")

    def work(session: Session) -> bool:
        _build, attempt = held(session, build_id, attempt_no, token_hash)
        room = logs.MAX_LOG_BYTES - attempt.log_bytes
        if seq < attempt.log_chunks:
            known = session.get(LogChunk, (build_id, attempt_no, seq))
            if known is not None and known.sha256 == sha256:
                return True
            if room <= 0:
                return False
            raise Conflict(f"log chunk {seq} is already there with other bytes")
        if seq > attempt.log_chunks or offset != attempt.log_bytes:
            raise Conflict(
                f"log chunk {seq} at offset {offset} leaves a gap: "
                f"chunk {attempt.log_chunks} at offset {attempt.log_bytes} is next"
            )
        if room <= 0:
            return False
        fits = len(data) <= room
        kept = data if fits else data[:room]
        session.add(
            LogChunk(
                build_id=build_id,
                attempt_no=attempt_no,
                seq=seq,
                offset=offset,
                size=len(kept),
                sha256=sha256 if fits else hashlib.sha256(kept).hexdigest(),
                data=packed if fits and packed is not None else kept,
            )
        )
        attempt.log_chunks += 1
        attempt.log_bytes += len(kept)
        return fits

    if not db.run(work):
        raise TooLarge(f"a log has at most {logs.MAX_LOG_BYTES} bytes", hint="Write less to the log, or keep it as an artifact.")


def is_token_of(db: Database, build_id: str, attempt_no: int, token_hash: str) -> bool:
    """True where this is the token of that attempt, be it over or not."""
    if not 0 < attempt_no < 2**31 or "\x00" in build_id:
        return False
    with db.reading() as session:
        attempt = session.get(Attempt, (build_id, attempt_no))
        return attempt is not None and attempt.token_hash == token_hash


def settings_of(db: Database, build_id: str, attempt_no: int, token_hash: str) -> BuildSettings:
    """The settings of the build that this attempt holds: what a grant is checked against. Raises AttemptFenced."""

    def work(session: Session) -> BuildSettings:
        build, _attempt = held(session, build_id, attempt_no, token_hash)
        return BuildSettings.model_validate(build.settings)

    return db.run(work)


UNNAMED: Final = ""
"""In the place of an upload's name, as long as the store has not given it one."""


def note_parts(db: Database, build_id: str, attempt_no: int, token_hash: str, key: str, upload: str) -> None:
    """Something is sent in parts from now on, which are removed if it is never completed. Raises AttemptFenced.

    It is noted before it is begun, with the name UNNAMED: should nobody come to note the name, it is looked for by its key.
    """

    def work(session: Session) -> None:
        _build, attempt = held(session, build_id, attempt_no, token_hash)
        if [key, upload] not in (known := attempt.in_parts or []):
            attempt.in_parts = [*known, [key, upload]]

    db.run(work)


def has_parts(db: Database, build_id: str, attempt_no: int, token_hash: str, key: str, upload: str) -> bool:
    """Whether this attempt sends that in parts. Raises AttemptFenced."""

    def work(session: Session) -> bool:
        _build, attempt = held(session, build_id, attempt_no, token_hash)
        return [key, upload] in (attempt.in_parts or ())

    return db.run(work)


def find_cache(db: Database, build_id: str, attempt_no: int, token_hash: str, query: CacheQuery) -> caches.Found | None:
    """The cache that answers to a build's attempt. Raises AttemptFenced."""

    def work(session: Session) -> caches.Found | None:
        build, attempt = held(session, build_id, attempt_no, token_hash)
        return caches.find(session, build, attempt, query)

    return db.run(work)


def live(db: Database) -> set[tuple[str, int]]:
    """Build id and number of every attempt that holds a build now."""
    with db.reading() as session:
        rows = session.execute(
            sa.select(Attempt.build_id, Attempt.attempt_no)
            .join(Build, sa.and_(Build.id == Attempt.build_id, Build.attempt_no == Attempt.attempt_no))
            .where(Attempt.ended_ms.is_(None))
        ).all()
    return {(row.build_id, row.attempt_no) for row in rows}
