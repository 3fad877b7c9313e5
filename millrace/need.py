"""What a build needs of its worker, and what a worker offers: cpu, memory, labels. Pure; docs/placement.md tells of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Final, Self

from pydantic import StringConstraints

LABEL: Final = r"^[A-Za-z0-9][A-Za-z0-9._=/-]{0,62}$"
Label = Annotated[str, StringConstraints(pattern=LABEL)]
GIB: Final = 1024**3


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a build takes of its worker as long as it is held. `labels`: the worker must have all of them.

    Few differ among many builds, so they are kept, and looked for, by their `key`.
    """

    cpu_millis: int
    memory_bytes: int
    labels: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """All of it in one string, such as `2000/4294967296/arm,gpu`."""
        return f"{self.cpu_millis}/{self.memory_bytes}/{','.join(sorted(self.labels))}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """The need of this key; None where it is none, as in a damaged record."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,18})/(.*)", key)
        if found is None:
            return None
        labels = frozenset(found[3].split(",") if found[3] else ())
        return cls(cpu_millis=int(found[1]), memory_bytes=int(found[2]), labels=labels)

    def __str__(self) -> str:
        return _in_words(self.cpu_millis, self.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a worker has for builds, or what of it is free. None: its slots alone bound that."""

    cpu_millis: int | None = None
    memory_bytes: int | None = None
    labels: frozenset[str] = frozenset()

    @classmethod
    def of(cls, cpus: float | None, memory_bytes: int | None, labels: Iterable[str] = ()) -> Self:
        """As settings and messages have it, in cpus."""
        return cls(cpu_millis=None if cpus is None else round(cpus * 1000), memory_bytes=memory_bytes, labels=frozenset(labels))

    @property
    def key(self) -> str:
        """All of it in one string; "" where it bounds nothing and has no labels."""
        if self == Offer():
            return ""
        cpu, memory = ("" if value is None else value for value in (self.cpu_millis, self.memory_bytes))
        return f"{cpu}/{memory}/{','.join(sorted(self.labels))}"

    @property
    def is_unbounded(self) -> bool:
        """Whether slots alone bound it."""
        return self.cpu_millis is None and self.memory_bytes is None

    def has_labels(self, need: Need) -> bool:
        """Whether every label is there that `need` names."""
        return need.labels <= self.labels

    def is_large_enough(self, need: Need) -> bool:
        """Whether it has as much cpu and memory as `need` takes."""
        return (self.cpu_millis is None or need.cpu_millis <= self.cpu_millis) and (
            self.memory_bytes is None or need.memory_bytes <= self.memory_bytes
        )

    def holds(self, need: Need) -> bool:
        """Whether a build of this need can be held by it."""
        return self.has_labels(need) and self.is_large_enough(need)

    def less(self, needs: Iterable[Need]) -> Self:
        """What is left of it beside these; below zero where they are too much."""
        cpu, memory = self.cpu_millis, self.memory_bytes
        for need in needs:
            cpu = None if cpu is None else cpu - need.cpu_millis
            memory = None if memory is None else memory - need.memory_bytes
        return replace(self, cpu_millis=cpu, memory_bytes=memory)

    def __str__(self) -> str:
        return _in_words(self.cpu_millis, self.memory_bytes)


def _in_words(cpu_millis: int | None, memory_bytes: int | None) -> str:
    """For people: `8 vCPU and 16 GiB`."""
    cpu = "any vCPU" if cpu_millis is None else f"{max(0, cpu_millis) / 1000:g} vCPU"
    memory = "any memory" if memory_bytes is None else f"{max(0, memory_bytes) / GIB:.4g} GiB"
    return f"{cpu} and {memory}"
