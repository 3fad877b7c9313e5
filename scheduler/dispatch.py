"""The bell: a Celery message that wakes a worker of a fleet. Losing it costs time, never a build."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from celery import Celery
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy.orm import Session

from millrace.errors import Unavailable
from millrace.failpoints import failpoint
from millrace.log import get_logger
from scheduler import lanes
from scheduler.db import Database, now_ms
from scheduler.fleets.capacity import capacity_of
from scheduler.models import IS_QUEUED, Build, Outbox
from scheduler.queue import bell_key

log = get_logger(__name__)
TASK: Final = "worker.run_build"
_MOST_WOKEN: Final = 100
_FEW: Final = 4
QUIET_S: Final = 3.0
"""After a failed ring, how long no other is tried, so that a dead Redis does not slow every request down."""
FORGOTTEN_MS: Final = 10_000
"""A build that waited this long is rung for again: its message may be lost."""


def queue_of(fleet: str) -> str:
    """The Celery queue of a fleet."""
    return f"millrace.{fleet}"


class Bell:
    """Rings for builds. Never raises, and never blocks for more than a second. Safe from several threads, not across a fork."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("millrace.bell", broker=broker_url, set_as_current=False)
        self._app.conf.update(
            task_ignore_result=True,
            task_serializer="json",
            accept_content=["json"],
            broker_connection_timeout=1,
            broker_transport_options={
                "visibility_timeout": 300,
                "socket_timeout": 0.8,
                "socket_connect_timeout": 0.5,
                "health_check_interval": 10,
                "max_retries": 0,
            },
        )
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def ring(self, build_id: str, fleet: str) -> bool:
        """Wake a worker of `fleet`; False where the broker did not take the message."""
        if self._quiet():
            return False
        try:
            failpoint("bell.ring.before", OSError)
            self._app.send_task(TASK, args=[build_id], queue=queue_of(fleet), retry=False, ignore_result=True)
            failpoint("bell.ring.after", OSError)
        except (BrokerError, RedisError, OSError) as error:
            self._failed(fleet, error)
            return False
        return True

    def is_heard(self, fleet: str) -> bool:
        """False where messages to `fleet` lie unread: ringing once more would only make their heap higher."""
        if self._quiet():
            return True
        try:
            with self._app.connection_for_write(connect_timeout=0.5) as connection:
                channel: Any = connection.default_channel  # its published types lack what every channel has
                return bool(channel.queue_declare(queue_of(fleet), passive=True).message_count == 0)
        except ChannelError:
            return True  # Redis keeps no empty queue
        except (BrokerError, RedisError, OSError) as error:
            self._failed(fleet, error)
            return True

    def check(self) -> str | None:
        """None where the broker answers, else what is wrong."""
        try:
            with self._app.connection_for_write(connect_timeout=0.5) as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=1)
        except (BrokerError, RedisError, OSError) as error:
            return str(error) or type(error).__name__
        return None

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Everything that the broker holds, by key. Raises Unavailable where it does not answer."""
        try:
            with self._app.connection_for_write(connect_timeout=0.5) as connection:
                channel: Any = connection.default_channel
                for key in channel.client.scan_iter():
                    yield key.decode(errors="replace"), b" ".join(_parts(channel.client, key))
        except (BrokerError, RedisError, OSError) as error:
            raise Unavailable(f"the broker does not answer: {error}") from error

    def _quiet(self) -> bool:
        with self._lock:
            return time.monotonic() < self._quiet_until

    def _failed(self, fleet: str, error: Exception) -> None:
        with self._lock:
            self._quiet_until = time.monotonic() + QUIET_S
        log.warning("bell.failed", fleet=fleet, why=str(error) or type(error).__name__)


def _parts(client: Any, key: bytes) -> list[bytes]:
    """A key of Redis with all it holds, whatever its type."""
    kind = client.type(key)
    if kind == b"hash":
        return [key, *(part for pair in client.hgetall(key).items() for part in pair)]
    if kind == b"string":
        return [key, client.get(key) or b""]
    if kind == b"set":
        return [key, *client.smembers(key)]
    return [key, *(client.zrange(key, 0, -1) if kind == b"zset" else client.lrange(key, 0, -1) if kind == b"list" else ())]


def ring_now(db: Database, bell: Bell, build_id: str, fleet: str) -> None:
    """Ring right after the commit that queued a new build. Never raises: the build is accepted; what fails here is made up for
    by the scheduler.
    """
    if bell.ring(build_id, fleet):
        _note_rung(db, [build_id])


def _note_rung(db: Database, build_ids: Sequence[str]) -> None:
    keys = [bell_key(build_id, 0) for build_id in build_ids]

    def work(session: Session) -> None:
        session.execute(sa.update(Outbox).where(Outbox.key.in_(keys), Outbox.sent_ms.is_(None)).values(sent_ms=now_ms()))

    try:
        db.run(work)
    except Unavailable as error:
        log.warning("outbox.not_marked", builds=len(keys), why=error.message)


class Ringer:
    """Rings after commits for those who must not wait for it.

    Of many builds that come close together, no more are rung for than the fleet has workers: one that is awake claims as long as
    builds wait. Its thread lives while there is something to ring. What a dying process leaves is rung for by the scheduler.
    """

    def __init__(self, db: Database, bell: Bell) -> None:
        self._db, self._bell = db, bell
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, str]] = []
        self._thread: threading.Thread | None = None

    def ring(self, build_id: str, fleet: str) -> None:
        """Ring for a build that was queued just now, soon."""
        with self._lock:
            self._waiting.append((build_id, fleet))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ringer", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until all was rung for."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                taken, self._waiting = self._waiting, []
                if not taken:
                    self._thread = None
                    return
            for fleet in sorted({fleet for _build_id, fleet in taken}):
                builds = [build_id for build_id, its in taken if its == fleet]
                if all([self._bell.ring(build_id, fleet) for build_id in builds[: self._most(fleet, len(builds))]]):
                    _note_rung(self._db, builds)

    def _most(self, fleet: str, builds: int) -> int:
        if builds < _FEW:
            return builds
        try:
            with self._db.reading() as session:
                return max(1, min(_MOST_WOKEN, capacity_of(session, fleet).workers))
        except Unavailable:
            return builds


def wake(db: Database, bell: Bell, fleet: str) -> None:
    """Ring once for each living worker of `fleet`, as what kept its builds waiting may be gone. Never raises."""
    try:
        with db.reading() as session:
            workers = capacity_of(session, fleet).workers
    except Unavailable as error:
        log.warning("bell.failed", fleet=fleet, why=error.message)
        return
    for _ in range(min(workers, _MOST_WOKEN)):
        if not bell.ring("", fleet):
            return


def relay(db: Database, bell: Bell) -> int:
    """Send what the outbox still holds, and ring again for builds that wait too long. How many messages went out.

    Where the broker is away, the rest waits for the next round.
    """
    with db.reading() as session:
        due = session.scalars(
            sa.select(Outbox).where(Outbox.sent_ms.is_(None), Outbox.next_try_ms <= now_ms()).order_by(Outbox.id).limit(500)
        ).all()
        waiting = lanes.waiting_fleets(session)
    sent = 0
    for row in due:
        done = bell.ring(row.payload["buildId"], row.payload["fleet"])
        _note(db, row.id, done)
        if not done:
            return sent
        sent += 1
    return sent + sum(_ring_again(db, bell, fleet) for fleet in waiting)


def _ring_again(db: Database, bell: Bell, fleet: str) -> bool:
    """Ring for a build that waits since long: its message may be lost."""
    with db.reading() as session:
        build_id = session.scalar(
            sa.select(Build.id)
            .where(IS_QUEUED, Build.fleet == fleet, Build.queued_ms < now_ms() - FORGOTTEN_MS, Build.not_before_ms < now_ms())
            .limit(1)
        )
    return build_id is not None and bell.is_heard(fleet) and bell.ring(build_id, fleet)


def _note(db: Database, outbox_id: int, done: bool) -> None:
    def work(session: Session) -> None:
        row = session.get(Outbox, outbox_id)
        if row is None or row.sent_ms is not None:
            return
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row.tries += 1
        if done:
            row.sent_ms = now
        else:
            row.next_try_ms = now + min(30_000, 1000 * 2 ** min(row.tries, 5))

    db.run(work)
