"""How a new generation of workers takes a fleet over: some first, more once these do as well as the old, or none again. Pure.

What is compared is the share of attempts that ended by a Reason of ours (`is_infra_failure`): a user's failing test says
nothing of a worker. A build that begins late or never on a new worker is seen there, too, since its attempt ends by such a
Reason.

- Return: Fisher's exact test, one-sided: were the new workers as good as the old ones, so many failures or more would be on
  their side by chance with a probability below `SURELY`, and they are two at least. It is asked again and again while
  attempts end, so the bound is a strict one: simulated, a generation that is as good is sent back in 1 of 20 rollouts where a
  fifth of all attempts fail by our fault, in 1 of 250 where a hundredth does, and in none where none does. Where the old ones
  have carried fewer than `ENOUGH`, they are taken to have carried so many, those that are missing without a failure.
- Widen, to twice the share: the new workers have carried enough attempts for this share (`needed`), and the same test finds
  no sign that they are worse: a probability of `HARDLY` or more. After `QUIET_S` at one share, `FEW` attempts without a
  failure are enough.
- Finish: the same at a share of 100 %.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from millrace.vocabulary import Reason

SURELY: Final = 0.01
HARDLY: Final = 0.2
ENOUGH: Final = 20
FEW: Final = 3
LEAST_FAILURES: Final = 2
QUIET_S: Final = 3600
COME_S: Final = 1800
"""How long none of the new workers may come, where old ones are there, before the old generation is taken again."""

_OURS: Final = ("infra.", "internal.")
_NOT_BY_WORKERS: Final = frozenset({Reason.WORKER_SHUTDOWN, Reason.NO_MATCHING_WORKER})
"""A worker that leaves as it was told hands back its builds; and no worker is to blame for a build that none can run."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One generation since the rollout began: its workers that are there, the attempts that ended on any of its workers, and
    how many of these by a Reason that `is_infra_failure`."""

    generation: int
    workers: int
    attempts: int
    infra_failures: int

    @property
    def percent(self) -> float:
        """The share of attempts that failed by our fault."""
        return 100 * self.infra_failures / self.attempts if self.attempts else 0.0


class Kind(StrEnum):
    """What is done next."""

    HOLD = "HOLD"
    WIDEN = "WIDEN"
    FINISH = "FINISH"
    RETURN = "RETURN"


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is done next. `share_percent`: the share of workers that are to be of the new generation from now on."""

    kind: Kind
    share_percent: int
    why: str


def is_infra_failure(reason: Reason) -> bool:
    """Whether an attempt that ended so speaks against the worker that carried it."""
    return reason.value.startswith(_OURS) and reason not in _NOT_BY_WORKERS


def canary_workers(total: int, share_percent: int) -> int:
    """How many of `total` workers are of the new generation: its share rounded up, so that there is one to try at any
    share."""
    return -(-total * share_percent // 100)


def needed(share_percent: int) -> int:
    """How many attempts the new generation must have carried, since the rollout began, to go on from this share."""
    return max(ENOUGH // 2, share_percent // 2)


def judge(stable: Side, canary: Side, share_percent: int, since_ms: int, now_ms: int) -> Step:
    """What is done next with `canary`, whose share has been `share_percent` since `since_ms`."""
    new, passed_s = f"generation {canary.generation}", (now_ms - since_ms) / 1000
    chance = chance_of(stable, canary)
    failed = f"{canary.infra_failures} of {canary.attempts} attempts failed by our fault"
    others = f"{stable.infra_failures} of {stable.attempts} on generation {stable.generation}"
    if chance < SURELY and canary.infra_failures >= LEAST_FAILURES:
        why = f"{new}: {failed}, {others}: by chance, that would be less often than 1 in {_once_in(chance)}"
        return Step(kind=Kind.RETURN, share_percent=0, why=why)
    if not (canary.workers or canary.attempts):
        if stable.workers and passed_s > COME_S:
            return Step(kind=Kind.RETURN, share_percent=0, why=f"{new}: none of its workers came within {passed_s / 60:.0f} min")
        return Step(kind=Kind.HOLD, share_percent=share_percent, why=f"{new}: none of its workers is there yet")
    if chance < HARDLY:
        why = f"{new}: {failed}, {others}: that may be chance; more attempts will tell"
        return Step(kind=Kind.HOLD, share_percent=share_percent, why=why)
    least = needed(share_percent)
    if passed_s >= QUIET_S and not canary.infra_failures:
        least = min(least, FEW)
    if canary.attempts < least:
        why = f"{new} carried {canary.attempts} of {least} attempts that are needed at {share_percent} %"
        return Step(kind=Kind.HOLD, share_percent=share_percent, why=why)
    if share_percent >= 100:
        return Step(kind=Kind.FINISH, share_percent=100, why=f"{new}: {failed}, {others}: it is the fleet's now")
    wider = min(100, 2 * share_percent)
    return Step(kind=Kind.WIDEN, share_percent=wider, why=f"{new}: {failed}, {others}: {wider} % of the workers now")


def chance_of(stable: Side, canary: Side) -> float:
    """Fisher's exact test, one-sided: how likely so many failures, or more, are on the side of `canary` if both are as
    good."""
    attempts = max(stable.attempts, ENOUGH)
    failures, total = stable.infra_failures + canary.infra_failures, attempts + canary.attempts
    most = min(failures, canary.attempts)
    if canary.infra_failures == 0:
        return 1.0
    whole = _log_choose(total, canary.attempts)
    chances = (
        math.exp(_log_choose(failures, k) + _log_choose(total - failures, canary.attempts - k) - whole)
        for k in range(canary.infra_failures, most + 1)
        if canary.attempts - k <= total - failures
    )
    return min(1.0, sum(chances))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _once_in(chance: float) -> int:
    return math.floor(1 / max(chance, 1e-6))
