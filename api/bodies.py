"""Objects on their way out. They are opened before the answer begins, so that what is wrong can still be said."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import BinaryIO

from flask import Response

from api.context import here
from millrace.errors import NotFound


def opened(bucket: str, key: str, *, what: str, offset: int = 0) -> tuple[BinaryIO, ExitStack]:
    """The object's bytes, and what closes them. Raises NotFound, and InfraProblem where the store fails."""
    stack = ExitStack()
    try:
        body = stack.enter_context(here().store.open(bucket, key, offset=offset))
    except FileNotFoundError as error:
        raise NotFound(f"{what} is not in the object store") from error
    return body, stack


def answer(pieces: Iterator[bytes], close: ExitStack, headers: dict[str, str], *, status: int = 200) -> Response:
    """An answer of `pieces`, as a file to be saved and not to be looked at, that closes the object however it ends.

    The first piece is taken before the answer begins, and raises what it raises; later ones can only break the answer off.
    """
    with close.pop_all() as guard:
        first = next(pieces, b"")
        close = guard.pop_all()
    response = Response(
        chain([first], pieces),
        status=status,
        content_type="application/octet-stream",
        headers={
            "Content-Disposition": "attachment",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "Referrer-Policy": "no-referrer",
            **headers,
        },
    )
    response.call_on_close(close.close)
    return response
