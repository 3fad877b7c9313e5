"""Whose comment approves (CodeBuild: PullRequestBuildPolicy, approverRoles). Pure."""

from typing import Final

from millrace.errors import FieldProblem, InvalidInput
from millrace.webhook import Provider, PullRequestBuildPolicy

ROLES: Final = (
    *(f"GITHUB_{name}" for name in ("READ", "TRIAGE", "WRITE", "MAINTAIN", "ADMIN")),
    *(f"GITLAB_{name}" for name in ("GUEST", "PLANNER", "REPORTER", "DEVELOPER", "MAINTAINER", "OWNER")),
    *(f"BITBUCKET_{name}" for name in ("READ", "WRITE", "ADMIN")),
)
"""CodeBuild's names, of each git server from the least to the most."""
WRITERS: Final = frozenset(
    {
        "GITHUB_WRITE",
        "GITHUB_MAINTAIN",
        "GITHUB_ADMIN",
        "GITLAB_DEVELOPER",
        "GITLAB_MAINTAINER",
        "GITLAB_OWNER",
        "BITBUCKET_WRITE",
        "BITBUCKET_ADMIN",
    }
)
"""Who may write, and so may approve where nothing else is said; as in CodeBuild."""
_FIELD: Final = "pullRequestBuildPolicy.approverRoles"


def allowed(policy: PullRequestBuildPolicy) -> frozenset[str]:
    """The roles whose comments approve: those that are named, and no others."""
    return frozenset(policy.approver_roles) or WRITERS


def check(policy: PullRequestBuildPolicy) -> None:
    """Raises InvalidInput for roles that there are not."""
    unknown = [role for role in policy.approver_roles if role not in ROLES]
    if unknown:
        what = f"{', '.join(unknown[:5])}: no such role; known are {', '.join(ROLES)}"
        raise InvalidInput(f"{_FIELD}: {what}", fields=[FieldProblem(field=_FIELD, what=what)])


def warnings(policy: PullRequestBuildPolicy, provider: Provider) -> list[str]:
    """What is odd about the roles, for people."""
    named, here = policy.approver_roles, f"{provider.name}_"
    if not named or policy.requires_comment_approval == "DISABLED":
        return []
    found = []
    weak = [role for role in named if role not in WRITERS and role.startswith(here)]
    if weak:
        found.append(f"{_FIELD}: {', '.join(weak)} may not write; of a public repository, GITHUB_READ is everybody")
    if not any(role.startswith(here) and role in ROLES for role in named):
        found.append(f"{_FIELD}: none is a role of {provider.name.title()}, so that no comment approves")
    return found
