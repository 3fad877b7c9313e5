"""Routes of artifacts: list and download, checked while they stream."""

from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import quote

from flask import Blueprint, Response, request

from api import bodies, render
from api.auth import Scope, needs, require_build
from api.builds import existing
from api.context import here
from millrace.errors import InfraProblem, NotFound
from millrace.log import get_logger
from millrace.storage import pieces
from scheduler.queries import ArtifactRecord

log = get_logger(__name__)
blueprint = Blueprint("artifacts", __name__, url_prefix="/v1/builds")


@blueprint.get("/<build_id>/artifacts")
@needs(Scope.USER)
def find(build_id: str) -> dict[str, Any]:
    """What the build left behind. Empty until the build has ended."""
    require_build(build_id)
    return {"artifacts": render.artifacts(existing(build_id).artifacts)}


@blueprint.get("/<build_id>/artifacts/<path:name>")
@needs(Scope.USER)
def download(build_id: str, name: str) -> Response:
    """One artifact's bytes. `identifier` names a secondary artifact. Bytes that are not what was stored break the answer off."""
    require_build(build_id)
    identifier = request.args.get("identifier", "")
    record = existing(build_id)
    item = next((a for a in record.artifacts if a.name == name and a.identifier == identifier), None)
    if item is None:
        hint = (
            "It has not ended yet."
            if not record.ended
            else f"It has: {', '.join(a.name for a in record.artifacts[:10]) or 'none'}."
        )
        raise NotFound(f"build {build_id} has no artifact {name[:200]!r}", hint=hint)
    try:
        body, close = bodies.opened(here().settings.bucket, item.key, what=f"artifact {name!r}")
    except NotFound as error:
        raise NotFound(f"artifact {name!r} is recorded, but no longer in the object store", hint="Build again.") from error
    headers = {
        "Content-Length": str(item.size_bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}",
        "ETag": f'"{item.sha256}"',
        "X-Millrace-Sha256": item.sha256,
    }
    return bodies.answer(_checked(body, item, build_id), close, headers)


def _checked(body: BinaryIO, item: ArtifactRecord, build_id: str) -> Iterator[bytes]:
    try:
        yield from pieces(body, sha256=item.sha256, size_bytes=item.size_bytes, what=f"artifact {item.name}")
    except InfraProblem as error:  # the answer has begun: all that is left is to break it off
        log.error("artifact.damaged", build_id=build_id, key=item.key, why=error.message)
        raise
