"""Objects on their way out. They are opened before the answer begins, so that what is wrong can still be said."""

from collections.abc import Iterator
from contextlib import ExitStack
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
    """An answer of `pieces`, as a file to be saved and not to be looked at, that closes the object however it ends."""
    response = Response(
        pieces,
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
