"""Acts on the deliveries that were only noted: in the process that noted them, and, should that die, in the scheduler."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.log import get_logger
from millrace.settings import Settings
from scheduler import hooks, inbox
from scheduler.db import Database, now_ms
from scheduler.hooks import Outcome, Result
from scheduler.inbox import Inbox
from scheduler.models import IS_ACCEPTED, Delivery, Webhook

log = get_logger(__name__)
LEFT_MS: Final = 15_000
"""What has waited for longer was left by a process that died, or that has too much to do."""
_TOGETHER: Final = 10
_BREATH_S: Final = 0.005
"""Between two commits, at least; else as long as the one before took: SQLite's waiters look again now and then, and would find it
taken each time.
"""
_PATIENCE_S: Final = 5.0
"""How long those who are still to be answered go first: git servers wait for ten seconds. Then it has half of the time."""
_LOOK_S: Final = 0.05
_AGAIN_S: Final = 1.0
Ring = Callable[[str, str], object]


@dataclass(frozen=True, kw_only=True)
class Clerk:
    """Acts on what waits, and rings for the builds that it queues. `stop` ends that after a few of them."""

    db: Database
    settings: Settings
    ring: Ring
    stop: threading.Event

    def act(self, *, older_ms: int = 0) -> bool:
        """Act on some of each webhook's deliveries that wait since `older_ms` at least. False where there was nothing to do.

        What another process is at is left to it. Raises Unavailable where the database is away.
        """
        with self.db.reading() as session:
            old = sa.select(Delivery.webhook_id).where(IS_ACCEPTED, Delivery.received_ms <= now_ms() - older_ms)
            waiting = session.scalars(old.group_by(Delivery.webhook_id).order_by(sa.func.min(Delivery.id))).all()
        done, pause_s = False, _BREATH_S
        for webhook_id in waiting:
            if self.stop.wait(pause_s):
                return False
            began = time.monotonic()
            done = self._act_on(webhook_id) or done
            pause_s = max(_BREATH_S, time.monotonic() - began)
        return done

    def _act_on(self, webhook_id: str) -> bool:
        try:
            return self._take(webhook_id, _TOGETHER)
        except Unavailable:
            raise
        except Exception:  # of one of them: which, is found when the first goes alone
            log.warning("webhook.not_acted_on_together", webhook=webhook_id)
        try:
            return self._take(webhook_id, 1)
        except Unavailable:
            raise
        except Exception:  # whatever it is: all others wait behind it
            log.exception("webhook.not_acted_on", webhook=webhook_id)
            self._give_up(webhook_id)
            return True

    def _take(self, webhook_id: str, most: int) -> bool:
        """The first that wait, in one commit. False where there are none, or another process is at them."""

        def work(session: Session) -> list[tuple[str, Sequence[Result]]]:
            row = session.scalar(sa.select(Webhook).where(Webhook.id == webhook_id).with_for_update(skip_locked=True))
            if row is None and session.get(Webhook, webhook_id) is not None:
                return []
            done: list[tuple[str, Sequence[Result]]] = []
            for waiting in _first(session, webhook_id, most):
                if row is None:
                    _close(waiting, Outcome.IGNORED, "its webhook was deleted before it was acted on")
                    done.append((waiting.project_name, []))
                    continue
                try:
                    arrival = inbox.read(waiting)
                except ValueError:  # not the text: it may hold a secret
                    log.error("webhook.damaged", webhook=webhook_id, delivery_id=waiting.delivery_id)
                    _close(waiting, Outcome.REFUSED, "what was noted of it is damaged: have it sent again")
                    done.append((waiting.project_name, []))
                    continue
                session.delete(waiting)
                session.flush()
                done.append((arrival.project, hooks.settle(session, hooks.record_of(row), arrival, self.settings)))
            return done

        try:
            done = self.db.run(work)
        except sa.exc.IntegrityError:  # the same came twice at once: the other was first, and is found now
            done = self.db.run(work)
        for project, results in done:
            hooks.tell(project, results)
            for one in results:
                if one.build_id is not None and one.fleet is not None:
                    self.ring(one.build_id, one.fleet)
        return bool(done)

    def _give_up(self, webhook_id: str) -> None:
        def work(session: Session) -> None:
            for row in _first(session, webhook_id, 1):
                _close(row, Outcome.REFUSED, "it could not be acted on, and the farm's log says why: have it sent again")

        self.db.run(work)


def _first(session: Session, webhook_id: str, most: int) -> Sequence[Delivery]:
    mine = sa.select(Delivery).where(IS_ACCEPTED, Delivery.webhook_id == webhook_id)
    return session.scalars(mine.order_by(Delivery.id).limit(most)).all()


def _close(row: Delivery, outcome: Outcome, why: str) -> None:
    row.outcome, row.why, row.event = outcome.value, why, None


class Drain:
    """Acts on what an inbox noted once the rush is over. Its thread lives while there is something to act on.

    What a dying process leaves is acted on by the next one, or by the scheduler.
    """

    def __init__(self, db: Database, settings: Settings, ring: Ring, inbox: Inbox) -> None:
        self._stop = threading.Event()
        self._clerk = Clerk(db=db, settings=settings, ring=ring, stop=self._stop)
        self._inbox = inbox
        self._lock = threading.Lock()
        self._more = False
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Something was noted."""
        with self._lock:
            self._more = True
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._work, name="drain", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """End after what is being acted on just now."""
        self._stop.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        patient_until = time.monotonic() + _PATIENCE_S
        while True:
            while self._inbox.is_pressed() and time.monotonic() < patient_until and not self._stop.is_set():
                self._stop.wait(_LOOK_S)
            with self._lock:
                if self._stop.is_set() or not self._more:
                    self._thread = None
                    return
                self._more = False
            try:
                again = self._clerk.act()
            except Unavailable as problem:
                log.warning("webhook.database_away", why=problem.message)
                again = not self._stop.wait(_AGAIN_S)
            if again:
                with self._lock:
                    self._more = True
