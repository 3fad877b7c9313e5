"""Routes of projects."""

from typing import Any, Final

from flask import Blueprint, Response, jsonify, request, url_for

from api import jsonbody, render
from api.auth import Scope, needs, principal, require_project
from api.context import here
from api.paging import limit_of, only
from buildenv.buildspec import looks_inline, parse
from buildenv.source import check_location
from millrace.errors import FieldProblem, Forbidden, InvalidInput
from millrace.project import BuildSettings, ProjectArtifacts, ProjectSettings, ProjectSource
from millrace.settings import Settings
from millrace.storage import check_key
from millrace.vocabulary import TokenScope
from scheduler import projects
from scheduler.notices import REPORTED

_BY_ADMIN: Final = "Use an admin token."
blueprint = Blueprint("projects", __name__, url_prefix="/v1/projects")


@blueprint.post("")
@needs(Scope.ADMIN)
def create() -> tuple[Response, int, dict[str, str]]:
    """Make a project (CodeBuild: CreateProject). 201, 409 where the name is taken, 422 for wrong fields."""
    context = here()
    settings = jsonbody.read(ProjectSettings)
    check_sources(context.settings, settings.source, *settings.secondary_sources)
    _check_shown(settings)
    check_artifacts(context.settings, settings.artifacts, *settings.secondary_artifacts)
    record = projects.create(context.db, settings)
    where = url_for("projects.show", name=settings.name)
    return jsonify(render.project(record, context.settings)), 201, {"Location": where}


@blueprint.get("")
@needs(Scope.USER)
def find() -> dict[str, Any]:
    """Projects by name; `limit`, and `cursor` from the page before."""
    only("limit", "cursor")
    context = here()
    found, cursor = projects.find(context.db, only=principal().project, limit=limit_of(100), after=request.args.get("cursor"))
    page: dict[str, Any] = {"projects": [render.project(record, context.settings) for record in found]}
    if cursor:
        page["nextCursor"] = cursor
    return page


@blueprint.get("/<name>")
@needs(Scope.USER)
def show(name: str) -> dict[str, Any]:
    """One project."""
    require_project(name)
    return render.project(projects.get(here().db, name), here().settings)


@blueprint.put("/<name>")
@needs(Scope.USER)
def replace(name: str) -> dict[str, Any]:
    """Replace a project's settings, all of them. Builds that are accepted already keep theirs."""
    require_project(name)
    context = here()
    settings = jsonbody.read(ProjectSettings)
    if settings.name != name:
        raise InvalidInput(f"the address names project {name!r}, the body {settings.name!r}")
    check_sources(context.settings, settings.source, *settings.secondary_sources)
    _check_shown(settings)
    check_artifacts(context.settings, settings.artifacts, *settings.secondary_artifacts)
    if principal().scope is TokenScope.PROJECT:
        check_reach(projects.get(context.db, name).settings, settings)
    return render.project(projects.update(context.db, settings), context.settings)


@blueprint.delete("/<name>")
@needs(Scope.ADMIN)
def delete(name: str) -> tuple[str, int]:
    """Delete a project. Its ended builds stay; 409 while builds of it wait or run."""
    projects.delete(here().db, name)
    return "", 204


def check_sources(settings: Settings, *sources: ProjectSource) -> None:
    """Raises InvalidInput or BadBuildspec for what could never be fetched or read, before anything is kept."""
    for source in sources:
        check_location(source, settings.git_roots)
        if not source.buildspec:
            continue
        if looks_inline(source.buildspec):
            parse(source.buildspec, where="the inline buildspec")
        elif source.buildspec.startswith(("s3://", "arn:")):
            if not source.buildspec.startswith(("s3://", "arn:aws:s3:::")):
                raise _no_buildspec(source.buildspec, "the only ARNs that are read are arn:aws:s3:::BUCKET/KEY")
            bucket, _, key = source.buildspec.removeprefix("arn:aws:s3:::").removeprefix("s3://").partition("/")
            check_key(bucket, key)
        elif source.buildspec.startswith("/") or ".." in source.buildspec.split("/"):
            raise _no_buildspec(source.buildspec, "a path is read below the source's top folder")
        elif not source.buildspec.isprintable():
            raise _no_buildspec(source.buildspec, "a path has no control characters")


def _check_shown(settings: ProjectSettings) -> None:
    """Raises InvalidInput where nobody would see what the project wants to be shown (CodeBuild: reportBuildStatus, badge)."""
    source = settings.source
    if source.report_build_status and source.type not in REPORTED:
        what = f"is for sources of the types {', '.join(sorted(REPORTED))}, not {source.type}"
        raise InvalidInput(f"reportBuildStatus {what}", fields=[FieldProblem(field="source.reportBuildStatus", what=what)])
    if settings.badge_enabled and not source.is_git:
        what = f"is for git sources, not {source.type}"
        raise InvalidInput(f"badgeEnabled {what}", fields=[FieldProblem(field="badgeEnabled", what=what)])


def check_artifacts(settings: Settings, *wanted: ProjectArtifacts) -> None:
    """Raises InvalidInput where artifacts would be published among the farm's own objects."""
    if any(one.bucket == settings.bucket for one in wanted):
        raise InvalidInput(
            f"artifacts cannot be published into {settings.bucket}, the farm's own bucket",
            hint="Name another bucket, or leave location out: the API hands artifacts out all the same.",
        )


def check_reach(project: ProjectSettings, wanted: BuildSettings | ProjectSettings) -> None:
    """Raises Forbidden where a project's own token would reach what only the project's settings may name: buckets, shared caches,
    fleets, privileges."""
    buckets = {one.bucket for one in (project.artifacts, *project.secondary_artifacts)}
    for one in (wanted.artifacts, *wanted.secondary_artifacts):
        if one.location is not None and one.bucket not in buckets:
            raise Forbidden(f"artifacts into bucket {one.location[:100]!r} are not among the project's own", hint=_BY_ADMIN)
    if wanted.cache.cache_namespace not in (None, project.cache.cache_namespace):
        raise Forbidden("the cacheNamespace is not the project's own", hint=_BY_ADMIN)
    if wanted.environment.fleet not in (None, project.environment.fleet):
        raise Forbidden("the fleet is not the project's own", hint=_BY_ADMIN)
    if isinstance(wanted, ProjectSettings) and _standing(wanted) != _standing(project):
        raise Forbidden("priority, weight and concurrentBuildLimit are the project's standing among others", hint=_BY_ADMIN)
    if wanted.environment.privileged_mode and not project.environment.privileged_mode:
        raise Forbidden("privilegedMode is not the project's own", hint=_BY_ADMIN)


def _standing(project: ProjectSettings) -> tuple[int, int, int | None]:
    return project.millrace.priority, project.millrace.weight, project.concurrent_build_limit


def _no_buildspec(value: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"buildspec {value[:200]!r} cannot be read: {why}",
        hint="Give the buildspec's text, a path in the source, or s3://BUCKET/KEY.",
    )
