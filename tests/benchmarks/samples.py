"""What a benchmark finds: one sample of one measure, and how much of it there is to be."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

OURS: Final = "Millrace"
MORE_IS_BETTER: Final = ("1/min", "MiB/s")
"""Units; of all others less is better."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`at` tells two runs of one measure apart: how many in parallel, on which database."""

    what: str
    who: str
    at: str = ""
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured. `peers`: beside other build systems, too. `about` is told of what was measured on."""

    rounds: int
    heavy: int
    """Rounds of what takes seconds each time."""
    queued: tuple[int, ...]
    peers: bool
    about: Callable[[str], None]


Part = Callable[[Scale], Iterator[Sample]]


def each(what: str, who: str, values: Iterable[float], unit: str, at: str = "") -> Iterator[Sample]:
    """Samples of one measure."""
    for value in values:
        yield Sample(what=what, who=who, at=at, value=value, unit=unit)
