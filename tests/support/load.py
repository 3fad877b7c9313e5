"""A farm at work, in this process: clients that ask, and workers that carry."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa

from millrace.contract import Claim
from millrace.errors import Unavailable
from millrace.settings import Settings
from scheduler import leases, lifecycle
from scheduler.db import Database
from scheduler.leases import hash_token
from scheduler.models import Build
from tests.support.records import a_build, a_claim_request, a_report


class Load:
    """Clients that start builds and workers that carry them, each a thread, until it is stopped."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db, self._settings = db, settings
        self._stop = threading.Event()
        self.given: list[tuple[str, int]] = []
        self.held: list[Claim] = []
        self.broken: list[BaseException] = []
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._ask, self._ask, self._carry)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert self.broken == []

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            while not self._stop.is_set():
                with suppress(Unavailable):  # SQLite is busy: a client asks again
                    work()
                time.sleep(0.01)
        except BaseException as error:  # told by the test's own thread
            self.broken.append(error)

    def _ask(self) -> None:
        build_id = a_build(self._db, self._settings)
        with self._db.reading() as session:
            self.given.append((build_id, session.execute(sa.select(Build.number).where(Build.id == build_id)).scalar_one()))

    def _carry(self) -> None:
        claim = leases.claim(self._db, a_claim_request("w", slots=1000, free_slots=500), self._settings)
        if claim is None:
            return
        if random.random() < 0.3:
            self.held.append(claim)  # it goes on running
            return
        lifecycle.finish(self._db, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
