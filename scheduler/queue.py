"""How a build comes into the queue: its row and its bell, in the commit of whatever made it."""

import re
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import FieldProblem, InvalidInput
from millrace.fleet import FLEET_NAME
from millrace.ids import new_build_id
from millrace.project import BuildSettings
from millrace.vocabulary import BuildState
from scheduler import notices
from scheduler.db import now_ms
from scheduler.models import Build, Outbox, Project

_COMMIT: Final = re.compile(r"[0-9a-f]{7,40}|[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a build comes from. `retry_of` names the build that it repeats; `auto_retry_number` counts from the first one, 0.

    `level` and `priority` are as in `scheduler.models.Build`; so is `line`.
    """

    initiator: str
    level: int
    priority: int
    max_attempts: int
    line: str | None = None
    retry_of: str | None = None
    auto_retry_number: int = 0


def enqueue(session: Session, project: Project, wanted: BuildSettings, origin: Origin) -> Build:
    """A new build of `project`, whose row is locked in this session, with the next number. Raises InvalidInput for its fleet."""
    fleet = fleet_of(wanted)  # whatever is wrong is found before anything is changed
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    project.last_build_number += 1
    build = Build(
        id=new_build_id(project.name),
        project_name=project.name,
        number=project.last_build_number,
        settings=wanted.model_dump(mode="json", by_alias=True, exclude_none=True),
        initiator=origin.initiator,
        fleet=fleet,
        level=origin.level,
        priority=origin.priority,
        rank=-1000 * origin.level - origin.priority,
        line=origin.line,
        state=BuildState.QUEUED.value,
        max_attempts=origin.max_attempts,
        submitted_ms=now,
        queued_ms=now,
        queue_deadline_ms=now + wanted.queued_timeout_in_minutes * 60_000,
        marks={"accepted": now},
        attempt_no=0,
        faults=0,
        message="",
        exported=[],
        retry_of=origin.retry_of,
        auto_retry_number=origin.auto_retry_number,
        not_before_ms=0,
        need=wanted.environment.need.key,
    )
    session.add(build)
    session.flush()
    put_bell(session, build, at_ms=now)
    notices.note(session, build)
    return build


def bell_key(build_id: str, attempt_no: int) -> str:
    """The outbox key of the bell for a build that waits after `attempt_no` attempts."""
    return f"bell/{build_id}/{attempt_no}"


def put_bell(session: Session, build: Build, *, at_ms: int | None = None) -> None:
    """Leave word that `build` waits, to be told to its fleet after the commit, or when it may start. `at_ms` is now."""
    if at_ms is None:
        at_ms = session.execute(sa.select(now_ms())).scalar_one()
    session.add(
        Outbox(
            kind="bell",
            key=bell_key(build.id, build.attempt_no),
            payload={"buildId": build.id, "fleet": build.fleet},
            created_ms=at_ms,
            next_try_ms=max(at_ms, build.not_before_ms),
        )
    )


def line_of(wanted: BuildSettings) -> str | None:
    """The branch or pull request that a build is of; None of a commit, a tag, or a source that is no git repository.

    No version at all is the repository's own default branch.
    """
    if not wanted.source.is_git:
        return None
    version = (wanted.source_version or "HEAD").removeprefix("refs/heads/")
    return None if version.startswith("refs/tags/") or _COMMIT.fullmatch(version) else version


def asked_for(arn: str | None) -> str:
    """The fleet that a build asks for: a bare name, or the name in a fleet ARN (`...:fleet/NAME:UUID`), where it names one."""
    if not arn:
        return "default"
    return arn.rpartition("fleet/")[2].partition(":")[0] if arn.startswith("arn:") else arn


def fleet_of(wanted: BuildSettings) -> str:
    """The fleet that a build asks for. Raises InvalidInput."""
    arn = wanted.environment.fleet.fleet_arn if wanted.environment.fleet else None
    name = asked_for(arn)
    if arn and FLEET_NAME.fullmatch(name) is None:
        what = "is neither the ARN nor the name of a fleet; a name has at most 100 letters, digits, hyphens, dots and underscores"
        raise InvalidInput(f"{arn[:100]!r} {what}", fields=[FieldProblem(field="environment.fleet.fleetArn", what=what)])
    return name
