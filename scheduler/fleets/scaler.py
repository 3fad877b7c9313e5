"""Has each fleet as many workers as it wants: looks, decides, acts, each second, in the scheduler that leads.

Each round is made from what is there: the records, and what the provider lists. So a round that ends half-way, wherever that is,
is gone on with by the next one, of this scheduler or of another. What a provider does not do is told, and asked for again later.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from millrace.errors import InvalidInput, MillraceError, ProviderTrouble, Unavailable
from millrace.fleet import FargateProvider, FleetSettings
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.vocabulary import Trouble
from scheduler import dispatch
from scheduler.db import Database
from scheduler.fleets import ledger, marks, overflow, policy, rollout, upgrades
from scheduler.fleets.ledger import Said, ScaledFleet
from scheduler.fleets.observe import At, Sight, Times, measure, observe
from scheduler.fleets.plan import Plan, make_plan
from scheduler.fleets.provider import Instance, InstanceState, Provider, WaitingBuild
from scheduler.fleets.providers import LOOK_EVERY_S, open_provider, order_of
from scheduler.fleets.waiting import waiting_builds

log = get_logger(__name__)
ROUND_S: Final = 1.0
_MEASURE_EVERY_S: Final = 10.0
_FORGET_EVERY_S: Final = 3600.0
_PATIENCE_S: Final = {
    Trouble.THROTTLED: 2.0,
    Trouble.AWAY: 2.0,
    Trouble.CAPACITY: 15.0,
    Trouble.CREDENTIALS: 30.0,
    Trouble.MISSING: 30.0,
}
"""How long a provider is left alone after its first trouble of a kind; twice as long after each that follows."""
_MOST_PATIENCE_S: Final = 300.0


@dataclass(kw_only=True)
class _Trouble:
    """What a provider did not do, in a row."""

    kind: str
    message: str
    since_ms: int
    failures: int
    again_at: float

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "message": self.message, "since": self.since_ms / 1000, "failures": self.failures}


@dataclass(kw_only=True)
class _Known:
    """What this scheduler remembers of a fleet, all of which another finds out by itself."""

    settings: FleetSettings
    provider: Provider
    memory: policy.Memory
    listed: Sequence[Instance] = ()
    listed_at: float | None = None
    times: Times = field(default_factory=Times)
    measured_at: float | None = None
    troubles: dict[str, _Trouble] = field(default_factory=dict)
    noted: tuple[dict[str, Any], int | None] = ({}, None)
    strangers: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()
    judged: str = ""
    judged_at: float | None = None
    hastened_at: float | None = None
    stirred: bool = False
    """It was just asked for something, and is looked at again in the next round."""


class Scaler:
    """See above. `open_as` makes a fleet's provider; `monotonic` is a clock that nobody sets."""

    def __init__(
        self,
        db: Database,
        bell: dispatch.Bell,
        settings: Settings,
        *,
        open_as: Callable[[str, FleetSettings, Settings], Provider] = open_provider,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._bell, self._settings = db, bell, settings
        self._open_as, self._monotonic = open_as, monotonic
        self._fleets: dict[str, _Known] = {}
        self._forgot_at: float | None = None

    def run(self, leads: Callable[[], bool], stop: threading.Event) -> None:
        """A round each second, as long as this scheduler leads."""
        while leads() and not stop.is_set():
            self.round()
            stop.wait(ROUND_S)

    def round(self) -> None:
        """Look after each fleet once. What becomes of one holds up no other. Raises Unavailable where the database is away."""
        with self._db.reading() as session:
            fleets = ledger.scaled(session)
        for gone in set(self._fleets) - {fleet.name for fleet in fleets}:
            del self._fleets[gone]
        for fleet in fleets:
            try:
                self._tend(fleet)
            except Unavailable:
                raise
            except MillraceError as error:
                log.warning("fleet.not_tended", fleet=fleet.name, why=error.message)
            except Exception:  # whatever one fleet's provider does, the others want their workers
                log.exception("fleet.not_tended", fleet=fleet.name)
        if fleets and self._due(self._forgot_at, _FORGET_EVERY_S):
            self._forgot_at = self._monotonic()
            ledger.forget(self._db)

    def _tend(self, fleet: ScaledFleet) -> None:
        known = self._known(fleet)
        every_s = LOOK_EVERY_S.get(fleet.settings.provider.type, ROUND_S) if fleet.settings.provider is not None else ROUND_S
        if known.stirred or self._due(known.listed_at, every_s):
            self._look(fleet, known)
        sight, decision, plan = self._decide(fleet, known)
        if (plan.release or plan.grow) and self._age_s(known) >= ROUND_S:  # nothing is done by what may no longer be so
            if self._look(fleet, known):
                sight, decision, plan = self._decide(fleet, known)
            else:
                plan = replace(plan, release={}, grow={})
        known.memory = decision.memory
        ledger.note_instances(self._db, fleet, sight)
        self._report(fleet, known, sight)
        self._protect(fleet, known, sight)
        if self._due(known.hastened_at, every_s):
            self._hasten(fleet, known, sight)
        self._act(fleet, known, sight, plan)
        self._overflow(fleet, known, sight, decision)
        self._judge(fleet, known, sight)
        said = Said(
            decision=decision,
            load=sight.load,
            troubles={verb: trouble.as_json() for verb, trouble in known.troubles.items()},
            strangers=tuple(sorted(known.strangers)),
            judged=known.judged,
        )
        if ledger.note_decision(self._db, fleet.name, said, *known.noted):
            known.noted = (said.as_json(), sight.load.now_ms)

    def _known(self, fleet: ScaledFleet) -> _Known:
        known = self._fleets.get(fleet.name)
        if known is None or known.settings != fleet.settings:
            provider = self._open_as(fleet.name, fleet.settings, self._settings)
            memory = fleet.memory if known is None else known.memory
            known = _Known(settings=fleet.settings, provider=provider, memory=memory, noted=(dict(fleet.said), None))
            self._fleets[fleet.name] = known
        return known

    def _look(self, fleet: ScaledFleet, known: _Known) -> bool:
        """Have the provider list its instances; False where it does not."""
        at = self._monotonic()
        listed: list[Instance] = []
        if not self._does(fleet, known, "find", lambda: listed.extend(known.provider.find())):
            return False
        known.listed, known.listed_at, known.stirred = listed, at, False
        return True

    def _decide(self, fleet: ScaledFleet, known: _Known) -> tuple[Sight, policy.Decision, Plan]:
        with self._db.reading() as session:
            if self._due(known.measured_at, _MEASURE_EVERY_S):
                known.times, known.measured_at = measure(session, fleet.name), self._monotonic()
            sight = observe(
                session,
                fleet.name,
                known.listed,
                age_s=self._age_s(known),
                generation=fleet.generations.newest,
                times=known.times,
                farm=self._settings,
                shape=fleet.settings.worker,
            )
        scaling = fleet.settings.scaling
        if fleet.paused:  # nothing of it is claimed, so that nobody need be there
            scaling = scaling.model_copy(update={"minimum": 0, "warm": (), "headroom_slots": 0})
        decision = policy.decide(scaling, fleet.settings.worker.slots, sight.load, known.memory)
        if known.listed_at is None:  # nothing is known of what there is
            return sight, decision, Plan()
        return sight, decision, make_plan(sight, decision.wanted, scaling, fleet.generations, why=decision.why)

    def _act(self, fleet: ScaledFleet, known: _Known, sight: Sight, plan: Plan) -> None:
        listed = len(known.listed)
        if plan.release:
            listed -= self._release(fleet, known, plan)
        stayed = marks.take_back(self._db, fleet.name, plan.stay, "it is wanted again")
        for why in sorted(set(plan.leave.values())):
            leaving = [worker for worker, its in plan.leave.items() if its == why]
            marks.ask_to_leave(self._db, fleet.name, leaving, why)
        lacking = len(plan.stay) - len(stayed)
        for generation, count in plan.grow.items():
            more, lacking = count + lacking, 0
            total = listed + more
            settings = fleet.settings_of(generation)
            provider = known.provider
            if settings.provider != fleet.settings.provider:  # that of the generation before the one that is tried out
                provider = self._open_as(fleet.name, settings, self._settings)
            waiting = self._waiting(fleet.name, settings)
            grow = partial(provider.grow_to, total, order_of(fleet.name, settings, generation), waiting)
            if self._does(fleet, known, "grow", grow):
                log.info("fleet.grows", fleet=fleet.name, by=more, to=total, generation=generation)
                listed = total
                known.stirred = True

    def _waiting(self, fleet: str, settings: FleetSettings) -> list[WaitingBuild]:
        """The builds that wait, for a provider that starts an instance for each."""
        if not isinstance(settings.provider, FargateProvider):
            return []
        with self._db.reading() as session:
            return waiting_builds(session, fleet)

    def _release(self, fleet: ScaledFleet, known: _Known, plan: Plan) -> int:
        """Let instances go; how many were taken from those that are listed and do not stop yet."""
        going: list[str] = []
        for why in sorted(set(plan.release.values())):
            going += marks.let_go(self._db, fleet.name, [each for each, its in plan.release.items() if its == why], why)
        if not going or not self._does(fleet, known, "release", lambda: known.provider.release(going)):
            return 0
        before = len(known.listed)
        if not self._look(fleet, known):
            return 0
        return before - len(known.listed)

    def _protect(self, fleet: ScaledFleet, known: _Known, sight: Sight) -> None:
        """Have no other hand end an instance of ours."""
        ours = frozenset(instance.id for instance in sight.instances if not (instance.released or instance.stranger))
        new = sorted(ours - known.protected)
        if new and self._does(fleet, known, "protect", lambda: known.provider.protect(new)):
            known.protected = ours

    def _hasten(self, fleet: ScaledFleet, known: _Known, sight: Sight) -> None:
        """Ask once more for the end of those that stop, whoever ends them: nothing has to wait for a worker that is gone."""
        held = {worker.id for worker in sight.workers if worker.at is not At.GONE}
        over = [
            instance.id
            for instance in sight.instances
            if instance.state is InstanceState.STOPPING and instance.id not in held and (instance.joined or instance.released)
        ]
        if over and self._does(fleet, known, "release", lambda: known.provider.release(over)):
            known.hastened_at = self._monotonic()

    def _overflow(self, fleet: ScaledFleet, known: _Known, sight: Sight, decision: policy.Decision) -> None:
        settings, load = fleet.settings, sight.load
        to = settings.overflow_fleet
        if settings.overflow_behavior != "ON_DEMAND" or to is None or decision.wanted < settings.scaling.maximum:
            return
        most = load.present if "grow" in known.troubles else max(load.present, settings.scaling.maximum)
        excess = load.queued - max(0, most * settings.worker.slots - (load.running - load.on_draining))
        if excess > 0:
            for build_id in overflow.move(self._db, fleet.name, to, excess, waited_s=settings.scaling.target_wait_s):
                self._bell.ring(build_id, to)

    def _judge(self, fleet: ScaledFleet, known: _Known, sight: Sight) -> None:
        """Widen, finish or take back the generation that is tried out, by how its builds fare."""
        if fleet.rollout is None:
            known.judged, known.judged_at = "", None
            return
        if not self._due(known.judged_at, _MEASURE_EVERY_S):
            return
        known.judged_at = self._monotonic()
        pair = (fleet.generations.stable, fleet.generations.newest)
        there = Counter(worker.generation for worker in sight.workers_at(At.IDLE, At.BUSY) if worker.generation is not None)
        with self._db.reading() as session:
            stable, newest = upgrades.sides(session, fleet.name, pair, int(fleet.rollout["began"]), there)
        share, since_ms = fleet.generations.share_percent, int(fleet.rollout["since"])
        step = rollout.judge(stable, newest, share, since_ms, sight.load.now_ms)
        known.judged = step.why
        upgrades.take(self._db, fleet.name, fleet.generations.newest, step)

    def _report(self, fleet: ScaledFleet, known: _Known, sight: Sight) -> None:
        """Say once what nobody asked for, and whose ground is gone."""
        strangers = frozenset(instance.id for instance in sight.instances if instance.stranger)
        for stranger in sorted(strangers - known.strangers):
            log.warning("instance.stranger", fleet=fleet.name, instance=stranger)
        known.strangers = strangers
        living = {worker.id for worker in sight.workers}
        for gone in sight.unlisted:
            if gone in living:
                log.warning("instance.vanished", fleet=fleet.name, instance=gone)

    def _does(self, fleet: ScaledFleet, known: _Known, verb: str, call: Callable[[], None]) -> bool:
        """Whether the provider did it; it is not asked where it was in trouble a moment ago."""
        trouble = known.troubles.get(verb)
        if trouble is not None and self._monotonic() < trouble.again_at:
            return False
        try:
            call()
        except (ProviderTrouble, InvalidInput) as error:
            kind = error.trouble if isinstance(error, ProviderTrouble) else Trouble.MISSING
            self._note_trouble(fleet, known, verb, kind, error)
            return False
        if known.troubles.pop(verb, None) is not None:
            log.info("provider.works_again", fleet=fleet.name, verb=verb)
        return True

    def _note_trouble(self, fleet: ScaledFleet, known: _Known, verb: str, kind: Trouble, error: MillraceError) -> None:
        before = known.troubles.get(verb)
        failures = before.failures + 1 if before is not None else 1
        wait_s = min(_MOST_PATIENCE_S, _PATIENCE_S[kind] * 2 ** min(failures - 1, 10))
        known.troubles[verb] = _Trouble(
            kind=kind.value,
            message=error.message[:500],
            since_ms=before.since_ms if before is not None else int(time.time() * 1000),
            failures=failures,
            again_at=self._monotonic() + wait_s,
        )
        log.warning("provider.trouble", fleet=fleet.name, verb=verb, kind=kind.value, why=error.message, again_in_s=wait_s)

    def _age_s(self, known: _Known) -> float:
        return self._monotonic() - known.listed_at if known.listed_at is not None else _MOST_PATIENCE_S * 1000

    def _due(self, at: float | None, every_s: float) -> bool:
        return at is None or self._monotonic() - at >= every_s
