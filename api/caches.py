"""Routes of caches: which there are, what a build asked for, and taking them away."""

from typing import Any

from flask import Blueprint, request

from api.auth import Scope, needs, principal, require_build, require_project
from api.builds import existing
from api.context import here
from api.paging import limit_of, only, whole_number
from millrace.errors import Forbidden, InvalidInput
from millrace.vocabulary import TokenScope
from scheduler import caches
from scheduler.caches import CacheRecord

blueprint = Blueprint("caches", __name__, url_prefix="/v1")


@blueprint.get("/caches")
@needs(Scope.USER)
def find() -> dict[str, Any]:
    """The caches of `project`, of those who share `namespace`, or all, newest first; `limit`, `cursor` from the page before."""
    only("project", "namespace", "limit", "cursor")
    project, shared = _whose(required=False)
    found, following = caches.find_all(
        here().db, project=project, shared=shared, limit=limit_of(100), before=whole_number("cursor", None)
    )
    page: dict[str, Any] = {"caches": [_rendered(record) for record in found]}
    if following is not None:
        page["nextCursor"] = str(following)
    return page


@blueprint.delete("/caches")
@needs(Scope.USER)
def remove() -> dict[str, Any]:
    """Take away the caches of `project` or `namespace`, or only that of `key`; how many there were."""
    only("project", "namespace", "key")
    project, shared = _whose(required=True)
    return {"removed": caches.remove(here().db, project=project, shared=shared, key=request.args.get("key"))}


@blueprint.get("/builds/<build_id>/caches")
@needs(Scope.USER)
def explain(build_id: str) -> dict[str, Any]:
    """What a build's attempts asked for, what answered or why nothing did, and what the build saved."""
    only()
    require_build(build_id)
    existing(build_id)
    lookups, saved = caches.of_build(here().db, build_id)
    return {
        "lookups": [{**one, "at": one["at"] / 1000} for one in lookups],
        "saved": [_rendered(record) for record in saved],
    }


def _whose(*, required: bool) -> tuple[str | None, str | None]:
    """The project or the shared namespace that is asked for."""
    project, shared = request.args.get("project"), request.args.get("namespace")
    if project and shared:
        raise InvalidInput("project and namespace are both given", hint="Name one of them.")
    if project:
        require_project(project)
        return project, None
    if principal().scope is TokenScope.PROJECT:
        if shared:
            raise Forbidden("what projects share takes an admin token", hint=f"Name your project: {principal().project}.")
        if not required:
            return principal().project, None
    if required and not shared:
        raise InvalidInput("nothing says whose caches", hint="Name a project, or a namespace that projects share.")
    return None, shared


def _rendered(record: CacheRecord) -> dict[str, Any]:
    whose = {"project": record.project, "namespace": record.shared, "fork": record.fork}
    return {
        **{name: value for name, value in whose.items() if value},
        "key": record.key,
        "version": record.version,
        "layers": record.layers,
        "sizeBytes": record.size_bytes,
        "ownBytes": record.own_bytes,
        "buildId": record.build_id,
        "created": record.created_ms / 1000,
        "lastUsed": record.used_ms / 1000,
    }
