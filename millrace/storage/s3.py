"""Objects in any S3, through the minio SDK. SHA-256 lies in the object's user metadata."""

import base64
import contextlib
import hashlib
import hmac
import io
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import BinaryIO, Final, Literal, TypeVar, cast
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.credentials.providers import Provider
from minio.datatypes import Part
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError

from millrace.contract import Grant, PartGrant
from millrace.errors import InvalidInput
from millrace.storage import PIECE_BYTES, HashingReader, StoredObject, can_begin_a_key, check_key, storage_problem

T = TypeVar("T")
_TRIES: Final = 3
_GONE: Final = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchObject", "ResourceNotFound"})
_IN_THE_WAY: Final = frozenset({"XMinioParentIsObject", "XMinioObjectExistsAsDirectory", "XMinioInvalidObjectName"})
_PASSING: Final = frozenset(
    {
        "AccessDenied",  # MinIO says so, for a moment, where another empties the same folder
        "BadDigest",
        "RequestTimeout",
        "SlowDown",
        "XAmzContentChecksumMismatch",
    }
)
"""Refusals that may not come again: bytes changed on their way, or the store had too much to do."""
_MOST_UPLOADS: Final = 1000
"""Amazon S3 API reference, ListMultipartUploads: as many as one answer has."""
_NO_UPLOAD: Final = "NoSuchUpload"
_BAD_PARTS: Final = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall", "MalformedXML"})
_PUT_S: Final = 900
_IN_MEMORY_BYTES: Final = 8 * 1024**2
_HASH: Final = "sha256"


class S3Store:
    """A `Store` in S3. Buckets are made when something is first put into them; `bucket` is the one that `check` looks at."""

    def __init__(self, endpoint: str, *, keys: Provider, region: str, secure: bool, bucket: str) -> None:
        self._keys, self._bucket = keys, bucket
        self._http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=60),
            maxsize=32,
            retries=urllib3.Retry(total=0, redirect=2),
        )
        self._client = Minio(endpoint, credentials=keys, region=region, secure=secure, http_client=self._http)
        self._region = region
        self._buckets: set[str] = set()

    def put(
        self,
        bucket: str,
        key: str,
        body: BinaryIO,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> StoredObject:
        check_key(bucket, key)
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as spool:
            # Spooled, since the hash goes in front of the bytes as metadata, and a try again needs the bytes again.
            reader = HashingReader(body)
            while piece := reader.read(PIECE_BYTES):
                spool.write(piece)
            if size_bytes is not None and reader.size_bytes != size_bytes:
                raise InvalidInput(f"{key} was announced with {size_bytes} bytes, but {reader.size_bytes} came")
            if sha256 is not None and reader.sha256 != sha256:
                raise InvalidInput(f"{key} was announced with SHA-256 {sha256}, but it is {reader.sha256}")

            notes = {f"x-amz-meta-{name}": quote(value, safe=" /:;=,.@+") for name, value in (metadata or {}).items()}

            def send() -> None:
                """In one request: what breaks off leaves nothing, not even parts that somebody would have to sweep up."""
                spool.seek(0)
                grant = self._grant_put(bucket, key, _PUT_S, reader.size_bytes, reader.sha256, notes)
                answer = self._http.request("PUT", grant.url, body=cast(BinaryIO, spool), headers=dict(grant.headers))
                if answer.status != 200:
                    raise _refusal(answer)

            self._try(f"keep {key}", lambda: self._make(bucket))
            self._try(f"keep {key}", send)
        return StoredObject(
            bucket=bucket, key=key, size_bytes=reader.size_bytes, sha256=reader.sha256, metadata=dict(metadata or {})
        )

    @contextlib.contextmanager
    def open(self, bucket: str, key: str, *, offset: int = 0) -> Iterator[BinaryIO]:
        check_key(bucket, key)
        if offset:
            stored = self.stat(bucket, key)
            if stored is not None and offset >= stored.size_bytes:
                yield io.BytesIO()
                return
        response = self._try(f"read {key}", lambda: self._get(bucket, key, offset))
        try:
            yield cast(BinaryIO, _Translating(response, key))
        finally:
            response.close()
            response.release_conn()

    def stat(self, bucket: str, key: str) -> StoredObject | None:
        check_key(bucket, key)

        def look() -> StoredObject | None:
            try:
                found = self._client.stat_object(bucket, key)
            except S3Error as error:
                if error.code in _GONE:
                    return None
                raise
            notes = {
                k.lower().removeprefix("x-amz-meta-"): v
                for k, v in (found.metadata or {}).items()
                if k.lower().startswith("x-amz-meta-")
            }
            return StoredObject(bucket=bucket, key=key, size_bytes=found.size or 0, sha256=notes.pop(_HASH, None), metadata=notes)

        return self._try(f"look at {key}", look)

    def list(self, bucket: str, prefix: str) -> Iterator[StoredObject]:
        check_key(bucket, "x")
        if not can_begin_a_key(prefix):
            return

        def find() -> list[StoredObject]:
            try:
                return [
                    StoredObject(bucket=bucket, key=item.object_name, size_bytes=item.size or 0, sha256=None)
                    for item in self._client.list_objects(bucket, prefix=prefix, recursive=True)
                    if item.object_name
                ]
            except S3Error as error:
                if error.code in _GONE:
                    return []
                raise

        yield from self._try(f"list {prefix}", find)

    def copy(self, bucket: str, key: str, to_bucket: str, to_key: str, *, metadata: Mapping[str, str]) -> None:
        check_key(to_bucket, to_key)
        stored = self.stat(bucket, key)
        if stored is None:
            raise FileNotFoundError(f"{bucket}/{key}")
        notes: dict[str, str | list[str] | tuple[str]] = dict(metadata)
        if stored.sha256 is not None:
            notes[_HASH] = stored.sha256
        source = CopySource(bucket, key)

        def send() -> None:
            self._client.copy_object(to_bucket, to_key, source, metadata=notes, metadata_directive="REPLACE")

        self._try(f"keep {to_key}", lambda: self._make(to_bucket))
        self._try(f"keep {to_key}", send)

    def delete(self, bucket: str, key: str) -> None:
        check_key(bucket, key)

        def remove() -> None:
            try:
                self._client.remove_object(bucket, key)
            except S3Error as error:
                if error.code not in _GONE:
                    raise

        self._try(f"delete {key}", remove)

    def delete_prefix(self, bucket: str, prefix: str) -> int:
        keys = [stored.key for stored in self.list(bucket, prefix)]
        if keys:
            errors = self._try(
                f"delete {prefix}", lambda: list(self._client.remove_objects(bucket, [DeleteObject(key) for key in keys]))
            )
            if errors:
                raise storage_problem(f"delete {errors[0].name}", RuntimeError(errors[0].message or errors[0].code))
        return len(keys)

    def presign(
        self,
        method: Literal["PUT", "GET"],
        bucket: str,
        key: str,
        *,
        expires_in_s: int,
        size_bytes: int | None = None,
        sha256: str | None = None,
    ) -> Grant:
        check_key(bucket, key)
        if method == "PUT":
            self._try(f"keep {key}", lambda: self._make(bucket))
            return self._grant_put(bucket, key, expires_in_s, size_bytes, sha256)
        expires = timedelta(seconds=expires_in_s)
        url = self._try(f"grant {key}", lambda: self._client.get_presigned_url(method, bucket, key, expires=expires))
        return Grant(method=method, url=url, headers={}, key=key, expires_in_s=expires_in_s)

    def _grant_put(
        self,
        bucket: str,
        key: str,
        expires_in_s: int,
        size_bytes: int | None,
        sha256: str | None,
        notes: Mapping[str, str] | None = None,
    ) -> Grant:
        headers = dict(notes or {})
        if size_bytes is not None:
            headers["Content-Length"] = str(size_bytes)
        if sha256 is not None:
            headers[f"x-amz-meta-{_HASH}"] = sha256
            headers["x-amz-checksum-sha256"] = base64.b64encode(bytes.fromhex(sha256)).decode()
        url = self._try(f"grant {key}", lambda: self._signed_put(bucket, key, headers, expires_in_s))
        return Grant(method="PUT", url=url, headers=headers, key=key, expires_in_s=expires_in_s)

    def begin_parts(self, bucket: str, key: str, *, sha256: str) -> str:
        check_key(bucket, key)
        self._try(f"keep {key}", lambda: self._make(bucket))
        headers: dict[str, str | list[str] | tuple[str]] = {f"x-amz-meta-{_HASH}": sha256}
        return self._try(f"keep {key}", lambda: self._client._create_multipart_upload(bucket, key, headers))

    def presign_part(
        self, bucket: str, key: str, upload: str, number: int, *, expires_in_s: int, size_bytes: int, md5: str
    ) -> PartGrant:
        headers = {"Content-Length": str(size_bytes), "Content-MD5": base64.b64encode(bytes.fromhex(md5)).decode()}
        params = {"partNumber": str(number), "uploadId": upload}
        url = self._try(f"grant {key}", lambda: self._signed_put(bucket, key, headers, expires_in_s, params))
        return PartGrant(url=url, headers=headers)

    def complete_parts(self, bucket: str, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, sha256: str) -> None:
        check_key(bucket, key)
        parts = [Part(number, tag) for number, tag in enumerate(tags, start=1)]

        def complete() -> None:
            try:
                self._client._complete_multipart_upload(bucket, key, upload, parts)
            except S3Error as error:
                if error.code in _BAD_PARTS:
                    raise InvalidInput(f"{key} lacks parts, or has others than were announced: {error.code}") from error
                if error.code != _NO_UPLOAD:
                    raise

        self._try(f"keep {key}", complete)
        stored = self.stat(bucket, key)
        if stored is None or (stored.size_bytes, stored.sha256) != (size_bytes, sha256):
            raise InvalidInput(f"{key} is not there as it was announced: {stored.size_bytes if stored else 'no'} bytes")

    def abort_parts(self, bucket: str, key: str, upload: str | None) -> None:
        check_key(bucket, key)

        def begun() -> list[str]:
            try:
                found = self._client._list_multipart_uploads(bucket, prefix=key, max_uploads=_MOST_UPLOADS)
            except S3Error as error:
                if error.code in _GONE:
                    return []
                raise
            return [one.upload_id for one in found.uploads if one.object_name == key and one.upload_id]

        def abort(one: str) -> None:
            try:
                self._client._abort_multipart_upload(bucket, key, one)
            except S3Error as error:
                if error.code not in (*_GONE, _NO_UPLOAD):
                    raise

        for one in [upload] if upload is not None else self._try(f"list what was begun of {key}", begun):
            self._try(f"delete {key}", partial(abort, one))

    def check(self) -> None:
        self._buckets.discard(self._bucket)
        self._try("answer", lambda: self._make(self._bucket), tries=2)

    def _signed_put(
        self, bucket: str, key: str, headers: Mapping[str, str], expires_in_s: int, params: Mapping[str, str] | None = None
    ) -> str:
        url = self._client.get_presigned_url("PUT", bucket, key, expires=timedelta(seconds=expires_in_s))
        return self._signed(url, headers, expires_in_s, datetime.now(UTC), params)

    def _signed(
        self, url: str, headers: Mapping[str, str], expires_in_s: int, now: datetime, params: Mapping[str, str] | None = None
    ) -> str:
        """A presigned PUT whose holder must send `headers` just so; the SDK's own signs none.

        Amazon S3 API reference, "Authenticating requests: using query parameters (AWS Signature Version 4)". S3 refuses
        `x-amz-` headers that are not signed, and bytes that do not have the signed checksum.
        """
        address = urlsplit(url)
        keys = self._keys.retrieve()
        token = (("X-Amz-Security-Token", keys.session_token),) if keys.session_token else ()
        wanted = {name.lower(): value for name, value in headers.items()} | {"host": address.netloc}
        names = ";".join(sorted(wanted))
        day, moment = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
        scope = f"{day}/{self._region}/s3/aws4_request"
        query = "&".join(
            f"{name}={quote(value, safe='')}"
            for name, value in (
                ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
                ("X-Amz-Credential", f"{keys.access_key}/{scope}"),
                ("X-Amz-Date", moment),
                ("X-Amz-Expires", str(expires_in_s)),
                *token,
                ("X-Amz-SignedHeaders", names),
                *sorted((params or {}).items()),  # behind those with capitals, as their order is by bytes
            )
        )
        lines = "".join(f"{name}:{wanted[name]}\n" for name in sorted(wanted))
        request = f"PUT\n{address.path}\n{query}\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        key = f"AWS4{keys.secret_key}".encode()
        for part in (day, self._region, "s3", "aws4_request", text):
            key = hmac.digest(key, part.encode(), hashlib.sha256)
        return f"{address.scheme}://{address.netloc}{address.path}?{query}&X-Amz-Signature={key.hex()}"

    def _make(self, bucket: str) -> None:
        if bucket in self._buckets:
            return
        if not self._client.bucket_exists(bucket):
            try:
                self._client.make_bucket(bucket, self._region)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
        self._buckets.add(bucket)

    def _get(self, bucket: str, key: str, offset: int) -> urllib3.BaseHTTPResponse:
        try:
            return self._client.get_object(bucket, key, offset=offset)
        except S3Error as error:
            if error.code in _GONE:
                raise FileNotFoundError(f"{bucket}/{key}") from error
            raise

    def _try(self, what: str, work: Callable[[], T], *, tries: int = _TRIES) -> T:
        """`work`, tried again where the store stumbles; its failures as ours."""
        for attempt in range(1, tries + 1):
            try:
                return work()
            except FileNotFoundError:
                raise
            except (MinioException, HTTPError, OSError) as error:
                if isinstance(error, S3Error) and error.code in _IN_THE_WAY:
                    raise InvalidInput(
                        f"the object store cannot {what}: part of it is an object, or it is a folder of objects"
                    ) from error
                passing = (
                    not isinstance(error, S3Error)
                    or (error.response is not None and error.response.status >= 500)
                    or error.code in _PASSING
                )
                if (
                    not isinstance(error, (S3Error, ServerError, InvalidResponseError, HTTPError, OSError))
                    or not passing
                    or attempt == tries
                ):
                    raise storage_problem(what, error) from error
                time.sleep(random.uniform(0.05, 0.3 * 2**attempt))  # noqa: S311  # jitter, not a secret
        raise AssertionError("unreachable")


def _refusal(answer: urllib3.BaseHTTPResponse) -> MinioException:
    """The SDK's own error for an answer that it did not read itself."""
    try:
        return S3Error.fromxml(answer)
    except (ValueError, ElementTree.ParseError):
        return ServerError(f"the store answered {answer.status}", answer.status)


class _Translating:
    """A response's body whose failures are ours."""

    def __init__(self, response: urllib3.BaseHTTPResponse, key: str) -> None:
        self._response, self._key = response, key

    def read(self, size: int = -1) -> bytes:
        """As a file's `read`; urllib3 may return less than asked for, so this reads on until it is enough or the end."""
        parts: list[bytes] = []
        got = 0
        while size < 0 or got < size:
            try:
                part = self._response.read(PIECE_BYTES if size < 0 else size - got)
            except (HTTPError, OSError) as error:
                raise storage_problem(f"read {self._key}", error) from error
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)
