"""What is done with a fleet, now that its size is decided: who is let go, who may stay, who is to leave, how many come. Pure.

Nothing here ends a worker that runs something: busy ones are asked to leave, and let go when they have left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from millrace.fleet import Scaling
from scheduler.fleets.marks import BY_HAND
from scheduler.fleets.observe import At, Sight, WorkerSeen
from scheduler.fleets.provider import InstanceState

_AT_A_TIME: Final = 4
"""Of so many workers, one is replaced at a time, where their generation is not the one that is wanted, or they take no builds."""
UNFIT_MS: Final = 300_000
"""How long a worker may be idle and take no builds, for a full disk or an engine that is away, before another takes its place."""


@dataclass(frozen=True, kw_only=True)
class Generations:
    """Which generations a fleet's workers are to be of: `share_percent` of them of `newest`, the others of `stable`."""

    stable: int = 1
    newest: int = 1
    share_percent: int = 100

    def newest_of(self, total: int) -> int:
        """How many of `total` workers are to be of the newest."""
        return total if self.stable == self.newest else -(-total * self.share_percent // 100)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`release`: instances to be let go, and why. `stay`: marked workers, of which `stay_most` may stay. `leave`: workers to be
    asked to leave, and why. `grow`: how many more instances of which generation.
    """

    release: Mapping[str, str] = field(default_factory=dict)
    stay: Sequence[str] = ()
    leave: Mapping[str, str] = field(default_factory=dict)
    grow: Mapping[int, int] = field(default_factory=dict)


def make_plan(sight: Sight, wanted: int, scaling: Scaling, generations: Generations, *, why: str) -> Plan:
    """What is to be done where `wanted` workers are to be there."""
    odd = _odd(sight, wanted, generations)
    surge = max(0, min(max(1, wanted // _AT_A_TIME), len(odd), scaling.maximum - wanted))
    target = wanted + surge
    missing = max(0, target - sight.load.present)
    stay = _stayers(sight, generations)[:missing]
    return Plan(
        release=_releases(sight, scaling),
        stay=stay,
        leave=_leavers(sight, wanted, odd, makes_room=surge == 0, why=why),
        grow=_growth(sight, target, missing - len(stay), generations),
    )


def _releases(sight: Sight, scaling: Scaling) -> dict[str, str]:
    """Instances that nothing is lost with: their worker has gone, or never came."""
    found: dict[str, str] = {}
    at = {worker.id: worker for worker in sight.workers}
    for instance in sight.instances:
        worker = at.get(instance.id)
        if instance.state is InstanceState.STOPPING:
            continue
        if instance.released:
            found[instance.id] = "it was let go before"
        elif worker is not None and worker.at is At.GONE:
            found[instance.id] = f"its worker has left{f': {worker.why}' if worker.why else ''}"
        elif worker is not None and worker.at is At.LOST:
            found[instance.id] = f"its worker has been silent for {worker.silent_ms // 1000} s, and runs nothing"
        elif instance.boots and sight.load.now_ms - instance.known_ms > scaling.join_within_s * 1000:
            found[instance.id] = f"its worker did not come within {scaling.join_within_s:g} s"
    return found


def _odd(sight: Sight, wanted: int, generations: Generations) -> list[WorkerSeen]:
    """Workers of instances that are to be replaced by others, the first to be replaced first: those that take no builds, and then
    those of another generation than is wanted.
    """
    unfit = [worker for worker in _candidates(sight) if _is_unfit(worker, sight.load.now_ms)]
    ours = [worker for worker in _candidates(sight) if worker not in unfit]
    others = sum(not worker.instance for worker in sight.workers_at(At.IDLE, At.BUSY))
    total = max(0, wanted - others)
    quota = {generations.newest: generations.newest_of(total)}
    if generations.stable != generations.newest:
        quota[generations.stable] = total - quota[generations.newest]
    found: list[WorkerSeen] = []
    for generation in {worker.generation for worker in ours} - {None}:
        here = [worker for worker in ours if worker.generation == generation]
        most = quota.get(generation) if generation is not None else None
        if most is None:
            found += here
        elif generations.stable != generations.newest:
            found += here[: max(0, len(here) - most)]
    return [*unfit, *sorted(found, key=_order)]


def _is_unfit(worker: WorkerSeen, now_ms: int) -> bool:
    """Whether it has had time enough to take builds again. One that runs some has no need to be replaced yet."""
    since = worker.idle_since_ms
    return bool(worker.not_claiming) and not worker.held and since is not None and now_ms - since >= UNFIT_MS


def _candidates(sight: Sight) -> list[WorkerSeen]:
    """Workers of the fleet's instances that could be asked to leave, those first that cost least."""
    return sorted((worker for worker in sight.workers_at(At.IDLE, At.BUSY) if worker.instance), key=_order)


def _order(worker: WorkerSeen) -> tuple[int, int, int, str]:
    """Idle for longest, then with the fewest builds, then of the oldest generation."""
    return worker.held, worker.idle_since_ms or 0, worker.generation or 0, worker.id


def _stayers(sight: Sight, generations: Generations) -> list[str]:
    """Workers whose mark may be taken back: they were not told yet, and are of a generation that is wanted."""
    wanted = (generations.stable, generations.newest)
    marked = [w for w in sight.workers_at(At.DRAINING) if w.marked and not w.told and w.generation in (None, *wanted)]
    marked = [worker for worker in marked if not worker.why.startswith(BY_HAND)]
    return [worker.id for worker in sorted(marked, key=lambda worker: (-worker.held, worker.id))]


def _leavers(sight: Sight, wanted: int, odd: Sequence[WorkerSeen], *, makes_room: bool, why: str) -> dict[str, str]:
    """Those of the workers that have come that are too many, and such first that are to be replaced.

    Booting ones count for nothing: each comes, and is looked at then. `makes_room`: no more can come before one has gone.
    """
    now = sight.load.now_ms
    replaced = {
        worker.id: f"it takes no builds: {worker.not_claiming}"
        if _is_unfit(worker, now)
        else f"generation {worker.generation} is replaced"
        for worker in odd
    }
    candidates = [*odd, *(worker for worker in _candidates(sight) if worker.id not in replaced)]
    leave = candidates[: max(0, sight.load.idle + sight.load.busy - wanted)]
    if odd and not leave and makes_room:
        leave = list(odd[: max(0, max(1, wanted // _AT_A_TIME) - sight.load.draining - sight.load.coming)])
    return {worker.id: replaced.get(worker.id, why) for worker in leave}


def _growth(sight: Sight, target: int, missing: int, generations: Generations) -> dict[int, int]:
    if missing <= 0:
        return {}
    others = sum(not worker.instance for worker in sight.workers_at(At.IDLE, At.BUSY))
    newest = sum(worker.generation == generations.newest for worker in _candidates(sight))
    newest += sum(instance.generation == generations.newest for instance in sight.instances if instance.boots)
    of_newest = min(missing, max(0, generations.newest_of(max(0, target - others)) - newest))
    grow = {generations.newest: of_newest, generations.stable: missing - of_newest}
    if generations.stable == generations.newest:
        grow = {generations.newest: missing}
    return {generation: count for generation, count in grow.items() if count}
