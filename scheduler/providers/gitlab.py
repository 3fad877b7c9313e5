"""GitLab, com and self-managed: commit statuses. GitLab: API v4, POST /projects/ID/statuses/COMMIT."""

from collections.abc import Mapping
from typing import Any, Final

from millrace.vocabulary import BuildState
from scheduler.providers.rest import Answer, Place, Refused, Report, Rest, segment

_STATES: Final = {
    BuildState.QUEUED: "pending",
    BuildState.RUNNING: "running",
    BuildState.SUCCEEDED: "success",
    BuildState.FAILED: "failed",
    BuildState.FAULT: "failed",
    BuildState.TIMED_OUT: "failed",
    BuildState.STOPPED: "canceled",
}
_MAX_TEXT: Final = 255


def tell(rest: Rest, report: Report) -> None:
    """The commit status. That it is in this state already, or past it, is no refusal: GitLab then says that it cannot move."""
    place = report.place
    try:
        ask(
            rest,
            "POST",
            f"{repository(place)}/statuses/{report.commit}",
            {
                "state": _STATES[report.state],
                "name": report.context[:_MAX_TEXT],
                "target_url": report.url[:_MAX_TEXT],
                "description": report.description[:_MAX_TEXT],
            },
        )
    except Refused as refusal:
        if refusal.status != 400 or "Cannot transition status" not in refusal.why:
            raise


def repository(place: Place) -> str:
    """The address of a project at the API."""
    return f"{place.origin}/api/v4/projects/{segment(place.path)}"


def ask(rest: Rest, method: str, url: str, body: Mapping[str, Any] | None = None, **params: str) -> Answer:
    """One request as GitLab wants it."""
    return rest.ask(method, url, body, {"Authorization": f"Bearer {rest.access.token}"}, params)
