"""Errors to answers: our tree, wrong fields and Werkzeug's own, all as problem+json (RFC 9457)."""

import difflib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Final

from flask import Flask, Response, request
from gunicorn.http.errors import NoMoreData, ParseException
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from millrace.errors import BadBuildspec, FieldProblem, InfraProblem, InvalidInput, MillraceError
from millrace.log import get_logger

log = get_logger(__name__)
_CODES: Final = {400: "bad_request", 413: "too_large", 415: "unsupported_media_type"}
"""Codes of ours where Werkzeug says no by itself."""


def install(app: Flask) -> None:
    """Let every error of `app` leave as problem+json."""
    app.register_error_handler(MillraceError, _ours)
    for kind in (NoMoreData, ParseException, BlockingIOError, ConnectionError):
        app.register_error_handler(kind, _broken_off)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def problem(status: int, code: str, detail: str, *, hint: str = "", **more: object) -> Response:
    """One problem+json answer. `code` is stable and for programs, `detail` and `hint` are for people."""
    body: dict[str, object] = {
        "type": "about:blank",
        "title": code.replace("_", " "),
        "status": status,
        "code": code,
        "detail": detail,
    }
    if hint:
        body["hint"] = hint
    body.update(more)
    return Response(json.dumps(body, ensure_ascii=False) + "\n", status=status, content_type="application/problem+json")


def from_validation(error: ValidationError, model: type[BaseModel], names: Mapping[str, str] | None = None) -> InvalidInput:
    """Every wrong field by its wire path, with a guess at what was meant for names that are unknown.

    `names` says how fields are called on the wire where that differs; "" is for what is said of the whole.
    """
    fields = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        path = (names or {}).get(path, path) or "(body)"
        what = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            name = str(item["loc"][-1])
            close = difflib.get_close_matches(name, _names_at(model, item["loc"][:-1]), n=1)
            what = "is no known field" + (f"; did you mean {close[0]}?" if close else "")
        fields.append(FieldProblem(field=path, what=what))
    return InvalidInput("; ".join(f"{field.field}: {field.what}" for field in fields[:5]), fields=fields)


def _names_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The wire names of the fields that there are at `path` of a `model`."""
    models = [model]
    for part in path:
        if isinstance(part, str):
            inside = [f.annotation for each in models for n, f in each.model_fields.items() if (f.alias or n) == part]
            models = [found for annotation in inside for found in _models_in(annotation)]
    return sorted({field.alias or name for each in models for name, field in each.model_fields.items()})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def _ours(error: MillraceError) -> Response:
    more: dict[str, object] = {}
    status = error.status
    if isinstance(error, BadBuildspec):
        more["problems"] = [{"line": p.line, "column": p.column, "what": p.what, "hint": p.hint} for p in error.problems]
    elif isinstance(error, InvalidInput) and error.fields:
        more["errors"] = [{"field": field.field, "what": field.what} for field in error.fields]
    elif isinstance(error, InfraProblem):
        status = 503
    answer = problem(status, error.code, error.message, hint=error.hint, **more)
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if status == 503:
        answer.headers["Retry-After"] = "5"
        log.warning("request.unavailable", path=request.path, why=error.message)
    return answer


def _http(error: HTTPException) -> Response:
    status = error.code or 500
    code = _CODES.get(status) or (error.name or "error").lower().replace(" ", "_")
    hints = {
        404: "docs/api.md lists the routes.",
        405: f"Allowed here: {', '.join(getattr(error, 'valid_methods', None) or [])}.",
    }
    detail = "there is no such address" if status == 404 else error.description or code
    answer = problem(status, code, detail, hint=hints.get(status, ""))
    for name, value in error.get_headers():
        if name.lower() in ("allow", "retry-after"):
            answer.headers[name] = value
    return answer


def _broken_off(error: Exception) -> Response:
    """The body did not come as it was announced: the client went away, stalled, or sent chunks that are none."""
    if isinstance(error, BlockingIOError):
        return problem(408, "request_timeout", "the body stopped coming", hint="Send it again.")
    what = "ended early" if isinstance(error, NoMoreData | ConnectionError) else "is not sent as HTTP has it"
    return problem(400, "bad_request", f"the body {what}")


def _unexpected(error: Exception) -> Response:
    number = uuid.uuid4().hex[:12]
    log.error("request.bug", id=number, method=request.method, path=request.path, exc_info=error)
    return problem(500, "internal", f"a fault of ours, logged as {number}", hint="Please report it with that number.")
