"""Comments that approve pull requests: whether who wrote one may is asked of the git server, behind the delivery, and live.

A delivery's row waits as `checking`, with what is asked, in its `event`; so no crash loses it. What cannot be looked up is asked
for again for an hour, and then is no approval. The row of the comment, that of the pull request and the build come in one commit.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import MillraceError, Unavailable
from millrace.log import get_logger
from millrace.project import ProjectSettings, ProjectSource
from millrace.settings import Settings
from millrace.webhook import PullRequestBuildPolicy, WebhookSettings, Wish
from scheduler import approvers, hooks
from scheduler.db import Database, now_ms
from scheduler.door import Credentials, Door
from scheduler.hooks import Outcome, Result
from scheduler.models import Delivery, Project, Webhook
from scheduler.providers import Later, Place, Refused, place_of
from scheduler.providers.roles import ROLE

log = get_logger(__name__)
_ROUND: Final = 100
_MAX_WAIT_MS: Final = 60_000
_MAX_PAUSE_MS: Final = 10 * 60_000
_NO_LASTS_MS: Final = 60_000
"""How long somebody who may not approve is not asked for again, so that their comments do not use up what the token may ask."""
GIVE_UP_MS: Final = 3_600_000


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A comment that waits, with what is known of its project. `tries` counts what was asked without an answer."""

    row_id: int
    project: str
    hook_id: str
    source: ProjectSource
    policy: PullRequestBuildPolicy
    wish: Wish
    tries: int
    since_ms: int


class Wishes:
    """Looks up who may approve, and approves; used by one thread. `clock` is the database's, or a test's."""

    def __init__(
        self, db: Database, settings: Settings, credentials: Credentials, *, clock: Callable[[], int] | None = None
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._door = Door(settings, credentials)
        self._noes: dict[tuple[str, str], tuple[int, str]] = {}

    def due(self) -> bool:
        """True where a comment waits whose turn it is."""
        with self._db.reading() as session:
            return bool(self._rows(session, self._now(session)))

    def run(self, stop: threading.Event | None = None) -> int:
        """Look at what is due, until `stop`; how many were settled. Raises Unavailable where the database is away."""
        stop, settled = stop or threading.Event(), 0
        with self._db.reading() as session:
            found = [self._asked(session, row) for row in self._rows(session, self._now(session))]
        for row_id, asked in found:
            if stop.is_set():
                break
            try:
                settled += self._settle(row_id, Outcome.IGNORED, asked) if isinstance(asked, str) else self._answer(asked)
            except Unavailable:
                raise
            except Exception as error:  # whatever it is: it must hold up no other
                log.exception("wish.failed", row_id=row_id)
                if not isinstance(asked, str):
                    self._postpone(asked, Later(f"it could not be asked for: {type(error).__name__}"))
        return settled

    def _now(self, session: Session) -> int:
        return self._clock() if self._clock is not None else session.execute(sa.select(now_ms())).scalar_one()

    @staticmethod
    def _rows(session: Session, now: int) -> list[Delivery]:
        waiting = session.scalars(sa.select(Delivery).where(sa.text("outcome = 'checking'")).order_by(Delivery.id))
        due = (row for row in waiting if int((row.event or {}).get("due_ms", 0)) <= now)
        return list(islice(due, _ROUND))  # so that those that are put off hold up no others

    @staticmethod
    def _asked(session: Session, row: Delivery) -> tuple[int, "_Asked | str"]:
        hook, project = session.get(Webhook, row.webhook_id), session.get(Project, row.project_name)
        if hook is None or project is None:
            return row.id, "its webhook is gone"
        try:
            event: dict[str, Any] = row.event or {}
            return row.id, _Asked(
                row_id=row.id,
                project=row.project_name,
                hook_id=hook.id,
                source=ProjectSettings.model_validate(project.settings).source,
                policy=WebhookSettings.model_validate(hook.settings).pull_request_build_policy,
                wish=Wish(**event["wish"]),
                tries=int(event.get("tries", 0)),
                since_ms=int(event.get("since_ms", 0)),
            )
        except (ValidationError, TypeError, KeyError, ValueError):
            return row.id, "its record cannot be read"

    def _answer(self, asked: _Asked) -> bool:
        """Settle one comment, or put it off; True where it is settled."""
        wish = asked.wish
        if not hooks.waits(self._db, asked.project, wish.commit, pull_request=wish.pull_request):
            return self._settle(asked.row_id, Outcome.IGNORED, f"pull request {wish.pull_request} does not wait at {wish.commit}")
        try:
            role = self._role(asked)
        except Refused as refusal:
            return self._settle(asked.row_id, Outcome.REFUSED, _unknown(wish, refusal.why))
        except Later as problem:
            return self._postpone(asked, problem)
        if role not in (roles := approvers.allowed(asked.policy)):
            named = " or ".join(one for one in approvers.ROLES if one in roles and one.startswith(_family(asked))) or "nobody"
            why = f"{wish.person} may not approve: their role is {role or 'none'}, and {named} may"
            self._noes[asked.hook_id, wish.person_id] = (self._read_clock() + _NO_LASTS_MS, role or "")
            return self._settle(asked.row_id, Outcome.IGNORED, why)
        return self._approve(asked, f"{wish.person} ({role})")

    def _role(self, asked: _Asked) -> str | None:
        """What the server says of who wrote it. Raises Refused and Later."""
        until_ms, role = self._noes.get((asked.hook_id, asked.wish.person_id), (0, ""))
        if until_ms > self._read_clock() and role not in approvers.allowed(asked.policy):
            return role or None
        look_up = ROLE.get(asked.source.type)
        if look_up is None:
            raise Refused(f"of a source of type {asked.source.type} nobody says who may write")
        place: Place = place_of(asked.source)
        with self._door.opened(asked.project, asked.source) as rest:
            return look_up(rest, place, asked.wish.person_id, asked.wish.person)

    def _approve(self, asked: _Asked, by: str) -> bool:
        """Start the build, and settle the comment, in one commit."""
        row_id, wish = asked.row_id, asked.wish

        def also(session: Session, result: Result) -> None:
            row = session.get(Delivery, row_id)
            if row is not None:
                row.outcome, row.why, row.event = Outcome.BUILD.value, f"{by} approved {wish.commit}", None
                row.build_id = result.build_id

        try:
            hooks.approve(
                self._db,
                asked.project,
                wish.commit,
                by=by,
                settings=self._settings,
                pull_request=wish.pull_request,
                also=also,
            )
        except Unavailable:
            raise
        except MillraceError as problem:  # it has moved on, or its build cannot be queued
            return self._settle(row_id, Outcome.REFUSED, problem.message)
        return True

    def _settle(self, row_id: int, outcome: Outcome, why: str) -> bool:
        def work(session: Session) -> str | None:
            row = session.get(Delivery, row_id, with_for_update=True)
            if row is None or row.outcome != Outcome.CHECKING.value:
                return None
            row.outcome, row.why, row.event = outcome.value, why, None
            return row.project_name

        project = self._db.run(work)
        log.warning("wish.not_granted", project=project, outcome=outcome.value, why=why)
        return True

    def _postpone(self, asked: _Asked, problem: Later) -> bool:
        """Ask again later, each time after longer; after an hour it is no approval."""
        now = self._read_clock()
        if now - asked.since_ms > GIVE_UP_MS:
            return self._settle(asked.row_id, Outcome.REFUSED, _unknown(asked.wish, problem.why))
        wait_ms = min(_MAX_WAIT_MS, 1000 * 2 ** min(asked.tries + 1, 10))
        if problem.wait_s is not None:
            wait_ms += int(min(_MAX_PAUSE_MS, problem.wait_s * 1000))

        def work(session: Session) -> None:
            row = session.get(Delivery, asked.row_id, with_for_update=True)
            if row is not None and row.outcome == Outcome.CHECKING.value:
                row.event = {**(row.event or {}), "due_ms": now + wait_ms, "tries": asked.tries + 1}
                row.why = f"whether {asked.wish.person} may approve {asked.wish.commit} is not known yet: {problem.why}"

        self._db.run(work)
        log.info("wish.postponed", project=asked.project, tries=asked.tries + 1, why=problem.why)
        return False

    def _read_clock(self) -> int:
        with self._db.reading() as session:
            return self._now(session)


def _unknown(wish: Wish, why: str) -> str:
    return f"whether {wish.person} may approve {wish.commit} could not be looked up, and so it is not approved: {why}"


def _family(asked: _Asked) -> str:
    return f"{asked.source.type.value.partition('_')[0]}_"
