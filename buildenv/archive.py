"""Unpacks source archives that nobody vouches for. Our own checker: the whole list is judged before the first byte is written,
and everything is written relative to folders that were opened without following links.

Kept: regular files, folders, and symbolic links that cannot leave the tree. Refused: absolute and `..` names, hard links,
devices, encrypted or damaged archives, and what is larger, deeper or more than `Limits` allow.
"""

import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from millrace.errors import BuildProblem
from millrace.vocabulary import Reason

_PIECE_BYTES: Final = 1024 * 1024
_SMALL_BYTES: Final = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an archive may unpack to. `ratio` counts only beyond 64 MiB, as small texts do compress that well."""

    entries: int = 200_000
    total_bytes: int = 20 * 1024**3
    ratio: int = 200
    depth: int = 64
    name_bytes: int = 255
    path_bytes: int = 4096


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    kind: str  # file, folder or link
    mode: int
    size: int
    link: str = ""
    source: "zipfile.ZipInfo | tarfile.TarInfo"


def unpack(archive: Path, dest: Path, *, limits: Limits | None = None) -> int:
    """Unpack a zip or tar (plain or gzip), known by its content, into the folder `dest`; how many files and links it had.

    Raises BuildProblem(BAD_SOURCE) that says which entry is wrong and why.
    """
    limits = limits or Limits()
    with open(archive, "rb") as file:
        head = file.read(265)
    try:
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            with zipfile.ZipFile(archive) as opened:
                return _write(dest, _judged(_zip_entries(opened), archive, limits), _ZipSource(opened), limits)
        if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
            _check_unpacked_size(archive, head, limits)
            with tarfile.open(archive, "r:gz" if head.startswith(b"\x1f\x8b") else "r:") as tar:
                return _write(dest, _judged(_tar_entries(tar), archive, limits), _TarSource(tar), limits)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, UnicodeError, RuntimeError, NotImplementedError) as error:
        raise _bad(f"the source archive is damaged, or not one that can be read: {error}") from error
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError)) or error.errno:
            raise
        raise _bad(f"the source archive is damaged: {error}") from error
    kind = "empty" if not head else "a zstd archive" if head.startswith(b"\x28\xb5\x2f\xfd") else "neither zip nor tar"
    raise _bad(f"the source archive is {kind}", hint="Use a zip, a tar or a tar.gz.")


def _bad(message: str, hint: str = "") -> BuildProblem:
    return BuildProblem(message, reason=Reason.BAD_SOURCE, hint=hint)


def _check_unpacked_size(archive: Path, head: bytes, limits: Limits) -> None:
    """A gzip that unpacks to more than it may is found before the tar in it is looked at, at the cost of one pass."""
    if not head.startswith(b"\x1f\x8b"):
        return
    most = min(limits.total_bytes, max(_SMALL_BYTES, archive.stat().st_size * limits.ratio))
    total = 0
    unzip = zlib.decompressobj(31)
    with open(archive, "rb") as file:
        while data := file.read(_PIECE_BYTES):
            while data:
                total += len(unzip.decompress(data, _PIECE_BYTES))
                if total > most:
                    raise _bad(f"the source archive unpacks to more than {most} bytes")
                data = unzip.unconsumed_tail
                if unzip.eof:
                    data, unzip = unzip.unused_data.lstrip(b"\0"), zlib.decompressobj(31)
    if total == 0:
        raise _bad("the source archive is empty")


def _zip_entries(opened: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in opened.infolist():
        if info.flag_bits & 0x1:
            raise _bad(f"{info.filename!r} in the source archive is encrypted")
        unix = info.external_attr >> 16
        mode = stat.S_IMODE(unix) or (0o755 if info.is_dir() else 0o644)
        if stat.S_ISLNK(unix):
            if info.file_size > 4096:
                raise _bad(f"the link {info.filename!r} in the source archive is too long")
            link = opened.read(info).decode("utf-8", errors="surrogateescape")
            yield _Entry(name=info.filename, kind="link", mode=mode, size=0, link=link, source=info)
        elif stat.S_IFMT(unix) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _bad(f"{info.filename!r} in the source archive is a device, socket or pipe")
        else:
            yield _Entry(
                name=info.filename, kind="folder" if info.is_dir() else "file", mode=mode, size=info.file_size, source=info
            )


def _tar_entries(tar: tarfile.TarFile) -> Iterator[_Entry]:
    for info in tar:
        kind = "folder" if info.isdir() else "link" if info.issym() else "file" if info.isreg() else ""
        if info.issparse():
            raise _bad(f"{info.name!r} in the source archive is a sparse file", hint="Pack it without --sparse.")
        if info.islnk():
            raise _bad(f"{info.name!r} in the source archive is a hard link", hint="Pack it with --hard-dereference.")
        if not kind:
            raise _bad(f"{info.name!r} in the source archive is a device, socket or pipe")
        yield _Entry(
            name=info.name,
            kind=kind,
            mode=stat.S_IMODE(info.mode),
            size=info.size if kind == "file" else 0,
            link=info.linkname,
            source=info,
        )


def _judged(entries: Iterator[_Entry], archive: Path, limits: Limits) -> list[tuple[tuple[str, ...], _Entry]]:
    """The entries with their path's parts; all of them are fine, or none is returned."""
    most = min(limits.total_bytes, max(_SMALL_BYTES, archive.stat().st_size * limits.ratio))
    judged: list[tuple[tuple[str, ...], _Entry]] = []
    kinds: dict[tuple[str, ...], str] = {}
    total = 0
    for entry in entries:
        if len(judged) >= limits.entries:
            raise _bad(f"the source archive has more than {limits.entries} entries")
        parts = _parts(entry.name, limits)
        if not parts:
            continue
        total += entry.size
        if total > most:
            raise _bad(f"the source archive unpacks to more than {most} bytes")
        for depth in range(1, len(parts)):
            if kinds.setdefault(parts[:depth], "folder") != "folder":
                raise _bad(f"{entry.name!r} in the source archive lies below {'/'.join(parts[:depth])!r}, which is no folder")
        if kinds.get(parts, entry.kind) != entry.kind:
            raise _bad(f"{entry.name!r} stands twice in the source archive, as {kinds[parts]} and as {entry.kind}")
        kinds[parts] = entry.kind
        if entry.kind == "link":
            _check_link(entry, parts)
        judged.append((parts, entry))
    return judged


def _parts(name: str, limits: Limits) -> tuple[str, ...]:
    raw = name.encode(errors="surrogateescape")
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":") or "\0" in name:
        raise _bad(f"{name!r} in the source archive is no relative path")
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        raise _bad(f"{name!r} in the source archive has control characters")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _bad(f"{name!r} in the source archive leaves the source folder")
    if len(raw) > limits.path_bytes or len(parts) > limits.depth:
        raise _bad(f"{name[:80]!r}... in the source archive is too long or too deep")
    if any(len(part.encode(errors="surrogateescape")) > limits.name_bytes for part in parts):
        raise _bad(f"{name[:80]!r}... in the source archive has a name of more than {limits.name_bytes} bytes")
    return parts


def _check_link(entry: _Entry, parts: tuple[str, ...]) -> None:
    """A link may go up only at its beginning, and no further than the tree's top: then no chain of links can leave it."""
    target = entry.link
    steps = [step for step in target.split("/") if step not in ("", ".")]
    up = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
    if not target or target.startswith("/") or "\0" in target or ".." in steps[up:] or up > len(parts) - 1 or len(target) > 4096:
        raise _bad(f"the link {entry.name!r} in the source archive leaves the source folder ({target[:80]!r})")


class _ZipSource:
    def __init__(self, opened: zipfile.ZipFile) -> None:
        self._opened = opened

    def open(self, entry: _Entry) -> IO[bytes]:
        if not isinstance(entry.source, zipfile.ZipInfo):
            raise AssertionError("a zip's entry")
        return self._opened.open(entry.source)


class _TarSource:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def open(self, entry: _Entry) -> IO[bytes]:
        if not isinstance(entry.source, tarfile.TarInfo):
            raise AssertionError("a tar's entry")
        file = self._tar.extractfile(entry.source)
        if file is None:
            raise AssertionError("a regular file")
        return file


def _write(dest: Path, entries: list[tuple[tuple[str, ...], _Entry]], source: "_ZipSource | _TarSource", limits: Limits) -> int:
    count = 0
    total = 0
    dest.mkdir(parents=True, exist_ok=True)
    for parts, entry in entries:
        if entry.kind == "folder":
            with _folder(dest, parts):
                continue
        with _folder(dest, parts[:-1]) as folder:
            name = parts[-1]
            _make_room(folder, name)
            count += 1
            if entry.kind == "link":
                os.symlink(entry.link, name, dir_fd=folder)
                continue
            total += _write_file(folder, name, entry, source, limits.total_bytes - total)
    return count


def _write_file(folder: int, name: str, entry: _Entry, source: "_ZipSource | _TarSource", most: int) -> int:
    mode = 0o755 if entry.mode & 0o111 else 0o644
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=folder)
    written = 0
    with os.fdopen(handle, "wb") as target, source.open(entry) as body:
        os.fchmod(target.fileno(), mode)
        while piece := body.read(_PIECE_BYTES):
            written += len(piece)
            if written > entry.size or written > most:
                raise _bad(f"{entry.name!r} in the source archive is larger than it says")
            target.write(piece)
    if written != entry.size:
        raise _bad(f"{entry.name!r} in the source archive breaks off after {written} of {entry.size} bytes")
    return written


def _make_room(folder: int, name: str) -> None:
    """An entry that stands twice: the last one counts."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except IsADirectoryError as error:
        raise _bad(f"{name!r} stands twice in the source archive, as a file and as a folder") from error


@contextmanager
def _folder(dest: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """The folder below `dest`, made where it is missing, opened step by step so that no link is ever followed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(dest, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            with suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=handle)
            try:
                below = os.open(part, flags, dir_fd=handle)
            except OSError as error:
                raise _bad(f"{'/'.join(parts)!r} in the source archive leads through something that is no folder") from error
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)
