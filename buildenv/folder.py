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

from millrace.errors import InvalidInput

_COMPRESSION: Final = 3


@dataclass(frozen=True, kw_only=True)
class PackedFolder:
    """What was packed; `size_bytes` and `sha256` are of the archive."""

    file_count: int
    size_bytes: int
    sha256: str


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
    """Write `folder` to `out`, without what its `.gitignore` files leave out and without `.git`. Modes and links are kept.

    Raises InvalidInput where there is no such folder, or git cannot list it.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder", hint="Name a folder that holds a buildspec.yml.")
    measured = _Measured(out)
    count = 0
    with (
        gzip.GzipFile(fileobj=cast(IO[bytes], measured), mode="wb", compresslevel=_COMPRESSION, mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in sorted(set(_names(folder))):
            path = folder / name
            try:
                status = path.lstat()
            except FileNotFoundError:  # tracked, but deleted
                continue
            if _add(tar, path, name, status):
                count += 1
    return PackedFolder(file_count=count, size_bytes=measured.size_bytes, sha256=measured.sha256.hexdigest())


def _add(tar: tarfile.TarFile, path: Path, name: str, status: os.stat_result) -> bool:
    info = tarfile.TarInfo(name)
    info.mode = 0o755 if status.st_mode & 0o111 else 0o644
    info.mtime = int(status.st_mtime)
    if stat.S_ISLNK(status.st_mode):
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
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
    for name in _listed(folder):
        if name.endswith("/"):
            yield from _names(folder / name, prefix + name)
        elif (folder / name).is_dir() and not (folder / name).is_symlink():  # a submodule
            yield from _names(folder / name, f"{prefix}{name}/")
        else:
            yield prefix + name


def _listed(folder: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as empty:
        where: list[str]
        if (folder / ".git").exists():
            where = ["-C", str(folder), "-c", "safe.directory=*"]
        else:  # ignore rules hold in a folder that is no repository, too
            _git(["init", "--quiet", empty])
            where = [f"--git-dir={empty}/.git", f"--work-tree={folder.resolve()}", "-C", str(folder)]
        output = _git([*where, "ls-files", "--cached", "--others", "--exclude-standard", "-z"])
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _git(arguments: list[str]) -> bytes:
    environment = {"PATH": os.defpath + ":/usr/local/bin", "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False, env=environment, timeout=120)
    except FileNotFoundError as error:
        raise InvalidInput("git is not installed", hint="apt-get install git") from error
    if done.returncode != 0:
        raise InvalidInput(f"git cannot list the folder: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
