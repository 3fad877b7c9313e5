"""Is it alive, and is it ready? Each dependency is named."""

from typing import Any

from flask import Blueprint

from api.auth import Scope, needs
from api.context import here
from millrace import __version__
from millrace.errors import MillraceError

blueprint = Blueprint("health", __name__)


@blueprint.get("/healthz")
@needs(Scope.PUBLIC)
def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@blueprint.get("/readyz")
@needs(Scope.PUBLIC)
def ready() -> tuple[dict[str, Any], int]:
    """200 where builds are accepted and kept: `ok`, or `degraded` where only the bell is away; else 503."""
    context = here()
    parts = {"database": _try(context.db.check), "store": _try(context.store.check)}
    down = any(problem is not None for problem in parts.values())
    parts["broker"] = context.bell.check()
    degraded = parts["broker"] is not None
    status = "down" if down else "degraded" if degraded else "ok"
    return {"status": status, "parts": {name: problem or "ok" for name, problem in parts.items()}}, 503 if down else 200


def _try(check: Any) -> str | None:
    try:
        check()
    except MillraceError as error:
        return error.message
    return None
