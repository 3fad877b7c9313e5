"""A small world for a scaler: a provider whose instances live in memory, workers that a test moves, and a clock that it sets."""

import itertools
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from millrace.contract import Claim, FinishReport
from millrace.errors import AttemptFenced, ProviderTrouble
from millrace.fleet import FleetSettings
from millrace.settings import Settings
from scheduler import leases, lifecycle
from scheduler.db import Database
from scheduler.fleets import records
from scheduler.fleets.provider import Instance, InstanceState, Order, WaitingBuild
from scheduler.fleets.scaler import Scaler
from scheduler.leases import hash_token
from scheduler.models import IS_HELD, Build
from tests.support.records import a_claim_request, a_report

FLEET = "default"


class Silent:
    """A bell that rings nowhere, and remembers for whom it did."""

    def __init__(self) -> None:
        self.rang: list[tuple[str, str]] = []

    def ring(self, build_id: str, fleet: str) -> bool:
        """As `scheduler.dispatch.Bell`."""
        self.rang.append((build_id, fleet))
        return True


@dataclass
class Box:
    """A provider in memory. `trouble`: what each call of a verb answers, as long as it stands there. With `lingers`, what is
    released is listed as stopping until it vanishes."""

    instances: dict[str, Instance] = field(default_factory=dict)
    trouble: dict[str, ProviderTrouble] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    protected: set[str] = field(default_factory=set)
    orders: list[Order] = field(default_factory=list)
    started: dict[str, int] = field(default_factory=dict)
    most: int = 0
    lingers: bool = False
    numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def check(self) -> None:
        """As it is told."""
        self._fail("check")

    def find(self) -> Sequence[Instance]:
        """All."""
        self._fail("find")
        return list(self.instances.values())

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        """More, where there are fewer."""
        self._fail("grow")
        for _ in range(total - len(self.instances)):
            one = Instance(id=f"i-{next(self.numbers)}", state=InstanceState.BOOTING, generation=order.generation)
            self.instances[one.id] = one
            self.started[one.id] = order.generation
        self.orders.append(order)
        self.most = max(self.most, len(self.instances))

    def release(self, ids: Sequence[str]) -> None:
        """Fewer."""
        self._fail("release")
        for each in ids:
            self.released.append(each)
            one = self.instances.pop(each, None)
            if one is not None and self.lingers:
                self.instances[each] = Instance(id=each, state=InstanceState.STOPPING, generation=one.generation)

    def protect(self, ids: Sequence[str]) -> None:
        """Remember them."""
        self._fail("protect")
        self.protected |= set(ids)

    def vanish(self, *ids: str) -> None:
        """These are gone, whoever did it."""
        for each in ids:
            self.instances.pop(each, None)

    def _fail(self, verb: str) -> None:
        if verb in self.trouble:
            raise self.trouble[verb]


class World:
    """One fleet, its provider, and a scaler that another may replace at any time. Its database is SQLite with our clock."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.clock_ms = 1_800_000_000_000
        self.farm = settings
        self.db = Database(f"sqlite:///{path}")
        self.box, self.bell = Box(), Silent()
        self.held: dict[str, list[Claim]] = {}
        self.left: set[str] = set()
        self.unfit: set[str] = set()
        self.all_unfit = False

        @sa.event.listens_for(self.db.engine, "connect")
        def set_clock(connection: sqlite3.Connection, _record: object) -> None:
            connection.create_function("julianday", -1, lambda *_: 2440587.5 + self.clock_ms / 86_400_000)
            connection.execute("PRAGMA synchronous=OFF")  # no power fails here

        self.scaler = self.another()

    def another(self) -> Scaler:
        """A scaler that knows nothing but what the records and the provider say."""
        bell: Any = self.bell
        return Scaler(self.db, bell, self.farm, open_as=lambda *_: self.box, monotonic=lambda: self.clock_ms / 1000)

    def configure(self, **settings: Any) -> None:
        """Set the fleet, in words of the wire."""
        records.put(self.db, FLEET, FleetSettings.model_validate({"provider": {"type": "process"}, **settings}))

    def advance(self, seconds: float) -> None:
        """Time passes, and nobody does anything."""
        self.clock_ms += int(seconds * 1000)

    def round(self, times: int = 1, *, every_s: float = 1) -> None:
        """The scaler looks, and a moment passes."""
        for _ in range(times):
            self.scaler.round()
            self.advance(every_s)

    def boot(self, *ids: str) -> None:
        """Workers come, where their instances still boot; all of them by default."""
        for each in ids or list(self.box.instances):
            one = self.box.instances.get(each)
            if one is not None and one.state is InstanceState.BOOTING:
                self.box.instances[each] = Instance(id=each, state=InstanceState.RUNNING, generation=one.generation)
                self.held[each] = []
                self.ask(each, free=0)

    def ask(self, worker: str, *, slots: int = 2, free: int | None = None) -> Claim | None:
        """A worker asks for a build, or says that it is there, and heeds what it is told."""
        generation = self.box.started.get(worker)
        running = self.held.setdefault(worker, [])
        free = slots - len(running) if free is None else free
        trouble = "the disk is full" if worker in self.unfit or self.all_unfit else ""
        free = 0 if trouble else free
        request = a_claim_request(worker, fleet=FLEET, slots=slots, free_slots=free, not_claiming=trouble, generation=generation)
        claim = leases.claim(self.db, request, self.farm)
        if claim is not None:
            running.append(claim)
        elif leases.leave_why(self.db, worker):
            self.left.add(worker)
            self.go(worker)
        return claim

    def ask_all(self) -> int:
        """Every worker asks until it gets nothing more; how many builds were claimed."""
        claimed = 0
        for worker in list(self.held):
            while worker in self.held and worker not in self.left and len(self.held[worker]) < 2 and self.ask(worker) is not None:
                claimed += 1
        return claimed

    def end(self, worker: str, report: FinishReport | None = None) -> None:
        """The worker's oldest build ends, well where nothing else is said, unless its lease ran out."""
        claim = self.held[worker].pop(0)
        with suppress(AttemptFenced):
            lifecycle.finish(self.db, claim.build_id, claim.attempt_no, hash_token(claim.token), report or a_report())
        if worker in self.left:
            self.go(worker)

    def go(self, worker: str) -> None:
        """A worker that was told to leave says how it is, and once it runs nothing, goodbye."""
        gone = not self.held[worker]
        state = "gone" if gone else "draining"
        generation = self.box.started.get(worker)
        leases.claim(
            self.db, a_claim_request(worker, fleet=FLEET, slots=2, free_slots=0, state=state, generation=generation), self.farm
        )
        if gone:
            del self.held[worker]
            self.left.discard(worker)

    def holders(self) -> set[str]:
        """Workers that hold a build, by the records."""
        with self.db.reading() as session:
            return {owner for owner in session.scalars(sa.select(Build.lease_owner).where(IS_HELD)) if owner is not None}


def run_all(world: World) -> None:
    """All that is queued is claimed and ends."""
    while world.ask_all() or any(world.held.values()):
        for worker in [worker for worker, held in world.held.items() if held]:
            world.end(worker)
