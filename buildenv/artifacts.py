"""Finds a build's artifacts in its source tree and packs them. The tree is the build's own work, so it is not trusted:
no link is followed out of it, nothing but plain files is read, and what changes meanwhile is an error, never a torn archive.
"""

import hashlib
import itertools
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from buildenv import globs
from buildenv.buildspec import ArtifactsSpec
from buildenv.tarstream import CopyOut, entries, root_of
from millrace.errors import BuildProblem, InfraProblem
from millrace.vocabulary import Reason

MAX_FILES: Final = 200_000
MAX_NAME_BYTES: Final = 900
"""An object's key has 1024 bytes, and begins with where the attempt's objects lie."""
_PIECE_BYTES: Final = 1024 * 1024
PART_BYTES: Final = 64 * 1024 * 1024
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One file to keep: `path` on the host, `name` in the artifact. `link` is a symbolic link's target, kept as a link."""

    path: Path
    name: str
    size_bytes: int
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A file ready to be uploaded, hashed while it was made. `parts` are the MD5s of its parts of `part_bytes`."""

    path: Path
    size_bytes: int
    sha256: str
    md5: str
    file_count: int
    part_bytes: int
    parts: tuple[str, ...]


def nothing_found(message: str = "no matching artifact paths found") -> BuildProblem:
    """CodeBuild's words for artifacts that are not there."""
    return BuildProblem(
        message, reason=Reason.ARTIFACTS_NOT_FOUND, hint="Paths are relative to the source folder, whatever the commands did."
    )


class Outside:
    """Files of the container outside the source, for absolute patterns: brought into `folder` of the host as they are found.

    The container must not change meanwhile. Links are not brought along: they lead into the container.
    """

    def __init__(self, copy_out: CopyOut, folder: Path) -> None:
        self._copy_out, self._folder = copy_out, folder
        self._numbers = itertools.count()

    def find(self, glob: str, say: Say) -> Iterator[tuple[Path, str]]:
        """The plain files that an absolute pattern names: where each lies on the host now, and its path in the container."""
        root = root_of(glob)
        if root == "/" or root.split("/")[1] in ("proc", "sys", "dev"):
            say(f"Skipping invalid file path {glob}")
            return
        self._folder.mkdir(exist_ok=True)
        try:
            for entry in entries(self._copy_out, root):
                if not globs.matches(glob.strip("/"), entry.path.strip("/")):
                    continue
                if entry.body is None:
                    if not entry.info.isdir():
                        say(f"Skipping {entry.path}: it is no regular file")
                    continue
                kept = self._folder / str(next(self._numbers))
                with open(kept, "xb") as file:
                    shutil.copyfileobj(entry.body, file)
                kept.chmod(entry.info.mode & 0o777 | stat.S_IRUSR)
                yield kept, entry.path
        except FileNotFoundError:
            return
        except tarfile.TarError as error:
            raise InfraProblem(f"the engine did not give {root} out whole: {error}", reason=Reason.ENGINE_LOST) from error


def collect(spec: ArtifactsSpec, root: Path, outside: Outside, say: Say) -> list[Found]:
    """The files that `spec` names below `root`, and by absolute patterns in the container. Raises BuildProblem where there are
    none, or too many."""
    say(f"Expanding base directory path: {spec.base_directory or '.'}")
    if spec.base_directory is not None and spec.base_directory.startswith("/"):
        found = _from_outside(spec, spec.base_directory.rstrip("/"), outside, say)
    else:
        found = _from_source(spec, root, outside, say)
    if not found:
        raise nothing_found()
    return sorted(found.values(), key=lambda item: item.name)


def _from_source(spec: ArtifactsSpec, root: Path, outside: Outside, say: Say) -> dict[str, Found]:
    bases = _bases(spec.base_directory, root)
    if not bases:
        raise nothing_found(f"no matching base directory path found for {spec.base_directory}")
    say("Assembling file list")
    found: dict[str, Found] = {}
    for base in bases:
        kept = list(_walk(base, say))
        say(f"Expanding file paths for base directory {base.relative_to(root).as_posix()}")
        for glob in spec.files:
            say(f"Expanding {glob}")
            if glob.startswith("/"):
                brought = ((path, inside.strip("/")) for path, inside in outside.find(glob, say))
                _tell(glob, _take(spec, brought, None, found, say), say)
            else:
                matching = ((path, name) for path, name in kept if globs.matches(glob.removeprefix("./"), name))
                _tell(glob, _take(spec, matching, base, found, say), say)
    return found


def _from_outside(spec: ArtifactsSpec, base: str, outside: Outside, say: Say) -> dict[str, Found]:
    """An absolute base directory: every pattern is relative to it, but for absolute ones."""
    say("Assembling file list")
    depth = len(base.strip("/").split("/"))
    found: dict[str, Found] = {}
    for glob in spec.files:
        say(f"Expanding {glob}")
        wanted = glob if glob.startswith("/") else f"{base}/{glob.removeprefix('./')}"
        cut = 0 if glob.startswith("/") else depth
        brought = ((path, "/".join(inside.strip("/").split("/")[cut:])) for path, inside in outside.find(wanted, say))
        _tell(glob, _take(spec, brought, None, found, say), say)
    return found


def _tell(glob: str, hits: int, say: Say) -> None:
    say(f"Found {hits} file(s)" if hits else f"Skipping invalid file path {glob}")


def _take(spec: ArtifactsSpec, matching: Iterable[tuple[Path, str]], base: Path | None, found: dict[str, Found], say: Say) -> int:
    """Put what is not excluded into `found`, by its name in the artifact; how many that were."""
    hits = 0
    for path, name in matching:
        if any(globs.matches(excluded, name) for excluded in spec.exclude_paths):
            continue
        hits += 1
        item = _file(base or path.parent, path, name, spec, say)
        if item is not None:
            found[item.name] = item
    return hits


def _bases(glob: str | None, root: Path) -> list[Path]:
    if glob is None or glob in (".", "./", ""):
        return [root]
    wanted = glob.removeprefix("./").rstrip("/")
    if wanted in ("", "."):
        return [root]
    found = []
    for folder, folders, _files in os.walk(root):
        folders.sort()
        for name in folders:
            path = Path(folder, name)
            if not path.is_symlink() and globs.matches(wanted, path.relative_to(root).as_posix()):
                found.append(path)
    return found


def _walk(base: Path, say: Say) -> Iterator[tuple[Path, str]]:
    """Everything below `base` that is no folder, with its path relative to it. Links are not followed."""
    count = 0
    for folder, folders, files in os.walk(base):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*files, *linked]):
            path = Path(folder, name)
            relative = path.relative_to(base).as_posix()
            try:
                relative.encode()
            except UnicodeEncodeError:
                shown = relative.encode(errors="backslashreplace").decode()
                say(f"Skipping a file whose name is not UTF-8: {shown}")
                continue
            count += 1
            if count > MAX_FILES:
                raise BuildProblem(f"there are more than {MAX_FILES} files below {base.name}", reason=Reason.ARTIFACT_TOO_LARGE)
            yield path, relative


def _file(base: Path, path: Path, name: str, spec: ArtifactsSpec, say: Say) -> Found | None:
    """The file as it goes into the artifact; None, with a line in the log, for what is no file."""
    target = name.rpartition("/")[2] if spec.discard_paths else name
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        link = os.readlink(path)
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(os.path.realpath(base)):
            raise BuildProblem(
                f"artifact {name} is a link that leaves the source folder ({link})",
                reason=Reason.ARTIFACTS_NOT_FOUND,
                hint="Copy the file into the source folder instead.",
            )
        if spec.enable_symlinks:
            return Found(path=path, name=target, size_bytes=len(link.encode()), link=link)
        if not real.is_file():
            say(f"Skipping {name}: it is a link to a folder, or to nothing")
            return None
        return Found(path=real, name=target, size_bytes=real.stat().st_size)
    if not stat.S_ISREG(status.st_mode):
        say(f"Skipping {name}: it is no regular file")
        return None
    return Found(path=path, name=target, size_bytes=status.st_size)


class Hashed:
    """A file that is measured and hashed while it is written, once, from front to back; also by parts of `part_bytes`."""

    def __init__(self, file: IO[bytes], part_bytes: int = sys.maxsize) -> None:
        self._file = file
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.size_bytes = 0
        self.part_bytes = part_bytes
        self._ended: list[str] = []
        self._part = hashlib.md5(usedforsecurity=False)
        """Of the second part on: the first one's is that of the whole, so far."""

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        left = memoryview(data)
        while left:
            room = self.part_bytes - self.size_bytes % self.part_bytes
            self._add(left[:room])
            left = left[room:]
        return self._file.write(data)

    def _add(self, piece: memoryview) -> None:
        self.md5.update(piece)
        if self._ended:
            self._part.update(piece)
        self.size_bytes += len(piece)
        if self.size_bytes % self.part_bytes == 0:
            self._ended.append((self._part if self._ended else self.md5).hexdigest())
            self._part = hashlib.md5(usedforsecurity=False)

    def parts(self) -> tuple[str, ...]:
        """The MD5 of each part."""
        if self.size_bytes % self.part_bytes == 0:
            return tuple(self._ended)
        return (*self._ended, (self._part if self._ended else self.md5).hexdigest())

    def flush(self) -> None:
        self._file.flush()


def check_name(name: str) -> None:
    """Raises BuildProblem for a name that no object can have (S3: object keys, and what terminals and logs can bear)."""
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise BuildProblem(
            f"no artifact can be named {name[:80]!r}: it has control characters, or more than {MAX_NAME_BYTES} bytes",
            reason=Reason.ARTIFACTS_NOT_FOUND,
            hint="Rename the file, leave it out by 'exclude-paths', or keep the artifacts in one zip.",
        )


def part_size(size_bytes: int, least_part_bytes: int) -> int:
    """How large the parts of an object of about that size are: whole MiB, so that a thousand make it up."""
    mib = 1024 * 1024
    return max(least_part_bytes, -(-size_bytes // (1000 * mib)) * mib)


def pack_zip(files: Sequence[Found], target: Path, *, max_bytes: int, least_part_bytes: int = PART_BYTES) -> Packed:
    """All `files` in one zip at `target`, in the order given. Raises BuildProblem where it grows over `max_bytes`."""
    with open(target, "xb") as file:
        hashed = Hashed(file, part_size(sum(item.size_bytes for item in files), least_part_bytes))
        with zipfile.ZipFile(cast(IO[bytes], hashed), mode="w", compression=zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for item in files:
                _add(archive, item)
                if hashed.size_bytes > max_bytes:
                    raise too_large(hashed.size_bytes, max_bytes)
        file.flush()
    return _packed(target, hashed, len(files))


def _add(archive: zipfile.ZipFile, item: Found) -> None:
    info = zipfile.ZipInfo(item.name, (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    if item.link is not None:
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, item.link)
        return
    with _open(item) as source:
        status = os.fstat(source.fileno())
        info.external_attr = (stat.S_IFREG | stat.S_IMODE(status.st_mode) & 0o777) << 16
        info.file_size = status.st_size
        with archive.open(info, "w", force_zip64=status.st_size > 2**31 - 1) as entry:
            _copy(source, entry, item, status.st_size)


def pack_file(item: Found, target: Path, *, max_bytes: int, least_part_bytes: int = PART_BYTES) -> Packed:
    """One file by itself, copied, so that what is hashed is what is uploaded."""
    if item.size_bytes > max_bytes:
        raise too_large(item.size_bytes, max_bytes)
    with open(target, "xb") as file, _open(item) as source:
        hashed = Hashed(file, part_size(item.size_bytes, least_part_bytes))
        _copy(source, hashed, item, os.fstat(source.fileno()).st_size)
    return _packed(target, hashed, 1)


def _open(item: Found) -> IO[bytes]:
    handle = os.open(item.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BuildProblem(f"artifact {item.name} stopped being a file while it was packed", reason=Reason.ARTIFACTS_NOT_FOUND)
    return os.fdopen(handle, "rb")


def _copy(source: IO[bytes], target: "IO[bytes] | Hashed", item: Found, size: int) -> None:
    left = size
    while left and (piece := source.read(min(left, _PIECE_BYTES))):
        target.write(piece)
        left -= len(piece)
    if left or source.read(1):
        raise BuildProblem(
            f"artifact {item.name} changed while it was packed",
            reason=Reason.ARTIFACTS_NOT_FOUND,
            hint="Let the build end its background processes.",
        )


def _packed(path: Path, hashed: Hashed, count: int) -> Packed:
    return Packed(
        path=path,
        size_bytes=hashed.size_bytes,
        sha256=hashed.sha256.hexdigest(),
        md5=hashed.md5.hexdigest(),
        file_count=count,
        part_bytes=hashed.part_bytes,
        parts=hashed.parts(),
    )


def too_large(size: int, most: int) -> BuildProblem:
    """An artifact over the farm's limit."""
    return BuildProblem(
        f"the artifact has more than {most} bytes ({size} so far)",
        reason=Reason.ARTIFACT_TOO_LARGE,
        hint="Keep less by 'exclude-paths', or have the operator raise MILLRACE_MAX_UPLOAD_BYTES.",
    )
