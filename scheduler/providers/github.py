"""GitHub and GitHub Enterprise: commit statuses, and check runs where the token is an app's.

GitHub: REST API, commits/statuses and checks/runs (version 2022-11-28).
"""

from collections.abc import Mapping
from typing import Any, Final

from millrace.vocabulary import BuildState
from scheduler.providers.rest import Access, Answer, Place, Refused, Report, Rest, segment

_STATES: Final = {
    BuildState.QUEUED: "pending",
    BuildState.RUNNING: "pending",
    BuildState.SUCCEEDED: "success",
    BuildState.FAILED: "failure",
    BuildState.FAULT: "error",
    BuildState.TIMED_OUT: "error",
    BuildState.STOPPED: "error",
}
_CHECKS: Final = {
    BuildState.QUEUED: ("queued", None),
    BuildState.RUNNING: ("in_progress", None),
    BuildState.SUCCEEDED: ("completed", "success"),
    BuildState.FAILED: ("completed", "failure"),
    BuildState.FAULT: ("completed", "failure"),
    BuildState.TIMED_OUT: ("completed", "timed_out"),
    BuildState.STOPPED: ("completed", "cancelled"),
}
_MAX_DESCRIPTION: Final = 140
_APP_TOKEN: Final = "ghs_"  # noqa: S105  # how GitHub begins the tokens of installed apps
_OLD_CHECK: Final = "status "
"""Before the id of a check run stands nothing; this says that the app may not make any, and so has statuses."""


def tell(rest: Rest, report: Report) -> str | None:
    """A check run where an app's token allows one, else a commit status."""
    if makes_checks(rest.access) and report.known_as != _OLD_CHECK:
        try:
            return _check(rest, report)
        except Refused as refusal:
            if refusal.status not in (403, 404):
                raise
    ask(
        rest,
        "POST",
        f"{repository(report.place)}/statuses/{report.commit}",
        {
            "state": _STATES[report.state],
            "target_url": report.url,
            "description": report.description[:_MAX_DESCRIPTION],
            "context": report.context,
        },
    )
    return _OLD_CHECK if makes_checks(rest.access) else None


def makes_checks(access: Access) -> bool:
    """True for an app's token, with which builds are check runs, where they may be: a status beside them would stand for ever."""
    return access.token.startswith(_APP_TOKEN)


def _check(rest: Rest, report: Report) -> str | None:
    status, conclusion = _CHECKS[report.state]
    body: dict[str, Any] = {
        "name": report.context,
        "status": status,
        "details_url": report.url,
        "external_id": report.build_id,
        "output": {"title": report.description, "summary": report.description},
    }
    if conclusion is not None:
        body["conclusion"] = conclusion
    runs = f"{repository(report.place)}/check-runs"
    if report.known_as is not None and report.known_as.isdecimal():
        try:
            ask(rest, "PATCH", f"{runs}/{report.known_as}", body)
            return report.known_as
        except Refused as refusal:
            if refusal.status != 404:
                raise
    made = ask(rest, "POST", runs, body | {"head_sha": report.commit}).data
    return str(made["id"]) if isinstance(made, dict) and isinstance(made.get("id"), int) else None


def repository(place: Place) -> str:
    """The address of a repository at the API."""
    owner, _, name = place.path.rpartition("/")
    api = "https://api.github.com" if place.host == "github.com" else f"{place.origin}/api/v3"
    return f"{api}/repos/{segment(owner)}/{segment(name)}"


def ask(rest: Rest, method: str, url: str, body: Mapping[str, Any] | None = None, **params: str) -> Answer:
    """One request as GitHub wants it."""
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {rest.access.token}",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    return rest.ask(method, url, body, headers, params)
