"""Finds a build's artifacts in its source tree and packs them. The tree is the build's own work, so it is not trusted:
no link is followed out of it, nothing but plain files is read, and what changes meanwhile is an error, never a torn archive.
"""

import hashlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

from buildenv import globs
from buildenv.buildspec import ArtifactsSpec
from millrace.errors import BuildProblem
from millrace.vocabulary import Reason

MAX_FILES: Final = 200_000
MAX_NAME_BYTES: Final = 900
"""An object's key has 1024 bytes, and begins with where the attempt's objects lie."""
_PIECE_BYTES: Final = 1024 * 1024
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
    """A file ready to be uploaded, hashed while it was made."""

    path: Path
    size_bytes: int
    sha256: str
    md5: str
    file_count: int


def nothing_found(message: str = "no matching artifact paths found") -> BuildProblem:
    """CodeBuild's words for artifacts that are not there."""
    return BuildProblem(
        message, reason=Reason.ARTIFACTS_NOT_FOUND, hint="Paths are relative to the source folder, whatever the commands did."
    )


def collect(spec: ArtifactsSpec, root: Path, say: Say) -> list[Found]:
    """The files that `spec` names below `root`. Raises BuildProblem where there are none, or too many."""
    say(f"Expanding base directory path: {spec.base_directory or '.'}")
    bases = _bases(spec.base_directory, root)
    if not bases:
        raise nothing_found(f"no matching base directory path found for {spec.base_directory}")
    say("Assembling file list")
    found: dict[str, Found] = {}
    for base in bases:
        entries = list(_walk(base, say))
        say(f"Expanding file paths for base directory {base.relative_to(root).as_posix()}")
        for glob in spec.files:
            wanted = _relative(glob, base)
            say(f"Expanding {glob}")
            hits = 0
            for path, name in entries:
                if wanted is None or not globs.matches(wanted, name) or any(globs.matches(x, name) for x in spec.exclude_paths):
                    continue
                hits += 1
                item = _file(base, path, name, spec, say)
                if item is not None:
                    found[item.name] = item
            say(f"Found {hits} file(s)" if hits else f"Skipping invalid file path {glob}")
    if not found:
        raise nothing_found()
    return sorted(found.values(), key=lambda item: item.name)


def _bases(glob: str | None, root: Path) -> list[Path]:
    if glob is None or glob in (".", "./", ""):
        return [root]
    wanted = _relative(glob, root)
    if wanted is None:
        return []
    if wanted in ("", "."):
        return [root]
    found = []
    for folder, folders, _files in os.walk(root):
        folders.sort()
        for name in folders:
            path = Path(folder, name)
            if not path.is_symlink() and globs.matches(wanted.rstrip("/"), path.relative_to(root).as_posix()):
                found.append(path)
    return found


def _relative(glob: str, base: Path) -> str | None:
    """`glob` relative to `base`; None for an absolute one, which names files of the container outside the source."""
    return None if glob.startswith("/") else glob.removeprefix("./")


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


class _Hashed:
    """A file that is measured and hashed while it is written, once, from front to back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.md5.update(data)
        self.size_bytes += len(data)
        return self._file.write(data)

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


def pack_zip(files: Sequence[Found], target: Path, *, max_bytes: int) -> Packed:
    """All `files` in one zip at `target`, in the order given. Raises BuildProblem where it grows over `max_bytes`."""
    with open(target, "xb") as file:
        hashed = _Hashed(file)
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


def pack_file(item: Found, target: Path, *, max_bytes: int) -> Packed:
    """One file by itself, copied, so that what is hashed is what is uploaded."""
    if item.size_bytes > max_bytes:
        raise too_large(item.size_bytes, max_bytes)
    with open(target, "xb") as file, _open(item) as source:
        hashed = _Hashed(file)
        _copy(source, hashed, item, os.fstat(source.fileno()).st_size)
    return _packed(target, hashed, 1)


def _open(item: Found) -> IO[bytes]:
    handle = os.open(item.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BuildProblem(f"artifact {item.name} stopped being a file while it was packed", reason=Reason.ARTIFACTS_NOT_FOUND)
    return os.fdopen(handle, "rb")


def _copy(source: IO[bytes], target: "IO[bytes] | _Hashed", item: Found, size: int) -> None:
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


def _packed(path: Path, hashed: _Hashed, count: int) -> Packed:
    return Packed(
        path=path,
        size_bytes=hashed.size_bytes,
        sha256=hashed.sha256.hexdigest(),
        md5=hashed.md5.hexdigest(),
        file_count=count,
    )


def too_large(size: int, most: int) -> BuildProblem:
    """An artifact over the farm's limit."""
    return BuildProblem(
        f"the artifact has more than {most} bytes ({size} so far)",
        reason=Reason.ARTIFACT_TOO_LARGE,
        hint="Keep less by 'exclude-paths', or have the operator raise MILLRACE_MAX_UPLOAD_BYTES.",
    )
