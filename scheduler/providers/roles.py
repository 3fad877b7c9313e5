"""What somebody may do in a repository, as its git server says at this moment, in CodeBuild's names (CodeBuild:
PullRequestBuildPolicy, approverRoles).

GitHub: GET /repos/OWNER/REPO/collaborators/NAME/permission. GitLab: GET /projects/ID/members/all/USER. Bitbucket Cloud: GET
/workspaces/WORKSPACE/permissions/repositories/SLUG. Data Center: GET /users with a filter of permission. All of them count what
somebody has through groups, too, and all but GitLab answer only a token that may administer the repository (GitHub: push).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from millrace.vocabulary import SourceType
from scheduler.providers import bitbucket, github, gitlab
from scheduler.providers.rest import Place, Refused, Rest, segment

_GITHUB: Final = {name: f"GITHUB_{name.upper()}" for name in ("read", "triage", "write", "maintain", "admin")}
_GITLAB: Final = {
    10: "GITLAB_GUEST",
    15: "GITLAB_PLANNER",
    20: "GITLAB_REPORTER",
    30: "GITLAB_DEVELOPER",
    40: "GITLAB_MAINTAINER",
    50: "GITLAB_OWNER",
}
_BITBUCKET: Final = {name: f"BITBUCKET_{name.upper()}" for name in ("read", "write", "admin")}
_MOST_PAGES: Final = 10


def _on_github(rest: Rest, place: Place, ident: str, name: str) -> str | None:
    url = f"{github.repository(place)}/collaborators/{segment(name)}/permission"
    answer = _object(github.ask(rest, "GET", url).data)
    user = answer.get("user")
    if not isinstance(user, dict) or str(user.get("id")) != ident:
        raise Refused(f"{name} is not the name of user {ident} at the server")
    for known in (answer.get("role_name"), answer.get("permission")):  # a role of one's own stands above one of GitHub's
        if isinstance(known, str) and known in _GITHUB:
            return _GITHUB[known]
    return None


def _on_gitlab(rest: Rest, place: Place, ident: str, _name: str) -> str | None:
    try:
        member = _object(gitlab.ask(rest, "GET", f"{gitlab.repository(place)}/members/all/{segment(ident)}").data)
    except Refused as refusal:
        if refusal.status == 404 and "Project" not in refusal.why:
            return None
        raise
    if str(member.get("id")) != ident:
        raise Refused(f"the server speaks of another user than {ident}")
    level = member.get("access_level")
    if member.get("state", "active") != "active" or not isinstance(level, int):
        return None
    return _GITLAB.get(max((known for known in _GITLAB if known <= level), default=0))


def _on_bitbucket(rest: Rest, place: Place, ident: str, name: str) -> str | None:
    if not bitbucket.is_cloud(place):
        return _on_data_center(rest, place, ident, name)
    workspace, slug = bitbucket.on_cloud(place)
    url = f"{bitbucket.CLOUD}/workspaces/{segment(workspace)}/permissions/repositories/{segment(slug)}"
    for one in _values(bitbucket.ask(rest, "GET", url, q=f'user.uuid="{ident}"').data):
        user = one.get("user")
        if isinstance(user, dict) and user.get("uuid") == ident:
            return _BITBUCKET.get(str(one.get("permission")))
    return None


def _on_data_center(rest: Rest, place: Place, ident: str, name: str) -> str | None:
    api, project, slug = bitbucket.on_data_center(place)
    for right in ("admin", "write", "read"):
        params = {
            "filter": name,
            "limit": "100",
            "permission": f"REPO_{right.upper()}",
            "permission.projectKey": project,
            "permission.repositorySlug": slug,
        }
        for _ in range(_MOST_PAGES):
            page = _object(bitbucket.ask(rest, "GET", f"{api}/users", None, **params).data)
            if any(str(one.get("id")) == ident for one in _values(page)):
                return _BITBUCKET[right]
            if page.get("isLastPage", True) or not isinstance(page.get("nextPageStart"), int):
                break
            params["start"] = str(page["nextPageStart"])
        else:
            raise Refused(f"too many users are like {name}")
    return None


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Refused("the server's answer is no JSON object")
    return data


def _values(data: Any) -> list[dict[str, Any]]:
    found = _object(data).get("values")
    if not isinstance(found, list):
        raise Refused("the server's answer has no list")
    return [one for one in found if isinstance(one, dict)]


ROLE: Final[Mapping[SourceType, Callable[[Rest, Place, str, str], str | None]]] = {
    SourceType.GITHUB: _on_github,
    SourceType.GITHUB_ENTERPRISE: _on_github,
    SourceType.BITBUCKET: _on_bitbucket,
    SourceType.GITLAB: _on_gitlab,
    SourceType.GITLAB_SELF_MANAGED: _on_gitlab,
}
"""The role of a user, by number and name; None for none. They raise Refused and Later: then nothing is known."""
