"""What can be asked of the records. Reads only."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.contract import LogFooter
from millrace.errors import InfraProblem, InvalidInput
from millrace.ids import log_list_key
from millrace.project import BuildSettings
from millrace.settings import Settings
from millrace.storage import Store
from millrace.vocabulary import BuildState, PhaseType, Reason, StatusType
from scheduler import logs
from scheduler.db import Database
from scheduler.models import Artifact, Attempt, Build, LogChunk, Phase
from scheduler.states import TERMINAL

_ORDER = {phase.value: number for number, phase in enumerate(PhaseType)}


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase. A running one has no status and no end; `contexts` is None where CodeBuild sends none."""

    phase_type: PhaseType
    status: StatusType | None
    started_ms: int
    ended_ms: int | None
    duration_ms: int | None
    contexts: Sequence[Mapping[str, str]] | None


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """A visible artifact. `identifier` is empty for the primary one."""

    name: str
    identifier: str
    key: str
    size_bytes: int
    sha256: str
    md5: str
    packaging: str
    file_count: int
    public_bucket: str | None
    public_key: str | None
    published: bool
    public_problem: str | None


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One try at the build."""

    attempt_no: int
    worker_id: str
    claimed_ms: int
    ended_ms: int | None
    verdict: str | None
    reason: str | None
    message: str


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """Everything there is to show of a build. Phases are those of its present attempt."""

    id: str
    project_name: str
    number: int
    settings: BuildSettings
    initiator: str
    fleet: str
    priority: int
    state: BuildState
    reason: Reason | None
    message: str
    exit_code: int | None
    attempt_no: int
    attempts: Sequence[AttemptRecord]
    cancel_requested: bool
    submitted_ms: int
    finished_ms: int | None
    resolved_source_version: str | None
    exported: Sequence[Mapping[str, str]]
    marks: Mapping[str, int]
    phases: Sequence[PhaseRecord]
    artifacts: Sequence[ArtifactRecord]
    retry_of: str | None
    auto_retry_number: int
    next_auto_retry: str | None

    @property
    def ended(self) -> bool:
        """True where nothing will change any more."""
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class LogInfo:
    """How much there is of an attempt's log. `ended`: no more will come; `complete`: all that the worker wrote is here.

    `gap` says in one line what is not; `missing_bytes` how much, where that is known; `full` that it is at its limit. `footer`
    is the worker's word. `root` is that of the stored chunks, once no more will come.
    """

    attempt_no: int
    size_bytes: int
    chunks: int = 0
    root: str | None = None
    footer: LogFooter | None = None
    ended: bool
    complete: bool
    gap: str | None = None
    missing_bytes: int | None = None
    full: str | None = None
    state: BuildState
    reason: Reason | None


def get_build(db: Database, build_id: str) -> BuildRecord | None:
    """The build with its phases, attempts and artifacts; None where there is none."""
    if "\x00" in build_id:
        return None
    with db.reading() as session:
        build = session.get(Build, build_id)
        return None if build is None else _full(session, [build])[0]


def find_builds(
    db: Database,
    *,
    project: str | None = None,
    states: Sequence[BuildState] = (),
    limit: int = 50,
    cursor: str | None = None,
) -> tuple[Sequence[BuildRecord], str | None]:
    """Builds, newest first, at most `limit`; and the cursor to go on with, or None. Raises InvalidInput for a bad cursor."""
    query = sa.select(Build).order_by(Build.submitted_ms.desc(), Build.id.desc()).limit(limit + 1)
    if project is not None:
        query = query.where(Build.project_name == project)
    if states:
        query = query.where(Build.state.in_([state.value for state in states]))
    if cursor is not None:
        moment, build_id = _read_cursor(cursor)
        query = query.where(sa.tuple_(Build.submitted_ms, Build.id) < sa.tuple_(sa.literal(moment), sa.literal(build_id)))
    with db.reading() as session:
        rows = session.scalars(query).all()
        page = rows[:limit]
        records = _full(session, page)
    return records, _cursor(page[-1]) if len(rows) > limit else None


def _cursor(build: Build) -> str:
    return base64.urlsafe_b64encode(f"{build.submitted_ms} {build.id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[int, str]:
    try:
        moment, _, build_id = base64.urlsafe_b64decode(cursor.encode()).decode().partition(" ")
        return int(moment), build_id
    except (ValueError, binascii.Error) as error:
        raise InvalidInput("the cursor is none of ours", hint="Use nextCursor of the page before, unchanged.") from error


def _full(session: Session, builds: Sequence[Build]) -> list[BuildRecord]:
    ids = [build.id for build in builds]
    phases: dict[str, list[Phase]] = {}
    for phase in session.scalars(sa.select(Phase).where(Phase.build_id.in_(ids))):
        phases.setdefault(phase.build_id, []).append(phase)
    attempts: dict[str, list[Attempt]] = {}
    for attempt in session.scalars(sa.select(Attempt).where(Attempt.build_id.in_(ids)).order_by(Attempt.attempt_no)):
        attempts.setdefault(attempt.build_id, []).append(attempt)
    artifacts: dict[str, list[Artifact]] = {}
    for artifact in session.scalars(
        sa.select(Artifact).where(Artifact.build_id.in_(ids)).order_by(Artifact.identifier, Artifact.name)
    ):
        artifacts.setdefault(artifact.build_id, []).append(artifact)
    return [_build(b, phases.get(b.id, []), attempts.get(b.id, []), artifacts.get(b.id, [])) for b in builds]


def _build(build: Build, phases: list[Phase], attempts: list[Attempt], artifacts: list[Artifact]) -> BuildRecord:
    return BuildRecord(
        retry_of=build.retry_of,
        auto_retry_number=build.auto_retry_number,
        next_auto_retry=build.next_auto_retry,
        id=build.id,
        project_name=build.project_name,
        number=build.number,
        settings=BuildSettings.model_validate(build.settings),
        initiator=build.initiator,
        fleet=build.fleet,
        priority=build.priority,
        state=BuildState(build.state),
        reason=Reason(build.reason) if build.reason else None,
        message=build.message,
        exit_code=build.exit_code,
        attempt_no=build.attempt_no,
        attempts=[
            AttemptRecord(
                attempt_no=a.attempt_no,
                worker_id=a.worker_id,
                claimed_ms=a.claimed_ms,
                ended_ms=a.ended_ms,
                verdict=a.verdict,
                reason=a.reason,
                message=a.message,
            )
            for a in attempts
        ],
        cancel_requested=build.cancel_requested_ms is not None,
        submitted_ms=build.submitted_ms,
        finished_ms=build.finished_ms,
        resolved_source_version=build.resolved_source_version,
        exported=build.exported,
        marks=build.marks,
        phases=_phases(build, [p for p in phases if p.attempt_no == build.attempt_no]),
        artifacts=[
            ArtifactRecord(
                name=a.name,
                identifier=a.identifier,
                key=a.key,
                size_bytes=a.size_bytes,
                sha256=a.sha256,
                md5=a.md5,
                packaging=a.packaging,
                file_count=a.file_count,
                public_bucket=a.public_bucket,
                public_key=a.public_key,
                published=a.published,
                public_problem=a.public_problem,
            )
            for a in artifacts
        ],
    )


def _phases(build: Build, reported: list[Phase]) -> list[PhaseRecord]:
    """SUBMITTED and QUEUED from the build's own times, then what the attempt reported, then COMPLETED (CodeBuild: phases)."""
    state = BuildState(build.state)
    in_queue = build.deadline_ms is None  # it waits, perhaps again, or ended while it did
    queue_end = build.finished_ms if in_queue else build.first_claimed_ms
    queue_status: StatusType | None = StatusType.SUCCEEDED
    if in_queue:
        queue_status = StatusType(state.value) if state in TERMINAL else None
    records = [
        PhaseRecord(
            phase_type=PhaseType.SUBMITTED,
            status=StatusType.SUCCEEDED,
            started_ms=build.submitted_ms,
            ended_ms=build.submitted_ms,
            duration_ms=0,
            contexts=None,
        ),
        PhaseRecord(
            phase_type=PhaseType.QUEUED,
            status=queue_status,
            started_ms=build.submitted_ms,
            ended_ms=queue_end,
            duration_ms=None if queue_end is None else queue_end - build.submitted_ms,
            contexts=None,
        ),
    ]
    if not in_queue:
        records += [
            PhaseRecord(
                phase_type=PhaseType(p.phase_type),
                status=StatusType(p.status) if p.status else None,
                started_ms=p.started_ms,
                ended_ms=p.ended_ms,
                duration_ms=p.duration_ms,
                contexts=None if p.ended_ms is None or p.status == StatusType.STOPPED else p.contexts,
            )
            for p in sorted(reported, key=lambda p: _ORDER[p.phase_type])
            if p.phase_type != PhaseType.COMPLETED
        ]
    if build.finished_ms is not None:
        records.append(
            PhaseRecord(
                phase_type=PhaseType.COMPLETED,
                status=None,
                started_ms=build.finished_ms,
                ended_ms=None,
                duration_ms=None,
                contexts=None,
            )
        )
    return records


_PULSE: Final = (
    sa.select(Build.state, Build.attempt_no, Attempt.log_bytes, Attempt.log_complete, Attempt.ended_ms)
    .select_from(Build)
    .outerjoin(Attempt, sa.and_(Attempt.build_id == Build.id, Attempt.attempt_no == Build.attempt_no))
    .where(Build.id == sa.bindparam("build_id"))
)


def pulse(db: Database, build_id: str) -> tuple[object, ...] | None:
    """What changes when there is anything new of the log of a build's newest attempt; None where there is no such build.

    It costs a fraction of `log_info`: those who follow a log ask it over and over.
    """
    with db.reading() as session:
        row = session.connection().execute(_PULSE, {"build_id": build_id}).first()
        return None if row is None else tuple(row)


def phases_of(db: Database, build_id: str) -> list[PhaseRecord]:
    """A build's phases; none where there is no such build."""
    with db.reading() as session:
        build = session.get(Build, build_id)
        return [] if build is None else _phases(build, list(session.scalars(sa.select(Phase).where(Phase.build_id == build_id))))


def log_info(db: Database, build_id: str, attempt_no: int | None = None) -> LogInfo | None:
    """How long the log of an attempt is, by default of the newest; None where there is no such build."""
    with db.reading() as session:
        build = session.get(Build, build_id)
        if build is None:
            return None
        number = build.attempt_no if attempt_no is None else attempt_no
        attempt = session.get(Attempt, (build_id, number))
        state = BuildState(build.state)
        reason = Reason(build.reason) if build.reason else None
        if attempt is None:
            over = state in TERMINAL
            return LogInfo(attempt_no=number, size_bytes=0, ended=over, complete=over, state=state, reason=reason)
        gap = logs.gap(attempt)
        return LogInfo(
            attempt_no=number,
            size_bytes=attempt.log_bytes,
            chunks=attempt.log_chunks,
            root=attempt.log_root,
            footer=logs.footer_of(attempt),
            ended=attempt.ended_ms is not None,
            complete=attempt.log_complete,
            gap=gap,
            missing_bytes=logs.missing_bytes(attempt) if gap else None,
            full=logs.full() if logs.is_full(attempt) else None,
            state=state,
            reason=reason,
        )


def read_log(
    db: Database, store: Store, settings: Settings, build_id: str, attempt_no: int, offset: int, max_bytes: int
) -> bytes:
    """Up to `max_bytes` of an attempt's log from byte `offset`; b"" at the present end.

    Raises InfraProblem where the store fails.
    """
    with db.reading() as session:
        attempt = session.get(Attempt, (build_id, attempt_no))
        if attempt is None:
            return b""
        if attempt.log_key is None:
            rows = session.execute(
                sa.select(LogChunk.offset, LogChunk.data)
                .where(LogChunk.build_id == build_id, LogChunk.attempt_no == attempt_no)
                .where(LogChunk.offset + LogChunk.size > offset, LogChunk.offset < offset + max_bytes)
                .order_by(LogChunk.seq)
                .limit(64)
            )
            return _join(rows.all(), offset, max_bytes)
    if offset >= attempt.log_bytes:
        return b""
    try:
        with store.open(settings.bucket, attempt.log_key, offset=offset) as body:
            return body.read(max_bytes)
    except FileNotFoundError as error:
        raise InfraProblem(
            f"the log {attempt.log_key} is not in the object store", reason=Reason.STORAGE, hint="Was it deleted there?"
        ) from error


def log_list(db: Database, store: Store, settings: Settings, build_id: str, attempt_no: int) -> bytes | None:
    """The list of the chunks of an attempt's log (`millrace.chunks`), so far; None where an older release put it away without.

    Raises InfraProblem where the store fails.
    """
    with db.reading() as session:
        attempt = session.get(Attempt, (build_id, attempt_no))
        if attempt is None or attempt.log_key is None:
            return b"".join(chunk.line for chunk in logs.listed(session, build_id, attempt_no))
    if attempt.log_root is None:
        return None
    key = log_list_key(build_id, attempt_no)
    try:
        with store.open(settings.bucket, key) as body:
            return body.read()
    except FileNotFoundError as error:
        raise InfraProblem(
            f"the list of chunks {key} is not in the object store", reason=Reason.STORAGE, hint="Was it deleted there?"
        ) from error


def _join(rows: Sequence[sa.Row[tuple[int, bytes]]], offset: int, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    for start, data in rows:
        if start > offset + size:  # a chunk is missing here: what is behind it must not pass for what it was
            break
        part = bytes(data)[max(0, offset - start) :][: max_bytes - size]
        parts.append(part)
        size += len(part)
        if size >= max_bytes:
            break
    return b"".join(parts)


def artifact(db: Database, build_id: str, name: str, identifier: str = "") -> ArtifactRecord | None:
    """One visible artifact by its name."""
    record = get_build(db, build_id)
    if record is None:
        return None
    return next((item for item in record.artifacts if item.name == name and item.identifier == identifier), None)
