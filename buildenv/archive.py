"""Unpacks source archives that nobody vouches for. Our own checker: the whole list is judged before the first byte is written,
and everything is written relative to folders that were opened without following links.

Kept: regular files with their time and whether they may be run, folders, and symbolic links that cannot leave the tree.
Refused: absolute and `..` names, hard links, devices, encrypted or damaged archives, and what is larger, deeper or more than
`Limits` allow.
"""

import calendar
import errno
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, Self

from millrace.errors import BuildProblem, InfraProblem
from millrace.vocabulary import Reason

_PIECE_BYTES: Final = 1024 * 1024
_SMALL_BYTES: Final = 64 * 1024**2
_HEADER_BYTES: Final = 1024**2
"""What a tar may say of one entry beside its body: names, links, attributes."""
_LINK_BYTES: Final = 4095
_END_RECORD: Final = 22
_END_RECORD_64: Final = 56 + 20
_LAST_SECOND: Final = 2**33
_DAMAGED: Final = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,  # a number that is none
    OverflowError,
    RuntimeError,  # encrypted
    NotImplementedError,
)


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
    changed_at_s: float
    link: str = ""
    source: "zipfile.ZipInfo | tarfile.TarInfo"


def unpack(archive: Path, dest: Path, *, limits: Limits | None = None) -> int:
    """Unpack a zip or tar (plain or gzip), known by its content, into the folder `dest`; how many files and links it had.

    Raises BuildProblem(BAD_SOURCE) that says which entry is wrong and why, and InfraProblem(STORAGE) where the disk fails.
    """
    limits = limits or Limits()
    with open(archive, "rb") as file:
        head = file.read(265)
    try:
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            _check_directory_size(archive, limits)
            with zipfile.ZipFile(archive) as opened:
                return _write(dest, _judged(_zip_entries(opened), archive, limits), _ZipSource(opened), limits)
        if head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
            _check_unpacked_size(archive, head, limits)
            mode: Literal["r:gz", "r:"] = "r:gz" if head.startswith(b"\x1f\x8b") else "r:"
            with tarfile.open(archive, mode, tarinfo=_Header) as tar:
                return _write(dest, _judged(_tar_entries(tar), archive, limits), _TarSource(tar), limits)
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # gzip and bz2 say so of bad data, seek of a place before the file
            raise _bad(f"the source archive is damaged: {error}") from error
        raise InfraProblem(
            f"the worker could not unpack the source archive: {error}",
            reason=Reason.STORAGE,
            status_code="CLIENT_ERROR",
            hint="Is there room on the worker's disk?",
        ) from error
    except _DAMAGED as error:
        raise _bad(f"the source archive is damaged, or not one that can be read: {error or type(error).__name__}") from error
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
    open_end = False
    unzip = zlib.decompressobj(31)
    with open(archive, "rb") as file:
        while data := file.read(_PIECE_BYTES):
            more = True
            while more:
                if not open_end:
                    data = data.lstrip(b"\0")  # padding between or after the members
                    if not data:
                        break
                piece = unzip.decompress(data, _PIECE_BYTES)
                total += len(piece)
                if total > most:
                    raise _bad(f"the source archive unpacks to more than {most} bytes")
                open_end = not unzip.eof
                data = unzip.unconsumed_tail
                more = bool(data) or len(piece) == _PIECE_BYTES  # there may be output without input left
                if unzip.eof:
                    data, unzip, more = unzip.unused_data, zlib.decompressobj(31), True
    if open_end:
        raise _bad("the source archive breaks off", hint="Pack it again, and compare its SHA-256.")
    if total == 0:
        raise _bad("the source archive is empty")


class _Header(tarfile.TarInfo):
    """A tar's header that may not ask for more memory than an honest one: tarfile reads these kinds of body whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        """As `TarInfo.frombuf`."""
        header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]  # typeshed wants a str, tarfile may pass None
        if header.type in b"xgXKL" and header.size > _HEADER_BYTES:
            raise _bad(f"a header in the source archive has {header.size} bytes")
        return header


def _check_directory_size(archive: Path, limits: Limits) -> None:
    """A zip's list of entries is read whole by zipfile: one that is too long is found before, by a walk over it.

    PKWARE APPNOTE 4.3.12 to 4.3.16; it looks where zipfile looks. What is damaged here is left to zipfile to say.
    """
    size = archive.stat().st_size
    with open(archive, "rb") as file:
        file.seek(max(0, size - _END_RECORD - 0xFFFF))
        tail = file.read()
        plain = tail[-_END_RECORD:].startswith(b"PK\x05\x06") and tail.endswith(b"\0\0")
        end = len(tail) - _END_RECORD if plain else tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) - end < _END_RECORD:
            return
        length: int = struct.unpack_from("<L", tail, end + 12)[0]
        after = size - len(tail) + end
        if after >= _END_RECORD_64:
            file.seek(after - _END_RECORD_64)
            record = file.read(_END_RECORD_64)
            if record.startswith(b"PK\x06\x06") and record[56:60] == b"PK\x06\x07":
                length = struct.unpack_from("<Q", record, 40)[0]
                after -= _END_RECORD_64
        if length > after:
            return
        file.seek(after - length)
        seen = 0
        while (head := file.read(46)).startswith(b"PK\x01\x02") and len(head) == 46:
            seen += 1
            if seen > limits.entries:
                raise _bad(f"the source archive has more than {limits.entries} entries")
            file.seek(sum(struct.unpack_from("<HHH", head, 28)), os.SEEK_CUR)


def _moment(date_time: tuple[int, int, int, int, int, int]) -> float:
    """A zip's time, which has no zone, taken as UTC; many tools write a day that there is none of."""
    try:
        return calendar.timegm(date_time)
    except ValueError:
        return 0


def _zip_entries(opened: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in opened.infolist():
        if info.flag_bits & 0x1:
            raise _bad(f"{info.filename!r} in the source archive is encrypted")
        unix = info.external_attr >> 16
        mode = stat.S_IMODE(unix)
        when = _moment(info.date_time)
        if stat.S_ISLNK(unix):
            if info.file_size > 4096:
                raise _bad(f"the link {info.filename!r} in the source archive is too long")
            link = opened.read(info).decode("utf-8", errors="surrogateescape")
            yield _Entry(name=info.filename, kind="link", mode=mode, size=0, changed_at_s=when, link=link, source=info)
        elif stat.S_IFMT(unix) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _bad(f"{info.filename!r} in the source archive is a device, socket or pipe")
        else:
            kind = "folder" if info.is_dir() else "file"
            yield _Entry(name=info.filename, kind=kind, mode=mode, size=info.file_size, changed_at_s=when, source=info)


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
            changed_at_s=info.mtime,
            link=info.linkname,
            source=info,
        )
    if tar.fileobj is not None:  # tarfile takes a damaged header that is not the first for the end
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise _bad("the source archive is damaged, or breaks off", hint="Pack it again, and compare its SHA-256.")


def _judged(entries: Iterator[_Entry], archive: Path, limits: Limits) -> list[tuple[tuple[str, ...], _Entry]]:
    """The entries with their path's parts; all of them are fine, or none is returned."""
    most = min(limits.total_bytes, max(_SMALL_BYTES, archive.stat().st_size * limits.ratio))
    judged: list[tuple[tuple[str, ...], _Entry]] = []
    kinds: dict[tuple[str, ...], str] = {}
    total = 0
    for number, entry in enumerate(entries):
        if number >= limits.entries:
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
        if entry.kind == "link" and not stays_inside(entry.link, len(parts) - 1):
            raise _bad(f"the link {entry.name!r} in the source archive leaves the source folder ({entry.link[:80]!r})")
        judged.append((parts, entry))
    return judged


def _parts(name: str, limits: Limits) -> tuple[str, ...]:
    raw = name.encode(errors="surrogateescape")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    shown = repr(name if len(name) <= 80 else f"{name[:77]}...")
    if is_odd_name(name):
        raise _bad(f"{shown} in the source archive is no plain relative path: absolute, with '\\' or with control characters")
    if ".." in parts:
        raise _bad(f"{shown} in the source archive leaves the source folder")
    if len(raw) > limits.path_bytes or len(parts) > limits.depth:
        raise _bad(f"{shown} in the source archive is too long or too deep")
    if any(len(part.encode(errors="surrogateescape")) > limits.name_bytes for part in parts):
        raise _bad(f"{shown} in the source archive has a name of more than {limits.name_bytes} bytes")
    return parts


def is_odd_name(name: str) -> bool:
    """True for a name that means another place on some system, or that a terminal would obey."""
    control = any(ord(char) < 32 or ord(char) == 127 for char in name)
    return control or name.startswith("/") or "\\" in name or re.match("[A-Za-z]:/", name) is not None


def stays_inside(link: str, depth: int) -> bool:
    """True where a symbolic link `depth` folders below the top cannot lead out of it.

    It may go up only at its beginning, and no further than the top: then no chain of such links can lead out, either.
    """
    steps = [step for step in link.split("/") if step not in ("", ".")]
    up = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
    fits = 0 < len(link.encode(errors="surrogateescape")) <= _LINK_BYTES
    return fits and not link.startswith("/") and "\0" not in link and ".." not in steps[up:] and up <= depth


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
        target.flush()
        when = min(max(entry.changed_at_s, 0), _LAST_SECOND)
        os.utime(target.fileno(), (when, when))
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
