"""Which build a worker is given, and which one it keeps room for: nothing large waits for ever behind what always fits."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.fairness import Lane, is_fair, longest_wait, serve
from scheduler.placement import KEEP_AFTER_MS, Pick, pick

SECOND = 1000


def a_lane(project: str = "a", number: int = 1, need: str = "small", **changes: int | None) -> Lane:
    values: dict[str, int | None] = {"level": 0, "queued_ms": number, "rank": 0, "passed_ms": None, **changes}
    return Lane(
        project=project,
        weight=1,
        running=0,
        served=0,
        build_id=f"{project}:{number}",
        number=number,
        need=need,
        **values,  # type: ignore[arg-type]
    )


def test_what_does_not_fit_is_passed_over_and_said_so() -> None:
    large, small = a_lane(number=1, need="large"), a_lane(number=2)
    assert pick([large, small], {"small"}, fair=False, now=0, kept=()) == Pick(lane=small, passed=large)
    assert pick([large, small], {"small", "large"}, fair=False, now=0, kept=()) == Pick(lane=large)


def test_whose_turn_it_is_not_is_not_passed_over() -> None:
    small, large = a_lane(number=1), a_lane("b", number=2, need="large", passed_ms=0)
    assert pick([small, large], {"small"}, fair=False, now=10 * KEEP_AFTER_MS, kept=()) == Pick(lane=small)


def test_room_is_kept_once_it_was_passed_over_for_long_and_by_one_worker() -> None:
    large, small = a_lane(number=1, need="large", passed_ms=5), a_lane(number=2)
    before, after = KEEP_AFTER_MS + 4, KEEP_AFTER_MS + 5
    assert pick([large, small], {"small"}, fair=False, now=before, kept=()).lane == small
    assert pick([large, small], {"small"}, fair=False, now=after, kept=()) == Pick(keep=large)
    assert pick([large, small], {"small"}, fair=False, now=after, kept={large.build_id}) == Pick(lane=small)
    assert pick([large, small], {"small", "large"}, fair=False, now=after, kept={large.build_id}) == Pick(lane=large)


def test_of_one_project_the_first_of_all_needs_comes() -> None:
    old, urgent = a_lane(number=1), a_lane(number=7, need="large", rank=-5)
    assert pick([old, urgent], {"small", "large"}, fair=False, now=0, kept=()).lane == urgent
    assert pick([old, urgent], {"small", "large"}, fair=True, now=0, kept=()).lane == old


@dataclass
class Box:
    """One worker with 4 vCPU and a queue that never runs short of small builds; `large` needs all of them."""

    projects: int
    level: int
    now: int = 0
    claims: int = 0
    clock: int = 0
    number: int = 100
    keeps: bool = False
    large_ms: int | None = None
    passed_ms: int | None = None
    served: dict[str, int] = field(default_factory=dict)
    held: list[tuple[int, str]] = field(default_factory=list)
    first_turn: int | None = None

    def lanes(self) -> list[Lane]:
        running = [project for _until, project in self.held]
        small = [
            Lane(
                project=f"p{n}",
                weight=1,
                running=running.count(f"p{n}"),
                served=self.served.get(f"p{n}", 0),
                build_id=f"p{n}:{self.number}",
                level=self.level,
                queued_ms=self.number,
                need="small",
                rank=-1000 * self.level,
                number=self.number,
            )
            for n in range(self.projects)
        ]
        large = Lane(
            project="big",
            weight=1,
            running=0,
            served=self.served.get("big", 0),
            build_id="big:1",
            level=0,
            queued_ms=1,
            need="large",
            number=1,
            passed_ms=self.passed_ms,
        )
        return [*small, large]

    def ask(self, lasts_s: int) -> bool:
        """Whether something was claimed."""
        self.held = [one for one in self.held if one[0] > self.now]
        free = 4 - len(self.held)
        if self.keeps:
            if free == 4:
                self.large_ms = self.now
            return False
        fits = ({"small"} if free >= 1 else set()) | ({"large"} if free == 4 else set())
        if not fits:
            return False
        fair = is_fair(self.claims)
        picked = pick(self.lanes(), fits, fair=fair, now=self.now, kept=())
        if picked.keep is not None:
            self.keeps = True
            return False
        if picked.passed is not None and self.passed_ms is None:
            self.passed_ms = self.now
        lane = picked.lane
        assert lane is not None
        if lane.need == "large":
            self.large_ms = self.now
            return False
        self.claims += 1
        self.number += 1
        self.served[lane.project], self.clock = serve(lane.served, 1, self.clock)
        self.held.append((self.now + lasts_s * SECOND, lane.project))
        return True


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(-1, 3), st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_a_build_that_needs_a_whole_worker_starts_within_the_bound(projects: int, level: int, lasts: list[int]) -> None:
    """However urgent the small ones are that always fit: its turn, two minutes, its turn again, and what runs then ends."""
    box, asked = Box(projects, level), 0
    turn = longest_wait(1, [1] * projects)
    since_claims: int | None = None
    while box.large_ms is None:
        while box.ask(lasts[asked % len(lasts)]):
            asked += 1
        if box.passed_ms is None and not box.keeps:
            assert box.claims <= turn, "its turn has not come"
        elif box.passed_ms is not None and box.now >= box.passed_ms + KEEP_AFTER_MS and since_claims is None:
            since_claims = box.claims
        if since_claims is not None and not box.keeps:
            assert box.claims <= since_claims + turn, "no room is kept"
        if box.keeps:
            assert box.now <= max((until for until, _ in box.held), default=box.now)
        box.now += SECOND
        assert box.now < 3_600 * SECOND
