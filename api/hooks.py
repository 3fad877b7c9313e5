"""Routes of a project's webhook: make, look, change, delete, try out (CodeBuild: CreateWebhook, UpdateWebhook, DeleteWebhook)."""

from typing import Any

from flask import Blueprint, request
from pydantic import Field

from api import jsonbody
from api.auth import Scope, needs, principal, require_project
from api.context import here
from api.paging import limit_of, only, whole_number
from api.render import seconds
from api.webhooks.routes import MAX_BYTES, read, rendered
from millrace.errors import Forbidden
from millrace.project import Shape
from millrace.vocabulary import TokenScope
from millrace.webhook import FilterGroups, Pattern, PullRequestBuildPolicy, WebhookFarm, WebhookSettings
from scheduler import approvers, filters, hooks
from scheduler.hooks import HookRecord
from scheduler.secrets import keys_of

blueprint = Blueprint("hooks", __name__, url_prefix="/v1/projects/<name>/webhook")


class WebhookInput(WebhookSettings):
    """A webhook as it is made. `repositoryId`: the git server's own id of the repository; else the first delivery tells it."""

    repository_id: str | None = Field(default=None, min_length=1, max_length=100)


class WebhookChange(Shape):
    """What is changed; what is left out stays. Of `branchFilter` and `filterGroups`, the one that is given replaces the other.

    `overlapMinutes`: how long the old secret holds beside the new one, where `rotateSecret` asks for one. `providerHookId`: what
    the git server calls the webhook.
    """

    branch_filter: Pattern | None = None
    filter_groups: FilterGroups | None = None
    build_type: str | None = Field(default=None, pattern="^BUILD$")
    pull_request_build_policy: PullRequestBuildPolicy | None = None
    millrace: WebhookFarm | None = None
    provider_hook_id: str | None = Field(default=None, min_length=1, max_length=100)
    rotate_secret: bool = False
    overlap_minutes: int = Field(default=hooks.OVERLAP_MS // 60_000, ge=0, le=30 * 24 * 60)


class Approval(Shape):
    """Which commit is approved, whole, as the delivery names it."""

    commit: str = Field(pattern=r"^[0-9a-f]{7,64}$")


class PayloadInput(Shape):
    """A payload to be tried out. `event` is what its header would say; left out, it is guessed."""

    payload: dict[str, Any]
    event: str | None = Field(default=None, max_length=100)


@blueprint.post("")
@needs(Scope.USER)
def create(name: str) -> tuple[dict[str, Any], int]:
    """Make the webhook. The answer holds the secret, which is never shown again."""
    only()
    require_project(name)
    wanted = jsonbody.read(WebhookInput)
    _check_fleet(wanted.millrace.fork_fleet, None)
    chosen = WebhookSettings.model_validate(wanted.model_dump(exclude={"repository_id"}))
    record, secret = hooks.create(here().db, keys_of(here().settings), name, chosen, repository_id=wanted.repository_id)
    return {**_rendered(record), "secret": secret}, 201


@blueprint.get("")
@needs(Scope.USER)
def show(name: str) -> dict[str, Any]:
    """The webhook, without its secret."""
    only()
    require_project(name)
    return _rendered(hooks.get(here().db, name))


@blueprint.put("")
@needs(Scope.USER)
def update(name: str) -> dict[str, Any]:
    """Change it, or have a new secret, which only this answer holds."""
    only()
    require_project(name)
    context = here()
    wanted = jsonbody.read(WebhookChange)
    said = wanted.model_dump(exclude_unset=True, exclude={"rotate_secret", "overlap_minutes", "provider_hook_id"})
    if said:
        if wanted.filter_groups is not None and wanted.branch_filter is None:
            said["branch_filter"] = None
        elif wanted.branch_filter is not None and wanted.filter_groups is None:
            said["filter_groups"] = ()
        settings = hooks.get(context.db, name).settings
        if wanted.millrace is not None:
            _check_fleet(wanted.millrace.fork_fleet, settings.millrace.fork_fleet)
        now = settings.model_dump()
        hooks.update(context.db, name, WebhookSettings.model_validate({**now, **said}))
        context.hooks.forget()
    if wanted.provider_hook_id is not None:
        hooks.set_provider_hook(context.db, name, wanted.provider_hook_id)
    if not wanted.rotate_secret:
        return _rendered(hooks.get(context.db, name))
    overlap_ms = wanted.overlap_minutes * 60_000
    record, secret = hooks.rotate(context.db, keys_of(context.settings), name, overlap_ms=overlap_ms)
    context.hooks.forget()
    return {**_rendered(record), "secret": secret}


@blueprint.delete("")
@needs(Scope.USER)
def delete(name: str) -> tuple[str, int]:
    """Remove it: its address is gone."""
    only()
    require_project(name)
    hooks.delete(here().db, name)
    here().hooks.forget()
    return "", 204


@blueprint.get("/deliveries")
@needs(Scope.USER)
def deliveries(name: str) -> dict[str, Any]:
    """What came, newest first, and what became of it: `limit`, and `cursor` from the page before."""
    only("limit", "cursor")
    require_project(name)
    found, cursor = hooks.deliveries(here().db, name, limit=limit_of(50), before=whole_number("cursor", None))
    shown = [
        {"id": one.id, "deliveryId": one.delivery_id, "received": seconds(one.received_ms), **rendered(one.result)}
        for one in found
    ]
    return {"deliveries": shown, **({"nextCursor": str(cursor)} if cursor is not None else {})}


@blueprint.post("/approve")
@needs(Scope.USER)
def approve(name: str) -> tuple[dict[str, Any], int]:
    """Start the build of a pull request that waits, at this very commit: 201. 409 where it has moved on since."""
    only()
    require_project(name)
    context = here()
    result = hooks.approve(context.db, name, jsonbody.read(Approval).commit, by=principal().name, settings=context.settings)
    if result.build_id is not None and result.fleet is not None:
        context.ringer.ring(result.build_id, result.fleet)
    return rendered(result), 201


@blueprint.post("/test")
@needs(Scope.USER)
def test(name: str) -> dict[str, Any]:
    """Say what a payload would do: which group matches, or which filter of each does not. Nothing is started or noted."""
    only()
    require_project(name)
    record = hooks.get(here().db, name)
    request.max_content_length = MAX_BYTES
    wanted = jsonbody.read(PayloadInput)
    heard = read(record.provider, wanted.payload, wanted.event)
    judged = [
        {
            **rendered(result),
            "group": decision.group,
            "groups": [[_filter(one) for one in group] for group in decision.groups],
        }
        for _event, decision, result in hooks.judge(record, heard)
    ]
    return {"event": heard.what, "repository": heard.repository, "why": "" if judged else heard.why, "events": judged}


def _check_fleet(wanted: str | None, now: str | None) -> None:
    """Raises Forbidden where a project's own token would reach a fleet that an admin has not given it."""
    if principal().scope is TokenScope.PROJECT and wanted not in (None, now):
        raise Forbidden("the forkFleet is not the webhook's own", hint="Use an admin token.")


def _filter(one: filters.FilterResult) -> dict[str, Any]:
    return {**one.filter.model_dump(mode="json", by_alias=True), "passed": one.passed, "says": one.says}


def _rendered(record: HookRecord) -> dict[str, Any]:
    shape = record.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    farm, policy = shape.pop("millrace"), record.settings.pull_request_build_policy
    address = f"{here().settings.public}/webhooks/{record.provider}/{record.id}"
    return {
        "url": address,
        "payloadUrl": address,
        **shape,
        "status": "ACTIVE",
        "lastModifiedSecret": seconds(record.secret_ms),
        "millrace": {
            **farm,
            "provider": record.provider.value,
            "repositoryId": record.repository_id,
            "providerHookId": record.provider_hook_id,
            "created": seconds(record.created_ms),
            "lastModified": seconds(record.modified_ms),
            "oldSecretUntil": seconds(record.previous_until_ms) if record.previous_until_ms else None,
            "warnings": [*filters.check(record.settings), *approvers.warnings(policy, record.provider)],
        },
    }
