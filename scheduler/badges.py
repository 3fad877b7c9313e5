"""What a project's badge says: how the newest build of a branch or tag stands."""

from enum import StrEnum
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.vocabulary import BuildState
from scheduler.db import Database
from scheduler.models import Build, Project
from scheduler.states import TERMINAL

_COMMON: Final = ("HEAD", "main", "master")
"""What a badge is of that names neither: the branch of builds that named none, and what it is mostly called."""
_BUILDS: Final = 1000
_TAGGED_BUILDS: Final = 200
"""So many of a project's last builds are looked at; for a tag fewer, as their settings have to be read."""


class Badge(StrEnum):
    """CodeBuild's words of a badge."""

    PASSING = "PASSING"
    FAILING = "FAILING"
    IN_PROGRESS = "IN_PROGRESS"
    UNKNOWN = "UNKNOWN"


def find(db: Database, uuid: str, *, branch: str | None = None, tag: str | None = None) -> Badge | None:
    """The badge of the project with this id; None where there is none, or it has no badge."""
    if "\0" in uuid + (branch or ""):
        return None
    with db.reading() as session:
        project = session.scalar(sa.select(Project).where(Project.uuid == uuid, Project.deleted_ms.is_(None)))
        if project is None or project.settings.get("badgeEnabled") is not True:
            return None
        state = _of_tag(session, project, tag) if tag is not None else _of_branch(session, project, branch)
    if state is None:
        return Badge.UNKNOWN
    if state not in TERMINAL:
        return Badge.IN_PROGRESS
    return Badge.PASSING if state is BuildState.SUCCEEDED else Badge.FAILING


def _of_branch(session: Session, project: Project, branch: str | None) -> BuildState | None:
    lines = _COMMON if branch is None else (branch.removeprefix("refs/heads/"),)
    newest = (
        sa.select(Build.state)
        .where(Build.project_name == project.name, Build.number > project.last_build_number - _BUILDS, Build.line.in_(lines))
        .order_by(Build.number.desc())
        .limit(1)
    )
    state = session.scalar(newest)
    return None if state is None else BuildState(state)


def _of_tag(session: Session, project: Project, tag: str) -> BuildState | None:
    last = (
        sa.select(Build.state, Build.settings)
        .where(
            Build.project_name == project.name, Build.number > project.last_build_number - _TAGGED_BUILDS, Build.line.is_(None)
        )
        .order_by(Build.number.desc())
    )
    name = f"refs/tags/{tag.removeprefix('refs/tags/')}"
    for state, settings in session.execute(last):
        cause = settings.get("webhook")
        ref = cause.get("headRef") if isinstance(cause, dict) else None
        if name in (ref, settings.get("sourceVersion")):
            return BuildState(state)
    return None
