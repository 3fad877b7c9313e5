"""What is tried on a load, and what came of it."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.fleet import Scaling
from scheduler.fleets.loads import Trace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is tried: how the fleet is set, and what its workers are like.

    `boot_s`: from when a worker is asked for until it takes builds; `leave_s`: from when it has nothing to do any more and is to
    leave until it is gone. `cost` is that of a worker for an hour, and `every_s` the time between decisions.
    """

    scaling: Scaling
    slots: int = 2
    boot_s: float = 30.0
    leave_s: float = 5.0
    cost: float = 0.0
    every_s: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """How things stood from `at_s` on. `wanted` is what was decided last; `worker_s` what workers had taken together by
    then."""

    at_s: float
    queued: int
    running: int
    ready: int
    booting: int
    draining: int
    wanted: int
    worker_s: float

    @property
    def workers(self) -> int:
        """All that are paid for."""
        return self.ready + self.booting + self.draining


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it. `waits_s` is in the order of arrivals; `worker_s` what all workers took together, their boots
    included."""

    setting: Setting
    trace: Trace
    waits_s: Sequence[float]
    moments: Sequence[Moment]
    ended_s: float
    worker_s: float
    busy_slot_s: float
    started: int

    @property
    def peak(self) -> int:
        """The most workers that were there at once."""
        return max((moment.workers for moment in self.moments), default=0)

    @property
    def most_wanted(self) -> int:
        """The most that was decided."""
        return max((moment.wanted for moment in self.moments), default=0)

    @property
    def cost(self) -> float:
        """What the workers cost."""
        return self.worker_s / 3600 * self.setting.cost

    @property
    def used_percent(self) -> float:
        """The share of the slots' time that builds held."""
        return 100 * self.busy_slot_s / (self.worker_s * self.setting.slots) if self.worker_s else 0.0

    def wait(self, percent: float) -> float:
        """So many per cent of the builds waited for so long, or less."""
        return point(self.waits_s, percent)


def point(samples: Sequence[float], percent: float) -> float:
    """A percentile, linear between samples."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A stretch of the time: `came` builds, which waited `wait_s` in the middle and `longest_s` at most. The most that
    waited, ran and were there in it, what was wanted at its end, and what had been spent by then."""

    from_s: float
    to_s: float
    came: int
    wait_s: float | None
    longest_s: float | None
    queued: int
    running: int
    workers: int
    wanted: int
    worker_s: float
    cost: float


def slices(result: Result, parts: int) -> list[Slice]:
    """The whole time in so many equal parts."""
    wide = result.ended_s / parts
    moments, at = result.moments, [moment.at_s for moment in result.moments]
    came = [arrival.at_s for arrival in result.trace.arrivals]
    found = []
    for number in range(parts):
        from_s, to_s = number * wide, (number + 1) * wide
        last = number == parts - 1
        first = bisect_left(came, from_s)
        waits = result.waits_s[first : len(came) if last else bisect_left(came, to_s)]
        begin = max(0, bisect_right(at, from_s) - 1)
        end = max(begin + 1, len(at) if last else bisect_left(at, to_s))
        inside, latest = moments[begin:end], moments[end - 1]
        spent_s = latest.worker_s + latest.workers * max(0.0, to_s - latest.at_s)
        found.append(
            Slice(
                from_s=from_s,
                to_s=to_s,
                came=len(waits),
                wait_s=point(waits, 50) if waits else None,
                longest_s=max(waits, default=None),
                queued=max(moment.queued for moment in inside),
                running=max(moment.running for moment in inside),
                workers=max(moment.workers for moment in inside),
                wanted=latest.wanted,
                worker_s=spent_s,
                cost=spent_s / 3600 * result.setting.cost,
            )
        )
    return found
