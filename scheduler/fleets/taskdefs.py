"""Task definitions of a fleet on Fargate: one for each image and size, made from the operator's template.

RunTask can override what a container is told, but not its image, so each image needs a definition of its own. They are named
by what is in them: `TEMPLATE-mr-FLEET-REVISION-HASH`, so that whoever asks finds one again that was made before.
"""

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from botocore.exceptions import ClientError

from millrace.errors import FieldProblem
from scheduler.fleets import aws

TOKEN: Final = "MILLRACE_WORKER_TOKEN"  # noqa: S105  # a variable's name
BUNDLE: Final = "/millrace"
"""Where the bundle's volume must be mounted: its programs know their own place."""
ENTRY: Final = "/millrace/millrace"
STOP_S: Final = 120
"""The most that Fargate gives a task between the wish to end it and its end."""
MIB: Final = 1024**2
_KEPT: Final = (
    "taskRoleArn",
    "executionRoleArn",
    "networkMode",
    "containerDefinitions",
    "volumes",
    "requiresCompatibilities",
    "cpu",
    "memory",
    "proxyConfiguration",
    "ephemeralStorage",
    "runtimePlatform",
)
_GIB: Final = 1024
_SIZES: Final[tuple[tuple[int, tuple[int, ...]], ...]] = (
    (256, (512, 1024, 2048)),
    (512, tuple(range(1 * _GIB, 4 * _GIB + 1, _GIB))),
    (1024, tuple(range(2 * _GIB, 8 * _GIB + 1, _GIB))),
    (2048, tuple(range(4 * _GIB, 16 * _GIB + 1, _GIB))),
    (4096, tuple(range(8 * _GIB, 30 * _GIB + 1, _GIB))),
    (8192, tuple(range(16 * _GIB, 60 * _GIB + 1, 4 * _GIB))),
    (16384, tuple(range(32 * _GIB, 120 * _GIB + 1, 8 * _GIB))),
)
"""Amazon ECS: Fargate task sizes; CPU units, and the MiB of memory that go with them."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One of Fargate's sizes: CPU units, 1024 for one vCPU, and MiB of memory."""

    cpu: int
    memory: int


def size_of(cpus: float, memory_bytes: int) -> Size | None:
    """The smallest of Fargate's sizes that has so much; None where none has."""
    for cpu, memories in _SIZES:
        for memory in memories:
            if cpu >= cpus * 1024 and memory * MIB >= memory_bytes:
                return Size(cpu=cpu, memory=memory)
    return None


def largest() -> Size:
    """The most that a task can have."""
    cpu, memories = _SIZES[-1]
    return Size(cpu=cpu, memory=memories[-1])


class TaskDefinitions:
    """Those of one fleet. `container` is the one that runs builds. Raises ProviderTrouble."""

    def __init__(self, client: Any, template: str, container: str, fleet: str) -> None:
        self._client, self._name, self._container = client, template, container
        self._fleet = hashlib.sha256(fleet.encode()).hexdigest()[:8]

    def template(self) -> dict[str, Any]:
        """The operator's own definition, as it is by now."""
        with aws.translated(f"the task definition {self._name}"):
            answer = self._client.describe_task_definition(taskDefinition=self._name)
        found: dict[str, Any] = aws.part_of(answer, "taskDefinition", dict)
        return found

    def problems(self, template: dict[str, Any]) -> list[FieldProblem]:
        """What keeps the template from running builds, all of it."""
        wrong: list[str] = []
        if template.get("networkMode") != "awsvpc":
            wrong.append("its networkMode must be awsvpc")
        if "FARGATE" not in template.get("requiresCompatibilities", []):
            wrong.append("its requiresCompatibilities must have FARGATE")
        containers = {one["name"]: one for one in template.get("containerDefinitions", [])}
        ours = containers.get(self._container)
        if ours is None:
            names = ", ".join(sorted(containers)) or "none"
            wrong.append(f"it has no container {self._container!r}, it has {names}")
            return [FieldProblem(field="provider.taskDefinition", what=what) for what in wrong]
        called = [*ours.get("entryPoint", []), *ours.get("command", [])]
        if called[:1] != [ENTRY] or "worker" not in called or "--once" not in called:
            wrong.append(f'container {self._container!r} must have the entryPoint ["{ENTRY}", "worker", "--once"]')
        if TOKEN not in {one["name"] for one in ours.get("secrets", [])}:
            wrong.append(f"container {self._container!r} must get {TOKEN} by its secrets, from Secrets Manager or SSM")
        if TOKEN in {one["name"] for one in ours.get("environment", [])}:
            wrong.append(f"container {self._container!r} has {TOKEN} in plain text in its environment")
        wrong += self._bundle_problems(ours, containers)
        return [FieldProblem(field="provider.taskDefinition", what=what) for what in wrong]

    def _bundle_problems(self, ours: dict[str, Any], containers: dict[str, dict[str, Any]]) -> list[str]:
        volume = _volume_at(ours, BUNDLE)
        if volume is None:
            return [f"container {self._container!r} must mount the bundle's volume at {BUNDLE}"]
        brings = [name for name, one in containers.items() if one is not ours and volume in _volumes(one)]
        if not brings:
            return [f"no other container mounts the volume {volume!r}, so none brings the bundle"]
        waits = {one["containerName"]: one["condition"] for one in ours.get("dependsOn", [])}
        if not any(waits.get(name) in ("SUCCESS", "COMPLETE") for name in brings):
            return [f"container {self._container!r} must depend on {' or '.join(map(repr, brings))} with condition SUCCESS"]
        if all(containers[name].get("essential", True) for name in brings if name in waits):
            return [f"container {brings[0]!r} ends when it has brought the bundle, so it must not be essential"]
        return []

    def ensure(self, template: dict[str, Any], image: str, size: Size) -> str:
        """The ARN of the definition for an image and a size; registered where it is not there yet."""
        wanted = self._made(template, image, size)
        family = wanted["family"]
        with aws.translated(f"the task definition {family}"):
            try:
                answer = self._client.describe_task_definition(taskDefinition=family)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") != "ClientException":  # how it says that there is none
                    raise
                answer = self._client.register_task_definition(**wanted)
        found: str = aws.part_of(aws.part_of(answer, "taskDefinition", dict), "taskDefinitionArn", str)
        return found

    def drop_old(self, template: dict[str, Any], used: Collection[str]) -> list[str]:
        """Deregister what was made of older revisions of the template and is not among the ARNs `used`; what went."""
        gone: list[str] = []
        with aws.translated(f"task definitions made from {self._name}"):
            pages = self._client.get_paginator("list_task_definition_families").paginate(
                familyPrefix=self._prefix(template), status="ACTIVE"
            )
            families = [family for page in pages for family in page["families"]]
            for family in families:
                if family.startswith(self._stem(template)):
                    continue
                for page in self._client.get_paginator("list_task_definitions").paginate(familyPrefix=family, status="ACTIVE"):
                    for arn in page["taskDefinitionArns"]:
                        if arn not in used:
                            self._client.deregister_task_definition(taskDefinition=arn)
                            gone.append(arn)
        return gone

    def _prefix(self, template: dict[str, Any]) -> str:
        return f"{template['family'][:200]}-mr-{self._fleet}-"

    def _stem(self, template: dict[str, Any]) -> str:
        return f"{self._prefix(template)}{template['revision']}-"

    def _made(self, template: dict[str, Any], image: str, size: Size) -> dict[str, Any]:
        made = {key: copy.deepcopy(template[key]) for key in _KEPT if template.get(key) not in (None, [], {})}
        made |= {"cpu": str(size.cpu), "memory": str(size.memory)}
        containers: list[dict[str, Any]] = made["containerDefinitions"]
        others = sum(
            one.get("memory") or one.get("memoryReservation") or 0 for one in containers if one["name"] != self._container
        )
        for one in containers:
            if one["name"] != self._container:
                continue
            for limit in ("cpu", "memoryReservation"):
                one.pop(limit, None)
            linux = {**one.get("linuxParameters", {}), "initProcessEnabled": False}  # the worker is to be the first process
            one |= {"image": image, "memory": size.memory - others, "stopTimeout": STOP_S, "linuxParameters": linux}
        content = json.dumps(made, sort_keys=True, default=str).encode()
        family = f"{self._stem(template)}{hashlib.sha256(content).hexdigest()[:12]}"
        return {"family": family, **made}


def _volumes(container: dict[str, Any]) -> set[str]:
    return {one["sourceVolume"] for one in container.get("mountPoints", []) if "sourceVolume" in one}


def _volume_at(container: dict[str, Any], path: str) -> str | None:
    for one in container.get("mountPoints", []):
        if one.get("containerPath", "").rstrip("/") == path and one.get("sourceVolume"):
            volume: str = one["sourceVolume"]
            return volume
    return None
