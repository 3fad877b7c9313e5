"""Whose comments approve: CodeBuild's roles, and what is odd about them."""

import json
from typing import Any

import botocore.loaders
import pytest

from millrace.errors import InvalidInput
from millrace.webhook import Provider, PullRequestBuildPolicy
from scheduler import approvers


def policy(*roles: str) -> PullRequestBuildPolicy:
    return PullRequestBuildPolicy(requires_comment_approval="FORK_PULL_REQUESTS", approver_roles=roles)


def test_the_roles_are_codebuilds() -> None:
    model: Any = botocore.loaders.Loader().load_service_model("codebuild", "service-2")
    assert sorted(approvers.ROLES) == sorted(model["shapes"]["PullRequestBuildApproverRole"]["enum"]), json.dumps(approvers.ROLES)


def test_who_may_write_approves_where_nothing_else_is_said() -> None:
    assert "GITHUB_WRITE" in approvers.allowed(policy()) and "GITHUB_TRIAGE" not in approvers.allowed(policy())
    assert approvers.allowed(policy("GITHUB_ADMIN")) == {"GITHUB_ADMIN"}


def test_roles_that_there_are_not_are_refused_by_name() -> None:
    approvers.check(policy(*approvers.ROLES))
    with pytest.raises(InvalidInput, match="GITHUB_BOSS: no such role") as caught:
        approvers.check(policy("GITHUB_WRITE", "GITHUB_BOSS"))
    assert [one.field for one in caught.value.fields] == ["pullRequestBuildPolicy.approverRoles"]


def test_roles_that_let_everybody_or_nobody_approve_are_warned_of() -> None:
    assert approvers.warnings(policy(), Provider.GITHUB) == []
    assert approvers.warnings(policy("GITHUB_WRITE"), Provider.GITHUB) == []
    (weak,) = approvers.warnings(policy("GITHUB_READ", "GITHUB_WRITE"), Provider.GITHUB)
    assert "GITHUB_READ may not write" in weak
    (none,) = approvers.warnings(policy("GITHUB_READ"), Provider.GITLAB)
    assert "none is a role of Gitlab" in none
