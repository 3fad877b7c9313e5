"""JSON bodies, read strictly: what could be understood in two ways is refused, with its place."""

import json
import re
from typing import Any, Final, TypeVar

from flask import request
from pydantic import BaseModel, ValidationError

from api.errors import from_validation
from millrace.errors import RequestError, UnsupportedMedia

M = TypeVar("M", bound=BaseModel)
_DEPTH: Final = 64
_BRACKET: Final = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A bracket, or a whole string, so that brackets inside strings do not count."""


def read(model: type[M]) -> M:
    """The request's body as a `model`. Raises RequestError, UnsupportedMedia or InvalidInput."""
    if request.mimetype not in ("application/json", ""):
        raise UnsupportedMedia(f"the body is {request.mimetype}, not JSON", hint="Send 'Content-Type: application/json'.")
    text = parse(request.get_data(cache=False))
    try:
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise from_validation(error, model) from error


def parse(raw: bytes) -> str:
    """The text of a JSON object. Refuses duplicate names, NaN and Infinity, deep nesting and lone surrogates."""
    if not raw.strip():
        raise RequestError("the body is empty", hint="Send a JSON object.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start}") from error
    _check_depth(text)
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise RequestError(f"the body is nested deeper than {_DEPTH} levels") from error
    except ValueError as error:
        what = "a number has more than 4300 digits" if "integer string conversion" in str(error) else str(error)
        raise RequestError(f"the body is not JSON that we take: {what}") from error
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError("the body has a lone surrogate, which is no character") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {type(value).__name__}, not an object")
    return text


def _check_depth(text: str) -> None:
    depth = 0
    for found in _BRACKET.finditer(text):
        char = found[0]
        if char in "[{":
            depth += 1
            if depth > _DEPTH:
                raise RequestError(f"the body is nested deeper than {_DEPTH} levels")
        elif char in "]}":
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands twice in one object")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
