"""From a request to a build on durable storage: the record and its bell in one commit."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import Conflict, FieldProblem, IdempotencyMismatch, InvalidInput, LimitExceeded, NotFound
from millrace.log import get_logger
from millrace.project import BuildOverrides, BuildSettings, ProjectSettings, WebhookCause, effective
from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler import placement
from scheduler.db import Database, now_ms
from scheduler.lifecycle import repeated, supersede
from scheduler.models import Build, Idempotency, Project
from scheduler.queue import Origin, enqueue, fleet_of, line_of
from scheduler.states import TERMINAL

log = get_logger(__name__)
KEY_LASTS_MS: Final = 86_400_000
"""How long an idempotency key is remembered."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A wish for a build. The same `idempotency_key` in the same `idempotency_scope` within 24 hours means the same build.

    `by_admin`: the request's priority counts among all builds of its fleet, not only among those of its project. `commit` is what
    git checks out, and `line` the branch or pull request, where `cause` tells of a webhook.
    """

    overrides: BuildOverrides
    initiator: str
    by_admin: bool = False
    cause: WebhookCause | None = None
    commit: str | None = None
    line: str | None = None
    idempotency_scope: str = ""
    idempotency_key: str | None = None

    def digest(self) -> str:
        """What the request asks for, to tell one from another of the same key."""
        return _sha256(json.dumps(self.overrides.model_dump(mode="json", exclude={"idempotency_token"}), sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class RetryRequest:
    """A wish to repeat a build that has ended (CodeBuild: RetryBuild)."""

    build_id: str
    initiator: str
    idempotency_scope: str = ""
    idempotency_key: str | None = None

    def digest(self) -> str:
        """As of a BuildRequest."""
        return _sha256(f"retry of {self.build_id}")


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The build of a request; `created` is False where an earlier request of the same key made it."""

    build_id: str
    fleet: str
    created: bool


def submit(db: Database, request: BuildRequest, settings: Settings) -> Submitted:
    """Queue a build. When this returns, the build is on durable storage.

    Raises NotFound for an unknown project, InvalidInput where an override does not fit, IdempotencyMismatch, LimitExceeded.
    """

    return _once(db, request, lambda session: queue(session, request, settings))


def queue(session: Session, request: BuildRequest, settings: Settings) -> Build:
    """Queue a build in the commit of this session. Raises as `submit` does."""
    project = _project(session, request.overrides.project_name)
    wanted = confined(_settings(project, request))
    priority = request.overrides.priority
    origin = Origin(
        initiator=request.initiator,
        level=project.priority + (priority if request.by_admin else 0),
        priority=priority,
        max_attempts=settings.max_attempts,
        line=line_of(wanted) if request.cause is None else request.line,
    )
    placement.refuse_misfit(session, fleet_of(wanted), wanted.environment)
    if settings.concurrency_overflow == "reject":
        _refuse_overflow(session, project)
    build = enqueue(session, project, wanted, origin)
    if project.cancel_superseded and build.line is not None:
        supersede(session, build)
    return build


def retry(db: Database, request: RetryRequest, settings: Settings) -> Submitted:
    """Queue a build like one that has ended, with its settings as they were then, whatever became of its project's.

    Raises NotFound for an unknown build or a deleted project, Conflict for a build that has not ended, IdempotencyMismatch.
    """

    def make(session: Session) -> Build:
        build = session.get(Build, request.build_id) if "\x00" not in request.build_id else None
        if build is None:
            raise NotFound(f"there is no build {request.build_id[:200]!r}", hint="GET /v1/builds lists them.")
        if BuildState(build.state) not in TERMINAL:
            raise Conflict(
                f"build {build.id} has not ended, it is {build.state}", hint="Stop it, or wait for its end, then retry it."
            )
        project = _project(session, build.project_name)
        origin = Origin(
            initiator=request.initiator,
            level=build.level,
            priority=build.priority,
            max_attempts=settings.max_attempts,
            retry_of=build.id,
        )
        try:
            wanted = repeated(build)
            placement.refuse_misfit(session, fleet_of(wanted), wanted.environment)
            return enqueue(session, project, wanted, origin)
        except ValidationError as error:
            raise Conflict(
                f"build {build.id} was made by another release, whose settings this one cannot read", hint="Start a new build."
            ) from error

    return _once(db, request, make)


def confined(wanted: BuildSettings) -> BuildSettings:
    """The settings of a build, without what a stranger's pull request must not have: privileges, sessions and public places.

    Secrets and caches are kept from it where they are handed out.
    """
    if wanted.fork is None:
        return wanted
    hidden = {"location": None}
    return wanted.model_copy(
        update={
            "environment": wanted.environment.model_copy(update={"privileged_mode": False}),
            "artifacts": wanted.artifacts.model_copy(update=hidden),
            "secondary_artifacts": tuple(one.model_copy(update=hidden) for one in wanted.secondary_artifacts),
            "debug_session_enabled": False,
        }
    )


def _once(db: Database, request: BuildRequest | RetryRequest, make: Callable[[Session], Build]) -> Submitted:
    """The build that `make` queues, or that an earlier request of the same key has made."""

    def work(session: Session) -> Submitted:
        if request.idempotency_key is not None:
            known = _known(session, request.idempotency_scope, request.idempotency_key)
            if known is not None:
                return _again(session, known, request.digest())
        build = make(session)
        if request.idempotency_key is not None:
            session.add(
                Idempotency(
                    scope=request.idempotency_scope,
                    key=request.idempotency_key,
                    request_sha256=request.digest(),
                    build_id=build.id,
                    created_ms=build.submitted_ms,
                )
            )
        return Submitted(build_id=build.id, fleet=build.fleet, created=True)

    try:
        submitted = db.run(work)
    except sa.exc.IntegrityError:
        if request.idempotency_key is None:
            raise
        submitted = db.run(work)  # the same key came twice at once: the other request won, and its build is the answer
    if submitted.created:
        log.info("build.queued", build_id=submitted.build_id, initiator=request.initiator)
    return submitted


def _project(session: Session, name: str) -> Project:
    project = session.get(Project, name, with_for_update=True)
    if project is None or project.deleted_ms is not None:
        raise NotFound(
            f"there is no project {name!r}",
            hint="POST /v1/projects makes one; GET /v1/projects lists them.",
        )
    return project


def _refuse_overflow(session: Session, project: Project) -> None:
    """CodeBuild: StartBuild over concurrentBuildLimit is an AccountLimitExceededException."""
    limit = project.concurrent_build_limit
    if limit is None:
        return
    busy = session.scalar(sa.select(sa.func.count()).where(Build.project_name == project.name, Build.finished_ms.is_(None)))
    if busy is not None and busy >= limit:
        raise LimitExceeded(
            f"project {project.name} has {busy} builds that wait or run, its limit is {limit}",
            hint="Wait for one to end, raise concurrentBuildLimit, or set MILLRACE_CONCURRENCY_OVERFLOW=queue.",
        )


def _settings(project: Project, request: BuildRequest) -> BuildSettings:
    try:
        wanted = effective(ProjectSettings.model_validate(project.settings), request.overrides)
        return wanted.model_copy(update={"source_commit": request.commit, "webhook": request.cause}) if request.cause else wanted
    except ValidationError as error:
        fields = [FieldProblem(field=".".join(str(part) for part in item["loc"]), what=item["msg"]) for item in error.errors()]
        raise InvalidInput("the overrides do not fit the project", fields=fields) from error


def _known(session: Session, scope: str, key: str) -> Idempotency | None:
    """What the key made; a key that is too old is forgotten here, as the sweeper may be late."""
    known = session.get(Idempotency, (scope, key))
    if known is None or known.created_ms > session.execute(sa.select(now_ms())).scalar_one() - KEY_LASTS_MS:
        return known
    session.expunge(known)
    session.execute(sa.delete(Idempotency).where(Idempotency.scope == scope, Idempotency.key == key))
    return None


def _again(session: Session, known: Idempotency, digest: str) -> Submitted:
    if known.request_sha256 != digest:
        raise IdempotencyMismatch(f"idempotency key {known.key!r} came before with another request, which made {known.build_id}")
    build = session.get(Build, known.build_id)
    if build is None:
        raise AssertionError("an idempotency row names a build that is there")
    return Submitted(build_id=build.id, fleet=build.fleet, created=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
