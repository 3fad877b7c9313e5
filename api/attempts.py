"""The worker's six verbs (`millrace.contract`): claim renew phase log grant finish."""

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from flask import Blueprint, Response, request

from api import jsonbody
from api.auth import Scope, attempt_token_hash, needs
from api.context import here
from millrace import packing
from millrace.contract import (
    LEAVE_HEADER,
    LOG_OFFSET_HEADER,
    LOG_SHA256_HEADER,
    MAX_LOG_CHUNK_BYTES,
    SOURCE_AUTH,
    CacheHit,
    CacheLayer,
    CacheQuery,
    ClaimRequest,
    FinishReport,
    Grant,
    GrantRequest,
    PartsDone,
    PhaseReport,
    PhaseReports,
    RenewRequest,
    SecretReference,
    SecretsReply,
    SecretsRequest,
)
from millrace.errors import InvalidInput, NotFound, RequestError, SecretUnavailable, TooLarge
from millrace.ids import cache_prefix, staging_prefix
from millrace.log import get_logger
from millrace.project import BuildSettings
from millrace.secrets import values_of
from millrace.vocabulary import Reason, SourceType, Verdict
from scheduler import attempts, caches, leases, lifecycle, publication, queries
from scheduler.states import TERMINAL

_log = get_logger(__name__)
blueprint = Blueprint("attempts", __name__, url_prefix="/worker/v1")
_PLAIN: Final = " !()*+,-./:;=?@_~'"
"""Stands in a header as it is; all else is percent-encoded."""
_PUT_S: Final = 900
_GET_S: Final = 300
_MAX_REPORT_BYTES: Final = 64 * 1024**2
"""A report names every artifact, and a build may have many thousands that are stored file by file."""


@blueprint.post("/claim")
@needs(Scope.WORKER)
def claim() -> Response:
    """The best build of the worker's fleet, or 204, which may ask the worker to leave."""
    asked = jsonbody.read(ClaimRequest)
    claimed = leases.claim(here().db, asked, here().settings)
    if claimed is None:
        why = leases.leave_why(here().db, asked.worker_id)
        return Response(status=204, headers={LEAVE_HEADER: quote(why, safe=_PLAIN)} if why else {})
    return _json(claimed.model_dump_json(by_alias=True, exclude_none=True))


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/renew")
@needs(Scope.ATTEMPT)
def renew(build_id: str, attempt_no: int) -> Response:
    """Another lease for the attempt; the answer says whether to stop."""
    jsonbody.read(RenewRequest)
    reply = leases.renew(here().db, build_id, attempt_no, attempt_token_hash(), here().settings)
    return _json(reply.model_dump_json(by_alias=True))


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/phase")
@needs(Scope.ATTEMPT)
def phase(build_id: str, attempt_no: int) -> dict[str, Any]:
    """A phase began or ended."""
    attempts.record_phase(here().db, build_id, attempt_no, attempt_token_hash(), jsonbody.read(PhaseReport))
    return {}


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/phases")
@needs(Scope.ATTEMPT)
def phases(build_id: str, attempt_no: int) -> dict[str, Any]:
    """Phases began or ended."""
    reports = jsonbody.read(PhaseReports).reports
    attempts.record_phase(here().db, build_id, attempt_no, attempt_token_hash(), *reports)
    return {}


@blueprint.put("/attempts/<build_id>/<int:attempt_no>/log/<int:seq>")
@needs(Scope.ATTEMPT)
def log(build_id: str, attempt_no: int, seq: int) -> dict[str, Any]:
    """One numbered chunk of the log."""
    if request.content_length is not None and request.content_length > MAX_LOG_CHUNK_BYTES:
        raise TooLarge(f"a log chunk has at most {MAX_LOG_CHUNK_BYTES} bytes")
    offset = request.headers.get(LOG_OFFSET_HEADER, "")
    if not (offset.isascii() and offset.isdigit()) or len(offset) > 18:
        raise RequestError(f"the header {LOG_OFFSET_HEADER} is missing or no number")
    body = request.get_data(cache=False)
    packed = request.headers.get("Content-Encoding", "") == "zstd"
    try:
        data = packing.unpack(body, MAX_LOG_CHUNK_BYTES) if packed else body
    except ValueError as error:
        raise RequestError(f"the log chunk says that it is zstd, and {error}") from error
    attempts.store_log(
        here().db,
        build_id,
        attempt_no,
        attempt_token_hash(),
        seq=seq,
        offset=int(offset),
        data=data,
        packed=packing.Packed(body) if packed else None,
        sha256=request.headers.get(LOG_SHA256_HEADER, ""),
    )
    return {}


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/grant")
@needs(Scope.ATTEMPT)
def grant(build_id: str, attempt_no: int) -> Response:
    """An address to put one artifact or cache of this attempt, or to get one of this build's own sources."""
    context = here()
    wanted = jsonbody.read(GrantRequest)
    settings = attempts.settings_of(context.db, build_id, attempt_no, attempt_token_hash())
    if wanted.kind == "source":
        return _json(_source(settings, wanted).model_dump_json(by_alias=True))
    if wanted.size_bytes is None or wanted.sha256 is None:
        raise InvalidInput(f"a grant for {wanted.kind} names its sizeBytes and sha256")
    if wanted.size_bytes > context.settings.max_upload_bytes:
        raise TooLarge(f"{wanted.name} has {wanted.size_bytes} bytes, the limit is {context.settings.max_upload_bytes}")
    prefix = staging_prefix if wanted.kind == "artifact" else cache_prefix
    key = prefix(build_id, attempt_no) + wanted.name
    granted = context.store.presign(
        "PUT", context.settings.bucket, key, expires_in_s=_PUT_S, size_bytes=wanted.size_bytes, sha256=wanted.sha256
    )
    if wanted.parts is not None:
        granted = granted.model_copy(update=_in_parts(build_id, attempt_no, key, wanted, wanted.size_bytes, wanted.sha256))
    return _json(granted.model_dump_json(by_alias=True, exclude_none=True))


def _in_parts(build_id: str, attempt_no: int, key: str, wanted: GrantRequest, size_bytes: int, sha256: str) -> dict[str, object]:
    """What a grant has beside where the object comes in parts. They are noted before they are begun, and once they have a name,
    before the worker hears of them.
    """
    parts, part_bytes = wanted.parts or (), wanted.part_bytes or size_bytes
    if len(parts) != -(-size_bytes // part_bytes):
        raise InvalidInput(f"{size_bytes} bytes in parts of {part_bytes} are not {len(parts)} parts")
    context, bucket = here(), here().settings.bucket
    attempts.note_parts(context.db, build_id, attempt_no, attempt_token_hash(), key, attempts.UNNAMED)
    upload = context.store.begin_parts(bucket, key, sha256=sha256)
    attempts.note_parts(context.db, build_id, attempt_no, attempt_token_hash(), key, upload)
    sizes = [*[part_bytes] * (len(parts) - 1), size_bytes - part_bytes * (len(parts) - 1)]
    granted = tuple(
        context.store.presign_part(bucket, key, upload, number, expires_in_s=_PUT_S, size_bytes=size, md5=md5)
        for number, (size, md5) in enumerate(zip(sizes, parts, strict=True), start=1)
    )
    return {"upload": upload, "part_bytes": part_bytes, "parts": granted}


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/grant/complete")
@needs(Scope.ATTEMPT)
def complete(build_id: str, attempt_no: int) -> dict[str, Any]:
    """All parts of an artifact or a cache are there: make one object of them."""
    context = here()
    done = jsonbody.read(PartsDone)
    if not attempts.has_parts(context.db, build_id, attempt_no, attempt_token_hash(), done.key, done.upload):
        raise NotFound(f"attempt {attempt_no} of {build_id} sends no {done.key[:200]!r} in parts of that name")
    context.store.complete_parts(
        context.settings.bucket, done.key, done.upload, done.tags, size_bytes=done.size_bytes, sha256=done.sha256
    )
    return {}


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/grant/secrets")
@needs(Scope.ATTEMPT)
def secrets(build_id: str, attempt_no: int) -> Response:
    """The values of the secrets that a build asks for, all or none. What it may ask for is told by its project."""
    context = here()
    wanted = jsonbody.read(SecretsRequest)
    settings = attempts.settings_of(context.db, build_id, attempt_no, attempt_token_hash())
    if settings.fork is not None:
        _check_fork(settings, wanted.references)
    values = values_of(context.secrets, settings.project_name, wanted.references, allowed=context.settings.secrets_names)
    return _json(SecretsReply(values=values).model_dump_json(by_alias=True))


def _check_fork(settings: BuildSettings, references: Sequence[SecretReference]) -> None:
    """Raises SecretUnavailable for all but what the worker itself needs to fetch the sources: strangers get no secrets."""
    sources = {one.auth.resource for one in (settings.source, *settings.secondary_sources) if one.auth is not None}
    foreign = [one.name for one in references if one.value not in sources or not one.name.startswith(SOURCE_AUTH)]
    if foreign:
        raise SecretUnavailable(f"a build from a fork gets no secrets: {', '.join(foreign)}")


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/grant/cache")
@needs(Scope.ATTEMPT)
def cache(build_id: str, attempt_no: int) -> Response:
    """The cache that answers, with an address to get it, or 204."""
    context = here()
    found = attempts.find_cache(context.db, build_id, attempt_no, attempt_token_hash(), jsonbody.read(CacheQuery))
    if found is None:
        return Response(status=204)
    sizes = {layer.object_key: layer.size_bytes for layer in found.below} | {found.object_key: found.size_bytes}
    keys, there = list(sizes), (context.store.stat(context.settings.bucket, key) for key in sizes)
    if any(item is None or item.size_bytes != sizes[item.key] for item in there):
        context.store.check()  # a store that is away has nothing, either
        caches.lose(context.db, found.object_key)
        return Response(status=204)
    *grants, own = (context.store.presign("GET", context.settings.bucket, key, expires_in_s=_GET_S) for key in keys)
    hit = CacheHit(
        key=found.key,
        exact=found.exact,
        size_bytes=found.size_bytes,
        sha256=found.sha256,
        build_id=found.build_id,
        grant=own,
        below=tuple(
            CacheLayer(size_bytes=layer.size_bytes, sha256=layer.sha256, grant=grant)
            for layer, grant in zip(found.below, grants, strict=True)
        ),
    )
    return _json(hit.model_dump_json(by_alias=True))


def _may_read(project: str, key: str) -> bool:
    """Of the farm's own objects a build reads uploads, and artifacts of its own project; never logs, or what others built."""
    kind, _, rest = key.partition("/")
    return kind == "uploads" or (
        kind == "artifacts" and queries.get_build(here().db, f"{project}:{rest.partition('/')[0]}") is not None
    )


def _source(settings: BuildSettings, wanted: GrantRequest) -> Grant:
    project = settings.project_name
    own = {
        source.location.removeprefix("arn:aws:s3:::").removeprefix("s3://")
        for source in (settings.source, *settings.secondary_sources)
        if source.type is SourceType.S3 and source.location
    }
    spec = settings.source.buildspec or ""
    if spec.startswith(("s3://", "arn:aws:s3:::")):
        own.add(spec.removeprefix("arn:aws:s3:::").removeprefix("s3://"))
    if wanted.name not in own:
        raise NotFound(f"{wanted.name[:200]!r} is no source of this build")
    bucket, _, key = wanted.name.partition("/")
    if bucket == here().settings.bucket and not _may_read(project, key):
        raise NotFound(f"{wanted.name[:200]!r} is nothing that a build of {project} may read")
    if here().store.stat(bucket, key) is None:
        raise NotFound(f"there is no object {wanted.name!r} in the object store")
    return here().store.presign("GET", bucket, key, expires_in_s=_GET_S)


@blueprint.post("/attempts/<build_id>/<int:attempt_no>/finish")
@needs(Scope.ATTEMPT)
def finish(build_id: str, attempt_no: int) -> dict[str, Any]:
    """The attempt is over; the answer says what became of the build."""
    is_known = attempts.is_token_of(here().db, build_id, attempt_no, attempt_token_hash())
    if is_known:
        request.max_content_length = max(_MAX_REPORT_BYTES, here().settings.max_body_bytes)
    report = jsonbody.read(FinishReport)
    if is_known:
        report = _as_stored(build_id, attempt_no, report)
    state = lifecycle.finish(here().db, build_id, attempt_no, attempt_token_hash(), report)
    if state in TERMINAL:
        publication.publish_soon(here().db, here().store, here().settings, build_id)
    return {"state": state.value}


def _as_stored(build_id: str, attempt_no: int, report: FinishReport) -> FinishReport:
    """The report, as far as the store bears it out: artifacts that are not there, or not whole, are a fault of ours.

    The store itself compared the bytes with their checksum when it took them. A cache that is not there is left out.
    """

    def stored(prefix: str) -> dict[str, int]:
        return {item.key: item.size_bytes for item in here().store.list(here().settings.bucket, prefix)}

    if report.caches:
        there = stored(cache_prefix(build_id, attempt_no))
        kept = tuple(item for item in report.caches if there.get(item.object_key) == item.size_bytes)
        report = report.model_copy(update={"caches": kept})
    if report.artifacts:
        there = stored(staging_prefix(build_id, attempt_no))
        missing = [item.name for item in report.artifacts if there.get(item.key) != item.size_bytes]
        if missing:
            here().store.check()  # a store that is away has nothing, either
            _log.error("artifact.not_stored", build_id=build_id, attempt_no=attempt_no, count=len(missing), first=missing[0])
            message = f"the object store took {missing[0]!r}, and does not have it as it was sent"
            lost = {"verdict": Verdict.FAULT, "reason": Reason.STORAGE, "message": message, "artifacts": (), "caches": ()}
            return report.model_copy(update=lost)
    return report


def _json(text: str) -> Response:
    return Response(text, content_type="application/json")
