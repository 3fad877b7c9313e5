"""Objects as files: `<root>/<bucket>/<key>`, with size and hash in a note, `<root>/.meta/<bucket>/<SHA-256 of the key>.json`.

A file that somebody simply drops into a bucket's folder is an object too, only without a hash. An object changes hands by
renames under a lock, each synced to disk: after a crash it is there whole, at worst without its note.
"""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from millrace.contract import Grant, PartGrant
from millrace.errors import Forbidden, InvalidInput
from millrace.storage import PIECE_BYTES, HashingReader, Joined, StoredObject, can_begin_a_key, check_key, storage_problem


@dataclass(frozen=True, kw_only=True)
class SignedObject:
    """What a signed address lets its holder do."""

    method: str
    bucket: str
    key: str
    expires_at_s: int
    size_bytes: int | None = None
    sha256: str | None = None


class DirectoryStore:
    """A `Store` in a folder, for one machine. Grants are relative addresses below the API's `/objects/`."""

    def __init__(self, root: str | Path, signing_key: bytes) -> None:
        if len(signing_key) < 32:
            raise InvalidInput("MILLRACE_SIGNING_KEY is shorter than 32 bytes")
        self._root = Path(root)
        self._signing_key = signing_key

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
        path, meta = self._paths(bucket, key)
        temporary = self._root / ".tmp" / secrets.token_hex(16)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            reader = HashingReader(body)
            with open(temporary, "xb") as file:
                shutil.copyfileobj(reader, file, PIECE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            if size_bytes is not None and reader.size_bytes != size_bytes:
                raise InvalidInput(f"{key} was announced with {size_bytes} bytes, but {reader.size_bytes} came")
            if sha256 is not None and reader.sha256 != sha256:
                raise InvalidInput(f"{key} was announced with SHA-256 {sha256}, but it is {reader.sha256}")
            stored = StoredObject(
                bucket=bucket, key=key, size_bytes=reader.size_bytes, sha256=reader.sha256, metadata=dict(metadata or {})
            )
            note = temporary.with_suffix(".json")
            with open(note, "x") as text:
                json.dump({"key": key, "size": stored.size_bytes, "sha256": stored.sha256, "metadata": stored.metadata}, text)
                text.flush()
                os.fsync(text.fileno())
            with self._lock():
                for folder in (path.parent, meta.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                meta.unlink(missing_ok=True)  # between the two renames the object has no hash, never a wrong one
                os.replace(temporary, path)
                _sync(path.parent)
                os.replace(note, meta)
                _sync(meta.parent)
        except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise InvalidInput(f"{key} cannot be stored: part of it is an object, or it is a folder of objects") from error
        except OSError as error:
            raise storage_problem(f"keep {key}", error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
                temporary.with_suffix(".json").unlink(missing_ok=True)
        return stored

    @contextlib.contextmanager
    def open(self, bucket: str, key: str, *, offset: int = 0) -> Iterator[BinaryIO]:
        path, _ = self._paths(bucket, key)
        try:
            file = open(path, "rb")  # noqa: SIM115  # closed below, outside this try, so that the block's own errors pass
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(f"{bucket}/{key}") from error
        except OSError as error:
            raise storage_problem(f"read {key}", error) from error
        with file:
            file.seek(offset)
            yield file

    def stat(self, bucket: str, key: str) -> StoredObject | None:
        path, meta = self._paths(bucket, key)
        try:
            if not path.is_file():
                return None
            size = path.stat().st_size
            note = _note(meta)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_problem(f"look at {key}", error) from error
        known = note if note.get("size") == size else {}
        return StoredObject(
            bucket=bucket, key=key, size_bytes=size, sha256=known.get("sha256"), metadata=known.get("metadata", {})
        )

    def list(self, bucket: str, prefix: str) -> Iterator[StoredObject]:
        check_key(bucket, "x")
        top = self._root / bucket
        if not can_begin_a_key(prefix):
            return
        try:
            folder = top / os.path.dirname(prefix)
            keys = sorted(path.relative_to(top).as_posix() for path in folder.rglob("*") if path.is_file())
        except OSError as error:
            raise storage_problem(f"list {prefix}", error) from error
        for key in keys:
            if key.startswith(prefix):
                with contextlib.suppress(InvalidInput):  # a file that was dropped there, with a name that is no key
                    if (stored := self.stat(bucket, key)) is not None:
                        yield stored

    def copy(self, bucket: str, key: str, to_bucket: str, to_key: str, *, metadata: Mapping[str, str]) -> None:
        stored = self.stat(bucket, key)
        with self.open(bucket, key) as body:
            known = (stored.size_bytes, stored.sha256) if stored else (None, None)
            self.put(to_bucket, to_key, body, size_bytes=known[0], sha256=known[1], metadata=metadata)

    def delete(self, bucket: str, key: str) -> None:
        path, meta = self._paths(bucket, key)
        try:
            if path.is_dir() or not self._root.is_dir():
                return
            with self._lock():
                for file in (path, meta):
                    with contextlib.suppress(NotADirectoryError):
                        file.unlink(missing_ok=True)
                self._prune(path.parent, self._root / bucket)
        except OSError as error:
            raise storage_problem(f"delete {key}", error) from error

    def delete_prefix(self, bucket: str, prefix: str) -> int:
        keys = [stored.key for stored in self.list(bucket, prefix)]
        for key in keys:
            self.delete(bucket, key)
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
        grant = SignedObject(
            method=method,
            bucket=bucket,
            key=key,
            expires_at_s=int(time.time()) + expires_in_s,
            size_bytes=size_bytes,
            sha256=sha256,
        )
        return Grant(method=method, url=f"/objects/{_sign(self._signing_key, grant)}", key=key, expires_in_s=expires_in_s)

    def begin_parts(self, bucket: str, key: str, *, sha256: str) -> str:
        check_key(bucket, key)
        return secrets.token_hex(16)

    def presign_part(
        self, bucket: str, key: str, upload: str, number: int, *, expires_in_s: int, size_bytes: int, md5: str
    ) -> PartGrant:
        """Each is an object by itself beside the one that they become; what they are is looked at when that is put together."""
        part = _part(key, upload, number)
        return PartGrant(url=self.presign("PUT", bucket, part, expires_in_s=expires_in_s, size_bytes=size_bytes).url)

    def complete_parts(self, bucket: str, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, sha256: str) -> None:
        there = {stored.key for stored in self.list(bucket, _part(key, upload))}
        if not there and _is(self.stat(bucket, key), size_bytes, sha256):
            return
        if missing := [number for number in range(1, len(tags) + 1) if _part(key, upload, number) not in there]:
            raise InvalidInput(f"{key} lacks {len(missing)} of {len(tags)} parts, the first is number {missing[0]}")
        with contextlib.closing(self._parts(bucket, key, upload, len(tags))) as pieces:
            self.put(bucket, key, cast(BinaryIO, Joined(pieces)), size_bytes=size_bytes, sha256=sha256)
        self.abort_parts(bucket, key, upload)

    def _parts(self, bucket: str, key: str, upload: str, count: int) -> Generator[bytes, None, None]:
        for number in range(1, count + 1):
            with self.open(bucket, _part(key, upload, number)) as body:
                while piece := body.read(PIECE_BYTES):
                    yield piece

    def abort_parts(self, bucket: str, key: str, upload: str | None) -> None:
        """What nobody has a name for was never granted, and so has no parts here."""
        if upload is not None:
            self.delete_prefix(bucket, _part(key, upload))

    def check(self) -> None:
        try:
            probe = self._root / ".tmp" / f"check-{secrets.token_hex(8)}"
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"ok")
            probe.unlink()
        except OSError as error:
            raise storage_problem("write a file", error) from error

    def _paths(self, bucket: str, key: str) -> tuple[Path, Path]:
        check_key(bucket, key)
        name = hashlib.sha256(key.encode()).hexdigest()  # so that notes of `a` and of `a.json/b` cannot be in each other's way
        return self._root / bucket / key, self._root / ".meta" / bucket / f"{name}.json"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held, over all threads and processes, while names change: data and note of two writers never mix."""
        folder = self._root / ".tmp"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _prune(folder: Path, top: Path) -> None:
        """Remove folders that became empty, up to the bucket."""
        while folder != top and top in folder.parents:
            try:
                folder.rmdir()
            except OSError:  # not empty, or another was faster
                return
            folder = folder.parent


def _part(key: str, upload: str, number: int | None = None) -> str:
    """The key of a part, or what those of all begin with."""
    folder, slash, _name = key.rpartition("/")
    return f"{folder}{slash}.{upload}.parts/{'' if number is None else f'{number:05}'}"


def _is(stored: StoredObject | None, size_bytes: int, sha256: str) -> bool:
    return stored is not None and (stored.size_bytes, stored.sha256) == (size_bytes, sha256)


def _sync(folder: Path) -> None:
    """Make the names in `folder` last through a crash."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _note(meta: Path) -> dict[str, Any]:
    """What was noted of an object; nothing where there is no note, or none that can be read."""
    try:
        note = json.loads(meta.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _sign(signing_key: bytes, grant: SignedObject) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(asdict(grant), ensure_ascii=False).encode()).rstrip(b"=")
    seal = base64.urlsafe_b64encode(hmac.digest(signing_key, payload, hashlib.sha256)).rstrip(b"=")
    return f"{payload.decode()}.{seal.decode()}"


def read_token(signing_key: bytes, token: str, method: str) -> SignedObject:
    """What a signed address grants. Raises Forbidden where it is forged, too old, or for another method."""
    payload, _, seal = token.partition(".")
    try:
        given = base64.urlsafe_b64decode(seal.encode() + b"==")
        wanted = hmac.digest(signing_key, payload.encode(), hashlib.sha256)
        if not hmac.compare_digest(given, wanted):
            raise Forbidden("this address was not signed by this farm", hint="Ask for a new grant.")
        grant = SignedObject(**json.loads(base64.urlsafe_b64decode(payload.encode() + b"==")))
    except (binascii.Error, ValueError, TypeError) as error:
        raise Forbidden("this address was not signed by this farm", hint="Ask for a new grant.") from error
    if grant.expires_at_s < time.time():
        raise Forbidden("this address has expired", hint="Ask for a new grant.")
    if grant.method != method:
        raise Forbidden(f"this address is for {grant.method}, not for {method}")
    return grant
