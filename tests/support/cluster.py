"""A cluster of ECS on moto with a template for tasks that carry builds, as docs/fargate.md has it."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

from moto.moto_api import state_manager

from millrace.fleet import FargateProvider
from tests.support.aws import REGION, Aws

_numbers = itertools.count(1)
TEMPLATE: dict[str, Any] = {
    "family": "millrace-builds",
    "networkMode": "awsvpc",
    "requiresCompatibilities": ["FARGATE"],
    "cpu": "2048",
    "memory": "4096",
    "executionRoleArn": "arn:aws:iam::123456789012:role/millrace-task-execution",
    "volumes": [{"name": "millrace"}],
    "containerDefinitions": [
        {
            "name": "bundle",
            "image": "registry.example.com/millrace/bundle:1",
            "essential": False,
            "memory": 256,
            "mountPoints": [{"sourceVolume": "millrace", "containerPath": "/millrace"}],
        },
        {
            "name": "build",
            "image": "registry.example.com/millrace/standard:1",
            "essential": True,
            "memory": 1024,
            "entryPoint": ["/millrace/millrace", "worker", "--once"],
            "dependsOn": [{"containerName": "bundle", "condition": "SUCCESS"}],
            "mountPoints": [{"sourceVolume": "millrace", "containerPath": "/millrace", "readOnly": True}],
            "secrets": [
                {
                    "name": "MILLRACE_WORKER_TOKEN",
                    "valueFrom": "arn:aws:secretsmanager:us-east-1:123456789012:secret:millrace/worker-token",
                }
            ],
        },
    ],
}


def template(**changes: Any) -> dict[str, Any]:
    """The template with `changes` to its container `build`; a value of None takes a member away."""
    made = copy.deepcopy(TEMPLATE)
    build = made["containerDefinitions"][1]
    build |= changes
    made["containerDefinitions"][1] = {key: value for key, value in build.items() if value is not None}
    return made


@contextlib.contextmanager
def a_cluster(aws: Aws, *, spot: bool = True) -> Iterator[str]:
    """An empty cluster, and the template; both go with what was made from it."""
    ecs = aws.client("ecs")
    state_manager.set_transition("ecs::task", {"progression": "manual", "times": 10**9})  # none ends by being looked at
    name = f"builds-{next(_numbers)}"
    ecs.create_cluster(clusterName=name, capacityProviders=["FARGATE", "FARGATE_SPOT"] if spot else ["FARGATE"])
    ecs.register_task_definition(**TEMPLATE)
    try:
        yield name
    finally:
        state_manager.unset_transition("ecs::task")
        for task in ecs.list_tasks(cluster=name)["taskArns"]:
            ecs.stop_task(cluster=name, task=task)
        ecs.delete_cluster(cluster=name)
        for arn in ecs.list_task_definitions(status="ACTIVE")["taskDefinitionArns"]:
            ecs.deregister_task_definition(taskDefinition=arn)


def shape_of(aws: Aws, cluster: str, **changes: Any) -> FargateProvider:
    """The settings of a fleet in this cluster."""
    values: dict[str, Any] = {
        "cluster": cluster,
        "task_definition": TEMPLATE["family"],
        "subnets": (aws.client("ec2").describe_subnets()["Subnets"][0]["SubnetId"],),
        "region": REGION,
        "endpoint_url": aws.url,
        **changes,
    }
    return FargateProvider(**values)
