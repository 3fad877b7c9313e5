"""From a request to a build on durable storage: the record and its bell in one commit."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import FieldProblem, IdempotencyMismatch, InvalidInput, NotFound
from millrace.ids import new_build_id
from millrace.log import get_logger
from millrace.project import BuildOverrides, BuildSettings, ProjectSettings, effective
from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler.db import Database, now_ms
from scheduler.lifecycle import put_bell
from scheduler.models import Build, Idempotency, Project

log = get_logger(__name__)
KEY_LASTS_MS: Final = 86_400_000
"""How long an idempotency key is remembered."""
_FLEET_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A wish for a build. The same `idempotency_key` in the same `idempotency_scope` within 24 hours means the same build."""

    overrides: BuildOverrides
    initiator: str
    idempotency_scope: str = ""
    idempotency_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The build of a request; `created` is False where an earlier request of the same key made it."""

    build_id: str
    fleet: str
    created: bool


def submit(db: Database, request: BuildRequest, settings: Settings) -> Submitted:
    """Queue a build. When this returns, the build is on durable storage.

    Raises NotFound for an unknown project, InvalidInput where an override does not fit, IdempotencyMismatch.
    """

    def work(session: Session) -> Submitted:
        if request.idempotency_key is not None:
            known = _known(session, request.idempotency_scope, request.idempotency_key)
            if known is not None:
                return _again(session, known, _digest(request))
        project = session.get(Project, request.overrides.project_name, with_for_update=True)
        if project is None or project.deleted_ms is not None:
            raise NotFound(
                f"there is no project {request.overrides.project_name!r}",
                hint="POST /v1/projects makes one; GET /v1/projects lists them.",
            )
        wanted = _settings(project, request.overrides)
        build = _record(session, project, wanted, request, settings)
        put_bell(session, build)
        if request.idempotency_key is not None:
            session.add(
                Idempotency(
                    scope=request.idempotency_scope,
                    key=request.idempotency_key,
                    request_sha256=_digest(request),
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
        log.info("build.queued", build_id=submitted.build_id, project=request.overrides.project_name, initiator=request.initiator)
    return submitted


def _settings(project: Project, overrides: BuildOverrides) -> BuildSettings:
    try:
        return effective(ProjectSettings.model_validate(project.settings), overrides)
    except ValidationError as error:
        fields = [FieldProblem(field=".".join(str(part) for part in item["loc"]), what=item["msg"]) for item in error.errors()]
        raise InvalidInput("the overrides do not fit the project", fields=fields) from error


def _record(session: Session, project: Project, wanted: BuildSettings, request: BuildRequest, settings: Settings) -> Build:
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    project.last_build_number += 1
    build = Build(
        id=new_build_id(project.name),
        project_name=project.name,
        number=project.last_build_number,
        settings=wanted.model_dump(mode="json", by_alias=True, exclude_none=True),
        initiator=request.initiator,
        fleet=_fleet(wanted),
        priority=request.overrides.priority,
        state=BuildState.QUEUED.value,
        max_attempts=settings.max_attempts,
        submitted_ms=now,
        queued_ms=now,
        queue_deadline_ms=now + wanted.queued_timeout_in_minutes * 60_000,
        marks={"accepted": now},
        attempt_no=0,
        faults=0,
        message="",
        exported=[],
    )
    session.add(build)
    session.flush()
    return build


def _fleet(wanted: BuildSettings) -> str:
    """The fleet that a build asks for: a bare name, or the name in a fleet ARN (`...:fleet/NAME:UUID`)."""
    arn = wanted.environment.fleet.fleet_arn if wanted.environment.fleet else None
    if not arn:
        return "default"
    name = arn.rpartition("fleet/")[2].partition(":")[0] if arn.startswith("arn:") else arn
    if _FLEET_NAME.fullmatch(name) is None:
        what = "is neither the ARN nor the name of a fleet; a name has at most 100 letters, digits, hyphens, dots and underscores"
        raise InvalidInput(f"{arn[:100]!r} {what}", fields=[FieldProblem(field="environment.fleet.fleetArn", what=what)])
    return name


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


def _digest(request: BuildRequest) -> str:
    text = json.dumps(request.overrides.model_dump(mode="json", exclude={"idempotency_token"}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
