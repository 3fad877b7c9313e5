"""How a fleet is set: where its workers come from, how many there may be, and what one is like.

CodeBuild's fleet fields map onto it (CodeBuild: CreateFleet): `baseCapacity` is `scaling.minimum`, `maxCapacity` of its
`scalingConfiguration` is `scaling.maximum`, a target of FLEET_UTILIZATION_RATE is `scaling.utilizationPercent`, and
`overflowBehavior` is itself.
"""

import re
from datetime import UTC, tzinfo
from enum import StrEnum
from typing import Annotated, Final, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, StringConstraints, field_validator, model_validator

from millrace.need import Label
from millrace.project import Shape

FLEET_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Clock = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
Region = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[a-z]+)+-[0-9]{1,2}$", max_length=40)]
"""As AWS names them: eu-central-1, us-gov-west-1."""
MOST_WORKERS: Final = 1000


class Weekday(StrEnum):
    """A day of the week."""

    MON = "MON"
    TUE = "TUE"
    WED = "WED"
    THU = "THU"
    FRI = "FRI"
    SAT = "SAT"
    SUN = "SUN"


def zone_of(name: str) -> tzinfo:
    """The time zone of this name in the IANA database. Raises ValueError."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # a folder of zones is an OSError
        raise ValueError(f"{name[:60]!r} is no time zone that this machine knows: write one like UTC or Europe/Berlin") from error


class Warm(Shape):
    """A minimum for some hours of some days by the clock of `timezone`. Where `to` is not after `from`, it ends the next day."""

    days: tuple[Weekday, ...] = tuple(Weekday)
    start: Clock = Field(alias="from")
    end: Clock = Field(alias="to")
    timezone: str = "UTC"
    minimum: int = Field(ge=1, le=MOST_WORKERS)

    @field_validator("timezone")
    @classmethod
    def _zone_is_known(cls, name: str) -> str:
        zone_of(name)
        return name


class Scaling(Shape):
    """How many workers there are to be.

    `target_wait_s`: how long a build may wait for slots that are there; 0: each that waits wants a slot of its own.
    `headroom_slots`: free slots kept beside those that are used. `utilization_percent`: the share of slots that is to be used.
    `shrink_after_s`: how long fewer must have been wanted before one leaves. `stale_after_s`: how old what is known may be before
    nothing is changed. `join_within_s`: how long a worker may take to come before it counts as one that never will.
    """

    minimum: int = Field(default=0, ge=0, le=MOST_WORKERS)
    maximum: int = Field(default=1, ge=0, le=MOST_WORKERS)
    target_wait_s: float = Field(default=0, ge=0, le=86_400)
    headroom_slots: int = Field(default=0, ge=0, le=10_000)
    utilization_percent: float | None = Field(default=None, gt=0, le=100)
    warm: tuple[Warm, ...] = ()
    shrink_after_s: float = Field(default=300, ge=0, le=86_400)
    stale_after_s: float = Field(default=60, gt=0, le=3600)
    join_within_s: float = Field(default=600, gt=0, le=7200)

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum is {self.minimum}, over maximum, which is {self.maximum}: raise maximum or lower minimum")
        for warm in self.warm:
            if warm.minimum > self.maximum:
                raise ValueError(f"warm minimum is {warm.minimum}, over maximum, which is {self.maximum}")
        return self


class WorkerShape(Shape):
    """What one worker of the fleet is like. Without `cpus` and `memory_bytes`, its slots alone say how many builds it takes."""

    slots: int = Field(default=2, ge=1, le=256)
    cpus: float | None = Field(default=None, gt=0, le=1024)
    memory_bytes: int | None = Field(default=None, ge=64 * 1024**2)
    labels: tuple[Label, ...] = Field(default=(), max_length=50)


class ProcessProvider(Shape):
    """Worker processes on the box of the embedded farm."""

    type: Literal["process"] = "process"


class ContainersProvider(Shape):
    """Worker containers of a Docker engine, which is also the engine of their builds.

    `environment` is what a worker needs beside what the farm gives it; `api_url` and `broker_url` where it reaches both from its
    container, else the farm's own. `work_dir` is the same path on the engine's host and inside.
    """

    type: Literal["containers"] = "containers"
    image: str = "millrace/worker:local"
    network: str = "bridge"
    docker_host: str | None = None
    socket: str = "/var/run/docker.sock"
    work_dir: str = "/var/lib/millrace/work"
    api_url: str | None = None
    broker_url: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class Ec2Provider(Shape):
    """An Auto Scaling group of EC2. `endpoint_url`: another address than AWS's own, for tests and clones."""

    type: Literal["ec2"] = "ec2"
    group: str = Field(min_length=1, max_length=255)
    region: Region
    endpoint_url: str | None = None


class FargateProvider(Shape):
    """A task of ECS for each build, which is also its sandbox. `container`: which of its containers runs the build.

    `api_url`: where tasks reach the API, else the farm's own. `images`: what images of builds are called where tasks pull them
    from; one that is not named is pulled by the name that builds know it by.
    """

    type: Literal["fargate"] = "fargate"
    cluster: str = Field(min_length=1, max_length=255)
    task_definition: str = Field(min_length=1, max_length=255)
    container: str = "build"
    subnets: tuple[str, ...] = Field(min_length=1, max_length=16)
    security_groups: tuple[str, ...] = Field(default=(), max_length=5)
    assign_public_ip: bool = False
    spot: bool = False
    region: Region
    endpoint_url: str | None = None
    api_url: str | None = None
    images: dict[str, str] = Field(default_factory=dict)


ProviderSettings = Annotated[ProcessProvider | ContainersProvider | Ec2Provider | FargateProvider, Field(discriminator="type")]


class FleetSettings(Shape):
    """A fleet as it is set. Without a provider its workers come and go by other hands, and nothing is scaled.

    `overflow_behavior`: QUEUE, or ON_DEMAND, which moves builds that the fleet cannot take at its maximum to `overflow_fleet`.
    `canary_percent`: the share of workers that a new generation begins with.
    """

    max_running: int | None = Field(default=None, ge=1, le=1_000_000)
    provider: ProviderSettings | None = None
    scaling: Scaling = Scaling()
    worker: WorkerShape = WorkerShape()
    overflow_behavior: Literal["QUEUE", "ON_DEMAND"] = "QUEUE"
    overflow_fleet: str | None = None
    canary_percent: int = Field(default=20, ge=1, le=100)

    @field_validator("overflow_fleet")
    @classmethod
    def _fleet_is_a_name(cls, name: str | None) -> str | None:
        if name is not None and FLEET_NAME.fullmatch(name) is None:
            raise ValueError(f"{name[:100]!r} is no name of a fleet")
        return name

    @model_validator(mode="after")
    def _overflow_has_a_place(self) -> Self:
        if self.overflow_behavior == "ON_DEMAND" and self.overflow_fleet is None:
            raise ValueError("overflowBehavior ON_DEMAND needs an overflowFleet, which takes what is too much for this one")
        if self.overflow_behavior == "QUEUE" and self.overflow_fleet is not None:
            raise ValueError("an overflowFleet takes builds only with overflowBehavior ON_DEMAND")
        if isinstance(self.provider, FargateProvider) and self.worker.slots != 1:
            raise ValueError("a task of fargate runs one build: worker.slots must be 1")
        return self
