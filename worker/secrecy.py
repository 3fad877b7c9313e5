"""Keeps what a worker knows from a build that runs beside it, as the same user, in the same container."""

import ctypes
import os
from collections.abc import Iterable
from typing import Final

from millrace.log import get_logger

log = get_logger(__name__)
_DUMPABLE: Final = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.getenv.argtypes = [ctypes.c_char_p]
_libc.getenv.restype = ctypes.c_void_p


def keep(names: Iterable[str]) -> None:
    """Wipe these variables, where /proc shows what this process was started with, and let nobody read its memory or follow it.

    Who has CAP_SYS_PTRACE could still; a build has it not (`buildenv.engine.CAPABILITIES`).
    """
    for name in names:
        _wipe(name)
    if _libc.prctl(_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("worker.memory_readable", why=os.strerror(ctypes.get_errno()))


def _wipe(name: str) -> None:
    """Overwrite a variable's value in the memory that the kernel shows as this process's environment, and unset it."""
    at = _libc.getenv(os.fsencode(name))
    if at:
        ctypes.memset(at, 0, len(ctypes.string_at(at)))
    os.environ.pop(name, None)
