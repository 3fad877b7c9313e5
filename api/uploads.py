"""Source folders on their way to a build: stored under their hash, so that the same folder is stored once."""

import tempfile
from typing import Any, BinaryIO, cast

from flask import Blueprint, request

from api.auth import Scope, needs
from api.context import here
from millrace.errors import InvalidInput, RequestError, TooLarge
from millrace.storage import PIECE_BYTES, HashingReader, storage_problem

blueprint = Blueprint("uploads", __name__, url_prefix="/v1/uploads")
_SUFFIXES = {"application/zip": "zip", "application/gzip": "tar.gz", "application/x-tar": "tar"}


@blueprint.post("")
@needs(Scope.USER)
def upload() -> tuple[dict[str, Any], int]:
    """Keep a source archive; the answer's `location` is what `sourceLocationOverride` takes with type S3.

    The body is a zip or a tar (plain or gzip) as raw bytes. 413 over `MILLRACE_MAX_UPLOAD_BYTES`.
    """
    context = here()
    most = context.settings.max_upload_bytes
    request.max_content_length = most + PIECE_BYTES  # in the place of what holds for JSON; None would not lift that
    if request.content_length is not None and request.content_length > most:
        raise TooLarge(
            f"the upload has {request.content_length} bytes, the limit is {most}", hint="Leave files out by .gitignore."
        )
    reader = HashingReader(cast(BinaryIO, request.stream))
    with tempfile.TemporaryFile() as spool:
        while piece := reader.read(PIECE_BYTES):
            if reader.size_bytes > most:
                raise TooLarge(f"the upload is over {most} bytes", hint="Leave files out by .gitignore.")
            try:
                spool.write(piece)
            except OSError as error:
                raise storage_problem("take the upload", error) from error
        if reader.size_bytes == 0:
            raise RequestError("the upload is empty", hint="Send the archive as the raw body (curl --data-binary @FILE).")
        if request.content_length is not None and request.content_length != reader.size_bytes:
            raise RequestError(f"the upload broke off after {reader.size_bytes} of {request.content_length} bytes")
        announced = request.headers.get("X-Millrace-Sha256", reader.sha256)
        if announced != reader.sha256:
            raise InvalidInput(f"the upload was announced with SHA-256 {announced[:64]}, but it is {reader.sha256}")
        key = f"uploads/{reader.sha256}.{_SUFFIXES.get(request.mimetype, 'tar.gz')}"
        if context.store.stat(context.settings.bucket, key) is None:
            spool.seek(0)
            context.store.put(
                context.settings.bucket, key, cast(BinaryIO, spool), size_bytes=reader.size_bytes, sha256=reader.sha256
            )
    return {"location": f"{context.settings.bucket}/{key}", "sha256": reader.sha256, "sizeBytes": reader.size_bytes}, 201
