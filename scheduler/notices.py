"""What git servers are to be told of builds: a row in the commit of the move that it tells of. `scheduler.messenger` sends them.

A topic is one context of one commit of one repository; its newest word is all that has to arrive. Newest is what the build says
that was asked for last: an older one that ends late has no say any more.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from string import Template
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import Conflict
from millrace.project import BuildSettings, WebhookCause
from millrace.vocabulary import BuildState, SourceType
from scheduler.db import Database, now_ms
from scheduler.models import Build, Notice

REPORTED: Final = frozenset(
    {
        SourceType.GITHUB,
        SourceType.GITHUB_ENTERPRISE,
        SourceType.BITBUCKET,
        SourceType.GITLAB,
        SourceType.GITLAB_SELF_MANAGED,
    }
)
"""Sources whose server takes a status (CodeBuild: ProjectSource, reportBuildStatus)."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_WORDS: Final = {
    BuildState.QUEUED: "Build queued",
    BuildState.RUNNING: "Build running",
    BuildState.SUCCEEDED: "Build succeeded",
    BuildState.FAILED: "Build failed",
    BuildState.FAULT: "Build faulted",
    BuildState.TIMED_OUT: "Build timed out",
    BuildState.STOPPED: "Build stopped",
}
"""The states that are told of. That a build is claimed or tidies up is no news."""
_MAX_CONTEXT: Final = 255


class Outcome(StrEnum):
    """What became of a notice. REFUSED and GIVEN_UP have a `why`; so has one that waits, once it was tried."""

    WAITING = "WAITING"
    SENT = "SENT"
    SUPERSEDED = "SUPERSEDED"
    REFUSED = "REFUSED"
    GIVEN_UP = "GIVEN_UP"


@dataclass(frozen=True, kw_only=True)
class NoticeRecord:
    """A notice as it may be shown. Times are milliseconds since 1970; `due_ms` None: nothing is sent any more."""

    build_id: str
    commit: str
    context: str
    state: BuildState
    outcome: Outcome
    why: str
    tries: int
    created_ms: int
    due_ms: int | None
    settled_ms: int | None


def note(session: Session, build: Build) -> None:
    """Leave word of the state that `build` has come to, where its project wants that and its commit is known."""
    source = build.settings.get("source")
    state = BuildState(build.state)
    if state not in _WORDS or not isinstance(source, dict) or not _wanted(build.settings, source):
        return
    commit = commit_of(build)
    if commit is None:
        return
    config = source.get("buildStatusConfig")
    context = str(config.get("context") or "") if isinstance(config, dict) else ""
    topic = [source.get("type"), source.get("location"), commit, _named(context, build) or f"\n{build.project_name}"]
    now: int = session.execute(sa.select(now_ms())).scalar_one()
    session.add(
        Notice(
            project_name=build.project_name,
            build_id=build.id,
            topic=hashlib.sha256(json.dumps(topic).encode()).hexdigest(),
            asked_ms=build.submitted_ms,
            commit_id=commit,
            context=context[:_MAX_CONTEXT],
            state=state.value,
            created_ms=now,
            due_ms=now,
        )
    )


def _named(context: str, build: Build) -> str:
    """`context` without its variables, but for those of the farm, which are the same for all its builds."""
    if "$" not in context:
        return context
    try:
        return expand(context, _variables(BuildSettings.model_validate(build.settings), build))
    except ValidationError:  # who sends it says so; the build goes on
        return context


def _wanted(settings: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """CodeBuild: builds of a webhook are always told of. Without a credential that cannot be, and is not tried unasked."""
    if source.get("type") not in list(REPORTED):  # a damaged record may hold anything
        return False
    return bool(source.get("reportBuildStatus") or (settings.get("webhook") and source.get("auth")))


def commit_of(build: Build) -> str | None:
    """The whole id of the commit that a build is of; None while it is not known."""
    cause = build.settings.get("webhook")
    caused = cause.get("commit") if isinstance(cause, dict) else None
    for known in (build.settings.get("sourceCommit"), caused, build.resolved_source_version):
        if isinstance(known, str) and _COMMIT.fullmatch(known):
            return known
    return None


def describe(state: BuildState, project: str) -> str:
    """What is told in words, as CodeBuild says it."""
    return f"{_WORDS[state]} for project {project}"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`text` with `$NAME` and `${NAME}` replaced; an unknown name stays as it is written."""
    return Template(text).safe_substitute(variables) if "$" in text else text


def variables(wanted: BuildSettings, build: Build, *, region: str, account: str, link: str) -> dict[str, str]:
    """What may stand in a buildStatusConfig: the plain variables of the build, and those that the farm sets. No secret does."""
    ours = {
        "AWS_REGION": region,
        "AWS_DEFAULT_REGION": region,
        "CODEBUILD_BUILD_ARN": f"arn:aws:codebuild:{region}:{account}:build/{build.id}",
        "CODEBUILD_BUILD_URL": link,
    }
    return _variables(wanted, build) | ours


def _variables(wanted: BuildSettings, build: Build) -> dict[str, str]:
    plain = {one.name: one.value for one in wanted.environment.environment_variables if one.type == "PLAINTEXT"}
    ours = {
        "CODEBUILD_BUILD_ID": build.id,
        "CODEBUILD_BUILD_NUMBER": str(build.number),
        "CODEBUILD_INITIATOR": build.initiator,
        "CODEBUILD_RESOLVED_SOURCE_VERSION": commit_of(build) or "",
        "CODEBUILD_SOURCE_REPO_URL": wanted.source.location or "",
        "CODEBUILD_SOURCE_VERSION": wanted.source_version or "",
    }
    cause: WebhookCause | None = wanted.webhook
    return plain | ours | ({} if cause is None else cause.variables())


def find(
    db: Database, *, project: str | None = None, build_id: str | None = None, limit: int = 100, before: int | None = None
) -> tuple[Sequence[NoticeRecord], int | None]:
    """The notices of a project or a build, newest first, at most `limit`, from `before` on; and where to go on, or None."""
    query = sa.select(Notice).order_by(Notice.id.desc()).limit(limit + 1)
    for column, value in ((Notice.project_name, project), (Notice.build_id, build_id)):
        query = query if value is None else query.where(column == value)
    if before is not None:
        query = query.where(Notice.id < before)
    with db.reading() as session:
        rows = session.scalars(query).all()
    return [_record(row) for row in rows[:limit]], rows[limit - 1].id if len(rows) > limit else None


def resend(db: Database, build_id: str) -> Sequence[NoticeRecord]:
    """Tell anew what a server refused of a build, or was given up; what was said stays listed. Newer builds keep the last word.

    Raises Conflict where nothing is to be told again.
    """

    def work(session: Session) -> Sequence[NoticeRecord]:
        newest = sa.select(sa.func.max(Notice.id)).where(Notice.build_id == build_id).group_by(Notice.topic)
        rows = session.scalars(sa.select(Notice).where(Notice.id.in_(newest)).order_by(Notice.id)).all()
        refused = [row for row in rows if row.outcome in (Outcome.REFUSED, Outcome.GIVEN_UP)]
        if not refused:
            raise Conflict(
                f"nothing that was to be told of {build_id} was refused or given up",
                hint=f"'millrace notices {build_id}' shows what was told.",
            )
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        kept = ("project_name", "build_id", "topic", "asked_ms", "commit_id", "context", "state")
        again = [Notice(**{name: getattr(row, name) for name in kept}, created_ms=now, due_ms=now) for row in refused]
        session.add_all(again)
        session.flush()
        return [_record(row) for row in again]

    return db.run(work)


def _record(row: Notice) -> NoticeRecord:
    return NoticeRecord(
        build_id=row.build_id,
        commit=row.commit_id,
        context=row.context,
        state=BuildState(row.state),
        outcome=Outcome(row.outcome or Outcome.WAITING),
        why=row.why,
        tries=row.tries,
        created_ms=row.created_ms,
        due_ms=row.due_ms if row.settled_ms is None else None,
        settled_ms=row.settled_ms,
    )
