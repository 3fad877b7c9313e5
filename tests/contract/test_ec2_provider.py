"""Auto Scaling groups as they are and as they fail: moto in server mode, behind a server that refuses and spoils."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from millrace.errors import InvalidInput, ProviderTrouble
from millrace.fleet import Ec2Provider, Scaling
from millrace.vocabulary import Trouble
from scheduler.fleets.ec2 import TAG_GENERATION, Ec2
from scheduler.fleets.provider import InstanceState, Order
from tests.support import aws as clouds
from tests.support.autoscaling import TIGHT, a_group
from tests.support.aws import Aws

FLEET = "builders"
ORDER = Order(fleet=FLEET, generation=3)


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with clouds.running() as server:
        yield server


@pytest.fixture(autouse=True)
def known_to_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in clouds.CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@dataclass
class Group:
    """A group and its provider."""

    aws: Aws
    name: str
    provider: Ec2

    def states(self) -> list[str]:
        return sorted(one.state.value for one in self.provider.find())

    @property
    def desired(self) -> int:
        return int(self.aws.group(self.name).desired_capacity)

    def ids(self) -> list[str]:
        return sorted(one.id for one in self.provider.find())


def provider_of(aws: Aws, group: str, **scaling: Any) -> Ec2:
    return Ec2(FLEET, Ec2Provider(group=group, region=clouds.REGION, endpoint_url=aws.url), Scaling(**{"maximum": 10, **scaling}))


@pytest.fixture
def group(aws: Aws) -> Iterator[Group]:
    with a_group(aws, FLEET) as name:
        made = Group(aws, name, provider_of(aws, name))
        yield made
        made.provider.close()


def trouble(ask: Callable[[], object]) -> ProviderTrouble:
    with pytest.raises(ProviderTrouble) as caught:
        ask()
    return caught.value


# How it grows and shrinks


def test_a_group_grows_to_its_maximum_and_says_that_it_may_not_have_more(group: Group) -> None:
    said = trouble(lambda: group.provider.grow_to(12, ORDER))
    assert (said.trouble, group.desired, len(group.ids())) == (Trouble.CAPACITY, 10, 10)
    assert "may have 10 instances (its MaxSize), and 12 are wanted" in said.message
    assert "Raise MaxSize" in said.hint


def test_a_group_that_was_set_higher_by_others_is_never_set_lower(group: Group) -> None:
    group.provider.grow_to(4, ORDER)
    group.provider.grow_to(2, ORDER)
    assert (group.desired, len(group.ids())) == (4, 4)


def test_instances_are_protected_from_their_first_moment_and_again_where_one_is_not(group: Group) -> None:
    group.provider.grow_to(3, ORDER)
    kept = group.aws.group(group.name).instance_states
    assert [one.protected_from_scale_in for one in kept] == [True] * 3
    kept[0].protected_from_scale_in = False
    kept[1].protected_from_scale_in = False
    group.aws.lifecycle(group.name, kept[1].instance.id, "Pending:Wait")
    group.provider.protect(group.ids())
    assert [one.protected_from_scale_in for one in kept] == [True, False, True], "AWS takes only those in service"
    before = group.aws.calls.count("SetInstanceProtection")
    kept[1].protected_from_scale_in = True
    group.provider.protect(group.ids())
    assert group.aws.calls.count("SetInstanceProtection") == before


def test_protection_goes_in_batches_that_aws_takes(aws: Aws) -> None:
    with a_group(aws, FLEET, MaxSize=130, NewInstancesProtectedFromScaleIn=False) as name:
        provider = provider_of(aws, name)
        provider.grow_to(120, ORDER)
        before = aws.calls.count("SetInstanceProtection")
        provider.protect([one.id for one in provider.find()])
        assert aws.calls.count("SetInstanceProtection") - before == 3
        assert all(one.protected_from_scale_in for one in aws.group(name).instance_states)
        provider.close()


@pytest.mark.parametrize(
    ("lifecycle", "state"),
    [
        ("Pending", InstanceState.BOOTING),
        ("Pending:Wait", InstanceState.BOOTING),
        ("Pending:Proceed", InstanceState.BOOTING),
        ("InService", InstanceState.RUNNING),
        ("Standby", InstanceState.RUNNING),
        ("Terminating", InstanceState.STOPPING),
        ("Terminating:Wait", InstanceState.STOPPING),
        ("Terminating:Proceed", InstanceState.STOPPING),
        ("Detaching", InstanceState.STOPPING),
        ("SomethingNew", InstanceState.STOPPING),
        ("Terminated", None),
        ("Warmed:Stopped", None),
    ],
)
def test_states_of_a_lifecycle_are_ours(group: Group, lifecycle: str, state: InstanceState | None) -> None:
    group.provider.grow_to(1, ORDER)
    group.aws.lifecycle(group.name, group.ids()[0], lifecycle)
    assert [one.state for one in group.provider.find()] == ([state] if state else [])


def test_a_machine_that_ec2_takes_away_is_stopping_before_its_group_knows(group: Group) -> None:
    group.provider.grow_to(1, ORDER)
    (one,) = group.aws.group(group.name).instance_states
    one.instance._state.name = "shutting-down"
    assert group.states() == ["stopping"]


def test_a_stopping_instance_takes_no_place_of_those_that_are_wanted(group: Group) -> None:
    group.provider.grow_to(2, ORDER)
    one, _ = group.ids()
    group.aws.lifecycle(group.name, one, "Terminating:Wait")
    group.aws.group(group.name).desired_capacity = 1  # as AWS counts after it was told to end one with its place
    group.provider.grow_to(3, ORDER)
    assert (group.desired, group.states()) == (2, ["running", "running", "stopping"])


def test_one_that_waits_for_its_lifecycle_hook_is_let_go(group: Group) -> None:
    groups = group.aws.client("autoscaling")
    for name, transition in (("leaving", "TERMINATING"), ("coming", "LAUNCHING")):
        groups.put_lifecycle_hook(
            LifecycleHookName=name,
            AutoScalingGroupName=group.name,
            LifecycleTransition=f"autoscaling:EC2_INSTANCE_{transition}",
        )
    group.provider.grow_to(2, ORDER)
    one, other = group.ids()
    group.aws.lifecycle(group.name, one, "Terminating:Wait")
    group.aws.lifecycle(group.name, other, "Terminating:Proceed")
    group.aws.completed.clear()
    group.provider.release([one, other])
    assert group.aws.completed == [("leaving", one)]
    assert group.ids() == [other], "that one is on its way already"


def test_a_new_generation_is_known_to_those_that_start_from_then_on(group: Group) -> None:
    group.provider.grow_to(1, ORDER)
    group.provider.grow_to(2, Order(fleet=FLEET, generation=4))
    assert sorted(one.generation or 0 for one in group.provider.find()) == [3, 4]
    tags = {tag["Key"]: (tag["Value"], tag["PropagateAtLaunch"]) for tag in group.aws.group(group.name).tags}
    assert tags[TAG_GENERATION][0] == "4"


# What AWS refuses, and how it fails


@pytest.mark.parametrize(
    ("action", "code", "status", "kind"),
    [
        ("DescribeAutoScalingGroups", "Throttling", 400, Trouble.THROTTLED),
        ("DescribeAutoScalingGroups", "ResourceContention", 500, Trouble.AWAY),
        ("DescribeAutoScalingGroups", "AccessDenied", 403, Trouble.CREDENTIALS),
        ("DescribeAutoScalingGroups", "ExpiredToken", 403, Trouble.CREDENTIALS),
        ("DescribeAutoScalingGroups", "InternalFailure", 500, Trouble.AWAY),
        ("DescribeAutoScalingGroups", "ServiceUnavailable", 503, Trouble.AWAY),
        ("SetDesiredCapacity", "ScalingActivityInProgress", 400, Trouble.THROTTLED),
        ("SetDesiredCapacity", "AccessDenied", 403, Trouble.CREDENTIALS),
        ("SetDesiredCapacity", "LimitExceeded", 400, Trouble.CAPACITY),
    ],
)
def test_what_aws_refuses_is_told_by_its_kind(group: Group, action: str, code: str, status: int, kind: Trouble) -> None:
    group.aws.fail(action, code, status=status)
    before = len(group.aws.calls)
    said = trouble(lambda: group.provider.grow_to(1, ORDER))
    assert (said.trouble, group.desired) == (kind, 0)
    assert group.name in said.message
    assert len(group.aws.calls) - before <= 4, "it asks a few times, and leaves the rest to the next round"
    group.aws.heal()
    group.provider.grow_to(1, ORDER)
    assert len(group.ids()) == 1


def test_ec2_throttles_under_a_name_of_its_own(group: Group) -> None:
    group.provider.grow_to(1, ORDER)
    group.aws.fail("DescribeInstances", "RequestLimitExceeded", status=503)
    assert trouble(group.provider.find).trouble is Trouble.THROTTLED


def test_a_call_that_is_throttled_once_is_made_again(group: Group) -> None:
    group.aws.fail("SetDesiredCapacity", "Throttling", times=1)
    group.provider.grow_to(2, ORDER)
    assert (group.desired, len(group.ids())) == (2, 2)


def test_capacity_that_aws_does_not_have_is_told_until_it_has_some(group: Group) -> None:
    words = "Could not launch On-Demand Instances. InsufficientInstanceCapacity - There is no capacity in us-east-1a."
    group.aws.group(group.name).desired_capacity = 3  # asked for, and none came
    group.provider.grow_to(3, ORDER)
    failed = {"Description": "Launching a new EC2 instance", "StatusCode": "Failed", "StatusMessage": words}
    other = {"Description": "Terminating EC2 instance: i-0", "StatusCode": "Failed", "StatusMessage": "no matter"}
    group.aws.activities[group.name] = [other, failed]
    said = trouble(lambda: group.provider.grow_to(3, ORDER))
    assert (said.trouble, group.desired) == (Trouble.CAPACITY, 3)
    assert "There is no capacity in us-east-1a" in said.message
    again = {"Description": "Launching a new EC2 instance: i-1", "StatusCode": "InProgress"}
    group.aws.activities[group.name] = [again, failed]
    group.provider.grow_to(3, ORDER)


@pytest.mark.parametrize(
    ("action", "lost"),
    [
        ("DescribeAutoScalingGroups", "AutoScalingGroups"),
        ("DescribeAutoScalingGroups", "Instances"),
        ("DescribeAutoScalingGroups", "DesiredCapacity"),
        ("DescribeAutoScalingGroups", "LifecycleState"),
        ("DescribeAutoScalingGroups", "InstanceId"),
        ("DescribeInstances", "reservationSet"),
        ("DescribeInstances", "instancesSet"),
        ("DescribeInstances", "launchTime"),
        ("DescribeInstances", "instanceState"),
    ],
)
def test_half_an_answer_is_trouble_and_no_empty_fleet(group: Group, action: str, lost: str) -> None:
    group.provider.grow_to(2, ORDER)
    group.aws.spoil(action, lambda body: body.replace(f"<{lost}>".encode(), b"<x>").replace(f"</{lost}>".encode(), b"</x>"))
    said = trouble(group.provider.find)
    assert said.trouble is Trouble.AWAY, said.message
    group.aws.heal()
    assert len(group.ids()) == 2


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_an_answer_that_breaks_off_is_trouble(group: Group, kept: float) -> None:
    group.provider.grow_to(2, ORDER)
    group.aws.spoil("DescribeAutoScalingGroups", lambda body: body[: int(len(body) * kept)])
    assert trouble(group.provider.find).trouble is Trouble.AWAY


def test_one_that_cannot_be_ended_does_not_keep_the_others(group: Group) -> None:
    group.provider.grow_to(3, ORDER)
    one, *others = group.ids()
    group.aws.fail("TerminateInstanceInAutoScalingGroup", "ResourceContention", status=500, times=3)
    said = trouble(lambda: group.provider.release([one, *others]))
    assert said.trouble is Trouble.AWAY
    assert len(group.ids()) == 1
    group.provider.release(group.ids())
    assert (group.ids(), group.desired) == ([], 0)


def test_a_group_at_its_least_says_so(group: Group) -> None:
    group.provider.grow_to(1, ORDER)
    words = "Currently, desiredSize equals minSize (1). Terminating instance without replacement will violate group's min size."
    group.aws.fail("TerminateInstanceInAutoScalingGroup", "ValidationError", words)
    said = trouble(lambda: group.provider.release(group.ids()))
    assert (said.trouble, said.hint) == (Trouble.CAPACITY, "Lower MinSize of the group.")


def test_one_that_went_in_the_same_moment_is_none_to_end(group: Group) -> None:
    group.provider.grow_to(1, ORDER)
    group.aws.fail(
        "TerminateInstanceInAutoScalingGroup", "ValidationError", "No managed instance found for instance ID: i-0", times=1
    )
    group.provider.release(group.ids())


def test_aws_that_cannot_be_reached_and_credentials_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        provider = Ec2(FLEET, Ec2Provider(group="g", region=clouds.REGION, endpoint_url=url), Scaling())
        assert trouble(provider.find).trouble is Trouble.AWAY
        provider.close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    provider = Ec2(FLEET, Ec2Provider(group="g", region=clouds.REGION, endpoint_url=url), Scaling())
    said = trouble(provider.find)
    assert (said.trouble, "credentials" in said.message) == (Trouble.CREDENTIALS, True)
    provider.close()


# What a group must be like


def test_a_group_that_is_not_there_is_missing(aws: Aws) -> None:
    provider = provider_of(aws, "no-such")
    for ask in (provider.check, provider.find, lambda: provider.grow_to(1, ORDER), lambda: provider.release(["i-1"])):
        said = trouble(ask)
        assert (said.trouble, "no-such" in said.message) == (Trouble.MISSING, True)
    provider.close()


def test_a_group_that_does_not_fit_is_refused_with_all_that_is_wrong(aws: Aws) -> None:
    loose = {"MetadataOptions": {"HttpTokens": "optional"}, "UserData": ""}
    changes = {"MaxSize": 5, "MinSize": 1, "NewInstancesProtectedFromScaleIn": False}
    with a_group(aws, FLEET, template=loose, **changes) as name:
        groups = aws.client("autoscaling")
        groups.suspend_processes(AutoScalingGroupName=name, ScalingProcesses=["Launch", "AZRebalance"])
        provider = provider_of(aws, name)
        with pytest.raises(InvalidInput) as caught:
            provider.check()
        provider.close()
    assert [problem.field for problem in caught.value.fields] == ["provider.group"] * 7
    said = caught.value.message
    for words in (
        "its MaxSize is 5, under scaling.maximum, which is 10",
        "its MinSize is 1, over scaling.minimum, which is 0",
        "NewInstancesProtectedFromScaleIn is off",
        "its process Launch is suspended",
        "HttpTokens to required",
        "HttpPutResponseHopLimit to 1",
        "starts no worker",
    ):
        assert words in said


def test_a_template_for_another_fleet_is_refused(aws: Aws) -> None:
    with a_group(aws, "others") as name:
        provider = provider_of(aws, name)
        with pytest.raises(InvalidInput, match="is for fleet others, not builders"):
            provider.check()
        provider.close()


def test_a_mixed_group_is_known_by_all_its_templates(aws: Aws) -> None:
    with (
        a_group(aws, FLEET) as first,
        a_group(aws, FLEET, template={"MetadataOptions": {**TIGHT, "HttpTokens": "optional"}}) as other,
    ):
        templates = [
            {"LaunchTemplateId": aws.group(name).ec2_launch_template.id, "Version": "$Latest"} for name in (first, other)
        ]
        policy = {
            "LaunchTemplate": {
                "LaunchTemplateSpecification": templates[0],
                "Overrides": [{"InstanceType": "m7i.large", "LaunchTemplateSpecification": templates[1]}],
            }
        }
        groups = aws.client("autoscaling")
        groups.create_auto_scaling_group(
            AutoScalingGroupName="mixed",
            MinSize=0,
            MaxSize=10,
            AvailabilityZones=[f"{clouds.REGION}a"],
            NewInstancesProtectedFromScaleIn=True,
            MixedInstancesPolicy=policy,
        )
        provider = provider_of(aws, "mixed")
        with pytest.raises(InvalidInput, match="HttpTokens to required"):
            provider.check()
        provider.close()
        groups.delete_auto_scaling_group(AutoScalingGroupName="mixed", ForceDelete=True)
