"""A build's log on its way to the API: numbered chunks, in order, with bounded memory, a hash over everything and a root."""

import contextvars
import hashlib
import threading
import time
from collections.abc import Callable
from typing import Final

from millrace.chunks import Tally
from millrace.contract import MAX_LOG_CHUNK_BYTES, LogFooter
from millrace.errors import AttemptFenced, MillraceError, Unavailable
from millrace.log import get_logger

log = get_logger(__name__)
_SETTLE_S: Final = 0.04
"""How long the first line after a silence waits for those that come with it."""
_LINGER_S: Final = 0.2
"""How far small chunks are apart at least; what comes after a longer silence goes at once."""
_BUFFER_BYTES: Final = 8 * 1024 * 1024
"""What is held for an API that is away or slow; then the build's output waits, and so, in the end, does the build."""


class LogShipper:
    """Takes the log from the build's thread and sends it from its own. `send(seq, offset, data)` blocks and raises ours."""

    def __init__(self, send: Callable[[int, int, bytes], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._buffer = bytearray()
        self._chunk = b""  # on its way; sent again as it is, for the API may have taken it and only the answer was lost
        self._taken_at = 0.0
        self._closed = False
        self._given_up = False
        self._hash = hashlib.sha256()
        self._written = 0
        self._sent = Tally()
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run,), name="log-shipper", daemon=True
        )  # its log lines name the build, too

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def write(self, data: bytes) -> None:
        """More of the log. Blocks while the buffer is full; after a fence what comes is dropped."""
        view = memoryview(data)
        while view:
            with self._changed:
                self._changed.wait_for(lambda: len(self._buffer) < _BUFFER_BYTES or self._given_up)
                piece = view[: max(1, _BUFFER_BYTES - len(self._buffer))]
                self._hash.update(piece)
                self._written += len(piece)
                if not self._given_up:
                    self._buffer += piece
                self._changed.notify_all()
            view = view[len(piece) :]

    def close(self, within_s: float) -> LogFooter:
        """Send the rest, for at most `within_s`; and say what was written, sent or not. Less than that at the API is a gap."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._given_up or not (self._buffer or self._chunk), within_s)
            if not done or self._given_up:
                log.warning("log.cut", written_bytes=self._written, sent_bytes=self._sent.size_bytes)
            tally = self._sent.copy()
            rest = bytes(self._buffer)
            for data in (self._chunk, *(rest[at : at + MAX_LOG_CHUNK_BYTES] for at in range(0, len(rest), MAX_LOG_CHUNK_BYTES))):
                if data:
                    tally.take(data)
            root = tally.root if tally.size_bytes == self._written else None
            return LogFooter(chunks=tally.chunks, size_bytes=self._written, sha256=self._hash.hexdigest(), root=root)

    def _run(self) -> None:
        while (chunk := self._take()) is not None:
            try:
                self._send(self._sent.chunks, self._sent.size_bytes, chunk)
            except AttemptFenced:
                self._give_up()
                return
            except Unavailable as error:
                log.warning("log.delayed", why=error.message)
                continue
            except MillraceError as error:
                log.error("log.refused", why=error.message)
                self._give_up()
                return
            with self._changed:
                self._sent.take(chunk)
                self._chunk = b""
                self._changed.notify_all()

    def _take(self) -> bytes | None:
        with self._changed:
            if self._chunk:
                return self._chunk
            self._changed.wait_for(lambda: self._buffer or self._closed)
            end = max(self._taken_at + _LINGER_S, time.monotonic() + _SETTLE_S)
            while len(self._buffer) < MAX_LOG_CHUNK_BYTES and not self._closed:
                left_s = end - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            if not self._buffer:
                return None
            self._taken_at = time.monotonic()
            self._chunk = bytes(self._buffer[:MAX_LOG_CHUNK_BYTES])
            del self._buffer[: len(self._chunk)]
            self._changed.notify_all()
            return self._chunk

    def _give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._chunk = b""
            self._buffer.clear()
            self._changed.notify_all()
