"""Is it alive, and is it ready? Each dependency is named."""

from typing import Any, Final
from urllib.parse import unquote, urlsplit

from flask import Blueprint

from api.auth import Scope, needs
from api.context import here
from millrace import __version__
from millrace.settings import Settings

blueprint = Blueprint("health", __name__)
_LEVELS: Final = ("ok", "degraded", "down")
_NEEDED: Final = frozenset({"database", "schema"})
_IN_THE_DATABASE: Final = ("schema", "scheduler", "workers")
_UNKNOWN: Final = "cannot be told while the database does not answer"


@blueprint.get("/healthz")
@needs(Scope.PUBLIC)
def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok", "version": __version__}


@blueprint.get("/readyz")
@needs(Scope.PUBLIC)
def ready() -> tuple[dict[str, Any], int]:
    """How each part is. 503 `down` where no build could be accepted and kept; 200 `degraded` where only something else is wrong.

    What is degraded is made up for: without Redis workers ask by themselves, without the store they wait for it, and what no
    worker takes stays in the queue.
    """
    context = here()
    said = context.readiness.look()
    if said["database"] is not None:
        said |= {part: _UNKNOWN for part in _IN_THE_DATABASE}
    parts = {
        part: {"status": "ok" if problem is None else _worst(part), "detail": _without_secrets(problem or "", context.settings)}
        for part, problem in said.items()
    }
    status = max((part["status"] for part in parts.values()), key=_LEVELS.index)
    return {"status": status, "version": __version__, "parts": parts}, 503 if status == "down" else 200


def _worst(part: str) -> str:
    return "down" if part in _NEEDED else "degraded"


def _without_secrets(text: str, settings: Settings) -> str:
    """Anybody may ask; a library's own message may repeat what it was given."""
    addresses = (settings.database_url, settings.broker_url)
    given = {urlsplit(address.get_secret_value()).password for address in addresses if address}
    given |= {secret.get_secret_value() for secret in (settings.store_secret_key, settings.signing_key) if secret}
    for value in sorted((value for value in given if value), key=len, reverse=True):
        text = text.replace(value, "***").replace(unquote(value), "***")
    return text
