"""What GitHub could not deliver, since we were away: its list of a webhook's deliveries is read, and it is told to try again.

GitHub keeps the list for three days (GitHub: repository webhooks, deliveries). A delivery that comes again keeps its id, so that
one which had arrived after all starts nothing twice. Of other servers, and where the token may not read the list, branches are
looked at (`scheduler.missed`).
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.log import get_logger
from millrace.project import ProjectSettings, ProjectSource
from millrace.settings import Settings
from millrace.webhook import Provider
from scheduler.db import Database, now_ms
from scheduler.door import Credentials, Door
from scheduler.models import Delivery, Project, Webhook
from scheduler.providers import Later, Refused, Rest, place_of
from scheduler.providers.github import ask, repository
from scheduler.providers.rest import segment

log = get_logger(__name__)
_KEPT_MS: Final = 3 * 24 * 3_600_000
_SETTLES_MS: Final = 60_000
"""A delivery younger than this may still be on its way to us."""
_OVERLAP_MS: Final = 15 * 60_000
"""So much of what was read before is read again: what had not settled then, and what GitHub listed late."""
_TRIES: Final = 3
"""So often a delivery is attempted, the first time included; then it is the server's, or ours, to mend what is wrong."""
_MOST_PAGES: Final = 50
_MAX_PAUSE_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True)
class _Hook:
    """A webhook that we made at GitHub. `since_ms`: what is older was read, or is no longer kept."""

    id: str
    project: str
    provider_hook_id: str
    source: ProjectSource
    since_ms: int


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One row of GitHub's list: one try at one delivery."""

    id: str
    guid: str
    event: str
    at_ms: int
    arrived: bool


class Redelivery:
    """Reads the lists whose turn it is; for one thread. `clock` is the database's, or a test's."""

    def __init__(
        self, db: Database, settings: Settings, credentials: Credentials, *, clock: Callable[[], int] | None = None
    ) -> None:
        self._db, self._settings, self._clock = db, settings, clock
        self._door = Door(settings, credentials)
        self._unread: set[str] = set()
        self._rests: dict[str, int] = {}

    def due(self) -> bool:
        """True where a list is to be read."""
        return bool(self._hooks())

    def run(self, stop: threading.Event | None = None) -> int:
        """Read what is due, until `stop`; how many deliveries GitHub was told to attempt again."""
        stop, asked = stop or threading.Event(), 0
        for hook in self._hooks():
            if stop.is_set():
                break
            now = self._read_clock()
            try:
                asked += self._one(hook, now)
            except Unavailable:
                raise
            except (Refused, Later) as problem:  # what was not read stays to be read
                self._say(hook, problem.why)
                pause_s = problem.wait_s if isinstance(problem, Later) else None
                self._rests[hook.id] = now + int(min(_MAX_PAUSE_S, max(pause_s or 0, self._settings.look_every_s)) * 1000)
            else:
                self._unread.discard(hook.id)
                self._rests.pop(hook.id, None)
                self._note(hook, now)
        return asked

    def _hooks(self) -> Sequence[_Hook]:
        every_ms = int(self._settings.look_every_s * 1000)
        if not every_ms:
            return []
        with self._db.reading() as session:
            now = self._now(session)
            due = sa.select(Webhook, Project).join(Project, Project.name == Webhook.project_name)
            due = due.where(Webhook.provider == Provider.GITHUB.value, Webhook.provider_hook_id.is_not(None))
            rows = session.execute(due.where(Webhook.listed_ms <= now - every_ms).order_by(Webhook.listed_ms).limit(200)).all()
            read = [_read(row, project, now) for row, project in rows]
            return [hook for hook in read if hook is not None and self._rests.get(hook.id, 0) <= now]

    def _one(self, hook: _Hook, now: int) -> int:
        """Have what did not arrive delivered again, in the order in which it happened."""
        attempts: dict[str, list[_Attempt]] = defaultdict(list)
        asked = 0
        refused: Refused | None = None
        with self._door.opened(hook.project, hook.source) as rest:
            where = f"{repository(place_of(hook.source))}/hooks/{segment(hook.provider_hook_id)}/deliveries"
            for one in self._listed(rest, where, hook.since_ms):
                attempts[one.guid].append(one)
            lost = [tries for tries in attempts.values() if _is_lost(tries, now)]
            came = self._came(hook, [tries[0].guid for tries in lost])
            for tries in sorted(lost, key=lambda tries: min(one.at_ms for one in tries)):
                if tries[0].guid in came:
                    continue
                newest = max(tries, key=lambda one: one.at_ms)
                try:
                    ask(rest, "POST", f"{where}/{segment(newest.id)}/attempts")
                except Refused as refusal:  # of this one, as it seems: what came after it must not wait behind it
                    refused = refusal
                    log.warning("webhook.not_redelivered", project=hook.project, delivery_id=newest.guid, why=refusal.why)
                    continue
                asked += 1
                log.warning("webhook.redelivered", project=hook.project, delivery_id=newest.guid, what=newest.event)
        if refused is not None and not asked:  # of all of them: the token may not, and once it may, they are asked for again
            raise refused
        return asked

    @staticmethod
    def _listed(rest: Rest, where: str, since_ms: int) -> Sequence[_Attempt]:
        """GitHub's list, newest first, as far back as `since_ms`."""
        found: list[_Attempt] = []
        answer = ask(rest, "GET", where, per_page="100")
        for _ in range(_MOST_PAGES):
            if not isinstance(answer.data, list):
                raise Refused("the server's answer has no list")
            page = [one for row in answer.data if (one := _attempt(row)) is not None]
            found += [one for one in page if one.at_ms >= since_ms]
            if answer.next is None or (page and min(one.at_ms for one in page) < since_ms):
                break
            answer = ask(rest, "GET", answer.next)
        return found

    def _came(self, hook: _Hook, guids: Sequence[str]) -> set[str]:
        """Which of these are noted: GitHub may not have heard our answer."""
        came: set[str] = set()
        with self._db.reading() as session:
            for start in range(0, len(guids), 200):
                those = Delivery.delivery_id.in_(guids[start : start + 200])
                came |= set(session.scalars(sa.select(Delivery.delivery_id).where(Delivery.webhook_id == hook.id, those)))
        return came

    def _note(self, hook: _Hook, listed_ms: int) -> None:
        def work(session: Session) -> None:
            session.execute(sa.update(Webhook).where(Webhook.id == hook.id).values(listed_ms=listed_ms))

        self._db.run(work)

    def _say(self, hook: _Hook, why: str) -> None:
        """Once, until the list can be read again."""
        if hook.id not in self._unread:
            self._unread.add(hook.id)
            log.warning("webhook.not_listed", project=hook.project, why=why)

    def _now(self, session: Session) -> int:
        return self._clock() if self._clock is not None else session.execute(sa.select(now_ms())).scalar_one()

    def _read_clock(self) -> int:
        with self._db.reading() as session:
            return self._now(session)


def _read(row: Webhook, project: Project, now: int) -> _Hook | None:
    try:
        source = ProjectSettings.model_validate(project.settings).source
    except ValidationError:
        return None
    since_ms = max(row.created_ms, row.listed_ms - _OVERLAP_MS, now - _KEPT_MS)
    ident = row.provider_hook_id or ""
    return _Hook(id=row.id, project=row.project_name, provider_hook_id=ident, source=source, since_ms=since_ms)


def _attempt(row: Mapping[str, Any] | object) -> _Attempt | None:
    if not isinstance(row, dict):
        return None
    ident, guid, at, status = (row.get(name) for name in ("id", "guid", "delivered_at", "status_code"))
    if not isinstance(ident, int | str) or not isinstance(guid, str) or not isinstance(at, str):
        return None
    try:
        at_ms = int(datetime.fromisoformat(at).timestamp() * 1000)
    except ValueError:
        return None
    arrived = isinstance(status, int) and 200 <= status < 300
    return _Attempt(id=str(ident), guid=guid[:100], event=str(row.get("event")), at_ms=at_ms, arrived=arrived)


def _is_lost(tries: Sequence[_Attempt], now: int) -> bool:
    if any(one.arrived for one in tries) or len(tries) >= _TRIES:
        return False
    return tries[0].event != "ping" and max(one.at_ms for one in tries) < now - _SETTLES_MS
