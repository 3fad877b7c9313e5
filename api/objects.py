"""Signed addresses of the directory store: what S3 does for itself."""

from collections.abc import Iterator
from typing import BinaryIO, cast

from flask import Blueprint, Response, request
from werkzeug.exceptions import RequestedRangeNotSatisfiable

from api import bodies
from api.auth import Scope, needs
from api.context import Context, here
from millrace.errors import InfraProblem, NotFound, RequestError
from millrace.storage import PIECE_BYTES
from millrace.storage.directory import DirectoryStore, SignedObject, read_token
from millrace.vocabulary import Reason

blueprint = Blueprint("objects", __name__, url_prefix="/objects")


@blueprint.put("/<token>")
@needs(Scope.PUBLIC)
def put(token: str) -> tuple[dict[str, object], int]:
    """Store the one object that the address grants, of the size and hash that were announced."""
    context, granted = _granted(token, "PUT")
    request.max_content_length = context.settings.max_upload_bytes + PIECE_BYTES  # None would leave the limit for JSON
    if granted.size_bytes is not None and request.content_length != granted.size_bytes:
        raise RequestError(f"{granted.size_bytes} bytes were granted, {request.content_length} are sent")
    stored = context.store.put(
        granted.bucket, granted.key, cast(BinaryIO, request.stream), size_bytes=granted.size_bytes, sha256=granted.sha256
    )
    return {"sha256": stored.sha256, "sizeBytes": stored.size_bytes}, 200


@blueprint.get("/<token>")
@needs(Scope.PUBLIC)
def get(token: str) -> Response:
    """The one object that the address grants; a single `Range` of its bytes where one is asked for (RFC 9110, section 14)."""
    context, granted = _granted(token, "GET")
    stored = context.store.stat(granted.bucket, granted.key)
    if stored is None:
        raise NotFound(f"there is no object {granted.bucket}/{granted.key}")
    first, end = 0, stored.size_bytes
    headers = {"Accept-Ranges": "bytes"}
    wanted = request.range
    if wanted is not None and wanted.units == "bytes" and len(wanted.ranges) == 1:
        part = wanted.range_for_length(stored.size_bytes)
        if part is None:
            raise RequestedRangeNotSatisfiable(stored.size_bytes)
        first, end = part
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{stored.size_bytes}"
    elif stored.sha256:
        headers["X-Millrace-Sha256"] = stored.sha256
    body, close = bodies.opened(granted.bucket, granted.key, what=granted.key, offset=first)
    headers["Content-Length"] = str(end - first)
    return bodies.answer(_part(body, end - first), close, headers, status=206 if "Content-Range" in headers else 200)


def _granted(token: str, method: str) -> tuple[Context, SignedObject]:
    context = here()
    key = context.settings.signing_key
    if key is None or not isinstance(context.store, DirectoryStore):
        raise NotFound("this farm's objects lie in S3", hint="Ask for a new grant.")
    return context, read_token(key.get_secret_value().encode(), token, method)


def _part(body: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    while size_bytes and (piece := body.read(min(PIECE_BYTES, size_bytes))):
        size_bytes -= len(piece)
        yield piece
    if size_bytes:
        raise InfraProblem(f"an object ended {size_bytes} bytes early", reason=Reason.STORAGE)
