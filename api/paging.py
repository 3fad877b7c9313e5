"""Numbers in the query string."""

from flask import request

from millrace.errors import InvalidInput


def whole_number(name: str, default: int | None, *, least: int = 0, most: int = 2**63 - 1) -> int | None:
    """The query's `name` as a whole number in its range, or `default`. Raises InvalidInput."""
    text = request.args.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not least <= int(text[:20]) <= most:
        raise InvalidInput(f"{name} is {text[:40]!r}, not a whole number from {least} to {most}")
    return int(text)


def limit_of(default: int) -> int:
    """The page size asked for: 1 to 100."""
    return whole_number("limit", default, least=1, most=100) or default
