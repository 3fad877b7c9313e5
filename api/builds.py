"""Routes of builds: start, look, stop."""

from contextlib import suppress
from typing import Any, Final

from flask import Blueprint, Response, jsonify, request, url_for
from pydantic import ValidationError

from api import jsonbody, render
from api.auth import Scope, needs, principal, require_build, require_project
from api.context import here
from api.errors import from_validation
from api.paging import limit_of, only
from api.projects import check_artifacts, check_reach, check_sources
from millrace.errors import InvalidInput, NotFound
from millrace.project import BuildOverrides, RetryWish, effective
from millrace.vocabulary import BuildState, TokenScope
from scheduler import dispatch, intake, lifecycle, projects, queries, waiting
from scheduler.queries import BuildRecord

_OVERRIDES: Final = {
    "type": "sourceTypeOverride",
    "location": "sourceLocationOverride",
    "auth": "sourceAuthOverride",
    "compute_type": "computeTypeOverride",
    "compute_configuration": "computeConfigurationOverride",
    "worker_labels": "workerLabelsOverride",
    "environment_variables": "environmentVariablesOverride",
    "secondary_sources": "secondarySourcesOverride",
    "secondary_artifacts": "secondaryArtifactsOverride",
    "secondary_source_versions": "secondarySourcesVersionOverride",
    "": "sourceTypeOverride",
}
"""Where the settings of a build come from, for errors that only show once they are put together; "": the source as a whole."""
blueprint = Blueprint("builds", __name__, url_prefix="/v1/builds")


@blueprint.post("")
@needs(Scope.USER)
def start() -> tuple[Response, int, dict[str, str]]:
    """Queue a build (CodeBuild: StartBuild). 201; 200 with the same build where the idempotency key came before.

    The key is the header `Idempotency-Key` or the member `idempotencyToken`, and holds for 24 hours.
    """
    context = here()
    overrides = jsonbody.read(BuildOverrides)
    require_project(overrides.project_name)
    _check_overrides(overrides)
    key = _key(overrides.idempotency_token)
    who = principal()
    submitted = intake.submit(
        context.db,
        intake.BuildRequest(
            overrides=overrides,
            initiator=who.name,
            by_admin=who.scope is TokenScope.ADMIN,
            idempotency_scope=f"token:{who.token_id}",
            idempotency_key=key,
        ),
        context.settings,
    )
    return _submitted(submitted)


def _key(token: str | None) -> str | None:
    key = request.headers.get("Idempotency-Key", token)
    if key is not None and not 1 <= len(key) <= 255:
        raise InvalidInput("an idempotency key has 1 to 255 characters")
    return key


def _submitted(submitted: intake.Submitted) -> tuple[Response, int, dict[str, str]]:
    context = here()
    if submitted.created:
        dispatch.ring_now(context.db, context.bell, submitted.build_id, submitted.fleet)
    record = existing(submitted.build_id)
    where = url_for("builds.show", build_id=submitted.build_id)
    return jsonify(render.build(record, context.settings)), 201 if submitted.created else 200, {"Location": where}


def _check_overrides(overrides: BuildOverrides) -> None:
    """Raises InvalidInput that names the override, or BadBuildspec, before anything is kept."""
    context = here()
    try:
        project = projects.get(context.db, overrides.project_name)
    except NotFound:
        return  # the scheduler says it, unless this request came before, when the project was there
    try:
        settings = effective(project.settings, overrides)
    except ValidationError as error:
        raise from_validation(error, BuildOverrides, names=_OVERRIDES) from error
    if overrides.source_type_override or overrides.source_location_override or overrides.buildspec_override:
        check_sources(context.settings, settings.source)
    if overrides.secondary_sources_override:
        check_sources(context.settings, *settings.secondary_sources)
    check_artifacts(context.settings, settings.artifacts, *settings.secondary_artifacts)
    if principal().scope is TokenScope.PROJECT:
        check_reach(project.settings, settings)


@blueprint.get("")
@needs(Scope.USER)
def find() -> dict[str, Any]:
    """Builds, newest first: `project`, `state` (may be repeated), `limit`, `cursor`."""
    only("project", "state", "limit", "cursor")
    context = here()
    project = request.args.get("project")
    if project is not None:
        require_project(project)
    found, cursor = queries.find_builds(
        context.db,
        project=project or principal().project,
        states=[_state(text) for text in request.args.getlist("state")],
        limit=limit_of(50),
        cursor=request.args.get("cursor"),
    )
    page: dict[str, Any] = {"builds": [render.build(record, context.settings, brief=True) for record in found]}
    if cursor:
        page["nextCursor"] = cursor
    return page


@blueprint.get("/<build_id>")
@needs(Scope.USER)
def show(build_id: str) -> dict[str, Any]:
    """One build."""
    require_build(build_id)
    return render.build(existing(build_id), here().settings)


@blueprint.get("/<build_id>/queue")
@needs(Scope.USER)
def queue(build_id: str) -> dict[str, Any]:
    """Why a build waits: its position, who goes before it, the limits that bind, and what would lift them.

    A project's token is not told which builds of other projects go before.
    """
    only()
    require_build(build_id)
    found = waiting.explain(here().db, build_id, here().settings)
    if found is None:
        raise _none(build_id)
    return render.waiting(found, only_project=principal().project)


@blueprint.post("/<build_id>/retry")
@needs(Scope.USER)
def retry(build_id: str) -> tuple[Response, int, dict[str, str]]:
    """Queue a build like one that has ended (CodeBuild: RetryBuild): its settings, and of git the very commit. As `start`.

    409 where the build has not ended.
    """
    require_build(build_id)
    context = here()
    wish = jsonbody.read(RetryWish) if request.get_data() else RetryWish()
    key = _key(wish.idempotency_token)
    who = principal()
    if who.scope is TokenScope.PROJECT:
        _check_retry(build_id)
    submitted = intake.retry(
        context.db,
        intake.RetryRequest(
            build_id=build_id, initiator=who.name, idempotency_scope=f"token:{who.token_id}", idempotency_key=key
        ),
        context.settings,
    )
    return _submitted(submitted)


def _check_retry(build_id: str) -> None:
    """Raises Forbidden where the build reached what its project's own token may not, or no longer."""
    record = existing(build_id)
    with suppress(NotFound):  # the scheduler says it
        check_reach(projects.get(here().db, record.project_name).settings, record.settings)


@blueprint.post("/<build_id>/stop")
@needs(Scope.USER)
def stop(build_id: str) -> dict[str, Any]:
    """Ask for a build to stop (CodeBuild: StopBuild). A queued one is STOPPED in the answer; a finished one stays as it is."""
    require_build(build_id)
    if not lifecycle.request_stop(here().db, build_id):
        raise _none(build_id)
    return render.build(existing(build_id), here().settings)


def existing(build_id: str) -> BuildRecord:
    """The build. Raises NotFound."""
    record = queries.get_build(here().db, build_id)
    if record is None:
        raise _none(build_id)
    return record


def _none(build_id: str) -> NotFound:
    return NotFound(f"there is no build {build_id[:200]!r}", hint="GET /v1/builds lists them.")


def _state(text: str) -> BuildState:
    try:
        return BuildState(text)
    except ValueError as error:
        raise InvalidInput(f"state is {text[:40]!r}; known: {', '.join(BuildState)}") from error
