"""Packs a folder for `millrace run`: what git would take, as a tar.gz that is the same for the same files."""

import gzip
import hashlib
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from buildenv.archive import is_odd_name, stays_inside
from millrace.errors import InvalidInput

_COMPRESSION: Final = 3
_PATIENCE_S: Final = 120


@dataclass(frozen=True, kw_only=True)
class PackedFolder:
    """What was packed; `size_bytes` and `sha256` are of the archive.

    `left_out` names what no source archive may hold: links that lead out of the folder, sockets, pipes, and odd names.
    """

    file_count: int
    size_bytes: int
    sha256: str
    left_out: tuple[str, ...] = ()


class _Measured:
    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size_bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size_bytes += len(data)
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def pack(folder: Path, out: BinaryIO) -> PackedFolder:
    """Write `folder` to `out`, without what `.gitignore` files leave out and without `.git`.

    Times, links inside, and whether a file may be run are kept. A folder inside a repository keeps to the rules of all of it.
    Raises InvalidInput where there is no such folder, git cannot list it, or a file cannot be read.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder", hint="Name a folder that holds a buildspec.yml.")
    measured = _Measured(out)
    count = 0
    left_out: list[str] = []
    with (
        gzip.GzipFile(fileobj=cast(IO[bytes], measured), mode="wb", compresslevel=_COMPRESSION, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        through: dict[str, bool] = {"": False}
        for name in sorted(set(_names(folder))):
            if _leads_through_a_link(folder, os.path.dirname(name), through):  # tracked, but a link stands there now
                continue
            try:
                if _add(tar, folder / name, name):
                    count += 1
                else:
                    left_out.append(name)
            except (FileNotFoundError, NotADirectoryError):  # tracked, but deleted
                continue
            except OSError as error:
                raise InvalidInput(f"{name!r} cannot be packed: {error}", hint="Is it being written, or not readable?") from error
    return PackedFolder(
        file_count=count, size_bytes=measured.size_bytes, sha256=measured.sha256.hexdigest(), left_out=tuple(left_out)
    )


def _leads_through_a_link(folder: Path, name: str, known: dict[str, bool]) -> bool:
    if name not in known:
        known[name] = _leads_through_a_link(folder, os.path.dirname(name), known) or (folder / name).is_symlink()
    return known[name]


def _add(tar: tarfile.TarFile, path: Path, name: str) -> bool:
    """Add one file or link; False where an archive may not hold it."""
    status = path.lstat()
    if is_odd_name(name):
        return False
    info = tarfile.TarInfo(name)
    info.mode = 0o755 if status.st_mode & 0o111 else 0o644
    info.mtime = int(status.st_mtime)
    if stat.S_ISLNK(status.st_mode):
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
        if not stays_inside(info.linkname, name.count("/")):
            return False
        tar.addfile(info)
        return True
    if not stat.S_ISREG(status.st_mode):
        return False
    with open(path, "rb") as file:
        info.size = os.fstat(file.fileno()).st_size
        tar.addfile(info, file)
    return True


def _names(folder: Path, prefix: str = "") -> Iterator[str]:
    """Names below `folder`, relative to the outermost one. A repository inside it is listed by its own rules."""
    for name in _listed(folder, top=not prefix):
        if name.endswith("/"):
            yield from _names(folder / name, prefix + name)
        elif (folder / name).is_dir() and not (folder / name).is_symlink():  # a submodule
            yield from _names(folder / name, f"{prefix}{name}/")
        else:
            yield prefix + name


def _listed(folder: Path, *, top: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as empty:
        where = ["-C", str(folder)]
        if not _is_own(folder, top=top):  # ignore rules hold in a folder that is no repository, too
            _git(["init", "--quiet", empty])
            where = [f"--git-dir={empty}/.git", f"--work-tree={folder.resolve()}", *where]
        output = _git([*where, "ls-files", "--cached", "--others", "--exclude-standard", "-z"])
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _is_own(folder: Path, *, top: bool) -> bool:
    """True where a repository's own list is the one to take: `folder` is its top, or lies in it and is not left out by it."""
    if (folder / ".git").exists():
        return True
    if not top or _run(["-C", str(folder), "rev-parse", "--is-inside-work-tree"]).stdout.strip() != b"true":
        return False
    return _run(["-C", str(folder), "check-ignore", "--quiet", "."]).returncode == 1


def _git(arguments: list[str]) -> bytes:
    done = _run(arguments)
    if done.returncode != 0:
        raise InvalidInput(f"git cannot list the folder: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _run(arguments: list[str]) -> "subprocess.CompletedProcess[bytes]":
    """git, with nothing of the user's own configuration, and deaf to programs that a repository's configuration names."""
    environment = {"PATH": os.defpath + ":/usr/local/bin", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    options = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    try:
        return subprocess.run(
            ["git", *options, *arguments],
            capture_output=True,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
        )
    except FileNotFoundError as error:
        raise InvalidInput("git is not installed", hint="apt-get install git") from error
    except subprocess.TimeoutExpired as error:
        raise InvalidInput(f"git did not list the folder in {_PATIENCE_S} s", hint="Name a smaller folder.") from error
