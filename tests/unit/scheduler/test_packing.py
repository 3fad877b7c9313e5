"""Waiting builds as slots: as many workers as it takes to hold them, no build counted that fits none."""

from hypothesis import given
from hypothesis import strategies as st

from millrace.fleet import WorkerShape
from millrace.need import GIB, Need, Offer
from scheduler.fleets.packing import slots_needed

SIZES = st.builds(
    Need,
    cpu_millis=st.sampled_from([0, 500, 1000, 2000, 3000, 4000, 9000]),
    memory_bytes=st.sampled_from([0, 1, 2, 3, 4, 8, 20]).map(lambda size: size * GIB),
    labels=st.sampled_from([frozenset[str](), frozenset({"gpu"}), frozenset({"other"})]),
)
SHAPES = st.builds(
    WorkerShape,
    cpus=st.sampled_from([None, 4, 7]),
    memory_bytes=st.sampled_from([None, 8 * GIB, 9 * GIB]),
    labels=st.sampled_from([(), ("gpu",)]),
)


def one_by_one(needs: dict[Need, int], shape: WorkerShape, slots: int) -> int:
    """How many workers first fit takes, build by build, in the order that `slots_needed` chose."""
    whole = Offer.of(shape.cpus, shape.memory_bytes, shape.labels)

    def share(need: Need) -> tuple[float, str]:
        parts = [need.cpu_millis / whole.cpu_millis] if whole.cpu_millis else []
        parts += [need.memory_bytes / whole.memory_bytes] if whole.memory_bytes else []
        return max(parts, default=0), need.key

    workers: list[list[Need]] = []
    for need in sorted(filter(whole.holds, needs), key=share, reverse=True):
        for _ in range(needs[need]):
            fitting = (one for one in workers if len(one) < slots and whole.less(one).holds(need))
            place = next(fitting, None)
            if place is None:
                workers.append(place := [])
            place.append(need)
    return len(workers)


@given(st.dictionaries(SIZES, st.integers(1, 12), max_size=5), SHAPES, st.integers(1, 5))
def test_slots_come_to_the_workers_that_first_fit_takes(needs: dict[Need, int], shape: WorkerShape, slots: int) -> None:
    found = slots_needed(needs, shape, slots)
    whole = Offer.of(shape.cpus, shape.memory_bytes, shape.labels)
    assert -(-found // slots) == one_by_one(needs, shape, slots)
    assert found >= sum(count for need, count in needs.items() if whole.holds(need))


def test_without_sizes_each_build_is_a_slot() -> None:
    small, large = Need(cpu_millis=1, memory_bytes=1), Need(cpu_millis=10**6, memory_bytes=10**12)
    assert slots_needed({small: 100_000, large: 3}, WorkerShape(slots=4), 4) == 100_003


def test_large_builds_take_workers_of_their_own() -> None:
    shape = WorkerShape(slots=4, cpus=8, memory_bytes=16 * GIB)
    large, small = Need(cpu_millis=8000, memory_bytes=16 * GIB), Need(cpu_millis=2000, memory_bytes=4 * GIB)
    assert slots_needed({large: 3, small: 4}, shape, 4) == 16
    assert slots_needed({large: 3, small: 1}, shape, 4) == 13
    assert slots_needed({Need(cpu_millis=9000, memory_bytes=0): 5}, shape, 4) == 0


def test_a_hundred_thousand_builds_are_counted_by_kind() -> None:
    shape = WorkerShape(slots=8, cpus=16, memory_bytes=64 * GIB)
    needs = {Need(cpu_millis=1000 * n, memory_bytes=n * GIB): 20_000 for n in (1, 2, 3, 5, 8)}
    assert slots_needed(needs, shape, 8) // 8 >= 20_000 * 19 // 16
