"""How a new generation takes a fleet over: step by step where it does well, and not at all where it does not."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.vocabulary import Reason
from scheduler.fleets.rollout import (
    COME_S,
    QUIET_S,
    Kind,
    Side,
    canary_workers,
    chance_of,
    is_infra_failure,
    judge,
    needed,
)

MINUTE = 60_000


def old(attempts: int = 100, failures: int = 0, workers: int = 4) -> Side:
    return Side(generation=1, workers=workers, attempts=attempts, infra_failures=failures)


def new(attempts: int = 0, failures: int = 0, workers: int = 1) -> Side:
    return Side(generation=2, workers=workers, attempts=attempts, infra_failures=failures)


@pytest.mark.parametrize(
    ("stable", "canary", "share", "passed_s", "kind", "wider", "why"),
    [
        (old(), new(workers=0), 20, 60, Kind.HOLD, 20, "generation 2: none of its workers is there yet"),
        (old(), new(4), 20, 60, Kind.HOLD, 20, "generation 2 carried 4 of 10 attempts that are needed at 20 %"),
        (
            old(),
            new(10),
            20,
            60,
            Kind.WIDEN,
            40,
            "generation 2: 0 of 10 attempts failed by our fault, 0 of 100 on generation 1: 40 % of the workers now",
        ),
        (old(), new(39), 80, 60, Kind.HOLD, 80, "generation 2 carried 39 of 40 attempts that are needed at 80 %"),
        (old(), new(40), 80, 60, Kind.WIDEN, 100, None),
        (
            old(),
            new(50),
            100,
            60,
            Kind.FINISH,
            100,
            "generation 2: 0 of 50 attempts failed by our fault, 0 of 100 on generation 1: it is the fleet's now",
        ),
        (old(), new(10, 1), 20, 60, Kind.HOLD, 20, None),  # one may be chance
        (
            old(),
            new(4, 3),
            20,
            60,
            Kind.RETURN,
            0,
            "generation 2: 3 of 4 attempts failed by our fault, 0 of 100 on generation 1: "
            "by chance, that would be less often than 1 in 45526",
        ),
        (old(200, 20), new(30, 3), 40, 60, Kind.WIDEN, 80, None),  # as often as before
        (old(0, workers=1), new(1, 1), 20, 60, Kind.HOLD, 20, None),  # nothing to compare with, and but one
        (old(0, workers=1), new(3, 3), 20, 60, Kind.RETURN, 0, None),
        (old(), new(3), 20, QUIET_S + 1, Kind.WIDEN, 40, None),  # a quiet fleet
        (old(), new(2), 20, QUIET_S + 1, Kind.HOLD, 20, None),
        (old(), new(4, 1), 20, QUIET_S + 1, Kind.HOLD, 20, None),
        (old(), new(workers=0), 20, COME_S + 1, Kind.RETURN, 0, "generation 2: none of its workers came within 30 min"),
        (old(workers=0), new(workers=0), 20, COME_S + 1, Kind.HOLD, 20, None),  # a fleet at zero
    ],
)
def test_what_is_done_next(
    stable: Side, canary: Side, share: int, passed_s: int, kind: Kind, wider: int, why: str | None
) -> None:
    step = judge(stable, canary, share, 0, passed_s * 1000)
    assert (step.kind, step.share_percent) == (kind, wider), step.why
    assert why is None or step.why == why


@given(st.integers(0, 60), st.integers(0, 60), st.data())
def test_the_chance_is_that_of_fishers_exact_test(attempts: int, more: int, data: st.DataObject) -> None:
    failures = data.draw(st.integers(0, 20 + more))
    mine = data.draw(st.integers(0, attempts))
    counted = 0
    total, failed = 20 + more + attempts, failures + mine
    for k in range(mine, min(failed, attempts) + 1):
        counted += math.comb(failed, k) * math.comb(total - failed, attempts - k)
    exact = counted / math.comb(total, attempts)
    assert chance_of(old(20 + more, failures), new(attempts, mine)) == pytest.approx(exact, rel=1e-6)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 20))
def test_more_failures_are_never_better(attempts: int, others: int, failures: int) -> None:
    order = [Kind.RETURN, Kind.HOLD, Kind.WIDEN, Kind.FINISH]
    few, many = min(attempts, failures), min(attempts, failures + 1)
    steps = [judge(old(others), new(attempts, count), 20, 0, MINUTE).kind for count in (many, few)]
    assert steps == sorted(steps, key=order.index)


@pytest.mark.parametrize(("total", "share", "found"), [(1, 1, 1), (0, 20, 0), (10, 20, 2), (11, 20, 3), (4, 100, 4), (3, 1, 1)])
def test_the_share_has_at_least_one_worker(total: int, share: int, found: int) -> None:
    assert canary_workers(total, share) == found


def roll_out(draw: random.Random, stable_fails: float, canary_fails: float, share: int = 20) -> tuple[Kind, int]:
    """A whole rollout, judged after each attempt; how it ended, and how many attempts failed on the new generation."""
    stable, canary = [0, 0], [0, 0]
    for number in range(5000):
        side, fails = (canary, canary_fails) if draw.random() * 100 < share else (stable, stable_fails)
        side[0] += 1
        side[1] += draw.random() < fails
        step = judge(old(*stable), new(*canary), share, 0, number)
        if step.kind in (Kind.FINISH, Kind.RETURN):
            return step.kind, canary[1]
        share = step.share_percent
    return Kind.HOLD, canary[1]


@pytest.mark.parametrize(("fails", "most"), [(0.0, 0), (0.01, 4), (0.05, 10), (0.2, 16)])
def test_a_generation_that_is_as_good_is_seldom_sent_back(fails: float, most: int) -> None:
    draw = random.Random(7)
    ends = [roll_out(draw, fails, fails)[0] for _ in range(200)]
    assert ends.count(Kind.RETURN) <= most
    assert ends.count(Kind.FINISH) >= 200 - most


def test_a_generation_that_fails_is_sent_back_after_few_builds() -> None:
    draw = random.Random(7)
    ends = [roll_out(draw, 0.01, 0.5) for _ in range(200)]
    assert all(kind is Kind.RETURN for kind, _failed in ends)
    assert max(failed for _kind, failed in ends) <= 8


def test_whose_fault_counts() -> None:
    ours = {reason for reason in Reason if is_infra_failure(reason)}
    assert {Reason.WORKER_LOST, Reason.ENGINE_LOST, Reason.IMAGE_PULL, Reason.BUG} <= ours
    assert not {Reason.EXIT_CODE, Reason.OOM, Reason.QUEUE_TIMEOUT, Reason.WORKER_SHUTDOWN, Reason.NO_MATCHING_WORKER} & ours


def test_wider_shares_need_more_attempts() -> None:
    assert [needed(share) for share in (1, 20, 40, 80, 100)] == [10, 10, 20, 40, 50]
