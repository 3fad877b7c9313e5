"""Is it alive, and is it ready? Each dependency is named."""

from typing import Any

from flask import Blueprint

from api.auth import Scope, needs
from api.context import here
from millrace import __version__

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
    parts = here().readiness.look()
    down = parts["database"] is not None or parts["store"] is not None
    status = "down" if down else "degraded" if parts["broker"] is not None else "ok"
    return {"status": status, "parts": {name: problem or "ok" for name, problem in parts.items()}}, 503 if down else 200
