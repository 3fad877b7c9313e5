"""A build's caches, carried out in the simplest way that is right: one archive for a key, made of the container's own files.

CodeBuild's rules (build-spec-ref, cache; caching-s3): a cache with a key is never rewritten; the list of paths is part of its
identity; `fallback-keys` are prefixes; what comes out of a cache stays within the declared paths; a cache never fails a build.
Files that came with the source stay as they are. Everything goes through the engine, so that owners, modes, links and paths
outside the source come back, and nothing of a build is unpacked on the host.
"""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

import zstandard

from buildenv import globs
from buildenv.artifacts import PART_BYTES, Hashed, part_size
from buildenv.tarstream import CopyOut, Entry, entries, renamed, root_of
from millrace.errors import BuildProblem
from millrace.vocabulary import Reason

MAX_UNPACKED_BYTES: Final = 20 * 1024**3
_LONGEST: Final = 200
_PIECE_BYTES: Final = 1024 * 1024
_OURS: Final = ("/codebuild/readonly", "/codebuild/output/tmp", "/proc", "/sys", "/dev")
"""No cache holds any of these, whatever its patterns say."""
_BROKEN: Final = (tarfile.TarError, zstandard.ZstdError, OSError, ValueError, EOFError)
Say = Callable[[str], None]


class Unusable(Exception):
    """A cache that cannot be made or read; the build goes on without it."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A cache ready to be uploaded. `parts` are the MD5s of its parts of `part_bytes`."""

    path: Path
    size_bytes: int
    sha256: str
    file_count: int
    part_bytes: int
    parts: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, hashed: Hashed, file_count: int) -> "Packed":
        """What was written to `path`."""
        return cls(
            path=path,
            size_bytes=hashed.size_bytes,
            sha256=hashed.sha256.hexdigest(),
            file_count=file_count,
            part_bytes=hashed.part_bytes,
            parts=hashed.parts(),
        )


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What a cache is made of: the patterns as declared, and where relative ones begin inside."""

    patterns: tuple[str, ...]
    source_inside: str

    def version(self) -> str:
        """The paths' part of a cache's identity: other paths, another cache."""
        return hashlib.sha256("\n".join(sorted(set(self.patterns))).encode()).hexdigest()

    def absolute(self) -> list[str]:
        """The patterns, from `/` on."""
        return [p if p.startswith("/") else f"{self.source_inside}/{p.removeprefix('./')}" for p in self.patterns]

    def folders(self) -> list[str]:
        """The folders, from `/` on, that the patterns name whole; none where a pattern names anything else."""
        found: list[str] = []
        for pattern in self.absolute():
            root = root_of(pattern)
            barred = (*_OURS, self.source_inside)
            is_barred = root == "/" or any(f"{ours}/".startswith(f"{root}/") for ours in barred)
            if is_barred or not self.allows(f"{root}/x") or "//" in pattern or {".", ".."} & set(root.split("/")):
                return []
            if set(root) & set(":,\\") or len(root) > _LONGEST:  # the kernel's list of layers cannot hold it
                return []
            if pattern not in (f"{root}/", f"{root}/**", f"{root}/**/*"):  # without a slash it may be a file
                return []
            found.append(root)
        return [root for root in dict.fromkeys(found) if not any(root.startswith(f"{other}/") for other in found)]

    def allows(self, path: str) -> bool:
        """True where a pattern names `path`: by wildcards, or as what lies at or below a plain path."""
        if any(path == ours or path.startswith(f"{ours}/") for ours in _OURS):
            return False
        inner = path.strip("/")
        for pattern in self.absolute():
            plain = pattern.rstrip("/")
            if root_of(pattern) == plain and (path == plain or path.startswith(f"{plain}/")):
                return True
            if globs.matches(pattern.strip("/"), inner):
                return True
        return False

    def stored(self, path: str) -> str:
        """What a path is called in the archive: the source lies elsewhere in the next build."""
        within = path.startswith(f"{self.source_inside}/")
        return f"source/{path[len(self.source_inside) + 1 :]}" if within else f"root/{path.strip('/')}"

    def unstored(self, name: str) -> str:
        """The path that a name in the archive stands for, from `/` on. Raises Unusable for a name that is none of ours."""
        kind, _, rest = name.partition("/")
        if kind not in ("source", "root") or not rest or ".." in rest.split("/"):
            raise Unusable(f"it holds an entry named {name[:100]!r}")
        return f"{self.source_inside}/{rest}" if kind == "source" else f"/{rest}"


def pack(
    paths: Paths, copy_out: CopyOut, target: Path, *, max_bytes: int, say: Say, least_part_bytes: int = PART_BYTES
) -> Packed | None:
    """All files that `paths` name, as a zstd tar at `target`; None where there are none. Raises Unusable."""
    count = 0
    try:
        with open(target, "xb") as file:
            hashed = Hashed(file, part_size(max_bytes, least_part_bytes))
            with (
                zstandard.ZstdCompressor(level=3).stream_writer(cast(IO[bytes], hashed), closefd=False) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                for entry in _found(paths, copy_out, say):
                    tar.addfile(renamed(entry.info, paths.stored(entry.path), _link(entry, paths)), entry.body)
                    count += not entry.info.isdir()
                    if hashed.size_bytes > max_bytes:
                        raise Unusable(f"it has more than {max_bytes} bytes")
    except _BROKEN as error:
        raise Unusable(str(error)) from error
    if not count:
        return None
    if hashed.size_bytes > max_bytes:
        raise Unusable(f"it has more than {max_bytes} bytes")
    return Packed.of(target, hashed, count)


def _found(paths: Paths, copy_out: CopyOut, say: Say) -> Iterator[Entry]:
    seen: set[str] = set()
    roots = {pattern: root_of(pattern) for pattern in paths.absolute()}
    for pattern, shown in zip(paths.absolute(), paths.patterns, strict=True):
        root = roots[pattern]
        above = {other for other in roots.values() if other != root and root.startswith(f"{other.rstrip('/')}/")}
        if root == "/" or any(root == ours or root.startswith(f"{ours}/") for ours in _OURS):
            say(f"Skipping invalid cache path {shown}")
            continue
        say(f"Expanded cache path {shown}")
        if root in seen or above - {"/"}:  # it comes with the other
            continue
        seen.add(root)
        try:
            for entry in entries(copy_out, root):
                kind = entry.info
                if (kind.isreg() or kind.isdir() or kind.issym() or kind.islnk()) and paths.allows(entry.path):
                    yield entry
        except FileNotFoundError:
            say(f"Skipping cache path {shown}: there is nothing")


def _link(entry: Entry, paths: Paths) -> str:
    link = entry.info.linkname
    if not entry.info.islnk():
        return link
    parent = entry.path[: len(entry.path) - len(entry.info.name.strip("/"))]  # a hard link names another entry of the same stream
    return paths.stored(f"{parent}{link.strip('/')}")


def unpack(paths: Paths, archive: Path, sha256: str, target: Path, *, has: Callable[[str], bool], say: Say) -> int:
    """The plain tar at `target`, for `Engine.copy_in` at `/`, of what a downloaded cache holds; how many files.

    `has` tells which relative paths came with the source: those are left out, as is what lies outside `paths`. Raises Unusable.
    """
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise Unusable("it came with other bytes than were stored")
    count, size = 0, 0
    try:
        with (
            open(archive, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file) as plain,
            tarfile.open(fileobj=plain, mode="r|") as kept,
            tarfile.open(target, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for info in kept:
                path = _wanted(paths, info, say)
                size += info.size
                if size > MAX_UNPACKED_BYTES:
                    raise Unusable(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
                if path is None or (info.name.startswith("source/") and has(info.name.removeprefix("source/"))):
                    continue
                link = paths.unstored(info.linkname).strip("/") if info.islnk() else info.linkname
                tar.addfile(renamed(info, path.strip("/"), link), kept.extractfile(info) if info.isreg() else None)
                count += not info.isdir()
    except _BROKEN as error:
        raise Unusable(f"it cannot be read: {error}") from error
    return count


def _wanted(paths: Paths, info: tarfile.TarInfo, say: Say) -> str | None:
    path = paths.unstored(info.name)
    known = info.isreg() or info.isdir() or info.issym() or info.islnk()
    if info.isdir() and path in (root_of(pattern) for pattern in paths.absolute()):
        return path  # the folder itself, which a pattern of what lies in it does not name
    if known and paths.allows(path) and (not info.islnk() or paths.allows(paths.unstored(info.linkname))):
        return path
    say(f'Skipping cache entry: path "{path}" is not within allowed cache paths')
    return None


def pieces(path: Path) -> Iterator[bytes]:
    """A file, piece by piece."""
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def check_key(key: str) -> str:
    """A cache key as the shell made it out. Raises BuildProblem for what no cache can be called."""
    if not key or len(key.encode()) > 512 or any(ord(c) < 32 or ord(c) == 127 for c in key) or ".." in key.split("/"):
        raise BuildProblem(
            f"no cache can have the key {key[:80]!r}: it is empty, has more than 512 bytes, control characters or '..'",
            reason=Reason.BAD_BUILDSPEC,
        )
    return key
