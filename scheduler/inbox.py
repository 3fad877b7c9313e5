"""Deliveries that come faster than they can be acted on: noted first, answered, and acted on behind the answer.

Such a delivery is a row of its own in the table of deliveries, with the part -1 and all that is needed to act on it. What came
within the same moment goes in with one commit. As long as one of a webhook waits, all that come for it line up behind, as an
older push must not be built after a newer one.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.webhook import Heard
from scheduler.db import Database, now_ms
from scheduler.models import IS_ACCEPTED, Delivery

ACCEPTED: Final = "accepted"
_CALM_S: Final = 0.05
"""When none has come for so long, a rush is over."""
_RUSH_S: Final = 0.5
"""Within so long, `at_once` deliveries may come and be acted on; more are a rush, in which answers go first."""
WHY: Final = "many come at once: it is noted, and acted on behind this answer"
PART: Final = -1
_HEARD: Final = TypeAdapter(Heard)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A delivery whose signature held. `initiator` is what its build is told of who called."""

    webhook_id: str
    project: str
    heard: Heard
    delivery_id: str
    initiator: str

    @property
    def what(self) -> str:
        """As its row says it."""
        return (self.heard.events[0].kind.value if self.heard.events else self.heard.what)[:100]

    @property
    def ref(self) -> str | None:
        """The branch, tag or pull request of its first event."""
        return self.heard.events[0].place if self.heard.events else None

    @property
    def commit(self) -> str | None:
        """The commit of its first event."""
        return self.heard.events[0].commit if self.heard.events else None


def _insert(insert: sqlite.Insert | postgresql.Insert) -> sqlite.Insert | postgresql.Insert:
    again = {name: insert.excluded[name] for name in ("received_ms", "outcome", "why", "event")}
    key = ("webhook_id", "delivery_id", "part")
    return insert.on_conflict_do_update(index_elements=key, set_=again, where=Delivery.outcome != ACCEPTED)


_INSERT: Final = {
    "sqlite": _insert(sqlite.insert(cast(sa.Table, Delivery.__table__))),
    "postgresql": _insert(postgresql.insert(cast(sa.Table, Delivery.__table__))),
}
"""Made once, as making it costs more than carrying it out."""


def note(session: Session, arrivals: Sequence[Arrival]) -> None:
    """Note what came, in the order given. What waits already is not noted twice."""
    now = session.execute(sa.select(now_ms())).scalar_one()
    rows = [row(one, now) for one in arrivals]
    connection = session.connection()
    connection.execute(_INSERT[connection.dialect.name], rows)


def row(one: Arrival, now: int) -> dict[str, Any]:
    """The columns of what came at `now`."""
    return {
        "webhook_id": one.webhook_id,
        "project_name": one.project,
        "delivery_id": one.delivery_id,
        "part": PART,
        "received_ms": now,
        "what": one.what,
        "ref": one.ref,
        "commit_id": one.commit,
        "outcome": ACCEPTED,
        "why": WHY,
        "event": {"initiator": one.initiator, "heard": _HEARD.dump_python(one.heard, mode="json")},
    }


def read(noted: Delivery) -> Arrival:
    """What a row holds. Raises ValueError where it is damaged."""
    kept = noted.event or {}
    return Arrival(
        webhook_id=noted.webhook_id,
        project=noted.project_name,
        delivery_id=noted.delivery_id,
        initiator=str(kept.get("initiator", "")),
        heard=_HEARD.validate_python(kept.get("heard")),
    )


def waits(session: Session, webhook_id: str) -> bool:
    """Whether a delivery of this webhook is still to be acted on."""
    found = sa.select(Delivery.id).where(IS_ACCEPTED, Delivery.webhook_id == webhook_id).limit(1)
    return session.scalar(found) is not None


@dataclass
class _Waiting:
    arrival: Arrival
    done: bool = False
    error: Exception | None = None


@dataclass
class Inbox:
    """The deliveries that one process of the API has in its hands. Safe from several threads.

    Up to `at_once` within half a second are acted on before they are answered; those beyond are only noted.
    """

    db: Database
    at_once: int
    _inside: int = 0
    _last_s: float = float("-inf")
    _came: deque[float] = field(init=False)
    _waiting: list[_Waiting] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _committing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._came = deque(maxlen=self.at_once)

    @contextmanager
    def place(self) -> Iterator[bool]:
        """For as long as a delivery is answered: whether it can be acted on at once."""
        with self._lock:
            self._inside += 1
            self._last_s = now = time.monotonic()
            rush = len(self._came) == self.at_once and (not self._came or now - self._came[0] < _RUSH_S)
            self._came.append(now)
            room = self._inside <= self.at_once and not rush
        try:
            yield room
        finally:
            with self._lock:
                self._inside -= 1

    def is_pressed(self) -> bool:
        """Whether some are still to be answered, or more are likely to come at once."""
        return self._inside > 0 or time.monotonic() - self._last_s < _CALM_S

    def put(self, arrival: Arrival) -> None:
        """Note a delivery. When this returns, it is on durable storage. Whoever is first commits for all who wait meanwhile."""
        mine = _Waiting(arrival)
        with self._lock:
            self._waiting.append(mine)
        with self._committing:
            if not mine.done:
                with self._lock:
                    together, self._waiting = self._waiting, []
                self._commit(together)
        if mine.error is not None:
            raise mine.error
        if not mine.done:  # whoever was to commit it was ended in the midst
            raise Unavailable("the delivery could not be noted", hint="Send it again.")

    def _commit(self, together: list[_Waiting]) -> None:
        def work(session: Session) -> None:
            note(session, [one.arrival for one in together])

        try:
            self.db.run(work)
        except Exception as error:  # each is told, by its own thread
            if len(together) > 1 and not isinstance(error, Unavailable):  # of one of them: the others must not suffer for it
                for one in together:
                    self._commit([one])
                return
            for one in together:
                one.error = error
        for one in together:
            one.done = True
