"""Payloads: read once their signature holds, and looked into without trust in their shape."""

import json
import re
from typing import Any, Final
from urllib.parse import parse_qs

from millrace.errors import RequestError, UnsupportedMedia

Payload = dict[str, Any]
NOTHING: Final = "0" * 40
MAX_PATHS: Final = 50_000
_COMMIT: Final = re.compile(r"[0-9a-f]{7,64}")


def parse(body: bytes, mimetype: str) -> Payload:
    """The JSON object of a body, also of a form's field `payload`. Raises RequestError, UnsupportedMedia."""
    if mimetype == "application/x-www-form-urlencoded":
        try:
            fields = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=16, errors="replace")
        except ValueError as error:
            raise RequestError(f"the form cannot be read: {error}") from error
        if len(fields.get("payload", [])) != 1:
            raise RequestError(
                "the form has no field 'payload', or several", hint="Set the webhook's content type to application/json."
            )
        body = fields["payload"][0].encode()
    elif mimetype not in ("application/json", ""):
        raise UnsupportedMedia(f"the body is {mimetype}", hint="Set the webhook's content type to application/json.")
    try:
        value = json.loads(body.decode(errors="replace"))
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the payload is not JSON: {what}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the payload is a JSON {type(value).__name__}, not an object")
    return value


def at(value: object, *path: str | int) -> Any:
    """What stands at `path`; None where there is no such place."""
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def text(value: object, *path: str | int, most: int = 300) -> str | None:
    """The string at `path`, cut off at `most` characters; None for anything else or nothing.

    What no database holds becomes `\ufffd`: were it left out, a name could come to be another's.
    """
    found = at(value, *path)
    if not isinstance(found, str) or not found:
        return None
    return found[:most].replace("\x00", "\ufffd").encode(errors="replace").decode()


def ident(value: object, *path: str | int) -> str | None:
    """The id at `path`, a number or a string."""
    found = at(value, *path)
    return str(found) if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63 else text(found, most=100)


def number(value: object, *path: str | int) -> int | None:
    """The number at `path` of a pull request."""
    found = at(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**31 else None


def items(value: object, *path: str | int) -> list[Any]:
    """The list at `path`; empty for anything else."""
    found = at(value, *path)
    return found if isinstance(found, list) else []


def commit(value: object, *path: str | int) -> str | None:
    """The commit id at `path`; None for none, and for the zeros that stand for none."""
    found = text(value, *path, most=100)
    return found if found is not None and _COMMIT.fullmatch(found) and set(found) != {"0"} else None


def changed_paths(commits: list[Any]) -> tuple[str, ...] | None:
    """What these commits added, changed and removed; None where one does not tell, or it is too much."""
    paths: dict[str, None] = {}
    for one in commits:
        for kind in ("added", "modified", "removed"):
            listed = at(one, kind)
            if not isinstance(listed, list):
                return None
            for path in listed:
                if not isinstance(path, str):
                    return None
                paths[path] = None
        if len(paths) > MAX_PATHS:
            return None
    return tuple(paths)
