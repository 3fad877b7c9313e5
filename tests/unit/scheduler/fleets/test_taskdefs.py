import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.vocabulary import COMPUTE_TYPES, GIB
from scheduler.fleets.taskdefs import MIB, Size, largest, size_of


@pytest.mark.parametrize(
    ("cpus", "memory_bytes", "size"),
    [
        (0.1, 1, Size(cpu=256, memory=512)),
        (1, 2 * GIB, Size(cpu=1024, memory=2048)),
        (2, 4 * GIB, Size(cpu=2048, memory=4096)),
        (4, 8 * GIB, Size(cpu=4096, memory=8192)),
        (8, 16 * GIB, Size(cpu=8192, memory=16384)),
        (8, 17 * GIB, Size(cpu=8192, memory=20480)),
        (0.25, 3 * GIB, Size(cpu=512, memory=3072)),
        (1, 30 * GIB, Size(cpu=4096, memory=30720)),
        (36, 72 * GIB, None),
        (1, 121 * GIB, None),
    ],
)
def test_a_build_gets_the_smallest_task_that_it_fits(cpus: float, memory_bytes: int, size: Size | None) -> None:
    assert size_of(cpus, memory_bytes) == size


def test_the_general_types_up_to_large_fit() -> None:
    fits = {name for name, (cpus, memory) in COMPUTE_TYPES.items() if size_of(cpus, memory) is not None}
    assert fits == {"BUILD_GENERAL1_SMALL", "BUILD_GENERAL1_MEDIUM", "BUILD_GENERAL1_LARGE"}


@given(st.floats(0.01, 20), st.integers(1, 130 * GIB))
def test_a_size_is_never_too_small_and_only_the_largest_is_outgrown(cpus: float, memory_bytes: int) -> None:
    size = size_of(cpus, memory_bytes)
    if size is None:
        assert cpus * 1024 > largest().cpu or memory_bytes > largest().memory * MIB
    else:
        assert size.cpu >= cpus * 1024
        assert size.memory * MIB >= memory_bytes
