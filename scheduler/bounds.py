"""The limits that can keep a build from being claimed: which of them bind, what they say, and what lifts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.fleet import WorkerShape
from millrace.need import Need, Offer
from millrace.settings import Settings
from scheduler.fleets.capacity import Living, capacity_in, claims
from scheduler.foresight import Foreseen, Like
from scheduler.lanes import Load
from scheduler.models import Build, Fleet, Project
from scheduler.placement import misfit, shape_offer

_NAMED: Final = 5
"""How many workers that take no builds are named."""


class Limit(StrEnum):
    """What can keep a build from being claimed."""

    FLEET_PAUSED = "fleet_paused"
    FLEET_LIMIT = "fleet_limit"
    FARM_LIMIT = "farm_limit"
    PROJECT_LIMIT = "project_limit"
    BACK_OFF = "back_off"
    NEVER_FITS = "never_fits"
    NO_WORKER = "no_worker"
    LABELS = "labels"
    SIZE = "size"
    ROOM = "room"
    SLOTS = "slots"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A limit that binds. `needs`: the limit, the free slots, or for BACK_OFF the time in ms, that would do; None for a pause.

    Of what workers lack, `more` empty ones like `like` would do.
    """

    limit: Limit
    says: str
    lift: str
    needs: int | None = None
    more: int | None = None
    like: Like | None = None


def of_records(session: Session, build: Build, settings: Settings, load: Load, position: int, own: int, now: int) -> list[Bound]:
    """What binds but for workers, where `position` claims must happen for the build to be claimed, `own` of its project."""
    fleet = build.fleet
    row = session.get(Fleet, fleet) or Fleet(name=fleet)
    project_limit = session.scalar(sa.select(Project.concurrent_build_limit).where(Project.name == build.project_name))
    found: list[Bound] = []
    if row.paused_ms is not None:
        why = f": {row.paused_why}" if row.paused_why else ""
        found.append(
            Bound(
                limit=Limit.FLEET_PAUSED,
                says=f"fleet {fleet} is paused by {row.paused_by}{why}",
                lift=f"resume the fleet: millrace fleet resume {fleet}",
            )
        )
    of_project = load.by_project.get(build.project_name, 0)
    for limit, what, most, running, needs, lift in (
        (
            Limit.PROJECT_LIMIT,
            f"project {build.project_name}",
            project_limit,
            of_project,
            of_project + own,
            "its concurrentBuildLimit",
        ),
        (Limit.FLEET_LIMIT, f"fleet {fleet}", row.max_running, load.fleet, load.fleet + position, "the fleet's maxRunning"),
        (Limit.FARM_LIMIT, "the farm", settings.max_running, load.everything, load.everything + position, "MILLRACE_MAX_RUNNING"),
    ):
        if most is not None and needs > most:
            found.append(
                Bound(
                    limit=limit,
                    says=f"{what} may run {most} at once and runs {running}",
                    lift=f"wait until builds of it end, or raise {lift} to {needs}",
                    needs=needs,
                )
            )
    if build.not_before_ms > now:
        wait_s = (build.not_before_ms - now + 999) // 1000
        found.append(
            Bound(
                limit=Limit.BACK_OFF,
                says=f"its last attempt failed through the farm's fault, and the next one waits {wait_s} s more",
                lift="wait for that",
                needs=build.not_before_ms,
            )
        )
    return found


def like_of(need: Need, workers: Sequence[Living], shape: WorkerShape | None) -> Like:
    """What a worker is like that could hold it: the smallest living one, or one as the fleet is set, or one made for it."""
    able = [one for one in workers if one.offer.holds(need)]
    if able:
        one = min(
            able, key=lambda one: (not claims(one.worker), *_size(one.offer), one.offer.key, one.worker.slots, one.worker.id)
        )
        return _like(one.offer, one.worker.slots)
    if shape is not None and shape_offer(shape).holds(need):
        return _like(shape_offer(shape), shape.slots)
    if all(one.offer.is_unbounded for one in workers):
        return Like(offer=Offer(labels=need.labels), slots=None)
    return Like(offer=Offer(cpu_millis=need.cpu_millis, memory_bytes=need.memory_bytes, labels=need.labels), slots=1)


def of_workers(
    fleet: str, need: Need, workers: Sequence[Living], shape: WorkerShape | None, like: Like, foreseen: Foreseen
) -> list[Bound]:
    """What the fleet's workers lack for the build; nothing where those that live are foreseen to take it."""
    if foreseen.more == 0:
        return []
    limit, says, lift = _lack(fleet, need, workers, shape, like, foreseen)
    needs = len(foreseen.ahead) + 1
    return [Bound(limit=limit, says=says, lift=lift, needs=needs, more=foreseen.more, like=like)]


def _lack(
    fleet: str, need: Need, workers: Sequence[Living], shape: WorkerShape | None, like: Like, foreseen: Foreseen
) -> tuple[Limit, str, str]:
    able = [one for one in workers if one.offer.holds(need)]
    if not able and shape is not None and (wrong := misfit(need, shape)):
        says = f"no worker of fleet {fleet} as it is set can ever hold it: {'; '.join(wrong.values())}"
        return Limit.NEVER_FITS, says, f"set other workers (millrace fleet set {fleet}), or start the build with another need"
    position, capacity = len(foreseen.ahead) + 1, capacity_in(able or workers)
    missing = max(1, position - capacity.free_slots)
    slots = f"{missing} more free slot{'s' * (missing > 1)}"
    if not workers:
        what = "".join(f", label {label}" for label in sorted(need.labels))
        if shape is not None:
            lift = f"wait for workers, which the fleet starts by itself; 'millrace fleet show {fleet}' says what is in the way"
            return Limit.NO_WORKER, f"no worker of fleet {fleet} is there yet", lift
        return Limit.NO_WORKER, f"no worker of fleet {fleet} is there", f"start a worker of fleet {fleet} with {slots}{what}"
    if not able:
        return _unfit(fleet, need, workers)
    if foreseen.short_of_room:
        free = [one for one in able if one.free_slots]
        most = max(free, key=lambda one: (one.room.is_large_enough(need), *_size(one.room)))
        has = f"of those with a free slot, worker {most.worker.id} has most, {most.room}"
        if most.room.is_large_enough(need):
            keeps = most.worker.keeps
            taken = "it keeps that for another build" if keeps else "builds that go before take that"
            has = f"worker {most.worker.id} has {most.room}, and {taken}"
        lift = f"wait until builds end, or add {_workers(foreseen.more)} with {like.offer} to fleet {fleet}"
        return Limit.ROOM, f"it waits for a worker of fleet {fleet} with {need} free; {has}", lift
    idle = f"{capacity.free_slots} of {capacity.slots} slots of {capacity.workers} workers are free"
    if len(able) < len(workers):
        idle += f" ({len(workers) - len(able)} more could not hold it)"
    mend = "mend what keeps workers from taking builds, " if capacity.not_claiming else ""
    return (
        Limit.SLOTS,
        "; ".join((idle, *capacity.not_claiming[:_NAMED])),
        f"{slots}: wait until builds end, {mend}or add workers to fleet {fleet}",
    )


def _unfit(fleet: str, need: Need, workers: Sequence[Living]) -> tuple[Limit, str, str]:
    """Of a build that no living worker could hold even if it were empty."""
    labels = f"label{'s' * (len(need.labels) > 1)} {', '.join(sorted(need.labels))}" if need.labels else ""
    labelled = [one for one in workers if one.offer.has_labels(need)]
    if not labelled:
        has = "has them all" if len(need.labels) > 1 else "has it"
        says = f"it waits for a worker of fleet {fleet} with {labels}; none living {has}"
        return Limit.LABELS, says, f"start a worker of fleet {fleet} with {labels} (MILLRACE_LABELS) and room for {need}"
    largest = max(labelled, key=lambda one: _size(one.offer)).offer
    with_labels = f" and {labels}" if labels else ""
    says = f"it waits for a worker of fleet {fleet} with {need} free{with_labels}; the largest living one has {largest}"
    return Limit.SIZE, says, f"start a worker of fleet {fleet} that has {need}{with_labels}"


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


def _size(offer: Offer) -> tuple[float, float]:
    """To tell the larger of two."""
    return (
        float("inf") if offer.cpu_millis is None else offer.cpu_millis,
        float("inf") if offer.memory_bytes is None else offer.memory_bytes,
    )


def _like(offer: Offer, slots: int) -> Like:
    return Like(offer=offer, slots=None if offer.is_unbounded else slots)
