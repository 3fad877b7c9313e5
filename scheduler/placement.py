"""What fits a worker: which build it is given, which one it passes over, and for which one it keeps room. docs/placement.md.

A worker is never given more than it offers. Where the build whose turn it is does not fit beside what the worker holds, another
one that fits goes before it; that build is passed over, and once it has been so for `KEEP_AFTER_MS`, a worker that could hold it
keeps room: it takes nothing else until the build fits. One worker does so for a build, and for one build at a time.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from millrace.errors import FieldProblem, InvalidInput
from millrace.fleet import FleetSettings, WorkerShape
from millrace.need import Need, Offer
from millrace.project import ProjectEnvironment
from scheduler import fairness, lanes
from scheduler.fairness import Lane
from scheduler.fleets.capacity import SILENT_MS, offer_of
from scheduler.lanes import Load
from scheduler.models import IS_HELD, Build, Fleet, Turn, Worker

KEEP_AFTER_MS: Final = 120_000
"""How long a build is passed over for its need before a worker keeps room for it."""
_MOST_OFFERS: Final = 100
"""Turns are counted for so many kinds of workers of a fleet; beyond, they are counted anew."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What a worker does: claim the first of `lane`; and of `passed` before it, or else keep room for the first of `keep`."""

    lane: Lane | None = None
    passed: Lane | None = None
    keep: Lane | None = None


def pick(lanes: Iterable[Lane], fits: Collection[str], *, fair: bool, now: int, kept: Collection[str]) -> Pick:
    """Of the lanes that a worker could hold if it were empty, and the needs that it has room for now.

    `kept` are builds for which other workers keep room: they are passed over as long as they do not fit here.
    """
    lanes = list(lanes)
    fitting = [lane for lane in lanes if lane.need in fits]
    first = fairness.choose(
        [*fitting, *(lane for lane in lanes if lane.need not in fits and lane.build_id not in kept)], fair=fair
    )
    if first is None or first.need in fits:
        return Pick(lane=first)
    if first.passed_ms is not None and first.passed_ms <= now - KEEP_AFTER_MS:
        return Pick(keep=first)
    return Pick(lane=fairness.choose(fitting, fair=fair), passed=first)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A worker that asks for a build: what it has in all, and what of it is left beside what it holds."""

    worker: Worker
    offer: Offer
    room: Offer

    def takes(self, need: str) -> bool:
        """Whether a build of this need has room now."""
        found = Need.parse(need)
        return found is not None and self.room.holds(found)


def place_of(session: Session, worker: Worker) -> Place:
    """What the records say of the worker, whatever it believes itself. As many rows are read as builds run."""
    offer = offer_of(worker)
    room = offer if offer.is_unbounded else offer.less(held_needs(session, worker.id))
    return Place(worker=worker, offer=offer, room=room)


def choose(session: Session, place: Place, load: Load, now: int, *, fair: bool, without: Collection[str]) -> Pick:
    """What the worker of this place is to do now. It takes what it keeps room for as soon as that fits, and nothing before."""
    worker, fleet = place.worker, place.worker.fleet
    if worker.keeps is not None:
        lane = lanes.read_lane(session, fleet, load, now, worker.keeps)
        need = None if lane is None else Need.parse(lane.need)
        if lane is not None and need is not None and place.offer.holds(need):
            if place.room.is_large_enough(need):
                return Pick(lane=lane if lane.project not in without else None)
            if lane.build_id not in _kept_by_others(session, worker, now):
                return Pick()
        worker.keeps = (
            None  # it was claimed by another, or ended; or something else keeps it now, or another worker, as this was away
        )
    needs = lanes.waiting_needs(session, fleet)
    could = {key: need for key, need in needs.items() if place.offer.holds(need)}
    fits = {key for key, need in could.items() if place.room.is_large_enough(need)}
    if not fits:
        return Pick()
    found = lanes.read_lanes(session, fleet, load, now, could, fair=fair, without=without)
    kept = frozenset[str]() if len(fits) == len(could) else _kept_by_others(session, worker, now)
    return pick(found, fits, fair=fair, now=now, kept=kept)


def claims_of(turn: Turn, offer: Offer) -> int:
    """How many claims the fleet's workers of this offer have had: each kind of workers has fair turns of its own."""
    if not offer.key:
        return turn.claims
    counted = turn.offers.get(offer.key, 0)
    return counted if isinstance(counted, int) else 0


def count_claim(turn: Turn, offer: Offer) -> None:
    """One more."""
    if not offer.key:
        turn.claims += 1
        return
    known = turn.offers if len(turn.offers) < _MOST_OFFERS or offer.key in turn.offers else {}
    turn.offers = {**known, offer.key: claims_of(turn, offer) + 1}


def shape_offer(shape: WorkerShape) -> Offer:
    """What each worker of a fleet has, as the fleet is set."""
    return Offer.of(shape.cpus, shape.memory_bytes, shape.labels)


def held_needs(session: Session, worker_id: str) -> list[Need]:
    """What the builds take that the worker holds. As many rows are read as builds run."""
    keys = session.scalars(sa.select(Build.need).where(IS_HELD, Build.lease_owner == worker_id))
    return [need for key in keys if (need := Need.parse(key)) is not None]


def _kept_by_others(session: Session, worker: Worker, now: int) -> frozenset[str]:
    """The builds for which other living workers of the fleet keep room."""
    keepers = sa.select(Worker.keeps).where(
        Worker.fleet == worker.fleet,
        Worker.id != worker.id,
        Worker.keeps.is_not(None),
        Worker.state == "up",
        Worker.not_claiming == "",
        Worker.leave_ms.is_(None),
        Worker.last_seen_ms > now - SILENT_MS,
    )
    return frozenset(keeps for keeps in session.scalars(keepers) if keeps is not None)


def pass_over(session: Session, lane: Lane, now: int) -> None:
    """Note since when others go before the first of `lane` for its need; next time, where its row is just being changed."""
    if lane.passed_ms is not None:
        return
    build = session.get(Build, lane.build_id, with_for_update={"skip_locked": True})
    if build is not None and build.passed_ms is None:
        build.passed_ms = now


def scaled_shape(session: Session, fleet: str) -> WorkerShape | None:
    """What the fleet's workers are like, where a provider makes them; None where they come by other hands."""
    row = session.get(Fleet, fleet)
    if row is None or row.settings is None:
        return None
    try:
        settings = FleetSettings.model_validate(row.settings)
    except ValidationError:  # of another release: whoever scales the fleet says so
        return None
    return settings.worker if settings.provider is not None else None


def misfit(need: Need, shape: WorkerShape) -> Mapping[str, str]:
    """Why no worker of this shape can ever hold a build of this need, by `size` and `labels`; nothing where one can."""
    offer, found = shape_offer(shape), {}
    if not offer.is_large_enough(need):
        found["size"] = f"it takes {need}, and a whole worker of the fleet has {offer}"
    if missing := sorted(need.labels - offer.labels):
        have = f"they have {', '.join(sorted(offer.labels))}" if offer.labels else "they have none"
        found["labels"] = f"workers of the fleet do not have the label{'s' * (len(missing) > 1)} {', '.join(missing)}: {have}"
    return found


def refuse_misfit(session: Session, fleet: str, environment: ProjectEnvironment) -> None:
    """Raises InvalidInput for a build that no worker of its fleet can ever hold, as the fleet is set."""
    shape = scaled_shape(session, fleet)
    found = misfit(environment.need, shape) if shape is not None else {}
    if not found:
        return
    size = "environment.computeType" if environment.compute_configuration is None else "environment.computeConfiguration"
    labels = "environment.workerLabels" if environment.worker_labels else "environment.computeConfiguration.instanceType"
    fields = [FieldProblem(field=size if kind == "size" else labels, what=what) for kind, what in found.items()]
    raise InvalidInput(
        f"no worker of fleet {fleet} can ever run this build: {'; '.join(found.values())}",
        fields=fields,
        hint=f"Choose another compute type or fleet, or set other workers: millrace fleet set {fleet}.",
    )
