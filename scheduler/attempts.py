"""What an attempt reports while it runs: phases and log chunks. Everything is fenced by attempt and token."""

import hashlib
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import MAX_LOG_CHUNK_BYTES, CacheQuery, PhaseReport
from millrace.errors import Conflict, InvalidInput, TooLarge
from millrace.project import BuildSettings
from millrace.vocabulary import BuildState, PhaseType
from scheduler import caches
from scheduler.db import Database
from scheduler.lifecycle import apply, held, plain
from scheduler.models import Attempt, Build, LogChunk, Phase
from scheduler.states import BuildEvent

_FARMS_OWN: Final = frozenset({PhaseType.SUBMITTED, PhaseType.QUEUED, PhaseType.COMPLETED})
"""Phases that the farm tells from the build's own times; no worker reports them."""
MAX_LOG_BYTES: Final = 1024**3
"""How long an attempt's log may be: it lies in the database while the build runs. What is beyond is refused, and the log
marked as incomplete."""


def record_phase(db: Database, build_id: str, attempt_no: int, token_hash: str, report: PhaseReport) -> None:
    """Write down that a phase began or ended. The first one starts the build; FINALIZING makes it FINALIZING.

    Raises AttemptFenced, InvalidInput for a phase that is not the worker's to report.
    """
    if report.phase_type in _FARMS_OWN:
        raise InvalidInput(f"the phase {report.phase_type} is told by the farm, not by a worker")

    def work(session: Session) -> None:
        build, _attempt = held(session, build_id, attempt_no, token_hash)
        if build.state == BuildState.CLAIMED:
            apply(session, build, BuildEvent.STARTED)
        if report.phase_type in (PhaseType.UPLOAD_ARTIFACTS, PhaseType.FINALIZING) and build.state == BuildState.RUNNING:
            apply(session, build, BuildEvent.FINALIZING)
        phase = session.get(Phase, (build_id, attempt_no, report.phase_type.value))
        if phase is None:
            phase = Phase(build_id=build_id, attempt_no=attempt_no, phase_type=report.phase_type.value, contexts=[])
            session.add(phase)
        elif phase.ended_ms is not None and report.ended_at_ms is None:
            return  # a late repeat of the beginning
        phase.started_ms = report.started_at_ms
        phase.ended_ms, phase.duration_ms = report.ended_at_ms, report.duration_ms
        phase.status = report.status.value if report.status else None
        phase.contexts = [context.model_dump(by_alias=True) for context in report.contexts]
        if report.resolved_source_version:
            build.resolved_source_version = plain(report.resolved_source_version)[:256]

    db.run(work)


def store_log(
    db: Database, build_id: str, attempt_no: int, token_hash: str, *, seq: int, offset: int, data: bytes, sha256: str
) -> None:
    """Keep one chunk of the log. The same chunk twice is fine; a gap or other bytes under the same number are a Conflict.

    Raises AttemptFenced, InvalidInput for an empty or damaged chunk, TooLarge for a chunk or log over its limit.
    """
    if len(data) > MAX_LOG_CHUNK_BYTES:
        raise TooLarge(f"a log chunk has at most {MAX_LOG_CHUNK_BYTES} bytes, this one has {len(data)}")
    if not data:
        raise InvalidInput("a log chunk is not empty")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidInput("the log chunk is not what its SHA-256 says", hint="Send it again.")

    def work(session: Session) -> None:
        _build, attempt = held(session, build_id, attempt_no, token_hash)
        if seq < attempt.log_chunks:
            known = session.get(LogChunk, (build_id, attempt_no, seq))
            if known is None or known.sha256 != sha256:
                raise Conflict(f"log chunk {seq} is already there with other bytes")
            return
        if seq > attempt.log_chunks or offset != attempt.log_bytes:
            raise Conflict(
                f"log chunk {seq} at offset {offset} leaves a gap: "
                f"chunk {attempt.log_chunks} at offset {attempt.log_bytes} is next"
            )
        if offset + len(data) > MAX_LOG_BYTES:
            raise TooLarge(f"a log has at most {MAX_LOG_BYTES} bytes", hint="Write less to the log, or keep it as an artifact.")
        session.add(
            LogChunk(build_id=build_id, attempt_no=attempt_no, seq=seq, offset=offset, size=len(data), sha256=sha256, data=data)
        )
        attempt.log_chunks += 1
        attempt.log_bytes += len(data)

    db.run(work)


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


def find_cache(db: Database, build_id: str, attempt_no: int, token_hash: str, query: CacheQuery) -> caches.Found | None:
    """The cache that answers to a build's attempt. Raises AttemptFenced."""

    def work(session: Session) -> caches.Found | None:
        build, _attempt = held(session, build_id, attempt_no, token_hash)
        return caches.find(session, build, query)

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
