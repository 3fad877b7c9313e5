"""What the queue tells: builds that nobody takes though somebody could, and projects that are passed over."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.need import Offer
from scheduler import fairness, lanes
from scheduler.db import now_ms
from scheduler.fleets.capacity import living, offer_of
from scheduler.fsck.terms import Fault, Said, Scope, said
from scheduler.models import Attempt, Build, Event, Project, Worker

_STUCK_MS: Final = 120_000
_LATELY_MS: Final = 15_000
"""An idle worker asks every ten seconds."""
_HOUR_MS: Final = 3_600_000


def nothing_forgotten(scope: Scope) -> Said:
    """23: no build is passed over by workers that ask, as one would be whose bell is lost and whom nobody rings for again.

    What looks so may only just have become so: it is blamed where it still looks so when its worker has asked once more.
    """
    first, asked_ms = _takeable(scope)
    faults = []
    if first:
        time.sleep(scope.look_again_s)
        again, _ = _takeable(scope)
        for build_id, (worker, _seen_ms) in first.items():
            if build_id in again and again[build_id][0] == worker and again[build_id][1] > asked_ms:
                what = f"{build_id} waits, no limit keeps it, and worker {worker} asked with a free slot and did not get it"
                faults.append(Fault(what=what, ids=(build_id,), hint="'millrace why' says more. Please report it."))
    return said("the oldest waiting build of each project", faults)


def _takeable(scope: Scope) -> tuple[dict[str, tuple[str, int]], int]:
    """Builds that have waited for long and might be claimed now, with a worker that could; and the database's time."""
    found: dict[str, tuple[str, int]] = {}
    with scope.db.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        lanes.keep_plans(session)
        for fleet in lanes.waiting_fleets(session):
            load = lanes.load_of(session, fleet)
            if not lanes.limits_of(session, fleet, scope.settings).leave_room(load):
                continue
            idle = _idle(session, fleet, now)
            takers = {
                key: next((worker for worker, room in idle if room.holds(need)), None)
                for key, need in lanes.waiting_needs(session, fleet).items()
            }
            for lane in lanes.read_lanes(session, fleet, load, now, [key for key, one in takers.items() if one], fair=True):
                worker = takers[lane.need]
                if worker is not None and lane.queued_ms < now - _STUCK_MS:
                    found[lane.build_id] = (worker.id, worker.last_seen_ms)
    return found, now


def _idle(session: Session, fleet: str, now: int) -> list[tuple[Worker, Offer]]:
    """The workers of the fleet that asked lately, have a slot that holds nothing, and keep no room; and what each has left."""
    asking = [one for one in living(session, fleet) if one.free_slots and one.worker.last_seen_ms > now - _LATELY_MS]
    asking.sort(key=lambda one: one.worker.last_seen_ms, reverse=True)
    return [(one.worker, one.room) for one in asking if one.worker.keeps is None]


def none_passed_over(scope: Scope) -> Said:
    """24: no project that holds nothing has seen more claims go by than docs/queue.md allows.

    Counted from the moment since which nothing about it has changed, at most for an hour; and only claims of workers that slots
    alone bound, each kind of them by itself: with others a build may be passed over because it does not fit.
    """
    faults: list[Fault] = []
    with scope.db.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        lanes.keep_plans(session)
        for fleet in lanes.waiting_fleets(session):
            load, needs = lanes.load_of(session, fleet), lanes.waiting_needs(session, fleet)
            offers = {offer_of(worker) for worker in session.scalars(sa.select(Worker).where(Worker.fleet == fleet))}
            for offer in sorted((one for one in offers if one.is_unbounded), key=lambda one: one.key):
                could = [key for key, need in needs.items() if offer.holds(need)]
                waiting = fairness.heads(lanes.read_lanes(session, fleet, load, now, could, fair=True), fair=True)
                since = {
                    lane.project: _unchanged_since(session, lane, now)
                    for lane in waiting
                    if not load.by_project.get(lane.project)
                }
                if since:
                    moves = _moves(session, min(since.values()))
                    faults += [
                        fault
                        for project, at_ms in since.items()
                        if (fault := _passed_over(fleet, offer, project, at_ms, waiting, moves))
                    ]
    return said("projects that wait", faults)


def _unchanged_since(session: Session, lane: fairness.Lane, now: int) -> int:
    build, project = session.get_one(Build, lane.build_id), session.get_one(Project, lane.project)
    return max(lane.queued_ms, build.not_before_ms, project.modified_ms, now - _HOUR_MS)


@dataclass(frozen=True, kw_only=True)
class _Move:
    """A build moved; `offer` is that of the worker of its attempt, where there is one."""

    at_ms: int
    event: str
    fleet: str
    project: str
    weight: int
    offer: Offer | None


def _moves(session: Session, since_ms: int) -> list[_Move]:
    rows = session.execute(
        sa.select(Event.at_ms, Event.event, Build.fleet, Build.project_name, Project.weight, Worker)
        .join(Build, Build.id == Event.build_id)
        .join(Project, Project.name == Build.project_name)
        .outerjoin(Attempt, sa.and_(Attempt.build_id == Event.build_id, Attempt.attempt_no == Event.attempt_no))
        .outerjoin(Worker, Worker.id == Attempt.worker_id)
        .where(Event.at_ms > since_ms)
    )
    return [
        _Move(
            at_ms=at_ms,
            event=event,
            fleet=fleet,
            project=project,
            weight=weight,
            offer=offer_of(worker) if worker is not None else None,
        )
        for at_ms, event, fleet, project, weight, worker in rows
    ]


def _passed_over(
    fleet: str, offer: Offer, project: str, since_ms: int, waiting: Sequence[fairness.Lane], moves: Sequence[_Move]
) -> Fault | None:
    moves = [move for move in moves if move.at_ms > since_ms]
    if any(move.project == project for move in moves):
        return None  # its own builds moved, and so it held something, or another build of it was the oldest
    claims = [move for move in moves if move.event == "CLAIMED" and move.fleet == fleet and move.offer == offer]
    mine = next(lane for lane in waiting if lane.project == project)
    others = {move.project: move.weight for move in claims} | {lane.project: lane.weight for lane in waiting if lane is not mine}
    most = fairness.longest_wait(mine.weight, others.values())
    if len(claims) <= most:
        return None
    what = f"project {project} holds nothing in fleet {fleet}, and {len(claims)} claims of others went by, at most {most} may"
    return Fault(what=what, ids=(mine.build_id,), hint="Please report it, with 'millrace why' of that build.")
