"""Where a fleet's workers come from: the contract that `process`, `containers`, `ec2` and `fargate` keep.

An instance is whatever a worker runs in: a process, a container, an EC2 instance, a task. The worker that runs in it claims with
the instance's id as its worker id, and is told its fleet and generation by its settings; so records and instances are matched by
id, and nothing else. A provider keeps no memory of its own: what it started is found again by whoever asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class InstanceState(StrEnum):
    """How an instance is. One that is gone is not listed."""

    BOOTING = "booting"
    RUNNING = "running"
    STOPPING = "stopping"


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One instance. `launched_ms` is the provider's word, in ms since 1970, None where it has none; so is `generation`.

    `build_id`: the only build that it is for, where it is for one.
    """

    id: str
    state: InstanceState
    launched_ms: int | None = None
    generation: int | None = None
    build_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class WaitingBuild:
    """A build that waits, for providers that start an instance for each."""

    build_id: str
    attempt_no: int
    image: str
    cpus: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is started. `environment`: the settings of its worker (`MILLRACE_*`), without its id and its secrets."""

    fleet: str
    generation: int
    environment: Mapping[str, str] = field(default_factory=dict)


class Provider(Protocol):
    """A fleet's source of instances. Every call may be made twice, by one thread at a time, and raises ProviderTrouble."""

    def check(self) -> None:
        """Whether it can work at all as it is set: asked before a setting is taken. Raises InvalidInput, ProviderTrouble."""

    def find(self) -> Sequence[Instance]:
        """All instances of the fleet that are there, or on the way; also those that others started."""

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        """Have `total` instances, stopping ones counted; does nothing where there are as many. Never ends one.

        Providers that start an instance for each build start them for `waiting`, in order, and not twice for one of them.
        """

    def release(self, ids: Sequence[str]) -> None:
        """End these, and have as many fewer, in one step: none comes for them. One that is not there is none to end.

        For one that stops already, whoever wanted that, it says that nothing has to wait for its worker.
        """

    def protect(self, ids: Sequence[str]) -> None:
        """Let nobody but us end these, where the provider might by itself."""
