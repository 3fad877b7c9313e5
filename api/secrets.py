"""Routes of the farm's own secrets. They are set, listed and removed here; no route answers a value."""

from typing import Any

from flask import Blueprint, request
from pydantic import Field, SecretStr

from api import jsonbody
from api.auth import Scope, needs, principal, require_project
from api.context import here
from api.paging import limit_of, only
from millrace.errors import Conflict, Forbidden
from millrace.project import Shape
from millrace.vocabulary import TokenScope
from scheduler import secrets
from scheduler.secrets import SecretRecord

blueprint = Blueprint("secrets", __name__, url_prefix="/v1/secrets")


class SecretInput(Shape):
    """A secret as it is sent. `project` None: for builds of all projects."""

    value: SecretStr
    project: str | None = Field(default=None, min_length=1, max_length=150)
    description: str = Field(default="", max_length=1024)


@blueprint.get("")
@needs(Scope.USER)
def find() -> dict[str, Any]:
    """What secrets there are, without their values; `project`, `limit`, and `cursor` from the page before."""
    only("project", "limit", "cursor")
    _require_own_store()
    project = request.args.get("project")
    if project is not None:
        require_project(project)
    found, cursor = secrets.find(
        here().db,
        project=principal().project if project is None else project,
        limit=limit_of(100),
        after=request.args.get("cursor"),
    )
    page: dict[str, Any] = {"secrets": [_rendered(record) for record in found]}
    if cursor:
        page["nextCursor"] = cursor
    return page


@blueprint.put("/<path:name>")
@needs(Scope.USER)
def put(name: str) -> tuple[dict[str, Any], int]:
    """Set a secret: 201, or 200 where it was there and has a new value now."""
    only()
    _require_own_store()
    wanted = jsonbody.read(SecretInput)
    _require_owner(wanted.project)
    record, new = secrets.put(
        here().db,
        secrets.keys_of(here().settings),
        name,
        wanted.value.get_secret_value(),
        project=wanted.project,
        description=wanted.description,
    )
    return _rendered(record), 201 if new else 200


@blueprint.delete("/<path:name>")
@needs(Scope.USER)
def delete(name: str) -> tuple[str, int]:
    """Remove a secret; `project` for one that is a project's."""
    only("project")
    _require_own_store()
    _require_owner(request.args.get("project"))
    secrets.delete(here().db, name, project=request.args.get("project"))
    return "", 204


def _require_owner(project: str | None) -> None:
    if project is not None:
        require_project(project)
    elif principal().scope is TokenScope.PROJECT:
        raise Forbidden(
            "a secret of the whole farm takes an admin token",
            hint=f"Name your project: {principal().project}, or use another token.",
        )


def _require_own_store() -> None:
    provider = here().settings.secrets_provider
    if provider != "builtin":
        raise Conflict(
            f"this farm's secrets are kept in {'AWS' if provider == 'aws' else 'Vault'}, and not by it",
            hint="Set them there; or set MILLRACE_SECRETS_PROVIDER=builtin.",
        )


def _rendered(record: SecretRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        **({"project": record.project} if record.project else {}),
        **({"description": record.description} if record.description else {}),
        "version": record.version,
        "created": record.created_ms / 1000,
        "lastModified": record.modified_ms / 1000,
    }
