"""What may stand in the query string."""

import difflib

from flask import request

from millrace.errors import FieldProblem, InvalidInput


def only(*names: str) -> None:
    """Raises InvalidInput where the query has other names: a filter that is misspelt must not show everything."""
    unknown = [name for name in request.args if name not in names]
    if not unknown:
        return
    fields = []
    for name in unknown:
        close = difflib.get_close_matches(name, names, n=1)
        fields.append(FieldProblem(field=name[:40], what="is not asked here" + (f"; did you mean {close[0]}?" if close else "")))
    known = ", ".join(names) or "none"
    raise InvalidInput("; ".join(f"{f.field}: {f.what}" for f in fields[:5]), hint=f"Known here: {known}.", fields=fields)


def whole_number(name: str, default: int | None, *, least: int = 0, most: int = 2**63 - 1) -> int | None:
    """The query's `name` as a whole number in its range, or `default`. Raises InvalidInput."""
    text = request.args.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
        raise InvalidInput(f"{name} is {text[:40]!r}, not a whole number from {least} to {most}")
    return int(text)


def limit_of(default: int) -> int:
    """The page size asked for: 1 to 100."""
    return whole_number("limit", default, least=1, most=100) or default
