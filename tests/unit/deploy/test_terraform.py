"""The modules of deploy/terraform: they allow and make what the templates of CloudFormation do."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import hcl2
import pytest

from millrace.settings import Settings
from tests.support.cloudformation import ROOT, load, of_type, statements

MODULES = ROOT / "deploy" / "terraform"
PAIRS = ("control-plane", "ec2-fleet", "fargate-fleet")
each_pair = pytest.mark.parametrize("name", PAIRS)


@cache
def module(name: str) -> dict[str, list[dict[str, Any]]]:
    """All blocks of a module, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((MODULES / name).glob("*.tf")):
        with open(path) as file:
            for kind, blocks in hcl2.load(file).items():
                found.setdefault(kind, []).extend(blocks if isinstance(blocks, list) else [blocks])
    return found


def resources(name: str, kind: str, of: str = "resource") -> dict[str, dict[str, Any]]:
    """The resources of a type, by name."""
    found: dict[str, dict[str, Any]] = {}
    for block in module(name).get(of, []):
        for said, named in block.items():
            if _plain(said) == kind:
                found |= {_plain(key): _plain(value) for key, value in named.items()}
    return found


def _plain(said: Any) -> Any:
    """What was read, without the quotes of strings and the marks of blocks."""
    if isinstance(said, str):
        return said[1:-1] if len(said) > 1 and said[0] == said[-1] == '"' else said
    if isinstance(said, list):
        return [_plain(one) for one in said]
    if isinstance(said, dict):
        return {_plain(key): _plain(value) for key, value in said.items() if not str(key).startswith("__")}
    return said


def allowed(name: str) -> dict[str, tuple[frozenset[str], bool]]:
    """What each statement allows, by its Sid, and whether on any resource."""
    found = {}
    for document in resources(name, "aws_iam_policy_document", "data").values():
        for said in document["statement"]:
            if "sid" in said and said.get("effect") != "Deny":
                found[said["sid"]] = frozenset(said["actions"]), said["resources"] == ["*"]
    return found


@each_pair
def test_it_allows_what_the_template_allows(name: str) -> None:
    template = load(ROOT / "deploy" / "cloudformation" / f"{name}.yaml")
    theirs = {
        one.said["Sid"]: (frozenset(one.actions), one.resources == ("*",))
        for one in statements(template)
        if one.effect == "Allow"
    }
    assert allowed(name) == theirs


@each_pair
def test_every_variable_and_output_says_what_it_is(name: str) -> None:
    for kind in ("variable", "output"):
        for block in module(name)[kind]:
            for said, value in block.items():
                assert _plain(value).get("description"), f"{kind} {said}"


@each_pair
def test_every_setting_that_is_given_is_one(name: str) -> None:
    known = {f"MILLRACE_{field.upper()}" for field in Settings.model_fields}
    text = "".join(path.read_text() for path in (MODULES / name).glob("*.tf"))
    assert set(re.findall(r"\bMILLRACE_[A-Z_]+\b", text)) - known == set()


@pytest.mark.parametrize("name", ["ec2-fleet", "fargate-fleet"])
def test_nothing_comes_in_to_a_worker(name: str) -> None:
    assert list(resources(name, "aws_security_group")) == ["workers"]
    assert not {"ingress", "egress"} & set(resources(name, "aws_security_group")["workers"])
    for said in resources(name, "aws_vpc_security_group_ingress_rule").values():
        assert "var.control_plane" in said["security_group_id"]
        assert said["referenced_security_group_id"] == "${aws_security_group.workers.id}"
        assert not {"cidr_ipv4", "cidr_ipv6", "prefix_list_id"} & set(said)


def test_an_instance_gives_its_builds_no_credentials_and_has_no_key() -> None:
    (template,) = resources("ec2-fleet", "aws_launch_template").values()
    (metadata,) = template["metadata_options"]
    assert (metadata["http_tokens"], metadata["http_put_response_hop_limit"]) == ("required", 1)
    assert "key_name" not in template
    (device,) = template["block_device_mappings"]
    assert (device["ebs"][0]["volume_type"], device["ebs"][0]["encrypted"]) == ("gp3", True)
    assert template["network_interfaces"][0]["associate_public_ip_address"] is False
    assert "user-data.sh" in str(template["user_data"])


def test_a_group_ends_nothing_by_itself() -> None:
    (group,) = resources("ec2-fleet", "aws_autoscaling_group").values()
    assert (group["protect_from_scale_in"], group["min_size"]) == (True, 0)
    assert "desired_capacity" not in group
    (hook,) = group["initial_lifecycle_hook"]
    assert (hook["lifecycle_transition"], hook["default_result"]) == ("autoscaling:EC2_INSTANCE_TERMINATING", "CONTINUE")


def test_bucket_records_and_bell_are_private_and_encrypted() -> None:
    (block,) = resources("control-plane", "aws_s3_bucket_public_access_block").values()
    closed = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert {name: block[name] for name in closed} == dict.fromkeys(closed, True)
    assert len(resources("control-plane", "aws_s3_bucket")) == 1
    assert len(resources("control-plane", "aws_s3_bucket_server_side_encryption_configuration")) == 1
    assert len(resources("control-plane", "aws_s3_bucket_lifecycle_configuration")) == 1
    (database,) = resources("control-plane", "aws_db_instance").values()
    assert (database["storage_encrypted"], database["publicly_accessible"]) == (True, False)
    (redis,) = resources("control-plane", "aws_elasticache_replication_group").values()
    assert (redis["transit_encryption_enabled"], redis["at_rest_encryption_enabled"]) == (True, True)


def test_the_example_gives_every_module_what_it_needs() -> None:
    for block in module("example")["module"]:
        for name, said in block.items():
            given = _plain(said)
            folder = Path(given["source"]).name
            variables = {_plain(one): _plain(value) for block in module(folder)["variable"] for one, value in block.items()}
            needed = {one for one, value in variables.items() if "default" not in value}
            assert needed <= set(given) <= {"source", *variables}, name


def test_the_parts_of_both_are_the_same() -> None:
    template = load(ROOT / "deploy" / "cloudformation" / "control-plane.yaml")
    for theirs, ours in (
        ("AWS::ECS::TaskDefinition", "aws_ecs_task_definition"),
        ("AWS::ECS::Service", "aws_ecs_service"),
        ("AWS::EC2::SecurityGroup", "aws_security_group"),
        ("AWS::IAM::Role", "aws_iam_role"),
    ):
        assert len(of_type(template, theirs)) == len(resources("control-plane", ours)), theirs
