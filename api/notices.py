"""Routes of what git servers are told."""

from typing import Any

from flask import Blueprint

from api.auth import Scope, needs, require_build, require_project
from api.builds import existing
from api.context import here
from api.paging import limit_of, only, whole_number
from api.render import seconds
from scheduler import notices, projects
from scheduler.notices import NoticeRecord

blueprint = Blueprint("notices", __name__, url_prefix="/v1")


@blueprint.get("/projects/<name>/notices")
@needs(Scope.USER)
def of_project(name: str) -> dict[str, Any]:
    """What was told of a project's builds, newest first: `limit`, and `cursor` from the page before."""
    only("limit", "cursor")
    require_project(name)
    projects.get(here().db, name)
    found, cursor = notices.find(here().db, project=name, limit=limit_of(50), before=whole_number("cursor", None))
    return {"notices": [_rendered(one) for one in found], **({"nextCursor": str(cursor)} if cursor is not None else {})}


@blueprint.get("/builds/<build_id>/notices")
@needs(Scope.USER)
def of_build(build_id: str) -> dict[str, Any]:
    """What was told of one build, newest first."""
    only()
    require_build(build_id)
    existing(build_id)
    found, _more = notices.find(here().db, build_id=build_id, limit=100)
    return {"notices": [_rendered(one) for one in found]}


@blueprint.post("/builds/<build_id>/notices/resend")
@needs(Scope.USER)
def resend(build_id: str) -> tuple[dict[str, Any], int]:
    """Tell the git server again what it refused of a build, or what was given up: 202. 409 where there is nothing of the kind."""
    only()
    require_build(build_id)
    existing(build_id)
    return {"notices": [_rendered(one) for one in notices.resend(here().db, build_id)]}, 202


def _rendered(one: NoticeRecord) -> dict[str, Any]:
    return {
        "buildId": one.build_id,
        "commit": one.commit,
        **({"context": one.context} if one.context else {}),
        "state": one.state.value,
        "outcome": one.outcome.value,
        "why": one.why,
        "tries": one.tries,
        "created": seconds(one.created_ms),
        **({"due": seconds(one.due_ms)} if one.due_ms is not None else {}),
        **({"settled": seconds(one.settled_ms)} if one.settled_ms is not None else {}),
    }
