"""Projects: made, changed, listed, deleted."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from millrace.project import ProjectSettings
from millrace.webhook import PROVIDERS
from scheduler.db import Database, now_ms
from scheduler.models import Build, Delivery, Project, Secret, Token, Webhook
from scheduler.states import TERMINAL


@dataclass(frozen=True, kw_only=True)
class ProjectRecord:
    """A project as it is kept. Times are milliseconds since 1970."""

    settings: ProjectSettings
    uuid: str
    created_ms: int
    modified_ms: int


def create(db: Database, settings: ProjectSettings) -> ProjectRecord:
    """Make a project. Raises AlreadyExists."""

    def work(session: Session) -> ProjectRecord:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row = session.get(Project, settings.name, with_for_update=True)
        if row is not None and row.deleted_ms is None:
            raise AlreadyExists(
                f"project {settings.name} exists", hint=f"PUT /v1/projects/{settings.name} replaces its settings."
            )
        if row is None:
            row = Project(name=settings.name, last_build_number=0)
            session.add(row)
        row.uuid, row.created_ms, row.modified_ms, row.deleted_ms = str(uuid.uuid4()), now, now, None
        _fill(row, settings)
        try:
            session.flush()
        except sa.exc.IntegrityError as error:
            raise AlreadyExists(f"project {settings.name} exists") from error
        return _record(row)

    return db.run(work)


def update(db: Database, settings: ProjectSettings) -> ProjectRecord:
    """Replace a project's settings. Accepted builds keep theirs. Raises NotFound, or Conflict where its webhook does not fit."""

    def work(session: Session) -> ProjectRecord:
        row = _living(session, settings.name, lock=True)
        _keep_webhook(session, row, settings)
        row.modified_ms = session.execute(sa.select(now_ms())).scalar_one()
        _fill(row, settings)
        return _record(row)

    return db.run(work)


def delete(db: Database, name: str) -> None:
    """Delete a project, its tokens' rights, its secrets and its webhook; its ended builds stay.

    Raises NotFound, or Conflict while builds of it wait or run.
    """

    def work(session: Session) -> None:
        row = _living(session, name, lock=True)
        busy = session.scalar(
            sa.select(sa.func.count()).where(Build.project_name == name, Build.state.not_in([state.value for state in TERMINAL]))
        )
        if busy:
            raise Conflict(f"project {name} has {busy} builds that wait or run", hint="Stop them, or wait for them, then delete.")
        row.deleted_ms = session.execute(sa.select(now_ms())).scalar_one()
        session.execute(  # a project of the same name that is made later is another one
            sa.update(Token).where(Token.project_name == name, Token.revoked_ms.is_(None)).values(revoked_ms=row.deleted_ms)
        )
        session.execute(sa.delete(Secret).where(Secret.project_name == name))
        session.execute(sa.delete(Webhook).where(Webhook.project_name == name))
        session.execute(sa.delete(Delivery).where(Delivery.project_name == name))

    db.run(work)


def get(db: Database, name: str) -> ProjectRecord:
    """The project. Raises NotFound."""
    with db.reading() as session:
        return _record(_living(session, name))


def find(
    db: Database, *, only: str | None = None, limit: int = 100, after: str | None = None
) -> tuple[Sequence[ProjectRecord], str | None]:
    """Projects by name, at most `limit`, from behind `after`; and where to go on, or None. `only` restricts to one name."""
    query = sa.select(Project).where(Project.deleted_ms.is_(None)).order_by(Project.name).limit(limit + 1)
    if only is not None:
        query = query.where(Project.name == only)
    if after is not None:
        query = query.where(Project.name > after)
    with db.reading() as session:
        rows = session.scalars(query).all()
    return [_record(row) for row in rows[:limit]], rows[limit - 1].name if len(rows) > limit else None


def _living(session: Session, name: str, *, lock: bool = False) -> Project:
    if "\x00" in name:
        raise InvalidInput("a project name has no NUL byte")
    row = session.get(Project, name, with_for_update=lock)
    if row is None or row.deleted_ms is not None:
        raise NotFound(f"there is no project {name!r}", hint="POST /v1/projects makes one; GET /v1/projects lists them.")
    return row


def _keep_webhook(session: Session, row: Project, settings: ProjectSettings) -> None:
    """A project that has a webhook stays at its git server; where its repository is another one, that is learnt anew."""
    hook = session.scalar(sa.select(Webhook).where(Webhook.project_name == row.name))
    if hook is None:
        return
    provider = PROVIDERS.get(settings.source.type)
    if provider != hook.provider:
        raise Conflict(
            f"project {row.name} has a webhook of {hook.provider}, which a source of type {settings.source.type} cannot have",
            hint="Delete the webhook first: 'millrace webhook delete'.",
        )
    if row.settings["source"].get("location") != settings.source.location:
        hook.repository_id = hook.provider_hook_id = None


def _fill(row: Project, settings: ProjectSettings) -> None:
    row.settings = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    row.concurrent_build_limit = settings.concurrent_build_limit
    row.priority, row.weight = settings.millrace.priority, settings.millrace.weight
    row.cancel_superseded, row.infra_retry = settings.millrace.cancel_superseded, settings.millrace.infra_retry


def _record(row: Project) -> ProjectRecord:
    return ProjectRecord(
        settings=ProjectSettings.model_validate(row.settings),
        uuid=row.uuid,
        created_ms=row.created_ms,
        modified_ms=row.modified_ms,
    )
