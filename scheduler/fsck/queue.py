"""What the queue tells: builds that nobody takes though somebody could, and projects that are passed over."""

import time
from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from scheduler import fairness, lanes
from scheduler.db import now_ms
from scheduler.fsck.terms import Fault, Said, Scope, said
from scheduler.models import IS_HELD, Build, Event, Project, Worker

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
        for fleet in lanes.waiting_fleets(session):
            load = lanes.load_of(session, fleet)
            worker = _idle(session, fleet, now)
            if worker is None or not lanes.limits_of(session, fleet, scope.settings).leave_room(load):
                continue
            for lane in lanes.read_lanes(session, fleet, load, now, fair=True):
                if lane.queued_ms < now - _STUCK_MS:
                    found[lane.build_id] = (worker.id, worker.last_seen_ms)
    return found, now


def _idle(session: Session, fleet: str, now: int) -> Worker | None:
    """The worker of the fleet that asked last, lately, and has a slot that holds nothing."""
    held = sa.select(sa.func.count()).where(IS_HELD, Build.lease_owner == Worker.id).correlate(Worker).scalar_subquery()
    asking = sa.select(Worker).where(Worker.fleet == fleet, Worker.last_seen_ms > now - _LATELY_MS, Worker.slots > held)
    asking = asking.where(Worker.state == "up", Worker.not_claiming == "", Worker.leave_ms.is_(None))
    return session.scalars(asking.order_by(Worker.last_seen_ms.desc()).limit(1)).first()


def none_passed_over(scope: Scope) -> Said:
    """24: no project that holds nothing has seen more claims go by than docs/queue.md allows.

    Counted from the moment since which nothing about it has changed, at most for an hour.
    """
    faults: list[Fault] = []
    with scope.db.reading() as session:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        for fleet in lanes.waiting_fleets(session):
            load = lanes.load_of(session, fleet)
            waiting = lanes.read_lanes(session, fleet, load, now, fair=True)
            since = {
                lane.project: _unchanged_since(session, lane, now) for lane in waiting if not load.by_project.get(lane.project)
            }
            if since:
                moves = _moves(session, min(since.values()))
                faults += [
                    fault for project, at_ms in since.items() if (fault := _passed_over(fleet, project, at_ms, waiting, moves))
                ]
    return said("projects that wait", faults)


def _unchanged_since(session: Session, lane: fairness.Lane, now: int) -> int:
    build, project = session.get_one(Build, lane.build_id), session.get_one(Project, lane.project)
    return max(lane.queued_ms, build.not_before_ms, project.modified_ms, now - _HOUR_MS)


def _moves(session: Session, since_ms: int) -> Sequence[Any]:
    return session.execute(
        sa.select(Event.at_ms, Event.event, Build.fleet, Build.project_name, Project.weight)
        .join(Build, Build.id == Event.build_id)
        .join(Project, Project.name == Build.project_name)
        .where(Event.at_ms > since_ms)
    ).all()


def _passed_over(fleet: str, project: str, since_ms: int, waiting: Sequence[fairness.Lane], moves: Sequence[Any]) -> Fault | None:
    moves = [move for move in moves if move.at_ms > since_ms]
    if any(move.project_name == project for move in moves):
        return None  # its own builds moved, and so it held something, or another build of it was the oldest
    claims = [move for move in moves if move.event == "CLAIMED" and move.fleet == fleet]
    mine = next(lane for lane in waiting if lane.project == project)
    others = {move.project_name: move.weight for move in claims} | {
        lane.project: lane.weight for lane in waiting if lane is not mine
    }
    most = fairness.longest_wait(mine.weight, others.values())
    if len(claims) <= most:
        return None
    what = f"project {project} holds nothing in fleet {fleet}, and {len(claims)} claims of others went by, at most {most} may"
    return Fault(what=what, ids=(mine.build_id,), hint="Please report it, with 'millrace why' of that build.")
