"""Bitbucket Cloud and Bitbucket Data Center (7.4 and later): build statuses of a commit.

Cloud: POST /2.0/repositories/WORKSPACE/SLUG/commit/COMMIT/statuses/build. Data Center: POST
/rest/api/latest/projects/KEY/repos/SLUG/commits/COMMIT/builds. Both know a status by its `key`, and replace the one they have.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any, Final

from millrace.vocabulary import BuildState
from scheduler.providers.rest import Answer, Place, Refused, Report, Rest, segment

_STATES: Final = {
    BuildState.QUEUED: "INPROGRESS",
    BuildState.RUNNING: "INPROGRESS",
    BuildState.SUCCEEDED: "SUCCESSFUL",
    BuildState.FAILED: "FAILED",
    BuildState.FAULT: "FAILED",
    BuildState.TIMED_OUT: "FAILED",
    BuildState.STOPPED: "STOPPED",
}
CLOUD: Final = "https://api.bitbucket.org/2.0"
_MAX_KEY: Final = 40
_MAX_TEXT: Final = 255
_TOKEN_USER: Final = "x-token-auth"  # noqa: S105  # the name that stands for a token's owner


def tell(rest: Rest, report: Report) -> None:
    """The build status of the commit."""
    place, state = report.place, _STATES[report.state]
    if is_cloud(place):
        url = f"{repository(place)}/commit/{report.commit}/statuses/build"
    else:
        url = f"{repository(place)}/commits/{report.commit}/builds"
        state = "FAILED" if state == "STOPPED" else state  # its older releases know no other end
    context = report.context
    ask(
        rest,
        "POST",
        url,
        {
            "key": context if len(context) <= _MAX_KEY else hashlib.sha1(context.encode(), usedforsecurity=False).hexdigest(),
            "state": state,
            "name": context[:_MAX_TEXT],
            "url": report.url,
            "description": report.description[:_MAX_TEXT],
        },
    )


def is_cloud(place: Place) -> bool:
    """True for bitbucket.org; all else is a Data Center."""
    return place.host == "bitbucket.org"


def repository(place: Place) -> str:
    """The address of a repository at the API."""
    if is_cloud(place):
        workspace, slug = on_cloud(place)
        return f"{CLOUD}/repositories/{segment(workspace)}/{segment(slug)}"
    above, project, slug = on_data_center(place)
    return f"{above}/projects/{segment(project)}/repos/{segment(slug)}"


def on_cloud(place: Place) -> tuple[str, str]:
    """Workspace and repository."""
    workspace, _, slug = place.path.rpartition("/")
    return workspace, slug


def on_data_center(place: Place) -> tuple[str, str, str]:
    """The address of the API, project and repository: a clone address is `[CONTEXT/]scm/KEY/SLUG`, by ssh without `scm`."""
    parts = place.path.split("/")
    if len(parts) < 2:
        raise Refused(f"{place.path[:100]!r} names no project and repository")
    above = parts[:-2]
    if above and above[-1] == "scm":
        above = above[:-1]
    context = "".join(f"/{segment(part)}" for part in above)
    return f"{place.origin}{context}/rest/api/latest", parts[-2], parts[-1]


def ask(rest: Rest, method: str, url: str, body: Mapping[str, Any] | None = None, **params: str) -> Answer:
    """One request as Bitbucket wants it."""
    return rest.ask(method, url, body, {"Authorization": _authorization(rest)}, params)


def _authorization(rest: Rest) -> str:
    access = rest.access
    if access.username == _TOKEN_USER:
        return f"Bearer {access.token}"
    return "Basic " + base64.b64encode(f"{access.username}:{access.token}".encode()).decode()
