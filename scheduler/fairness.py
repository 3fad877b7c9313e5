"""Whose turn it is: which waiting build of a fleet is claimed next. Pure; `scheduler.leases` claims by it.

What fits a worker, and what then happens to turns, is told in `scheduler.placement`.

Between projects: the highest level first; of one level, the project that holds the fewest slots for its weight; of these, the
one that was served longest ago, by a clock that runs slower the higher the weight. Inside a project: the highest level and
priority, then the lowest build number. Every `FAIR_TURN`th claim of a fleet is a fair one: it looks at no level and no priority,
and takes a project's oldest build, so that nobody waits for ever behind what is urgent. docs/queue.md states the bound, and a
test proves it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

FAIR_TURN: Final = 4
UNIT: Final = 1_000_000
"""What one claim costs a project of weight 1 on the fleet's clock."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Builds of a project and of one need that may be claimed now: what the project holds of this fleet, and the first of them.

    `served` is where the fleet's clock stands for the project, 0 where it was never served. `queued_ms` is by the database's
    clock; `need`, `rank`, `number` and `passed_ms` are as in `scheduler.models.Build`.
    """

    project: str
    weight: int
    running: int
    served: int
    build_id: str
    level: int
    queued_ms: int
    need: str = ""
    rank: int = 0
    number: int = 0
    passed_ms: int | None = None


def is_fair(turn: int) -> bool:
    """Whether the claim after `turn` others is a fair one."""
    return turn % FAIR_TURN == FAIR_TURN - 1


def choose(lanes: Iterable[Lane], *, fair: bool) -> Lane | None:
    """Whose turn it is; None where there is no lane. At a fair turn the lanes name their oldest builds, else their best."""

    def rank(lane: Lane) -> tuple[int, float, int, int, str]:
        level = 0 if fair else -lane.level
        return level, lane.running / lane.weight, lane.served, lane.queued_ms, lane.project

    return min(heads(lanes, fair=fair), key=rank, default=None)


def heads(lanes: Iterable[Lane], *, fair: bool) -> list[Lane]:
    """Of each project the lane whose first build comes first."""

    def place(lane: Lane) -> tuple[int, int]:
        return 0 if fair else lane.rank, lane.number

    found: dict[str, Lane] = {}
    for lane in lanes:
        if place(lane) < place(found.setdefault(lane.project, lane)):
            found[lane.project] = lane
    return list(found.values())


def serve(served: int, weight: int, clock: int) -> tuple[int, int]:
    """A project's `served` and the fleet's clock after a claim. Who was away gets no credit for it beyond its next claim."""
    start = max(served, clock)
    return start + UNIT // weight, start


def longest_wait(weight: int, others: Iterable[int]) -> int:
    """After at most so many claims of the fleet, a project's oldest build is claimed, where the project holds no slot.

    `others` are the weights of the other projects that wait. Each of them comes before it at most once, and once more for each
    time that its weight holds this one's; all that at fair turns.
    """
    return FAIR_TURN * (1 + sum(1 + -(-other // weight) for other in others))
