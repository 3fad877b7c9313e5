"""Workers on AWS Fargate: a task of ECS for each build that waits, which is also the build's sandbox (docs/fargate.md).

A task is asked for with a token that is made from its build and attempt, so that a question whose answer was lost starts no
second one. Tasks are found again by `startedBy`, and say by their tags which build they are for.
"""

import hashlib
import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final
from urllib.parse import urlsplit

from millrace.clock import now_ms
from millrace.errors import FieldProblem, InvalidInput, ProviderTrouble
from millrace.fleet import FargateProvider
from millrace.log import get_logger
from millrace.settings import Settings
from millrace.vocabulary import Trouble
from scheduler.fleets import aws
from scheduler.fleets.provider import Instance, InstanceState, Order, WaitingBuild
from scheduler.fleets.taskdefs import MIB, Size, TaskDefinitions, largest, size_of

log = get_logger(__name__)
_STATES: Final = {
    "PROVISIONING": InstanceState.BOOTING,
    "PENDING": InstanceState.BOOTING,
    "ACTIVATING": InstanceState.BOOTING,
    "RUNNING": InstanceState.RUNNING,
    "DEACTIVATING": InstanceState.STOPPING,
    "STOPPING": InstanceState.STOPPING,
    "DEPROVISIONING": InstanceState.STOPPING,
}
"""Amazon ECS: task lifecycle. One that is STOPPED is gone, and listed for an hour more."""
_BUILD, _ATTEMPT, _GENERATION, _FLEET = "millrace:build", "millrace:attempt", "millrace:generation", "millrace:fleet"
_DESCRIBED_AT_ONCE: Final = 100
_MOST_TRIES: Final = 3
"""How many tasks for one attempt may end before they have claimed it, within the hour that ECS lists them."""
_AGAIN_MS: Final = 600_000
"""How long an answer that was lost is the same again; later a new task is asked for."""
_NOT_FOR_TASKS: Final = ("MILLRACE_BROKER_URL", "MILLRACE_WORKER_TOKEN", "MILLRACE_WORKER_ID")


class Fargate:
    """See `provider.Provider`."""

    def __init__(self, fleet: str, shape: FargateProvider, farm: Settings) -> None:
        self._fleet, self._settings = fleet, shape
        self._api_url = (shape.api_url or farm.api).rstrip("/")
        self._started_by = f"millrace-{hashlib.sha256(fleet.encode()).hexdigest()[:20]}"

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    @cached_property
    def _client(self) -> Any:
        return aws.client("ecs", self._settings.region, self._settings.endpoint_url)

    @cached_property
    def _definitions(self) -> TaskDefinitions:
        return TaskDefinitions(self._client, self._settings.task_definition, self._settings.container, self._fleet)

    def check(self) -> None:
        wrong = [] if _can_be_reached(self._api_url) else [_loopback(self._api_url)]
        wrong += self._cluster_problems()
        wrong += self._definitions.problems(self._definitions.template())
        if wrong:
            lines = "".join(f"\n  {problem.field}: {problem.what}" for problem in wrong)
            raise InvalidInput(
                f"the fleet cannot run builds on Fargate:{lines}",
                hint="docs/fargate.md has a task definition that can.",
                fields=wrong,
            )

    def _cluster_problems(self) -> list[FieldProblem]:
        name = self._settings.cluster
        with aws.translated(f"the cluster {name}"):
            found = aws.part_of(self._client.describe_clusters(clusters=[name]), "clusters", list)
        if not found:
            return [FieldProblem(field="provider.cluster", what=f"there is no cluster {name!r} in {self._settings.region}")]
        cluster = found[0]
        if cluster["status"] != "ACTIVE":
            return [FieldProblem(field="provider.cluster", what=f"cluster {name!r} is {cluster['status']}, not ACTIVE")]
        if self._settings.spot and "FARGATE_SPOT" not in cluster.get("capacityProviders", []):
            return [FieldProblem(field="provider.spot", what=f"cluster {name!r} has not the capacity provider FARGATE_SPOT")]
        return []

    def find(self) -> Sequence[Instance]:
        return [_instance(task) for task in self._tasks() if task["lastStatus"] != "STOPPED"]

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        tasks = self._tasks()
        living = [task for task in tasks if task["lastStatus"] != "STOPPED"]
        room = total - len(living)
        has_one = {_what_for(task) for task in living}
        failed = Counter(_what_for(task) for task in tasks if task["lastStatus"] == "STOPPED")
        wanted = [build for build in waiting if _key(build) not in has_one]
        if room <= 0 or not wanted:
            return
        template = self._definitions.template()
        problems: list[ProviderTrouble] = []
        for build in wanted:
            if room <= 0:
                break
            try:
                self._start(build, order, template, tasks, failed[_key(build)])
            except ProviderTrouble as trouble:
                if trouble.trouble is not Trouble.MISSING:
                    raise
                problems.append(trouble)  # it is this build's, or this image's: others may start all the same
            else:
                room -= 1
        self._definitions.drop_old(template, {task["taskDefinitionArn"] for task in living})
        if problems:
            raise problems[0]

    def release(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        for task_id in (one.id for one in self.find() if one.id in ids and one.state is not InstanceState.STOPPING):
            try:
                with aws.translated(f"the task {task_id}"):
                    self._client.stop_task(cluster=self._settings.cluster, task=task_id, reason="Millrace: released by its fleet")
            except ProviderTrouble as trouble:
                if trouble.trouble is not Trouble.MISSING:
                    raise
                log.debug("task.gone", task=task_id)

    def protect(self, ids: Sequence[str]) -> None:
        """Nothing ends a task of ours by itself but Fargate Spot, which asks nobody."""

    def _start(
        self, build: WaitingBuild, order: Order, template: dict[str, Any], tasks: Sequence[dict[str, Any]], failed: int
    ) -> None:
        what = f"a task for build {build.build_id}"
        if failed >= _MOST_TRIES:
            last = [task for task in tasks if _what_for(task) == _key(build) and task["lastStatus"] == "STOPPED"][-1]
            raise ProviderTrouble(
                Trouble.MISSING,
                f"{failed} tasks for build {build.build_id} ended without claiming it, the last one because {_why_stopped(last)}",
                hint="Can the task pull the build's image, and does it reach the API? It is tried again within the hour.",
            )
        size = _size(build)
        arn = self._definitions.ensure(template, self._settings.images.get(build.image, build.image), size)
        with aws.translated(what):
            answer = self._client.run_task(**self._request(build, order, arn, failed))
        for failure in answer.get("failures", []):
            raise aws.trouble(what, failure.get("reason", "no reason given"), failure.get("detail", ""))
        for task in aws.part_of(answer, "tasks", list):
            log.info("task.started", build_id=build.build_id, task=_task_id(task), cpu=size.cpu, memory_mib=size.memory)

    def _request(self, build: WaitingBuild, order: Order, arn: str, failed: int) -> dict[str, Any]:
        settings = self._settings
        environment = {name: value for name, value in order.environment.items() if name not in _NOT_FOR_TASKS}
        environment |= {
            "MILLRACE_API_URL": self._api_url,
            "MILLRACE_BUILD": build.build_id,
            "MILLRACE_ENGINE": "own",
            "MILLRACE_FLEET": order.fleet,
            "MILLRACE_OWN_IMAGE": build.image,
            "MILLRACE_SLOTS": "1",
        }
        tags = {_FLEET: order.fleet, _BUILD: build.build_id, _ATTEMPT: build.attempt_no, _GENERATION: order.generation}
        asked = f"{settings.cluster} {self._fleet} {build.build_id} {build.attempt_no} {failed} {now_ms() // _AGAIN_MS}"
        return {
            "cluster": settings.cluster,
            "taskDefinition": arn,
            "count": 1,
            "startedBy": self._started_by,
            "clientToken": hashlib.sha256(asked.encode()).hexdigest(),
            "networkConfiguration": {
                "awsvpcConfiguration": {
                    "subnets": list(settings.subnets),
                    "securityGroups": list(settings.security_groups),
                    "assignPublicIp": "ENABLED" if settings.assign_public_ip else "DISABLED",
                }
            },
            "overrides": {
                "containerOverrides": [
                    {
                        "name": settings.container,
                        "environment": [{"name": name, "value": value} for name, value in sorted(environment.items())],
                    }
                ]
            },
            "tags": [{"key": key, "value": str(value)} for key, value in tags.items()],
            **(
                {"capacityProviderStrategy": [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]}
                if settings.spot
                else {"launchType": "FARGATE"}
            ),
        }

    def _tasks(self) -> list[dict[str, Any]]:
        """The fleet's tasks, also those that ECS still lists though they are gone; oldest first."""
        found: dict[str, dict[str, Any]] = {}
        with aws.translated(f"the tasks of fleet {self._fleet} in {self._settings.cluster}"):
            for arns in _in_pieces(self._arns()):
                answer = self._client.describe_tasks(cluster=self._settings.cluster, tasks=arns, include=["TAGS"])
                found |= {task["taskArn"]: task for task in aws.part_of(answer, "tasks", list)}
        return sorted(found.values(), key=lambda task: str(task.get("createdAt", "")))

    def _arns(self) -> list[str]:
        pages = self._client.get_paginator("list_tasks")
        asked = {"cluster": self._settings.cluster, "startedBy": self._started_by}
        return [
            arn
            for desired in ("RUNNING", "STOPPED")  # what is to run but does not yet, and what ends, are listed by what is desired
            for page in pages.paginate(**asked, desiredStatus=desired)
            for arn in aws.part_of(page, "taskArns", list)
        ]


def _can_be_reached(url: str) -> bool:
    """Whether an address is more than one that each machine has for itself."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback and not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host != "localhost"


def _loopback(url: str) -> FieldProblem:
    return FieldProblem(field="provider.apiUrl", what=f"tasks cannot reach the API at {url}, which is for this machine only")


def _in_pieces(arns: list[str]) -> Iterator[list[str]]:
    for at in range(0, len(arns), _DESCRIBED_AT_ONCE):
        yield arns[at : at + _DESCRIBED_AT_ONCE]


def _key(build: WaitingBuild) -> tuple[str, str]:
    return build.build_id, str(build.attempt_no)


def _tags(task: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in task.get("tags", [])}


def _what_for(task: dict[str, Any]) -> tuple[str, str]:
    tags = _tags(task)
    return tags.get(_BUILD, ""), tags.get(_ATTEMPT, "")


def _task_id(task: dict[str, Any]) -> str:
    arn: str = task["taskArn"]
    return arn.rpartition("/")[2]


def _instance(task: dict[str, Any]) -> Instance:
    tags, created = _tags(task), task.get("createdAt")
    generation = tags.get(_GENERATION, "")
    is_ending = task.get("desiredStatus") == "STOPPED"
    return Instance(
        id=_task_id(task),
        state=InstanceState.STOPPING if is_ending else _STATES.get(task["lastStatus"], InstanceState.BOOTING),
        launched_ms=int(created.timestamp() * 1000) if created is not None else None,
        generation=int(generation) if generation.isdigit() else None,
        build_id=tags.get(_BUILD) or None,
    )


def _size(build: WaitingBuild) -> Size:
    size = size_of(build.cpus, build.memory_bytes)
    if size is None:
        most = largest()
        raise ProviderTrouble(
            Trouble.MISSING,
            f"build {build.build_id} needs {build.cpus:g} vCPUs and {build.memory_bytes // MIB} MiB; "
            f"no task of Fargate has more than {most.cpu // 1024} vCPUs and {most.memory} MiB",
            hint="Give its project a smaller compute type, or another fleet.",
        )
    return size


def _why_stopped(task: dict[str, Any]) -> str:
    reasons = [str(task.get("stoppedReason", "")), *(str(one.get("reason", "")) for one in task.get("containers", []))]
    codes = [f"{one['name']} ended with status {one['exitCode']}" for one in task.get("containers", []) if one.get("exitCode")]
    return "; ".join(dict.fromkeys(reason for reason in (*reasons, *codes) if reason))[:500] or "it says not why"
