"""The order of claims: never unfair while a share is open, and nobody waits longer than the bound that docs/queue.md states."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.fairness import FAIR_TURN, Lane, choose, is_fair, longest_wait, serve


@dataclass
class Queue:
    """A fleet in memory that claims as `scheduler.leases` does."""

    weights: dict[str, int]
    waiting: dict[str, list[tuple[int, int]]]
    """Of each project: (level, number) of its builds, in the order in which they came."""
    running: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    clock: int = 0
    turn: int = 0

    def lanes(self, *, fair: bool) -> list[Lane]:
        heads = {
            name: min(builds, key=lambda build: build[1] if fair else (-build[0], build[1]))
            for name, builds in self.waiting.items()
            if builds
        }
        return [
            Lane(
                project=name,
                weight=self.weights[name],
                running=self.running.get(name, 0),
                served=self.served.get(name, 0),
                build_id=str(number),
                level=level,
                queued_ms=number,
            )
            for name, (level, number) in heads.items()
        ]

    def claim(self) -> Lane | None:
        lane = choose(self.lanes(fair=is_fair(self.turn)), fair=is_fair(self.turn))
        if lane is None:
            return None
        self.turn += 1
        self.waiting[lane.project].remove((lane.level, int(lane.build_id)))
        self.served[lane.project], self.clock = serve(lane.served, lane.weight, self.clock)
        self.running[lane.project] = self.running.get(lane.project, 0) + 1
        return lane


NAMES = "abcdef"
WEIGHTS = st.fixed_dictionaries(dict.fromkeys(NAMES, st.integers(1, 10)))


@settings(max_examples=200, deadline=None)
@given(
    WEIGHTS,
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(-3, 3)), max_size=60),
    st.integers(0, 40),
    st.data(),
)
def test_the_oldest_build_of_a_project_that_holds_no_slot_starts_within_the_bound(
    weights: dict[str, int], builds: list[tuple[str, int]], past: int, data: st.DataObject
) -> None:
    """Whatever happened before, whatever the others send meanwhile, however urgent it is, on any number of slots."""
    numbers = iter(range(10_000))
    queue = Queue(weights, {name: [] for name in NAMES})
    for name, level in builds:
        queue.waiting[name].append((level, next(numbers)))
    for _ in range(past):
        queue.claim()
        for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=2)):
            queue.running[name] = max(0, queue.running.get(name, 0) - 1)
    queue.running["a"] = 0
    queue.waiting["a"] = [(-3, next(numbers))]  # the least urgent of all
    bound = longest_wait(weights["a"], [weights[name] for name in NAMES if name != "a"])
    for _ in range(bound):
        for name in NAMES[1:]:
            queue.waiting[name].append((3, next(numbers)))
        lane = queue.claim()
        assert lane is not None
        if lane.project == "a":
            return
        queue.running[lane.project] -= data.draw(st.sampled_from([0, 1, 1]))
    raise AssertionError(f"not claimed within {bound} claims")


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, st.lists(st.sampled_from(NAMES), min_size=1, max_size=60), st.lists(st.sampled_from(NAMES), max_size=60))
def test_no_project_is_served_while_another_holds_less_of_its_share(
    weights: dict[str, int], sent: list[str], ended: list[str]
) -> None:
    queue = Queue(weights, {name: [(0, number) for number, of in enumerate(sent) if of == name] for name in NAMES})
    ends = iter(ended)
    while (lane := queue.claim()) is not None:
        held = {name: queue.running.get(name, 0) - (name == lane.project) for name in NAMES}
        waiting = [name for name, builds in queue.waiting.items() if builds or name == lane.project]
        assert held[lane.project] / weights[lane.project] == min(held[name] / weights[name] for name in waiting)
        name = next(ends, None)
        if name and queue.running.get(name):
            queue.running[name] -= 1


def test_on_one_slot_weights_share_the_claims() -> None:
    queue = Queue({"a": 3, "b": 1}, {"a": [(0, n) for n in range(400)], "b": [(0, n) for n in range(400, 800)]})
    taken = []
    for _ in range(200):
        lane = queue.claim()
        assert lane is not None
        queue.running[lane.project] = 0
        taken.append(lane.project)
    assert 148 <= taken.count("a") <= 152


def test_what_is_urgent_goes_first_but_for_every_fair_turn() -> None:
    queue = Queue({"a": 1, "b": 1}, {"a": [(5, n) for n in range(30)], "b": [(0, n) for n in range(100, 130)]})
    taken = ""
    for _ in range(12):
        lane = queue.claim()
        assert lane is not None
        queue.running[lane.project] = 0
        taken += lane.project
    assert taken == ("a" * (FAIR_TURN - 1) + "b") * 3


def test_who_was_away_comes_first_once_and_not_for_all_the_time_it_was_away() -> None:
    queue = Queue({"a": 1, "b": 1}, {"a": [(0, n) for n in range(100)], "b": []})
    for _ in range(50):
        queue.claim()
        queue.running["a"] = 0
    queue.waiting["b"] = [(0, n) for n in range(200, 230)]
    taken = ""
    for _ in range(6):
        lane = queue.claim()
        assert lane is not None
        queue.running[lane.project] = 0
        taken += lane.project
    assert taken.startswith("b")
    assert taken.count("b") <= 4
