"""Pushes that no webhook told of, since we or the git server were away: found by looking at the branches now and then.

A branch that was at another commit when it was looked at last, and of which no delivery tells, is left alone until the next look,
as its delivery may be on its way; then it is treated as a push whose sender, message and changed files are not known.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import MillraceError, NotFound, Unavailable
from millrace.log import get_logger
from millrace.project import ProjectSettings, ProjectSource
from millrace.settings import Settings
from millrace.webhook import EventKind, Heard, SourceEvent
from scheduler import hooks
from scheduler.db import Database, now_ms
from scheduler.hooks import HookRecord, Outcome
from scheduler.models import Delivery, Head, Project, Webhook

log = get_logger(__name__)
INITIATOR: Final = "millrace/missed-push"
_MOST_REFS: Final = 10_000
Look = Callable[[str, ProjectSource], Mapping[str, str]]
"""The branches of a project's repository, with their commits. Raises MillraceError."""


class CatchUp:
    """Looks at the repositories whose turn it is, one after another. For one thread."""

    def __init__(self, db: Database, settings: Settings, look: Look) -> None:
        self._db, self._settings, self._look = db, settings, look
        self._unread: set[str] = set()

    def run(self) -> list[str]:
        """The builds that were started. Raises Unavailable where the database is away."""
        started = []
        for ident in self._due():
            started += self._one(ident)
        return started

    def _due(self) -> list[str]:
        every_ms = int(self._settings.look_every_s * 1000)
        if not every_ms:
            return []
        with self._db.reading() as session:
            due = sa.select(Webhook.id).where(Webhook.looked_ms <= now_ms() - every_ms).order_by(Webhook.looked_ms).limit(200)
            return list(session.scalars(due))

    def _one(self, ident: str) -> list[str]:
        with self._db.reading() as session:
            row = session.get(Webhook, ident)
            project = session.get(Project, row.project_name) if row is not None else None
        if row is None or project is None:
            return []
        moved = self._moved(ident, self._read(project))
        try:
            hook = hooks.get(self._db, project.name)
        except NotFound:
            return []
        return [build for ref, before, commit in moved for build in self._tell(hook, ref, before, commit)]

    def _read(self, project: Project) -> Mapping[str, str] | None:
        """The branches; None where they are not to be had, which is said once, until they are again."""
        try:
            found = self._look(project.name, ProjectSettings.model_validate(project.settings).source)
            why = "" if len(found) <= _MOST_REFS else f"it has {len(found)} branches, and {_MOST_REFS} are looked at"
        except Unavailable:
            raise
        except MillraceError as problem:
            found, why = {}, problem.message
        if not why:
            self._unread.discard(project.name)
            return found
        if project.name not in self._unread:
            self._unread.add(project.name)
            log.warning("webhook.not_looked", project=project.name, why=why)
        return None

    def _moved(self, ident: str, found: Mapping[str, str] | None) -> list[tuple[str, str | None, str]]:
        """Note where the branches are: ref, commit before and commit of those whose push nobody told of. None: not to be had."""

        def work(session: Session) -> list[tuple[str, str | None, str]]:
            hook = session.get(Webhook, ident, with_for_update=True)
            if hook is None:
                return []
            hook.looked_ms = session.execute(sa.select(now_ms())).scalar_one()
            if found is None:
                return []
            first, hook.seen_ms = not hook.seen_ms, hook.looked_ms
            known = {row.ref: row for row in session.scalars(sa.select(Head).where(Head.webhook_id == ident))}
            for ref in known.keys() - found.keys():
                session.delete(known[ref])
            moved = []
            for ref, commit in found.items():
                row = known.get(ref)
                if row is None:
                    row = Head(webhook_id=ident, ref=ref, commit_id=commit if first else None)
                    session.add(row)
                if row.commit_id == commit or _told(session, ident, ref, commit):
                    row.commit_id, row.moved_to = commit, None
                elif row.moved_to != commit:
                    row.moved_to = commit
                else:
                    moved.append((ref, row.commit_id, commit))
            return moved

        return self._db.run(work)

    def _tell(self, hook: HookRecord, ref: str, before: str | None, commit: str) -> list[str]:
        event = SourceEvent(kind=EventKind.PUSH, ref=ref, commit=commit, before=before, stamp=f"{before}")
        heard = Heard(what=event.kind.value, events=(event,), looked_up=True)
        ident = f"missed-{commit}-{hashlib.sha256(ref.encode()).hexdigest()[:16]}"
        results = hooks.receive(self._db, hook, heard, delivery_id=ident, initiator=INITIATOR, settings=self._settings)
        log.warning("webhook.missed", project=hook.project, ref=ref, commit=commit, outcome=results[0].outcome.value)
        return [one.build_id for one in results if one.build_id is not None and one.outcome is Outcome.BUILD]


def _told(session: Session, ident: str, ref: str, commit: str) -> bool:
    """Whether the last that was told of the branch is that it is at this commit."""
    last = sa.select(Delivery.commit_id).where(Delivery.webhook_id == ident, Delivery.ref == ref)
    return session.scalar(last.order_by(Delivery.id.desc()).limit(1)) == commit
