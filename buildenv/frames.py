"""The stream of an attached container, taken apart. Pure: bytes in, bytes out.

A container without a terminal sends frames: one byte that names the stream, three zero bytes, the payload's size as four bytes
(big-endian), the payload (Docker Engine API: attach to a container, stream format). docker-py's own readers take a cut stream for
a finished one; this one tells them apart.
"""

import struct
from typing import Final

from millrace.errors import InfraProblem
from millrace.vocabulary import Reason

HEADER: Final = struct.Struct(">BxxxL")
STDERR: Final = 2
ENGINE_ERROR: Final = 3
"""The stream on which the engine itself reports that copying the output failed."""


class Frames:
    """Feed it what came; it gives the payloads, merged in their order. It keeps at most one header, never a payload."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0
        self._stream = 0

    def feed(self, data: bytes) -> bytes:
        """The output bytes in `data`. Raises InfraProblem(ENGINE_LOST) where it is no such stream."""
        out: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left:
                payload = data[at : at + self._left]
                at += len(payload)
                self._left -= len(payload)
                if self._stream == ENGINE_ERROR:
                    raise _broken(f"the engine could not go on copying the output: {payload[:500].decode(errors='replace')}")
                out.append(payload)
                continue
            wanted = HEADER.size - len(self._header)
            self._header += data[at : at + wanted]
            at += wanted
            if len(self._header) == HEADER.size:
                self._begin()
        return out[0] if len(out) == 1 else b"".join(out)

    def _begin(self) -> None:
        stream, self._left = HEADER.unpack(self._header)
        if stream > ENGINE_ERROR or self._header[1:4] != b"\0\0\0":
            raise _broken(f"the container's output is no stream of frames: {self._header!r}")
        self._stream = stream
        self._header = b""

    def end(self) -> None:
        """The connection has ended. Raises InfraProblem(ENGINE_LOST) where that was inside a frame."""
        if self._left or self._header:
            raise _broken("the container's output was cut inside a frame")


def _broken(message: str) -> InfraProblem:
    return InfraProblem(message, reason=Reason.ENGINE_LOST, hint="Look at the Docker engine's own log on the worker's host.")
