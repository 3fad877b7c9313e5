"""How many workers builds take that differ in size. Pure; the policy of a fleet counts by it."""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace.fleet import WorkerShape
from millrace.need import Need, Offer


@dataclass(kw_only=True)
class _Bins:
    """Workers that are filled alike: how many, how many builds each holds, and what is left of each."""

    count: int
    builds: int
    room: Offer


def slots_needed(needs: Mapping[Need, int], shape: WorkerShape, slots: int) -> int:
    """As many slots as these waiting builds come to on empty workers of this shape, `slots` to each; by first fit, largest first.

    So many that, divided by `slots` and rounded up, they are the workers that hold them all. Builds that no such worker can hold
    count as none: none is to come for them. Without cpus and memory in the shape, it is how many builds there are.
    """
    whole = Offer.of(shape.cpus, shape.memory_bytes, shape.labels)
    bins: list[_Bins] = []
    for need in sorted((need for need in needs if whole.holds(need)), key=lambda need: _share(need, whole), reverse=True):
        left, found = needs[need], []
        for some in [*bins, *([] if left == 0 else [_Bins(count=left, builds=0, room=whole)])]:
            each = min(slots - some.builds, _fit(need, some.room), left)
            if each < 1:
                found.append(some)
                continue
            full = min(some.count, left // each)
            rest = min(left - full * each, each) if full < some.count else 0
            for count, taken in ((full, each), (1 if rest else 0, rest), (some.count - full - (1 if rest else 0), 0)):
                if count:
                    room = some.room.less([_times(need, taken)])
                    found.append(_Bins(count=count, builds=some.builds + taken, room=room))
            left -= full * each + rest
        bins = [some for some in found if some.builds]
    last = bins[-1].builds if bins else 0
    return max(sum(some.count for some in bins) - 1, 0) * slots + last


def _share(need: Need, whole: Offer) -> tuple[float, str]:
    """How much of a worker it takes, of what it takes most of."""
    shares = [
        taken / there for taken, there in ((need.cpu_millis, whole.cpu_millis), (need.memory_bytes, whole.memory_bytes)) if there
    ]
    return max(shares, default=0), need.key


def _fit(need: Need, room: Offer) -> int:
    """How many builds of this need have room side by side; very many where nothing bounds them."""
    most = 10**9
    for taken, there in ((need.cpu_millis, room.cpu_millis), (need.memory_bytes, room.memory_bytes)):
        if there is not None and taken:
            most = min(most, max(0, there) // taken)
    return most


def _times(need: Need, count: int) -> Need:
    """So many of them together."""
    return Need(cpu_millis=need.cpu_millis * count, memory_bytes=need.memory_bytes * count, labels=need.labels)
