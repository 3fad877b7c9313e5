"""The stacks of fleets, made in moto: a fleet can be set to what comes of them, by their own outputs."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
from moto.ecs.models import ecs_backends

from millrace.commands.fleetset import _body, fleet_set
from millrace.fleet import Ec2Provider, FargateProvider, FleetSettings, Scaling
from millrace.settings import Settings
from scheduler.fleets.ec2 import Ec2
from scheduler.fleets.fargate import Fargate
from scheduler.fleets.provider import Order, WaitingBuild
from tests.support import aws as stand_in
from tests.support.aws import REGION, Aws
from tests.support.cloudformation import ROOT, load, of_type

TEMPLATES = ROOT / "deploy" / "cloudformation"
IMAGE = "/test/machine-image"
"""A parameter of ours: moto has none of Ubuntu's, and looks for those even where another is given."""


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name, value in stand_in.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with stand_in.running() as one:
        yield one


@contextlib.contextmanager
def a_stack(aws: Aws, name: str, **parameters: str) -> Iterator[dict[str, str]]:
    """A stack of a template, on a network of its own; its outputs."""
    formation, ec2, iam = aws.client("cloudformation"), aws.client("ec2"), aws.client("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"{REGION}{zone}")["Subnet"]["SubnetId"]
        for number, zone in enumerate("ab")
    ]
    group = ec2.create_security_group(GroupName="farm", Description="of the farm", VpcId=vpc)["GroupId"]
    role = iam.create_role(RoleName=f"scheduler-of-{name}", AssumeRolePolicyDocument="{}")["Role"]["RoleName"]
    iam.create_role(RoleName=f"api-of-{name}", AssumeRolePolicyDocument="{}")
    aws.client("ssm").put_parameter(Name=IMAGE, Value=stand_in.IMAGE, Type="String", Overwrite=True)
    secret = aws.client("secretsmanager").create_secret(Name=f"worker-of-{name}", SecretString="{}")["ARN"]
    given = {
        "ApiUrl": "https://millrace.example.org",
        "WorkerSecret": secret,
        "SchedulerRole": role,
        "ApiRole": f"api-of-{name}",
        "LoadBalancerGroup": group,
        "VpcId": vpc,
        "Subnets": ",".join(subnets),
        **{key: group if value == "GROUP" else value for key, value in parameters.items()},
    }
    formation.create_stack(
        StackName=name,
        TemplateBody=re.sub("Default: /aws/service/.*", f"Default: {IMAGE}", (TEMPLATES / f"{name}.yaml").read_text()),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    (stack,) = formation.describe_stacks(StackName=name)["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE", stack
    yield {one["OutputKey"]: one["OutputValue"] for one in stack["Outputs"]}


def allowed(aws: Aws, stack: str) -> list[dict[str, Any]]:
    """What the stack allows the scheduler."""
    iam, role = aws.client("iam"), f"scheduler-of-{stack}"
    (name,) = iam.list_role_policies(RoleName=role)["PolicyNames"]
    statements: list[dict[str, Any]] = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]["Statement"]
    return statements


def settings_of(command: str, fleet: str) -> FleetSettings:
    """What a `millrace fleet set` sets, as the command line itself makes it out."""
    *verb, name = shlex.split(command)[:4]
    assert (verb, name) == (["millrace", "fleet", "set"], fleet)
    given = fleet_set.make_context("set", shlex.split(command)[3:]).params
    named = {option: value for option, value in given.items() if value not in (None, False, ())}
    return FleetSettings.model_validate(_body({}, named))


def test_a_fleet_can_be_set_to_the_group_of_its_stack(aws: Aws) -> None:
    with a_stack(
        aws,
        "ec2-fleet",
        RedisGroup="GROUP",
        Image="example.org/millrace-worker:1",
        SecondInstanceType="m5.xlarge",
    ) as out:
        shape = Ec2Provider(group=out["Group"], region=out["Region"], endpoint_url=aws.url)
        provider = Ec2("default", shape, Scaling(maximum=int(out["MostInstances"])))
        provider.check()
        assert provider.find() == []
        provider.grow_to(2, Order(fleet="default", generation=3))
        found = provider.find()
        assert [one.generation for one in found] == [3, 3]
        provider.release([found[0].id])
        provider.close()
        (sizing,) = [one for one in allowed(aws, "ec2-fleet") if one["Sid"] == "SizeThisGroup"]
        assert sizing["Resource"].endswith(f":autoScalingGroupName/{out['Group']}")
        told = settings_of(out["FleetSet"], "default")
        assert told.provider == shape.model_copy(update={"endpoint_url": None})
        assert (told.worker.slots, told.scaling.maximum) == (int(out["Slots"]), int(out["MostInstances"]))


def _mend_moto() -> None:
    """Put back what moto's CloudFormation drops of the cluster and the task definition, as it stands in the template."""
    said = load(TEMPLATES / "fargate-fleet.yaml")
    (task,) = of_type(said, "AWS::ECS::TaskDefinition").values()
    (cluster,) = of_type(said, "AWS::ECS::Cluster").values()
    backend = ecs_backends[stand_in.ACCOUNT][REGION]
    for revisions in backend.task_definitions.values():
        for one in revisions.values():
            one.network_mode, one.requires_compatibilities = task["NetworkMode"], task["RequiresCompatibilities"]
    for one in backend.clusters.values():
        one.capacity_providers = cluster["CapacityProviders"]


def test_a_fleet_can_be_set_to_the_cluster_of_its_stack(aws: Aws) -> None:
    with a_stack(aws, "fargate-fleet", BundleImage="example.org/millrace-bundle:1") as out:
        told = settings_of(out["FleetSet"], "tasks")
        assert isinstance(told.provider, FargateProvider)
        assert (told.provider.cluster, told.provider.security_groups) == (out["Cluster"], (out["WorkerGroup"],))
        _mend_moto()
        farm = Settings(api_url="https://millrace.example.org")
        provider = Fargate("tasks", told.provider.model_copy(update={"endpoint_url": aws.url}), farm)
        provider.check()
        build = WaitingBuild(build_id="demo:1", attempt_no=1, image="debian:13", cpus=1, memory_bytes=2 * 1024**3)
        provider.grow_to(1, Order(fleet="tasks", generation=3), [build])
        (found,) = provider.find()
        assert (found.build_id, found.generation) == ("demo:1", 3)
        ecs = aws.client("ecs")
        (task,) = ecs.describe_tasks(cluster=out["Cluster"], tasks=[found.id])["tasks"]
        family = task["taskDefinitionArn"].rpartition("/")[2]
        allows = {one["Sid"]: one for one in allowed(aws, "fargate-fleet")}
        for sid in ("RunBuildsHere", "MakeDefinitions"):
            assert fnmatch(family, allows[sid]["Resource"].rpartition("/")[2]), sid
        assert fnmatch(task["taskArn"], allows["SeeAndEndThem"]["Resource"])
        provider.release([found.id])
        assert provider.find() == []
