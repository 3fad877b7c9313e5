"""The stdin and output of a build that is a process of this container."""

import fcntl
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from millrace.errors import InfraProblem
from millrace.vocabulary import Reason

_READ_BYTES: Final = 256 * 1024
_PIPE_BYTES: Final = 1024 * 1024
_WRITE_S: Final = 30.0
_LOOK_EVERY_S: Final = 0.5


class OwnConsole:
    """See `engine.Console`. `child_in` and `child_out` are the build's ends; `started` lets go of them here."""

    def __init__(self) -> None:
        self.child_in, self._in = os.pipe()
        self._out, self.child_out = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        with suppress(OSError):  # the system's bound is lower
            fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._wake_read, self._wake_write = os.pipe()
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._started = False
        self._has_ended: Callable[[], bool] = lambda: False
        self._ended = False

    def started(self, has_ended: Callable[[], bool]) -> None:
        """The build has its ends; `has_ended` says whether it is over, whoever may still hold one of them."""
        if not self._started:
            self._started = True
            self._has_ended = has_ended
            os.close(self.child_in)
            os.close(self.child_out)

    def write(self, data: bytes) -> None:
        with self._writing:
            left = memoryview(data)
            until = time.monotonic() + _WRITE_S
            while left and not self._closed.is_set():
                try:
                    left = left[os.write(self._in, left) :]
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise _lost("the build's stdin takes nothing more") from None
                    select.select([self._wake_read], [self._in], [], _LOOK_EVERY_S)
                except OSError as error:
                    raise _lost(f"the build's stdin is closed: {error.strerror}") from error

    def read(self, timeout_s: float) -> bytes | None:
        with self._reading:
            return None if self._closed.is_set() or self._ended else self._read(timeout_s)

    def _read(self, timeout_s: float) -> bytes | None:
        until = time.monotonic() + timeout_s
        while True:
            over = self._has_ended()  # asked first: what it has written by then is read below
            try:
                data = os.read(self._out, _READ_BYTES)
            except BlockingIOError:
                left = until - time.monotonic()
                if over:
                    self._ended = True
                    return None
                if left <= 0:
                    return b""
                select.select([self._out, self._wake_read], [], [], min(left, _LOOK_EVERY_S))
                if self._closed.is_set():
                    return None
                continue
            self._ended = not data
            return data or None

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        os.write(self._wake_write, b"x")
        with self._reading, self._writing:
            ends = [self._in, self._out, self._wake_read, self._wake_write]
            if not self._started:
                ends += [self.child_in, self.child_out]
            for end in ends:
                os.close(end)


def _lost(message: str) -> InfraProblem:
    return InfraProblem(message, reason=Reason.ENGINE_LOST)
