"""Tells a git server that a pull request waits for an approval, with a link to the page of approvals: `pending`, in the context
of the project's builds, which replace it once somebody approves (CodeBuild: "Pull request approval is required for starting a
build").

What was told is noted in the delivery's `event`. It is a courtesy, and of nothing that came more than a day ago.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.log import get_logger
from millrace.project import ProjectSettings
from millrace.settings import Settings
from millrace.vocabulary import BuildState
from scheduler import notices
from scheduler.db import Database, now_ms
from scheduler.door import Credentials, Door
from scheduler.hooks import Outcome
from scheduler.models import Delivery, Project
from scheduler.providers import TELL, Later, Refused, Report, place_of
from scheduler.providers.github import makes_checks

log = get_logger(__name__)
DESCRIPTION: Final = "Waits for an approval"
_DAY_MS: Final = 24 * 3_600_000
_MOST: Final = 200
_MAX_WAIT_MS: Final = 120_000
_TOLD: Final = "told"


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A pull request that waits, and of which nobody was told. `tries` counts what was sent without an answer."""

    row_id: int
    project: str
    wanted: ProjectSettings
    commit: str
    tries: int


class Held:
    """Tells what waits; used by one thread. `clock` is the database's, or a test's."""

    def __init__(
        self, db: Database, settings: Settings, credentials: Credentials, *, clock: Callable[[], int] | None = None
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._door = Door(settings, credentials)
        self._from_id = 0
        """All before this were told of, or need not be: so that what waits for long is not read again and again."""

    def due(self) -> bool:
        """True where somebody is to be told."""
        return bool(self._find())

    def run(self, stop: threading.Event | None = None) -> int:
        """Tell what is due, until `stop`; of how many."""
        stop, told = stop or threading.Event(), 0
        for one in self._find():
            if stop.is_set():
                break
            try:
                told += self._tell(one)
            except Unavailable:
                raise
            except Exception:  # whatever it is: it must hold up no other
                log.exception("held.failed", project=one.project)
                self._note(one, {_TOLD: "no"})
        return told

    def _find(self) -> list[_Waiting]:
        with self._db.reading() as session:
            now = self._now(session)
            rows = sa.select(Delivery).where(sa.text("outcome = 'approval'"), Delivery.id >= self._from_id)
            found: list[_Waiting] = []
            settled = True
            for row in session.scalars(rows.order_by(Delivery.id)):
                if len(found) == _MOST:
                    break
                event: dict[str, Any] = row.event or {}
                if _TOLD in event or row.received_ms < now - _DAY_MS:
                    self._from_id = row.id + 1 if settled else self._from_id
                    continue
                one = _read(row, session.get(Project, row.project_name), int(event.get("tries", 0)))
                if one is None:
                    continue
                settled = False
                if int(event.get("due_ms", 0)) <= now:
                    found.append(one)
            return found

    def _tell(self, one: _Waiting) -> bool:
        if one.wanted.source.type not in notices.REPORTED or one.wanted.source.auth is None:
            return self._note(one, {_TOLD: "nobody"})
        config = one.wanted.source.build_status_config
        context = (config.context if config else None) or ""
        try:
            report = Report(
                place=place_of(one.wanted.source),
                state=BuildState.QUEUED,
                commit=one.commit,
                context=context if context and "$" not in context else self._context(one.project),
                description=f"{DESCRIPTION} for project {one.project}",
                url=f"{self._settings.public}/approvals/{quote(one.project, safe='')}",
                build_id="",
            )
            with self._door.opened(one.project, one.wanted.source) as rest:
                if makes_checks(rest.access):
                    return self._note(one, {_TOLD: "nobody"})
                TELL[one.wanted.source.type](rest, report)
        except Refused as refusal:
            log.warning("held.not_told", project=one.project, why=refusal.why)
            return self._note(one, {_TOLD: "refused"})
        except Later as problem:
            wait_ms = min(_MAX_WAIT_MS, 1000 * 2 ** min(one.tries + 1, 10)) + int((problem.wait_s or 0) * 1000)
            with self._db.reading() as session:
                now = self._now(session)
            self._note(one, {"due_ms": now + wait_ms, "tries": one.tries + 1})
            return False
        self._note(one, {_TOLD: "yes"})
        log.info("held.told", project=one.project, commit=one.commit)
        return True

    def _context(self, project: str) -> str:
        return f"AWS CodeBuild {self._settings.region} ({project})"

    def _note(self, one: _Waiting, change: dict[str, Any]) -> bool:
        """Beside the event, as long as it waits. False, as nothing was told."""

        def work(session: Session) -> None:
            row = session.get(Delivery, one.row_id, with_for_update=True)
            if row is not None and row.outcome == Outcome.APPROVAL.value and row.event is not None:
                row.event = {**row.event, **change}

        self._db.run(work)
        return False

    def _now(self, session: Session) -> int:
        return self._clock() if self._clock is not None else session.execute(sa.select(now_ms())).scalar_one()


def _read(row: Delivery, project: Project | None, tries: int) -> _Waiting | None:
    if project is None or row.commit_id is None:
        return None
    try:
        wanted = ProjectSettings.model_validate(project.settings)
    except ValidationError:
        return None
    return _Waiting(row_id=row.id, project=row.project_name, wanted=wanted, commit=row.commit_id, tries=tries)
