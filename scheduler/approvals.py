"""What waits for an approval, and what was approved lately, for people to look at. `scheduler.hooks.approve` approves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from millrace.webhook import Provider, SourceEvent
from scheduler import hooks
from scheduler.db import Database
from scheduler.hooks import Outcome
from scheduler.models import Delivery, Project, Webhook

_MOST: Final = 200
_LATELY: Final = 10


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A pull request that waits at a commit. `moved_to`: where it is by now, where that is another."""

    project: str
    provider: Provider
    received_ms: int
    event: SourceEvent
    moved_to: str | None


@dataclass(frozen=True, kw_only=True)
class Approved:
    """A pull request that was approved. `why` says by whom."""

    project: str
    ref: str
    commit: str
    build_id: str
    why: str


def waiting(db: Database, project: str | None = None) -> Sequence[Waiting]:
    """What waits, of one project or of all, newest first; a pull request stands there once for each commit."""
    rows = sa.select(Delivery, Webhook.provider).join(Webhook, Webhook.id == Delivery.webhook_id)
    rows = rows.join(Project, Project.name == Delivery.project_name).where(Project.deleted_ms.is_(None))
    rows = rows.where(sa.text("outcome = 'approval'"), Delivery.event.is_not(None)).order_by(Delivery.id.desc()).limit(_MOST)
    if project is not None:
        rows = rows.where(Delivery.project_name == project)
    found: dict[tuple[str, str | None, str | None], Waiting] = {}
    with db.reading() as session:
        for row, provider in session.execute(rows):
            key = (row.webhook_id, row.ref, row.commit_id)
            if key in found:
                continue
            now_at = session.scalar(hooks.commit_of(row))
            found[key] = Waiting(
                project=row.project_name,
                provider=Provider(provider),
                received_ms=row.received_ms,
                event=hooks.kept_event(row.event or {}),
                moved_to=now_at if now_at != row.commit_id else None,
            )
    return list(found.values())


def approved(db: Database, project: str | None = None) -> Sequence[Approved]:
    """The last that were approved, newest first."""
    rows = sa.select(Delivery).where(Delivery.outcome == Outcome.BUILD.value, Delivery.why.startswith(hooks.APPROVED_BY))
    if project is not None:
        rows = rows.where(Delivery.project_name == project)
    with db.reading() as session:
        return [
            Approved(
                project=row.project_name, ref=row.ref or "", commit=row.commit_id or "", build_id=row.build_id or "", why=row.why
            )
            for row in session.scalars(rows.order_by(Delivery.id.desc()).limit(_LATELY))
        ]
