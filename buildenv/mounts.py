"""Mounts that end with the process that made them: made in a mount namespace of its own, and lent to a container's.

Nothing is ever mounted in the host's own namespace, so whatever kills a process or the host leaves nothing to be unmounted.
"""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

_NEWNS, _FS = 0x00020000, 0x00000200
_REC, _SLAVE, _DETACH = 0x4000, 1 << 19, 2
_OPEN_TREE, _MOVE_MOUNT = 428, 429
"""The numbers of the calls, the same on all architectures; Linux 5.2 has them."""
_CLONE, _CLOEXEC = 1, os.O_CLOEXEC
_FROM_EMPTY, _TO_EMPTY = 4, 64
_AT_FDCWD: Final = -100
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@cache
def are_possible() -> bool:
    """Whether this process may mount at all, and has the GNU tar that keeps what an overlay needs."""
    if os.geteuid() != 0 or shutil.which("tar") is None:
        return False
    said = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False)
    return "GNU tar" in said.stdout


def leave_the_hosts() -> None:
    """Give the calling thread, and those it starts, a mount namespace of their own. Raises OSError."""
    _check(_libc.unshare(_NEWNS))
    _check(_libc.mount(None, b"/", None, _REC | _SLAVE, None))


def overlay(target: Path, lower: Sequence[Path], upper: Path, work: Path) -> None:
    """Mount what `upper` changes of `lower`, of which the first lies on top. Raises OSError."""
    options = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work},redirect_dir=nofollow,index=off,metacopy=off"
    _check(_libc.mount(b"overlay", os.fsencode(target), b"overlay", 0, os.fsencode(options)))


def unmount(target: Path | str) -> None:
    """Undo what is mounted there, used or not."""
    with suppress(OSError):
        _check(_libc.umount2(os.fsencode(target), _DETACH))


def lend(source: Path) -> int:
    """What is mounted at `source`, as a file descriptor for one `attach`, here or in another namespace. Raises OSError."""
    return _check(_libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _CLONE | _CLOEXEC))


def attach(lent: int, folder: int) -> None:
    """Mount what was lent over an open folder. Raises OSError."""
    _check(_libc.syscall(_MOVE_MOUNT, lent, b"", folder, b"", _FROM_EMPTY | _TO_EMPTY))


def inside(pid: int, work: Callable[[], None]) -> None:
    """Do `work` where the process `pid` sees its files, in a thread that ends with it. Raises OSError."""
    view = view_of(pid)
    try:
        within(view, work)
    finally:
        os.close(view)


def view_of(pid: int) -> int:
    """How the process sees its files, as a file descriptor that outlives it. Raises OSError."""
    return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def within(view: int, work: Callable[[], None]) -> None:
    """The same as `inside`, of a view that was kept. Raises OSError."""
    failed: list[OSError] = []

    def enter() -> None:
        try:
            _check(_libc.unshare(_FS))
            _check(_libc.setns(view, _NEWNS))
            work()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="inside")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def open_below(root: Path, relative: str) -> int:
    """An open folder below `root`, made where it is missing; no link is followed. Raises OSError."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in relative.strip("/").split("/"):
        try:
            with suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder
