"""Bitbucket Cloud and Bitbucket Data Center (7.4 and later): build statuses of a commit.

Cloud: POST /2.0/repositories/WORKSPACE/SLUG/commit/COMMIT/statuses/build. Data Center: POST
/rest/api/latest/projects/KEY/repos/SLUG/commits/COMMIT/builds. Both know a status by its `key`, and replace the one they have.
"""

import base64
import hashlib
from typing import Final

from millrace.vocabulary import BuildState
from scheduler.providers.rest import Refused, Report, Rest, segment

_STATES: Final = {
    BuildState.QUEUED: "INPROGRESS",
    BuildState.RUNNING: "INPROGRESS",
    BuildState.SUCCEEDED: "SUCCESSFUL",
    BuildState.FAILED: "FAILED",
    BuildState.FAULT: "FAILED",
    BuildState.TIMED_OUT: "FAILED",
    BuildState.STOPPED: "STOPPED",
}
_MAX_KEY: Final = 40
_MAX_TEXT: Final = 255
_TOKEN_USER: Final = "x-token-auth"  # noqa: S105  # the name that stands for a token's owner


def tell(rest: Rest, report: Report) -> None:
    """The build status of the commit."""
    place, state = report.place, _STATES[report.state]
    if place.host == "bitbucket.org":
        workspace, _, slug = place.path.rpartition("/")
        url = f"https://api.bitbucket.org/2.0/repositories/{segment(workspace)}/{segment(slug)}/commit/{report.commit}/statuses/build"
    else:
        above, project, slug = _on_data_center(place.path)
        repository = f"{place.origin}{above}/rest/api/latest/projects/{segment(project)}/repos/{segment(slug)}"
        url = f"{repository}/commits/{report.commit}/builds"
        state = "FAILED" if state == "STOPPED" else state  # its older releases know no other end
    context = report.context
    rest.send(
        "POST",
        url,
        {
            "key": context if len(context) <= _MAX_KEY else hashlib.sha1(context.encode(), usedforsecurity=False).hexdigest(),
            "state": state,
            "name": context[:_MAX_TEXT],
            "url": report.url,
            "description": report.description[:_MAX_TEXT],
        },
        {"Authorization": _authorization(rest)},
    )


def _on_data_center(path: str) -> tuple[str, str, str]:
    """Where Bitbucket lies at its host, project and repository: `[CONTEXT/]scm/KEY/SLUG`, by ssh without `scm`."""
    parts = path.split("/")
    if len(parts) < 2:
        raise Refused(f"{path[:100]!r} names no project and repository")
    above = parts[:-2]
    if above and above[-1] == "scm":
        above = above[:-1]
    return "".join(f"/{segment(part)}" for part in above), parts[-2], parts[-1]


def _authorization(rest: Rest) -> str:
    access = rest.access
    if access.username == _TOKEN_USER:
        return f"Bearer {access.token}"
    return "Basic " + base64.b64encode(f"{access.username}:{access.token}".encode()).decode()
