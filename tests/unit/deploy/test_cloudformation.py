"""The templates of deploy/cloudformation: what cfn-lint says of them, and what must be true of every farm made with them."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import cfnlint
import pytest
import yaml
from cfnlint.api import ManualArgs, lint

from millrace.commands.fleetset import fleet_set
from millrace.settings import Settings
from tests.support.cloudformation import ROOT, TEMPLATES, load, of_type, statements

FLEETS = [path for path in TEMPLATES if path.name.endswith("-fleet.yaml")]
REGIONS = ["us-east-1", "eu-central-1"]
NO_RESOURCE = {
    "ecs:ListTasks": "its resource would be an instance of ECS, which Fargate has none of; the cluster is a condition instead",
}
"""Actions on any resource for which AWS has a kind of resource, and why all the same."""
each_template = pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
each_fleet = pytest.mark.parametrize("path", FLEETS, ids=lambda path: path.stem)


@cache
def actions_of_aws() -> dict[str, dict[str, Any]]:
    """What AWS's service authorization reference says of each action, as cfn-lint ships it: `service:action`, in lower case."""
    path = Path(str(cfnlint.__file__)).parent / "data" / "AdditionalSpecs" / "Policies.json"
    return {
        f"{service}:{action}": said
        for service, known in json.loads(path.read_text()).items()
        for action, said in known["Actions"].items()
    }


def test_there_are_templates() -> None:
    assert [path.stem for path in TEMPLATES] == ["control-plane", "ec2-fleet", "fargate-fleet"]


@each_template
def test_cfn_lint_finds_nothing(path: Path) -> None:
    found = lint(path.read_text(), config=ManualArgs(regions=REGIONS))
    assert [f"{path.name}:{one.linenumber} {one.rule.id} {one.message}" for one in found] == []


@each_template
def test_cloudformation_reads_the_template_as_yaml_does(path: Path) -> None:
    # AWS CloudFormation user guide, template formats: no aliases. At most 51,200 bytes go along with a command by themselves.
    kinds = {type(token) for token in yaml.scan(path.read_text())}
    assert not kinds & {yaml.AnchorToken, yaml.AliasToken}
    assert len(path.read_bytes()) <= 51_200


@each_template
def test_every_parameter_says_what_it_is_and_takes_no_nonsense(path: Path) -> None:
    for name, said in load(path)["Parameters"].items():
        assert said.get("Description", "").strip().endswith("."), name
        bound = {"AllowedPattern", "AllowedValues", "MinValue", "MinLength"} & set(said)
        assert bound or said["Type"].startswith(("AWS::", "List<AWS::")), name
        assert "AllowedPattern" not in said or said.get("ConstraintDescription"), name


@each_template
def test_every_output_says_what_it_is(path: Path) -> None:
    assert [name for name, said in load(path)["Outputs"].items() if not said.get("Description")] == []


@each_template
def test_nobody_may_do_everything(path: Path) -> None:
    found = list(statements(load(path)))
    assert found
    for one in found:
        if one.effect == "Deny":
            continue
        assert one.effect == "Allow"
        assert not any("*" in action for action in one.actions), one.where
        assert not {"NotAction", "NotResource"} & set(one.said), one.where


@each_template
def test_only_what_has_no_resource_is_allowed_on_any(path: Path) -> None:
    for one in statements(load(path)):
        if one.effect == "Allow" and "*" in one.resources:
            for action in one.actions:
                has_resource = "Resources" in actions_of_aws()[action.lower()]
                assert not has_resource or action in NO_RESOURCE, f"{one.where}: {action} can be allowed on one resource only"


@each_template
def test_every_allowed_action_is_one_of_aws(path: Path) -> None:
    unknown = {
        action
        for one in statements(load(path))
        for action in one.actions
        if one.effect == "Allow" and action.lower() not in actions_of_aws()
    }
    assert unknown == set()


def test_the_page_lists_all_that_is_allowed_on_any_resource() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    _, _, rest = page.partition("<!-- any resource -->\n")
    listed = set(re.findall(r"^\| `([a-z0-9]+:[A-Za-z]+)`", rest.partition("<!-- /any resource -->")[0], re.MULTILINE))
    used = {
        action
        for path in TEMPLATES
        for one in statements(load(path))
        if one.effect == "Allow" and "*" in one.resources
        for action in one.actions
    }
    assert listed == used


@each_template
def test_all_buckets_are_private_and_encrypted_and_swept(path: Path) -> None:
    template = load(path)
    closed = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
    for name, bucket in of_type(template, "AWS::S3::Bucket").items():
        assert bucket["PublicAccessBlockConfiguration"] == dict.fromkeys(closed, True), name
        (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] in ("AES256", "aws:kms"), name
        rules = bucket["LifecycleConfiguration"]["Rules"]
        assert any("AbortIncompleteMultipartUpload" in rule for rule in rules), name
        assert any("NoncurrentVersionExpiration" in rule for rule in rules), name
        policies = [one for one in of_type(template, "AWS::S3::BucketPolicy").values() if one["Bucket"] == {"Ref": name}]
        assert any(
            said["Effect"] == "Deny" and said["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
            for one in policies
            for said in one["PolicyDocument"]["Statement"]
        ), name


def test_records_and_bell_are_encrypted_and_not_public() -> None:
    template = load(ROOT / "deploy/cloudformation/control-plane.yaml")
    (database,) = of_type(template, "AWS::RDS::DBInstance").values()
    assert (database["StorageEncrypted"], database["PubliclyAccessible"]) == (True, False)
    (redis,) = of_type(template, "AWS::ElastiCache::ReplicationGroup").values()
    assert redis["TransitEncryptionEnabled"] is True
    assert redis["AtRestEncryptionEnabled"] is True
    assert redis["AuthToken"]
    for task in of_type(template, "AWS::ECS::TaskDefinition").values():
        for container in task["ContainerDefinitions"]:
            assert container["User"] == "millrace"
            assert not any(re.search("TOKEN|KEY|PASSWORD|DATABASE|BROKER", one["Name"]) for one in container["Environment"])
    assert [one["Protocol"] for one in of_type(template, "AWS::ElasticLoadBalancingV2::Listener").values()] == ["HTTPS"]


def test_only_the_load_balancer_takes_calls_from_addresses() -> None:
    template = load(ROOT / "deploy/cloudformation/control-plane.yaml")
    for name, group in of_type(template, "AWS::EC2::SecurityGroup").items():
        assert all("SourceSecurityGroupId" in rule for rule in group.get("SecurityGroupIngress", ())), name
    for name, rule in of_type(template, "AWS::EC2::SecurityGroupIngress").items():
        assert "SourceSecurityGroupId" in rule or (rule["GroupId"], rule["ToPort"]) == ({"Ref": "LoadBalancerGroup"}, 443), name


@each_fleet
def test_nothing_comes_in_to_a_worker(path: Path) -> None:
    template = load(path)
    own = of_type(template, "AWS::EC2::SecurityGroup")
    assert own
    for name, group in own.items():
        assert not group.get("SecurityGroupIngress"), name
    for name, rule in of_type(template, "AWS::EC2::SecurityGroupIngress").items():
        # What a fleet opens are the control plane's groups, and to its own workers only.
        assert rule["GroupId"]["Ref"] in template["Parameters"], name
        assert rule["SourceSecurityGroupId"]["Ref"] in own, name
        assert not {"CidrIp", "CidrIpv6", "SourcePrefixListId"} & set(rule), name


@each_fleet
def test_the_scheduler_is_allowed_this_fleet_only(path: Path) -> None:
    template = load(path)
    policies = of_type(template, "AWS::IAM::Policy")
    assert {name: one["Roles"] for name, one in policies.items()} == {
        "SchedulerPolicy": [{"Ref": "SchedulerRole"}],
        "ApiPolicy": [{"Ref": "ApiRole"}],
    }
    asked = {action for one in statements(template) if one.where.startswith("ApiPolicy") for action in one.actions}
    assert all(re.match(r"\w+:Describe", action) for action in asked), "the API looks, and changes nothing"
    changing = [
        one
        for one in statements(template)
        if one.where.startswith("SchedulerPolicy") and not all(re.match(r"\w+:(Describe|List)", action) for action in one.actions)
    ]
    assert changing
    for one in changing:
        # docs/deploy.md says what is left to that: AWS has no resource for it.
        assert "*" not in one.resources or one.actions == ("ecs:DeregisterTaskDefinition",), one.where


@each_template
def test_every_setting_that_is_given_is_one(path: Path) -> None:
    known = {f"MILLRACE_{name.upper()}" for name in Settings.model_fields}
    text = path.read_text() + (ROOT / "deploy" / "user-data.sh").read_text()
    assert set(re.findall(r"\bMILLRACE_[A-Z_]+\b", text)) - known == set()


def test_an_instance_gives_its_builds_no_credentials_and_has_no_key() -> None:
    template = load(ROOT / "deploy/cloudformation/ec2-fleet.yaml")
    (one,) = of_type(template, "AWS::EC2::LaunchTemplate").values()
    data = one["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert "KeyName" not in data
    for device in data["BlockDeviceMappings"]:
        assert (device["Ebs"]["VolumeType"], device["Ebs"]["Encrypted"]) == ("gp3", True)
    assert [one["AssociatePublicIpAddress"] for one in data["NetworkInterfaces"]] == [False]


def test_an_instance_may_read_one_secret() -> None:
    template = load(ROOT / "deploy/cloudformation/ec2-fleet.yaml")
    roles = of_type(template, "AWS::IAM::Role")
    assert list(roles) == ["WorkerRole"]
    read = [one for one in statements(template) if any(action.startswith("secretsmanager:") for action in one.actions)]
    assert [(one.actions, one.resources) for one in read] == [(("secretsmanager:GetSecretValue",), ({"Ref": "WorkerSecret"},))]


def test_a_group_ends_nothing_by_itself() -> None:
    template = load(ROOT / "deploy/cloudformation/ec2-fleet.yaml")
    (group,) = of_type(template, "AWS::AutoScaling::AutoScalingGroup").values()
    assert group["NewInstancesProtectedFromScaleIn"] is True
    assert group["MinSize"] == "0"
    assert "DesiredCapacity" not in group
    (hook,) = group["LifecycleHookSpecificationList"]
    assert (hook["LifecycleTransition"], hook["DefaultResult"]) == ("autoscaling:EC2_INSTANCE_TERMINATING", "CONTINUE")
    assert hook["HeartbeatTimeout"] >= 100


def test_the_user_data_is_the_script() -> None:
    template = load(ROOT / "deploy/cloudformation/ec2-fleet.yaml")
    (one,) = of_type(template, "AWS::EC2::LaunchTemplate").values()
    between, (head, body) = one["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Join"]
    script = (ROOT / "deploy" / "user-data.sh").read_text()
    assert between == ""
    assert body == script, "python -m tests.support.embed puts it there"
    assert len(script) + len(head["Fn::Sub"]) < 12_000  # Amazon EC2 user guide: 16 KB at most, with what is put in


def test_the_commands_of_the_page_are_ones() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    commands = [line.partition("#")[0] for line in page.splitlines() if line.startswith("millrace fleet set ")]
    assert len(commands) >= 3
    for command in commands:
        fleet_set.make_context("set", shlex.split(command)[3:])
