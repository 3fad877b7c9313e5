"""A build's log on its way to the API: numbered chunks, in order, with bounded memory, a hash over everything and a root."""

import contextvars
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from millrace.chunks import Chunk, Tally
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
_PIECE_BYTES: Final = 256 * 1024
"""A larger write is cut, so that what is held is never much more than that."""

_SMALL_BYTES: Final = 16 * 1024


class LogShipper:
    """Takes the log from the build's thread and sends it from its own. `send(chunk, data)` blocks and raises ours.

    What is written is kept as it came, small pieces together, and joined and hashed a chunk at a time.
    """

    def __init__(self, send: Callable[[Chunk, bytes], None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._pieces: deque[bytes | bytearray] = deque()
        self._held = 0
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
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            with self._changed:
                if self._held >= _BUFFER_BYTES:
                    self._changed.wait_for(lambda: self._held < _BUFFER_BYTES or self._given_up)
                self._written += len(piece)
                if self._given_up:
                    self._hash.update(piece)
                    continue
                if len(piece) >= _SMALL_BYTES:
                    self._pieces.append(piece)
                elif self._pieces and isinstance(last := self._pieces[-1], bytearray) and len(last) < _PIECE_BYTES:
                    last += piece
                else:
                    self._pieces.append(bytearray(piece))
                self._held += len(piece)
                if len(self._pieces) == 1 or self._held >= MAX_LOG_CHUNK_BYTES:  # else nobody waits for it
                    self._changed.notify_all()

    def close(self, within_s: float) -> LogFooter:
        """Send the rest, for at most `within_s`; and say what was written, sent or not. Less than that at the API is a gap."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: self._given_up or not (self._pieces or self._chunk), within_s)
            if not done or self._given_up:
                log.warning("log.cut", written_bytes=self._written, sent_bytes=self._sent.size_bytes)
            tally, whole = self._sent.copy(), self._hash.copy()
            if self._chunk:
                tally.take(self._chunk)
            rest = b"".join(self._pieces)
            whole.update(rest)
            for at in range(0, len(rest), MAX_LOG_CHUNK_BYTES):
                tally.take(rest[at : at + MAX_LOG_CHUNK_BYTES])
            root = tally.root if tally.size_bytes == self._written else None
            return LogFooter(chunks=tally.chunks, size_bytes=self._written, sha256=whole.hexdigest(), root=root)

    def _run(self) -> None:
        while (data := self._take()) is not None:
            chunk = self._sent.next(data)
            try:
                self._send(chunk, data)
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
                self._sent.add(chunk)
                self._chunk = b""
                self._changed.notify_all()

    def _take(self) -> bytes | None:
        with self._changed:
            if self._chunk:
                return self._chunk
            self._changed.wait_for(lambda: self._pieces or self._closed)
            end = max(self._taken_at + _LINGER_S, time.monotonic() + _SETTLE_S)
            while self._held < MAX_LOG_CHUNK_BYTES and not self._closed:
                left_s = end - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            if not self._pieces:
                return None
            self._taken_at = time.monotonic()
            self._chunk = self._joined()
            self._hash.update(self._chunk)
            self._changed.notify_all()
            return self._chunk

    def _joined(self) -> bytes:
        """The next chunk; the last of its pieces is cut where they are more than that."""
        parts: list[bytes | bytearray] = []
        left = MAX_LOG_CHUNK_BYTES
        while left and self._pieces:
            piece = self._pieces.popleft()
            if len(piece) > left:
                self._pieces.appendleft(piece[left:])
                piece = piece[:left]
            parts.append(piece)
            left -= len(piece)
        self._held -= MAX_LOG_CHUNK_BYTES - left
        return b"".join(parts)

    def _give_up(self) -> None:
        with self._changed:
            self._given_up = True
            self._chunk = b""
            for piece in self._pieces:
                self._hash.update(piece)
            self._pieces.clear()
            self._held = 0
            self._changed.notify_all()
