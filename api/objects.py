"""Signed addresses of the directory store: what S3 does for itself."""

from collections.abc import Iterator
from typing import BinaryIO, cast

from flask import Blueprint, Response, request

from api.auth import Scope, needs
from api.context import Context, here
from millrace.errors import NotFound, RequestError
from millrace.storage import PIECE_BYTES
from millrace.storage.directory import DirectoryStore, SignedObject, read_token

blueprint = Blueprint("objects", __name__, url_prefix="/objects")


@blueprint.put("/<token>")
@needs(Scope.PUBLIC)
def put(token: str) -> tuple[dict[str, object], int]:
    """Store the one object that the address grants, of the size and hash that were announced."""
    context, granted = _granted(token, "PUT")
    request.max_content_length = None
    if granted.size_bytes is not None and request.content_length != granted.size_bytes:
        raise RequestError(f"{granted.size_bytes} bytes were granted, {request.content_length} are sent")
    stored = context.store.put(
        granted.bucket, granted.key, cast(BinaryIO, request.stream), size_bytes=granted.size_bytes, sha256=granted.sha256
    )
    return {"sha256": stored.sha256, "sizeBytes": stored.size_bytes}, 200


@blueprint.get("/<token>")
@needs(Scope.PUBLIC)
def get(token: str) -> Response:
    """The one object that the address grants."""
    context, granted = _granted(token, "GET")
    stored = context.store.stat(granted.bucket, granted.key)
    if stored is None:
        raise NotFound(f"there is no object {granted.bucket}/{granted.key}")
    headers = {"Content-Length": str(stored.size_bytes), "Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}
    if stored.sha256:
        headers["X-Millrace-Sha256"] = stored.sha256
    return Response(_body(context, granted), content_type="application/octet-stream", headers=headers)


def _granted(token: str, method: str) -> tuple[Context, SignedObject]:
    context = here()
    key = context.settings.signing_key
    if key is None or not isinstance(context.store, DirectoryStore):
        raise NotFound("this farm's objects lie in S3", hint="Ask for a new grant.")
    return context, read_token(key.get_secret_value().encode(), token, method)


def _body(context: Context, granted: SignedObject) -> Iterator[bytes]:
    with context.store.open(granted.bucket, granted.key) as body:
        while piece := body.read(PIECE_BYTES):
            yield piece
