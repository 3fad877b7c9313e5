"""What a build's own Docker daemon keeps, on the worker, for the next build of its project (CodeBuild: LOCAL_DOCKER_LAYER_CACHE).

A folder per project, mounted at `/var/lib/docker`. Two daemons cannot share one, so one build at a time has it, and others go
without. Between two builds all goes but images and what they were built from: no container, volume or network of one build is
there in the next. A folder that is not used for long makes room, as do the least recently used.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from millrace.log import get_logger

log = get_logger(__name__)
INSIDE: Final = "/var/lib/docker"
MODE: Final = "LOCAL_DOCKER_LAYER_CACHE"
FOLDER: Final = "docker"
"""Below that of the worker's layers of caches."""
DAYS: Final = 14
_KEPT: Final = frozenset({"image", "overlay2", "buildkit"})
"""Docker's data root: images, their layers, and the builder's; all else is of containers, or is made anew."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One project's folder. `size_bytes` None: a build has it, or was killed that had it."""

    project: str
    size_bytes: int | None
    used_s: float


class DaemonStore:
    """The folder that one attempt has, if any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[str] | None = None
        self._path: Path | None = None

    def take(self, project: str) -> Path | None:
        """The project's folder, to be let go by `close`; None where another build has it. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / hashlib.sha256(project.encode()).hexdigest()[:32]
        lock = open(path.with_suffix(".lock"), "a+")  # noqa: SIM115  # closed here or by `close`
        if not _locked(lock) or not _is_there(lock):
            lock.close()
            return None
        _write(lock, {"project": project})
        path.mkdir(exist_ok=True, mode=0o711)
        _clean(path)  # where the last build's worker was killed
        self._lock, self._path = lock, path
        return path

    def close(self) -> None:
        """Let it go, with nothing of this build's containers in it. The container is gone by now. Raises OSError."""
        if self._lock is None or self._path is None:
            return
        try:
            _clean(self._path)
            _write(self._lock, {**_read(self._path.with_suffix(".lock")), "size_bytes": _size(self._path)})
        finally:
            self._lock.close()
            self._lock = None


def kept(folder: Path) -> Iterator[Kept]:
    """All that is there, the last used first."""
    for path in sorted(folder.glob("*.lock"), key=lambda one: one.stat().st_mtime, reverse=True):
        noted = _read(path)
        size = noted.get("size_bytes")
        yield Kept(
            project=str(noted.get("project", "?")),
            size_bytes=size if isinstance(size, int) else None,
            used_s=path.stat().st_mtime,
        )


def evict(folder: Path, most_bytes: int, *, most_age_s: float = DAYS * 86_400) -> int:
    """Remove what was not used for long, and the least recently used until the rest has at most `most_bytes`; how many went."""
    total = gone = 0
    for path in sorted(folder.glob("*.lock"), key=lambda one: one.stat().st_mtime, reverse=True):
        with open(path, "a+") as lock:
            if not _locked(lock):
                continue
            size = _read(path).get("size_bytes")
            if not isinstance(size, int):  # its worker was killed
                size = _size(path.with_suffix(""))
            if total + size <= most_bytes and path.stat().st_mtime > time.time() - most_age_s:
                total += size
                continue
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
            gone += 1
    if gone:
        log.info("daemon_stores.evicted", count=gone)
    return gone


def _clean(path: Path) -> None:
    """Remove what is of containers: their records, and the layers that they wrote to."""
    for driver in path.glob("image/*/layerdb/mounts"):
        storage = path / driver.parts[-3]
        for container in driver.iterdir():
            for name in ("mount-id", "init-id"):
                with suppress(OSError):
                    layer = (container / name).read_text().strip()
                    if layer and "/" not in layer and layer not in (".", ".."):
                        shutil.rmtree(storage / layer, ignore_errors=True)
            shutil.rmtree(container)
    for entry in path.iterdir():
        if entry.name in _KEPT and not entry.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _size(path: Path) -> int:
    """Bytes on the disk, each file once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for where, folders, files in os.walk(path):
        for name in (*folders, *files):
            with suppress(OSError):
                status = os.lstat(os.path.join(where, name))
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(lock: IO[str]) -> bool:
    try:
        return os.stat(lock.name).st_ino == os.fstat(lock.fileno()).st_ino
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, object]:
    try:
        noted = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _write(lock: IO[str], noted: dict[str, object]) -> None:
    lock.seek(0)
    lock.truncate(0)
    json.dump(noted, lock)
    lock.flush()
