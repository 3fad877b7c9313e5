"""The layers of caches on a worker, unpacked, one folder each, called by the hash of its archive.

A layer is made once, never changed (`buildenv.seals` finds one that was), and locked as long as a process uses it; the least
recently used go when there are too many.
In its archive, a zstd tar, a file that the layer takes away is a character device 0/0, and a folder that hides what lies below it
has the attribute `trusted.overlay.opaque`, as the kernel's overlay keeps them. Names begin as in `buildenv.cache`.
"""

import fcntl
import hashlib
import os
import secrets as randomness
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

import zstandard

from buildenv import daemonstore, seals
from buildenv.artifacts import PART_BYTES, Hashed, part_size
from buildenv.cache import MAX_UNPACKED_BYTES, Packed, Unusable
from millrace.log import get_logger

log = get_logger(__name__)
_PIECE_BYTES: Final = 1024 * 1024
_ATTRIBUTES: Final = ("user.*", "security.capability", "system.posix_acl_*", "trusted.overlay.opaque")
_XATTRS: Final = ("--xattrs", *(f"--xattrs-include={name}" for name in _ATTRIBUTES))
_PAUSE_S: Final = 0.02
_HOT_S: Final = 600.0
"""How long after its last use a layer is looked after."""
_PATIENCE_S: Final = 600.0


class Layers:
    """The folder of one worker's layers, as one attempt uses it. Safe from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: list[IO[str]] = []

    def use(
        self,
        sha256: str,
        fetch: Callable[[Path], None],
        check: Callable[[], None],
        warn: Callable[[str], None] = lambda _text: None,
    ) -> tuple[Path, bool]:
        """The unpacked layer, fetched where it is not here yet, and whether it was; locked until `close`.

        One that was changed here is set aside and fetched anew, of which `warn` is told. `check` is asked while another process
        makes it. Raises Unusable, and what `fetch` and `check` raise.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        layer = self._folder / sha256
        until = time.monotonic() + _PATIENCE_S
        while True:
            lock = open(self._folder / f"{sha256}.lock", "a+")  # noqa: SIM115  # closed here or by `close`
            try:
                if layer.is_dir() and _locked(lock, fcntl.LOCK_SH) and _is_there(lock) and layer.is_dir():
                    if seals.holds(layer):
                        os.utime(lock.name)
                        self._locks.append(lock)
                        return layer, False
                    warn(f"layer {sha256[:12]} of the cache was changed on the worker; it is fetched anew")
                    _set_aside(layer, lock)
                    continue
                if _locked(lock, fcntl.LOCK_EX) and _is_there(lock) and not layer.is_dir():
                    self._make(layer, sha256, fetch, lock)
                    fcntl.flock(lock, fcntl.LOCK_SH)
                    self._locks.append(lock)
                    return layer, True
            finally:
                if lock not in self._locks:
                    lock.close()
            check()
            if time.monotonic() > until:
                raise Unusable("another build takes too long to unpack it")
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Let go of all layers."""
        while self._locks:
            self._locks.pop().close()

    def _make(self, layer: Path, sha256: str, fetch: Callable[[Path], None], lock: IO[str]) -> None:
        part, archive = layer.with_suffix(".part"), layer.with_suffix(".tar.zst")
        shutil.rmtree(part, ignore_errors=True)
        try:
            fetch(archive)
            part.mkdir(mode=0o755)
            size = unpack(archive, sha256, part)
            lock.truncate(0)
            lock.write(str(size))
            lock.flush()
            part.rename(layer)
            seals.make(layer)
        except OSError as error:
            raise Unusable(f"it cannot be unpacked: {error}") from error
        finally:
            archive.unlink(missing_ok=True)
            shutil.rmtree(part, ignore_errors=True)


def _set_aside(layer: Path, lock: IO[str]) -> None:
    """Give a changed layer, which `lock` is of, another name: builds that have it keep it, and it goes when none has it."""
    log.warning("layer.changed", layer=layer.name)
    aside = layer.with_name(f"{layer.name}-{randomness.token_hex(4)}")
    folder = os.open(layer.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # of several who see it at once, one does it
        if not _is_there(lock):
            return
        os.truncate(lock.name, 0)  # without a size, `evict` takes it for half made
        os.rename(lock.name, aside.with_suffix(".lock"))
        seals.of(layer).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            layer.rename(aside)
    finally:
        os.close(folder)


def look_after(folder: Path) -> int:
    """Look at the layers that were used of late, so that builds need not; how many were changed, and are set aside."""
    changed = 0
    for path in folder.glob("*.lock"):
        layer = path.with_suffix("")
        if path.stat().st_mtime < time.time() - _HOT_S or not layer.is_dir() or not seals.of(layer).is_file():
            continue
        with open(path, "a+") as lock:
            if _locked(lock, fcntl.LOCK_SH) and _is_there(lock) and not seals.holds(layer, trust_s=seals.TRUST_S / 2):
                _set_aside(layer, lock)
                changed += 1
    return changed


def _locked(lock: IO[str], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(lock: IO[str]) -> bool:
    """False where the file was removed before it was locked."""
    try:
        return os.stat(lock.name).st_ino == os.fstat(lock.fileno()).st_ino
    except FileNotFoundError:
        return False


def evict(folder: Path, most_bytes: int) -> int:
    """Remove the least recently used layers until the rest has at most `most_bytes`; how many went. What is used stays.

    What a process left half made that was ended goes, too. What Docker daemons of builds keep may have as much beside.
    """
    daemonstore.evict(folder / daemonstore.FOLDER, most_bytes)
    if not folder.is_dir():
        return 0
    look_after(folder)
    locks = sorted(folder.glob("*.lock"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = gone = 0
    for path in locks:
        text = path.read_bytes()
        size = int(text) if text.isdigit() else 0
        if size and total + size <= most_bytes and path.with_suffix("").is_dir():
            total += size
            continue
        with open(path, "a+") as lock:
            if not _locked(lock, fcntl.LOCK_EX):
                total += size
                continue
            for end in ("", ".part"):
                shutil.rmtree(path.with_suffix(end), ignore_errors=True)
            for end in (".tar.zst", ".seal"):
                path.with_suffix(end).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            gone += 1
    if gone:
        log.info("layers.evicted", count=gone)
    return gone


def pack(root: Path, names: Sequence[str], target: Path, *, max_bytes: int, least_part_bytes: int = PART_BYTES) -> Packed:
    """The folders `names` below `root` as a layer at `target`. Raises Unusable."""
    command = ["tar", "-C", str(root), "--format=pax", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--numeric-owner"]
    with open(target, "xb") as file:
        hashed = Hashed(file, part_size(max_bytes, least_part_bytes))
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                [*command, *_XATTRS, "--warning=no-file-ignored", "-c", "--", *names],
                stdout=subprocess.PIPE,
                stderr=said,
                env=_ENV,
            ) as tar,
            zstandard.ZstdCompressor(level=3, threads=-1).stream_writer(cast(IO[bytes], hashed), closefd=False) as packed,
        ):
            while piece := cast(IO[bytes], tar.stdout).read(_PIECE_BYTES):
                packed.write(piece)
                if hashed.size_bytes > max_bytes:
                    tar.kill()
                    raise Unusable(f"it has more than {max_bytes} bytes")
            _end(tar, said)
    if hashed.size_bytes > max_bytes:
        raise Unusable(f"it has more than {max_bytes} bytes")
    return Packed.of(target, hashed, 0)


def stream(path: Path) -> Iterator[bytes]:
    """What `Engine.copy_out` would give of a path of the host. Raises FileNotFoundError for none, and behind a link."""
    if path.parent.resolve() != path.parent or not os.path.lexists(path):
        raise FileNotFoundError(path)
    command = ["tar", "-C", str(path.parent), "--format=pax", "--numeric-owner", "-c", "--", path.name]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=_ENV) as tar,
    ):
        while piece := cast(IO[bytes], tar.stdout).read(_PIECE_BYTES):
            yield piece


def unpack(archive: Path, sha256: str, target: Path) -> int:
    """Unpack a layer into an empty folder; how many bytes it has. Raises Unusable, OSError."""
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise Unusable("it came with other bytes than were stored")
    command = ["tar", "-C", str(target), "--numeric-owner", "--same-owner", "-p", "--delay-directory-restore", *_XATTRS, "-x"]
    size = 0
    with (
        open(archive, "rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as plain,
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said, env=_ENV) as tar,
    ):
        into = cast(IO[bytes], tar.stdin)
        try:
            with suppress(BrokenPipeError):  # what tar says of it counts
                while piece := plain.read(_PIECE_BYTES):
                    size += len(piece)
                    if size > MAX_UNPACKED_BYTES:
                        raise Unusable(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
                    into.write(piece)
        except zstandard.ZstdError as error:
            raise Unusable(f"it cannot be read: {error}") from error
        finally:
            with suppress(BrokenPipeError):
                into.close()
        _end(tar, said)
    return size


_ENV: Final = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _end(tar: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    if tar.wait() != 0:
        said.seek(0)
        raise Unusable(f"tar ended with {tar.returncode}: {said.read().decode(errors='replace').strip()[-300:]}")
