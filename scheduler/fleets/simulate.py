"""What a fleet would do: a load is replayed, event by event, through the very `decide` that runs live. Pure; no time passes.

Workers come `boot_s` after they were asked for, take builds first come, first served, and leave as live ones do
(`scheduler.fleets.plan`): those that are idle go, the one that has been idle for longest first; one that is busy takes nothing
more and goes when its last build has ended; one that boots is let come first. The policy is asked every `every_s`, and is told
the medians of what it has seen by then.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from millrace.errors import InvalidInput
from scheduler.fleets.loads import Trace
from scheduler.fleets.outcome import Moment, Result, Setting, point
from scheduler.fleets.policy import Load, Memory, decide

BUILDS_SEEN: Final = 50
BOOTS_SEEN: Final = 20
"""Medians are those of so many, the last ones (as in `scheduler.fleets.observe`)."""
_WARM_EVERY_S: Final = 10.0
"""How often it is looked at the clock of warm hours, where nothing else happens."""


def simulate(trace: Trace, setting: Setting) -> Result:
    """Replay a load. Raises InvalidInput where no build would ever start."""
    if setting.scaling.maximum < 1:
        raise InvalidInput("maximum is 0: no build would ever start", hint="Try a maximum of 1 or more.")
    return _Run(trace, setting).run()


class _What(IntEnum):
    """Events of one moment come in this order: what ends makes room for what comes, and then it is decided."""

    END = 0
    GONE = 1
    READY = 2
    ARRIVE = 3
    DECIDE = 4


@dataclass(eq=False)
class _Worker:
    """`ready_s` is None while it boots."""

    started_s: float
    ready_s: float | None = None
    busy: int = 0
    idle_since_s: float = 0.0
    leaving: bool = False


class _Middle:
    """The median of the last ones that were added."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._last: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, value: float) -> None:
        self._last.append(value)
        insort(self._ordered, value)
        if len(self._last) > self._most:
            del self._ordered[bisect_left(self._ordered, self._last.popleft())]

    def median(self) -> float | None:
        return point(self._ordered, 50) if self._ordered else None


class _Run:
    """One replay."""

    def __init__(self, trace: Trace, setting: Setting) -> None:
        self._trace = trace
        self._setting = setting
        self._now_s = 0.0
        self._events: list[tuple[float, int, int, float, _Worker | None]] = []
        self._pushed = 0
        self._queue: deque[int] = deque()
        self._workers: list[_Worker] = []
        self._free: deque[_Worker] = deque()
        self._started = 0
        self._ended = 0
        self._memory = Memory()
        self._wanted = 0
        self._waits: list[float] = [0.0] * len(trace.arrivals)
        self._lengths = _Middle(BUILDS_SEEN)
        self._boots = _Middle(BOOTS_SEEN)
        self._running = 0
        self._ready = 0
        self._draining = 0
        self._worker_s = 0.0
        self._moments: list[Moment] = []

    def run(self) -> Result:
        arrivals = self._trace.arrivals
        for arrival in arrivals:
            self._push(arrival.at_s, _What.ARRIVE)
        self._push(arrivals[0].at_s // self._setting.every_s * self._setting.every_s, _What.DECIDE)
        arrived = 0
        while self._events:
            at_s, what, _number, length_s, worker = heapq.heappop(self._events)
            self._worker_s += len(self._workers) * (at_s - self._now_s)
            self._now_s = at_s
            if what == _What.ARRIVE:
                self._queue.append(arrived)
                arrived += 1
            elif what == _What.DECIDE:
                self._decide()
                if self._ended == len(arrivals) and self._is_settled():
                    break
                self._push(self._next_look_s(), _What.DECIDE)
            elif worker is not None and what == _What.GONE:
                self._workers.remove(worker)
                self._draining -= 1
            elif worker is not None and what == _What.READY:
                self._join(worker)
            elif worker is not None:
                self._end(worker, length_s)
            self._start_builds()
            if self._events[0][0] > self._now_s:
                self._note()
        self._note()
        return Result(
            setting=self._setting,
            trace=self._trace,
            waits_s=self._waits,
            moments=self._moments,
            ended_s=self._now_s,
            worker_s=self._worker_s,
            busy_slot_s=math.fsum(arrival.length_s for arrival in arrivals),
            started=self._started,
        )

    def _push(self, at_s: float, what: _What, *, length_s: float = 0.0, worker: _Worker | None = None) -> None:
        heapq.heappush(self._events, (at_s, what, self._pushed, length_s, worker))
        self._pushed += 1

    def _join(self, worker: _Worker) -> None:
        worker.ready_s = worker.idle_since_s = self._now_s
        self._ready += 1
        self._boots.add(self._now_s - worker.started_s)
        self._free.extend([worker] * self._setting.slots)

    def _start_builds(self) -> None:
        """Those that came first, on the slots that have been free for longest, as workers that ask take turns."""
        while self._queue and self._free:
            worker = self._free.popleft()
            if worker.leaving:
                continue
            number = self._queue.popleft()
            arrival = self._trace.arrivals[number]
            self._waits[number] = self._now_s - arrival.at_s
            worker.busy += 1
            self._running += 1
            self._push(self._now_s + arrival.length_s, _What.END, length_s=arrival.length_s, worker=worker)

    def _end(self, worker: _Worker, length_s: float) -> None:
        worker.busy -= 1
        self._running -= 1
        self._ended += 1
        self._lengths.add(length_s)
        if not worker.leaving:
            worker.idle_since_s = self._now_s
            self._free.append(worker)
        elif not worker.busy:
            self._leave(worker)

    def _leave(self, worker: _Worker) -> None:
        self._push(self._now_s + self._setting.leave_s, _What.GONE, worker=worker)

    def _decide(self) -> None:
        now_ms = self._trace.start_ms + round(self._now_s * 1000)
        staying = [worker for worker in self._workers if not worker.leaving]
        ready = [worker for worker in staying if worker.ready_s is not None]
        leaving = [worker for worker in self._workers if worker.leaving]
        load = Load(
            now_ms=now_ms,
            known_ms=now_ms,
            queued=len(self._queue),
            oldest_wait_s=self._now_s - self._trace.arrivals[self._queue[0]].at_s if self._queue else 0,
            running=self._running,
            on_draining=sum(worker.busy for worker in leaving),
            idle=sum(1 for worker in ready if not worker.busy),
            busy=sum(1 for worker in ready if worker.busy),
            booting=len(staying) - len(ready),
            draining=len(leaving),
            build_s=self._lengths.median(),
            boot_s=self._boots.median(),
        )
        decision = decide(self._setting.scaling, self._setting.slots, load, self._memory)
        self._memory, self._wanted = decision.memory, decision.wanted
        for _ in range(decision.wanted - len(staying)):
            worker = _Worker(started_s=self._now_s)
            self._workers.append(worker)
            self._started += 1
            self._push(self._now_s + self._setting.boot_s, _What.READY, worker=worker)
        for worker in sorted(ready, key=_goes_first)[: max(0, len(ready) - decision.wanted)]:
            worker.leaving = True
            self._draining += 1
            self._ready -= 1
            if not worker.busy:
                self._leave(worker)

    def _is_settled(self) -> bool:
        """Whether nothing is on its way: no worker that comes or leaves, no shrinking that is due."""
        at_home = all(worker.ready_s is not None and not worker.leaving for worker in self._workers)
        return at_home and self._is_still()

    def _is_still(self) -> bool:
        """Whether no worker stays only for what was wanted before."""
        return len(self._memory.recent) <= 1

    def _next_look_s(self) -> float:
        """When it is decided next: after `every_s`, but moments at which nothing can have changed are passed over.

        Between two events the load changes only by how long builds have waited, which counts only against a target. What else
        can change is that a worker has stayed for long enough, and warm hours. The last look before an event stays: what is
        wanted then keeps workers from then on.
        """
        every_s, scaling = self._setting.every_s, self._setting.scaling
        soonest_s = self._now_s + every_s
        if (self._queue and scaling.target_wait_s) or not self._events:
            return soonest_s
        until_s = (math.ceil(self._events[0][0] / every_s) - 1) * every_s
        if not self._is_still():
            stays_until_s = (self._memory.recent[0][0] - self._trace.start_ms) / 1000 + scaling.shrink_after_s
            until_s = min(until_s, math.ceil(stays_until_s / every_s) * every_s)
        if scaling.warm:
            until_s = min(until_s, self._now_s + max(every_s, _WARM_EVERY_S))
        return max(soonest_s, until_s)

    def _note(self) -> None:
        moment = Moment(
            at_s=self._now_s,
            queued=len(self._queue),
            running=self._running,
            ready=self._ready,
            booting=len(self._workers) - self._ready - self._draining,
            draining=self._draining,
            wanted=self._wanted,
            worker_s=self._worker_s,
        )
        self._moments.append(moment)


def _goes_first(worker: _Worker) -> tuple[int, float]:
    """Who leaves first: the least busy, of the idle ones the one that has been so for longest."""
    return worker.busy, worker.idle_since_s
