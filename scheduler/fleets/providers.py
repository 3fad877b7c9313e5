"""Which provider a fleet's settings mean."""

from collections.abc import Callable, Mapping
from typing import Final

from millrace.errors import InvalidInput
from millrace.fleet import ContainersProvider, Ec2Provider, FargateProvider, FleetSettings
from millrace.settings import Settings
from scheduler.fleets.process import ProcessProvider
from scheduler.fleets.provider import Order, Provider

Make = Callable[[str, FleetSettings, Settings], Provider]
"""From a fleet's name, its settings and the farm's to its provider. What that needs of others is imported in there."""


def _process(fleet: str, _fleet_settings: FleetSettings, farm: Settings) -> Provider:
    return ProcessProvider(fleet, farm.home)


def _containers(fleet: str, settings: FleetSettings, farm: Settings) -> Provider:
    from scheduler.fleets.containers import Containers

    if not isinstance(settings.provider, ContainersProvider):
        raise AssertionError("it is asked for by its type")
    return Containers(fleet, settings.provider, farm)


def _ec2(fleet: str, settings: FleetSettings, _farm: Settings) -> Provider:
    from scheduler.fleets.ec2 import Ec2

    if not isinstance(settings.provider, Ec2Provider):
        raise AssertionError("it is asked for by its type")
    return Ec2(fleet, settings.provider, settings.scaling)


def _fargate(fleet: str, settings: FleetSettings, farm: Settings) -> Provider:
    from scheduler.fleets.fargate import Fargate

    if not isinstance(settings.provider, FargateProvider):
        raise AssertionError("it is asked for by its type")
    return Fargate(fleet, settings.provider, farm)


MAKERS: Final[Mapping[str, Make]] = {
    "containers": _containers,
    "ec2": _ec2,
    "fargate": _fargate,
    "process": _process,
}
LOOK_EVERY_S: Final[Mapping[str, float]] = {"process": 1.0, "containers": 1.0, "ec2": 10.0, "fargate": 5.0}
"""How often a provider is asked for its instances where nothing stirs; clouds count requests."""


def open_provider(fleet: str, settings: FleetSettings, farm: Settings) -> Provider:
    """The provider of a fleet that has one. Raises InvalidInput where this release has none such."""
    kind = settings.provider.type if settings.provider is not None else "none"
    make = MAKERS.get(kind)
    if make is None:
        raise InvalidInput(f"this release has no provider {kind!r}", hint=f"It has: {', '.join(sorted(MAKERS))}.")
    return make(fleet, settings, farm)


def order_of(fleet: str, settings: FleetSettings, generation: int) -> Order:
    """What a worker of the fleet is told by its settings."""
    shape = settings.worker
    environment = {
        "MILLRACE_FLEET": fleet,
        "MILLRACE_GENERATION": str(generation),
        "MILLRACE_SLOTS": str(shape.slots),
    }
    if shape.cpus is not None:
        environment["MILLRACE_CPUS"] = f"{shape.cpus:g}"
    if shape.memory_bytes is not None:
        environment["MILLRACE_MEMORY_OFFERED_BYTES"] = str(shape.memory_bytes)
    if shape.labels:
        environment["MILLRACE_LABELS"] = ",".join(shape.labels)
    return Order(fleet=fleet, generation=generation, environment=environment)
