"""What must happen even when nobody asks: lost leases, deadlines, unsent messages, logs to be put away, leftovers."""

import hashlib
import io
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.chunks import Tally
from millrace.errors import InfraProblem, InvalidInput, Unavailable
from millrace.ids import cache_prefix, log_key, log_list_key, staging_prefix
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.storage import Store
from scheduler import caches, dispatch, drain, held, leases, logs, messenger, missed, publication, redelivery, wishes
from scheduler.db import Database, now_ms
from scheduler.door import Credentials
from scheduler.fleets.scaler import Scaler
from scheduler.intake import KEY_LASTS_MS
from scheduler.lifecycle import forget_log
from scheduler.models import Artifact, Attempt, Idempotency, Leader, LogChunk, Notice, Outbox, Worker

log = get_logger(__name__)
_DAY_MS: Final = 86_400_000
_LOG_SETTLES_MS: Final = 5_000
"""How long after its end an attempt's log stays in the database, where those who follow it read it."""
_LOGS_AT_ONCE: Final = 50
_LOSERS_AT_ONCE: Final = 200
_BY_END: Final = (Attempt.ended_ms, Attempt.build_id, Attempt.attempt_no)
_STEP_MS: Final = 20_000
"""By how much the database's clock and this process's monotonic one must come apart from one round to the next, to say that the
former was set: more than a slow answer takes."""
_STORE_S: Final = 1.0
"""How long a round waits for what the store is asked to do; it goes on beside the next rounds."""


class Sweeper:
    """One scheduler. Several may run; the one that holds the leader's lease acts. `monotonic` is a clock that nobody sets.

    `look` reads the branches of a repository; without it, pushes that no webhook told of stay unknown. `credentials` open the API
    of a git server; without them, none is told of builds, and no comment approves any. `scaler` has fleets as many workers as
    they want.
    """

    def __init__(
        self,
        db: Database,
        bell: dispatch.Bell,
        store: Store,
        settings: Settings,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        look: missed.Look | None = None,
        credentials: Credentials | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self._db, self._bell, self._store, self._settings = db, bell, store, settings
        self._monotonic = monotonic
        self._name = f"{settings.host}-{uuid.uuid4().hex[:8]}"
        self._catch_up = missed.CatchUp(db, settings, look) if look is not None else None
        self._messenger = messenger.Messenger(db, settings, credentials) if credentials is not None else None
        self._redelivery = redelivery.Redelivery(db, settings, credentials) if credentials is not None else None
        self._held = held.Held(db, settings, credentials) if credentials is not None else None
        self._wishes = wishes.Wishes(db, settings, credentials) if credentials is not None else None
        self._leaving = threading.Event()
        self._clerk = drain.Clerk(db=db, settings=settings, ring=partial(dispatch.ring_now, db, bell), stop=self._leaving)
        self._scaler = scaler
        self._leads_until = 0.0
        self._publisher = publication.Publisher(db, store, settings)
        self._beside: dict[str, threading.Thread] = {}
        self._as_of_ms: int | None = None
        self._this_round: tuple[int, float] | None = None
        self._last_round: tuple[int, float] | None = None
        self._spare_until_ms = 0
        self._next: dict[str, tuple[int, str, int] | None] = {}

    def sweep(self) -> bool:
        """One round. False where another scheduler acts. Raises Unavailable where the database is away."""
        if not self._lead():
            return False
        self._each(
            self._take_back_lost,
            self._enforce_deadlines,
            lambda: dispatch.relay(self._db, self._bell),
            self._forget_old_rows,
            self._publish,
            self._act_on_deliveries,
            self._look_for_pushes,
            self._ask_for_deliveries,
            self._tell_git_servers,
            self._look_up_approvers,
            self._tell_what_is_held,
            self._scale,
            self._tend_store,
        )
        return True

    @staticmethod
    def _each(*steps: Callable[[], object]) -> None:
        """Every step, whatever becomes of the one before: what one record has done wrong must not hold up all others."""
        for step in steps:
            try:
                step()
            except Unavailable:
                raise
            except InfraProblem as problem:
                log.warning("sweep.store_failed", why=problem.message)
            except Exception:  # whatever it is: leases must be taken back all the same
                log.exception("sweep.step_failed")

    def _take_back_lost(self) -> None:
        """Not for one lease after the database was away: until then, nobody could renew."""
        if self._spares():
            return
        for build_id in leases.expire(self._db, as_of_ms=self._as_of_ms):
            log.warning("lease.expired", build_id=build_id)

    def _enforce_deadlines(self) -> None:
        """Nor then: a build that ended in time may not have been able to say so."""
        if not self._spares():
            leases.enforce_deadlines(self._db)

    def _spares(self) -> bool:
        return self._as_of_ms is not None and self._as_of_ms < self._spare_until_ms

    def _publish(self) -> None:
        if self._publisher.due():
            self._run_beside("publisher", lambda: self._publisher.publish(stop=self._leaving))

    def _act_on_deliveries(self) -> None:
        """Those that a process of the API only noted, and left when it died."""

        def work() -> None:
            while self._clerk.act(older_ms=drain.LEFT_MS):
                pass

        self._run_beside("deliveries", work)

    def _look_for_pushes(self) -> None:
        if self._catch_up is not None:
            self._run_beside("missed", self._catch_up.run)

    def _tell_git_servers(self) -> None:
        teller = self._messenger
        if teller is not None and teller.due():
            self._run_beside("messenger", lambda: teller.run(self._leaving))

    def _ask_for_deliveries(self) -> None:
        asking = self._redelivery
        if asking is not None and asking.due():
            self._run_beside("redelivery", lambda: asking.run(self._leaving))

    def _tell_what_is_held(self) -> None:
        telling = self._held
        if telling is not None and telling.due():
            self._run_beside("held", lambda: telling.run(self._leaving))

    def _look_up_approvers(self) -> None:
        asking = self._wishes
        if asking is not None and asking.due():
            self._run_beside("wishes", lambda: asking.run(self._leaving))

    def _scale(self) -> None:
        """Fleets have rounds of their own, as builds do not wait for the next one here."""
        scaler = self._scaler
        if scaler is not None:
            self._run_beside("scaler", lambda: scaler.run(lambda: self._monotonic() < self._leads_until, self._leaving))

    def _tend_store(self) -> None:
        tending = self._run_beside(
            "store",
            self._put_logs_away,
            self._drop_losers,
            lambda: caches.make_room(self._db, self._settings.cache_store_bytes),
            lambda: caches.drop_replaced(self._db, self._store, self._settings.bucket),
        )
        tending.join(_STORE_S)

    def _run_beside(self, name: str, *steps: Callable[[], object]) -> threading.Thread:
        """In a thread of its own, unless it still runs: the store may take minutes, and no lost lease may wait for that."""

        def work() -> None:
            try:
                self._each(*steps)
            except Unavailable as problem:
                log.warning("sweep.database_away", why=problem.message)

        if name not in self._beside or not self._beside[name].is_alive():
            self._beside[name] = threading.Thread(target=work, name=name, daemon=True)
            self._beside[name].start()
        return self._beside[name]

    def run_forever(self, stop: threading.Event) -> None:
        """Sweep every `sweep_every_s` seconds until `stop`; what fails is logged and tried again in the next round."""
        log.info("scheduler.started", name=self._name)
        while not stop.is_set():
            try:
                self.sweep()
            except Unavailable as problem:
                log.warning("sweep.database_away", why=problem.message)
            stop.wait(self._settings.sweep_every_s)
        self._leaving.set()
        self._resign()
        log.info("scheduler.stopped", name=self._name)

    def _lead(self) -> bool:
        lease_ms = int(max(3 * self._settings.sweep_every_s, 1) * 1000)

        def work(session: Session) -> bool:
            row = session.get(Leader, "sweeper", with_for_update=True)
            now, at_s = session.execute(sa.select(now_ms())).scalar_one(), self._monotonic()
            led = row is not None and row.owner == self._name
            if row is not None and row.owner and not led and now < row.expires_ms < now + lease_ms + _STEP_MS:
                return False
            step_ms = 0
            if led and self._last_round is not None:
                step_ms = now - self._last_round[0] - int((at_s - self._last_round[1]) * 1000)
                self._follow_clock(session, now, step_ms)
            else:
                leases.bound_waits(session, now, lease_ms=int(self._settings.lease_ttl_s * 1000))
            self._this_round = (now, at_s)
            if row is None:
                session.add(Leader(name="sweeper", owner=self._name, expires_ms=now + lease_ms))
            else:
                self._spare_after(now - step_ms - (row.expires_ms - lease_ms if row.owner else row.expires_ms), now)
                row.owner, row.expires_ms = self._name, now + lease_ms
            self._as_of_ms = now
            return True

        try:
            leads = self._db.run(work)
            self._last_round = self._this_round if leads else None
            self._leads_until = self._this_round[1] + lease_ms / 1500 if leads and self._this_round is not None else 0.0
            return leads
        except sa.exc.IntegrityError:  # two started at once, and the other was first
            return False

    def _follow_clock(self, session: Session, now: int, step_ms: int) -> None:
        """Where the database's clock was set since the last round, move what was noted by it, so that nothing is over."""
        if abs(step_ms) < _STEP_MS:
            return
        log.warning("clock.stepped", by_s=round(step_ms / 1000))
        self._spare_until_ms = 0
        leases.follow_clock(session, now, step_ms, lease_ms=int(self._settings.lease_ttl_s * 1000))

    def _spare_after(self, gap_ms: int, now: int) -> None:
        """Where leases may have run out since nobody reached the database, workers get one lease's length to come back."""
        settings = self._settings
        if gap_ms > 1000 * max(settings.lease_ttl_s - 1.5 * settings.renew_every_s, 4.5 * settings.sweep_every_s):
            self._spare_until_ms = now + int(settings.lease_ttl_s * 1000)
            log.warning("leases.spared", gap_s=round(gap_ms / 1000, 1), for_s=settings.lease_ttl_s)

    def _resign(self) -> None:
        def work(session: Session) -> None:
            mine = sa.update(Leader).where(Leader.name == "sweeper", Leader.owner == self._name)
            session.execute(mine.values(owner="", expires_ms=now_ms()))

        try:
            self._db.run(work)
        except Unavailable as problem:
            log.warning("sweep.database_away", why=problem.message)

    def _put_logs_away(self) -> None:
        with self._db.reading() as session:
            ended = session.scalars(
                sa.select(Attempt)
                .where(Attempt.ended_ms < now_ms() - _LOG_SETTLES_MS, self._behind("logs"))
                .where(Attempt.log_key.is_(None), Attempt.log_bytes > sa.literal_column("0"))  # as its index says it
                .order_by(*_BY_END)
                .limit(_LOGS_AT_ONCE)
            ).all()
        self._next["logs"] = _end(ended[-1]) if len(ended) == _LOGS_AT_ONCE else None
        if ended:
            self._store.check()
        for attempt in ended:
            try:
                self._put_log_away(attempt)
            except (InfraProblem, InvalidInput) as problem:  # InvalidInput: chunks are missing, or another was faster
                log.warning("log.not_stored", build_id=attempt.build_id, attempt_no=attempt.attempt_no, why=problem.message)

    def _behind(self, what: str) -> sa.ColumnElement[bool]:
        """Attempts that come after those of the last round: what fails is tried again once all others had their turn."""
        last = self._next.get(what)
        return sa.true() if last is None else sa.tuple_(*_BY_END) > sa.tuple_(*map(sa.literal, last))

    def _put_log_away(self, attempt: Attempt) -> None:
        build_id, attempt_no, bucket = attempt.build_id, attempt.attempt_no, self._settings.bucket
        tally, lines = Tally(), []
        with self._db.reading() as session:
            for chunk in logs.listed(session, build_id, attempt_no):
                tally.add(chunk)
                lines.append(chunk.line)
        if (tally.chunks, tally.size_bytes) != (attempt.log_chunks, attempt.log_bytes):
            raise InvalidInput(f"of {attempt.log_chunks} chunks {tally.chunks} are there, with {tally.size_bytes} bytes")
        body = _ChunkReader(self._db, build_id, attempt_no)
        self._store.put(bucket, log_list_key(build_id, attempt_no), io.BytesIO(b"".join(lines)))
        self._store.put(bucket, log_key(build_id, attempt_no), _as_file(body), size_bytes=attempt.log_bytes)
        self._now_in_store(attempt, listed=tally.root, found=body.root, sha256=body.sha256)

    def _now_in_store(self, attempt: Attempt, *, listed: str, found: str, sha256: str) -> None:
        """`listed` is the root of the chunks as they came, `found` and `sha256` are of their bytes as they were read back."""

        def work(session: Session) -> None:
            row = session.get(Attempt, (attempt.build_id, attempt.attempt_no), with_for_update=True)
            if row is None or row.log_key is not None:
                return
            row.log_root = row.log_root or listed  # the last release ended it, without one
            if row.log_complete and (row.log_sha256 != sha256 or found != row.log_root):
                log.error("log.hash_differs", build_id=row.build_id, attempt_no=row.attempt_no)
                row.log_complete = False
            row.log_key = log_key(row.build_id, row.attempt_no)
            forget_log(session, row.build_id, row.attempt_no)

        self._db.run(work)

    def _drop_losers(self) -> None:
        """Remove what attempts uploaded that nobody may see, a day after they ended."""
        visible = sa.select(Artifact.build_id).where(
            Artifact.build_id == Attempt.build_id, Artifact.attempt_no == Attempt.attempt_no
        )
        with self._db.reading() as session:
            unseen = session.execute(
                sa.select(Attempt, visible.exists(), caches.of_attempt())
                .where(Attempt.ended_ms < now_ms() - _DAY_MS, Attempt.swept == sa.false(), self._behind("losers"))
                .order_by(*_BY_END)
                .limit(_LOSERS_AT_ONCE)
            ).all()
        self._next["losers"] = _end(unseen[-1][0]) if len(unseen) == _LOSERS_AT_ONCE else None
        if unseen:
            self._store.check()
        for attempt, is_visible, is_cached in unseen:
            try:
                self._drop_loser(attempt, is_visible=is_visible, is_cached=is_cached)
            except (InfraProblem, InvalidInput) as problem:
                log.warning("attempt.not_swept", build_id=attempt.build_id, attempt_no=attempt.attempt_no, why=problem.message)

    def _drop_loser(self, attempt: Attempt, *, is_visible: bool, is_cached: bool) -> None:
        build_id, attempt_no, bucket = attempt.build_id, attempt.attempt_no, self._settings.bucket
        for key, upload in attempt.in_parts or ():
            self._store.abort_parts(bucket, key, upload or None)
        if not is_visible:
            self._store.delete_prefix(bucket, staging_prefix(build_id, attempt_no))
        if not is_cached:
            self._store.delete_prefix(bucket, cache_prefix(build_id, attempt_no))

        def work(session: Session) -> None:
            session.execute(
                sa.update(Attempt).where(Attempt.build_id == build_id, Attempt.attempt_no == attempt_no).values(swept=True)
            )

        self._db.run(work)

    def _forget_old_rows(self) -> None:
        def work(session: Session) -> None:
            session.execute(sa.delete(Idempotency).where(Idempotency.created_ms < now_ms() - KEY_LASTS_MS))
            session.execute(sa.delete(Outbox).where(Outbox.sent_ms < now_ms() - _DAY_MS))
            session.execute(sa.delete(Notice).where(Notice.settled_ms < now_ms() - 30 * _DAY_MS))
            session.execute(sa.delete(Worker).where(Worker.last_seen_ms < now_ms() - 7 * _DAY_MS))

        self._db.run(work)


def _end(attempt: Attempt) -> tuple[int, str, int]:
    return attempt.ended_ms or 0, attempt.build_id, attempt.attempt_no


class _ChunkReader:
    """An attempt's chunks as one stream, a chunk in memory at a time."""

    def __init__(self, db: Database, build_id: str, attempt_no: int) -> None:
        self._db, self._build_id, self._attempt_no = db, build_id, attempt_no
        self._rest = b""
        self._hash, self._tally = hashlib.sha256(), Tally()

    @property
    def sha256(self) -> str:
        """Of what was read so far."""
        return self._hash.hexdigest()

    @property
    def root(self) -> str:
        """Of the chunks that were read so far."""
        return self._tally.root

    def read(self, size: int = -1) -> bytes:
        """As a file's `read`."""
        parts: list[bytes] = []
        wanted = size if size >= 0 else 1 << 62
        while wanted > 0:
            if not self._rest and not self._next():
                break
            part, self._rest = self._rest[:wanted], self._rest[wanted:]
            parts.append(part)
            wanted -= len(part)
        data = b"".join(parts)
        self._hash.update(data)
        return data

    def _next(self) -> bool:
        with self._db.reading() as session:
            chunk = session.get(LogChunk, (self._build_id, self._attempt_no, self._tally.chunks))
            if chunk is None:
                return False
            self._rest = bytes(chunk.data)
        self._tally.take(self._rest)
        return True


def _as_file(reader: _ChunkReader) -> BinaryIO:
    """Typed as the file that it behaves like."""
    return reader  # type: ignore[return-value]  # it has the one method that a store reads with
