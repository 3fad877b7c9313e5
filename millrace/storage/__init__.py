"""Where artifacts, uploads and old logs lie: one small interface, a directory or any S3 behind it.

Keys live in buckets. Both stores keep size and SHA-256 beside each object, and pass `tests/contract/test_store.py`.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Final, Literal, Protocol
from urllib.parse import unquote, urlsplit

from millrace.contract import Grant, PartGrant
from millrace.errors import InfraProblem, InvalidInput
from millrace.failpoints import guard
from millrace.project import BUCKET_NAME
from millrace.settings import Settings
from millrace.vocabulary import Reason

PIECE_BYTES: Final = 1024 * 1024
"""How much is held in memory of a body that streams through."""
_AWS: Final = re.compile(r"\.amazonaws\.com(\.cn)?$")
"""Hosts of AWS's own S3, for which its roles have keys."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An object that is there. `sha256` is None where somebody else put it there without saying."""

    bucket: str
    key: str
    size_bytes: int
    sha256: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)


class Store(Protocol):
    """An object store. Every failure of the store itself is InfraProblem(STORAGE); safe from several threads."""

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
        """Store `body`, whole or not at all, and replace what was there.

        `size_bytes` and `sha256`, where given, are what the body must turn out to be; else InvalidInput, and nothing is left.
        """

    def open(self, bucket: str, key: str, *, offset: int = 0) -> AbstractContextManager[BinaryIO]:
        """The object's bytes from `offset`, none where that is at or beyond the end. Raises FileNotFoundError."""

    def stat(self, bucket: str, key: str) -> StoredObject | None:
        """What is known of the object; None where there is none."""

    def list(self, bucket: str, prefix: str) -> Iterator[StoredObject]:
        """Objects whose keys begin with `prefix`, by key; none for a prefix that no key can have. Hashes may be left out."""

    def copy(self, bucket: str, key: str, to_bucket: str, to_key: str, *, metadata: Mapping[str, str]) -> None:
        """Make `to_key` the same object with other metadata, and replace what was there. Raises FileNotFoundError."""

    def delete(self, bucket: str, key: str) -> None:
        """Remove the object; one that is gone is fine."""

    def delete_prefix(self, bucket: str, prefix: str) -> int:
        """Remove all objects whose keys begin with `prefix`; how many there were."""

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
        """An address with which a holder may do just this, for a while.

        A PUT sends exactly the grant's headers; other bytes than those announced are refused by the store.
        """

    def begin_parts(self, bucket: str, key: str, *, sha256: str) -> str:
        """Begin an object that comes in parts; a name for it. Nothing is seen of it before `complete_parts`."""

    def presign_part(
        self, bucket: str, key: str, upload: str, number: int, *, expires_in_s: int, size_bytes: int, md5: str
    ) -> PartGrant:
        """An address to put part `number`, from 1 on. As often as need be: the last one counts."""

    def complete_parts(self, bucket: str, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, sha256: str) -> None:
        """Make one object of all parts, in order; `tags` are what their puts answered. May be repeated.

        Raises InvalidInput where parts are missing or are not what was announced.
        """

    def abort_parts(self, bucket: str, key: str, upload: str | None) -> None:
        """Remove what is there of its parts; without `upload`, of all that was begun under this key and not completed.

        What is complete, or gone, is fine.
        """

    def check(self) -> None:
        """Raises InfraProblem(STORAGE) unless the store can be written to."""


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Raises InvalidInput where they do not make one."""
    return guard(_open_store(settings), "store", partial(InfraProblem, reason=Reason.STORAGE))


def _open_store(settings: Settings) -> Store:
    from minio.credentials.providers import StaticProvider

    from millrace.storage.directory import DirectoryStore
    from millrace.storage.keys import RoleKeys
    from millrace.storage.s3 import S3Store

    address = urlsplit(settings.store)
    if address.scheme == "file" and not address.netloc and address.path.startswith("/"):
        key = settings.signing_key
        if key is None:
            raise InvalidInput(
                "a directory store needs MILLRACE_SIGNING_KEY", hint="'millrace up' makes one; or set 32 random bytes in hex."
            )
        return DirectoryStore(unquote(address.path), key.get_secret_value().encode())
    if address.scheme in ("http", "https") and address.hostname and address.path in ("", "/") and "@" not in address.netloc:
        name, secret = settings.store_access_key, settings.store_secret_key
        by_role = name is None and secret is None and address.scheme == "https" and _AWS.search(address.hostname) is not None
        if not by_role and (name is None or secret is None):
            raise InvalidInput("an S3 store needs MILLRACE_STORE_ACCESS_KEY and MILLRACE_STORE_SECRET_KEY")
        return S3Store(
            address.netloc,
            keys=RoleKeys() if name is None or secret is None else StaticProvider(name, secret.get_secret_value()),
            region=settings.store_region,
            secure=address.scheme == "https",
            bucket=settings.bucket,
        )
    shown = re.sub(r"//.*@", "//***@", settings.store)
    raise InvalidInput(
        f"MILLRACE_STORE_URL {shown!r} is no store",
        hint="Use file:///folder or http(s)://host:port; keys go into MILLRACE_STORE_ACCESS_KEY and MILLRACE_STORE_SECRET_KEY.",
    )


def check_key(bucket: str, key: str) -> None:
    """Raises InvalidInput for a bucket or key that could mean another place than it says.

    Buckets are named by the rules of S3 (Amazon S3 user guide, bucket naming rules), in both stores.
    """
    if not BUCKET_NAME.fullmatch(bucket):
        raise InvalidInput(f"{bucket[:80]!r} is no bucket name", hint="3 to 63 of a-z, 0-9, '-' and '.', as S3 has it.")
    for part in key.split("/"):
        if part in ("", ".", "..") or len(part.encode(errors="surrogatepass")) > 255:
            raise InvalidInput(f"{bucket}/{key[:200]!r} is no object key: each part has 1 to 255 bytes and is not . or ..")
        if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) <= 0xDFFF for char in part):
            raise InvalidInput(f"{bucket}/{key[:200]!r} is no object key: it has control characters")
    if len(key.encode()) > 1024:
        raise InvalidInput(f"{bucket}/{key[:200]!r} is no object key: it has more than 1024 bytes")


def can_begin_a_key(prefix: str) -> bool:
    """False where no key that `check_key` passes begins with `prefix`, or where it ends in `.` or `..` as a part."""
    return not (prefix.startswith("/") or "//" in prefix or "\0" in prefix or {".", ".."} & set(prefix.split("/")))


def storage_problem(what: str, cause: BaseException) -> InfraProblem:
    """The store's own failure, said once for both stores."""
    return InfraProblem(
        f"the object store failed to {what}: {cause or type(cause).__name__}",
        reason=Reason.STORAGE,
        status_code="CLIENT_ERROR",
        hint="Is the store up, and is there room?",
    )


class HashingReader:
    """A body that is measured and hashed while it is read."""

    def __init__(self, body: BinaryIO) -> None:
        self._body = body
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As a file's `read`."""
        data = self._body.read(size)
        self._sha256.update(data)
        self.size_bytes += len(data)
        return data

    @property
    def sha256(self) -> str:
        """Of all that was read so far."""
        return self._sha256.hexdigest()


class Joined:
    """Pieces as the one body that they make. A `read` may give less than was asked for; nothing means the end."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def read(self, _size: int = -1) -> bytes:
        """The next piece."""
        return next(self._pieces, b"")


def pieces(body: BinaryIO, *, sha256: str | None, size_bytes: int, what: str) -> Iterator[bytes]:
    """`body` in pieces, checked: raises InfraProblem(STORAGE) where it was not what the record says.

    The last piece is only given out once all of it is known to be right, so that nobody is handed a whole, but wrong object.
    """
    reader = HashingReader(body)
    held = b""
    while (piece := reader.read(PIECE_BYTES)) and reader.size_bytes <= size_bytes:
        if held:
            yield held
        held = piece
    if reader.size_bytes != size_bytes or (sha256 is not None and reader.sha256 != sha256):
        raise InfraProblem(
            f"{what} is damaged in the store: {reader.size_bytes} bytes with SHA-256 {reader.sha256}, "
            f"recorded were {size_bytes} bytes with {sha256}",
            reason=Reason.STORAGE,
            hint="Build again, or restore the store from a backup.",
        )
    if held:
        yield held
