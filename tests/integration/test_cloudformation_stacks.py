"""The stacks of fleets, made in moto: a fleet can be set to what comes of them, by their own outputs."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from millrace.commands.fleetset import _body, fleet_set
from millrace.fleet import Ec2Provider, FleetSettings, Scaling
from scheduler.fleets.ec2 import Ec2
from scheduler.fleets.provider import Order
from tests.support import aws as stand_in
from tests.support.aws import REGION, Aws
from tests.support.cloudformation import ROOT

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
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"{REGION}{zone}")["Subnet"]["SubnetId"]
        for number, zone in enumerate("ab")
    ]
    group = ec2.create_security_group(GroupName="farm", Description="of the farm", VpcId=vpc)["GroupId"]
    iam.create_role(RoleName="scheduler", AssumeRolePolicyDocument="{}")
    aws.client("ssm").put_parameter(Name=IMAGE, Value=stand_in.IMAGE, Type="String")
    secret = aws.client("secretsmanager").create_secret(Name="worker", SecretString="{}")["ARN"]
    given = {
        "ApiUrl": "https://millrace.example.org",
        "WorkerSecret": secret,
        "SchedulerRole": "scheduler",
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


def allowed(aws: Aws) -> list[dict[str, Any]]:
    """What the stack allows the scheduler."""
    iam = aws.client("iam")
    (name,) = iam.list_role_policies(RoleName="scheduler")["PolicyNames"]
    statements: list[dict[str, Any]] = iam.get_role_policy(RoleName="scheduler", PolicyName=name)["PolicyDocument"]["Statement"]
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
        (sizing,) = [one for one in allowed(aws) if one["Sid"] == "SizeThisGroup"]
        assert sizing["Resource"].endswith(f":autoScalingGroupName/{out['Group']}")
        told = settings_of(out["FleetSet"], "default")
        assert told.provider == shape.model_copy(update={"endpoint_url": None})
        assert (told.worker.slots, told.scaling.maximum) == (int(out["Slots"]), int(out["MostInstances"]))
