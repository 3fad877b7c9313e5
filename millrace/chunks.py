"""What makes a log provable: the list of its chunks, one line each, and the list's SHA-256, which is the log's root.

A line is `SEQ OFFSET SIZE SHA256` and a newline: numbers in decimal from 0, bytes, and the hash of the chunk's bytes in hex.
So whoever holds the list can say which chunk is wrong, and `sha256sum` of the list is the root.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Self

_LINE: Final = re.compile(rb"([0-9]{1,9}) ([0-9]{1,18}) ([0-9]{1,9}) ([0-9a-f]{64})\n")


class Unsound(Exception):
    """Bytes and list do not fit each other; the message names the first chunk that is wrong."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One line of the list."""

    seq: int
    offset: int
    size_bytes: int
    sha256: str

    @property
    def line(self) -> bytes:
        """As it stands in the list."""
        return f"{self.seq} {self.offset} {self.size_bytes} {self.sha256}\n".encode()


class Tally:
    """A list of chunks as it grows: how many, how many bytes, and the root so far."""

    def __init__(self) -> None:
        self.chunks, self.size_bytes = 0, 0
        self._hash = hashlib.sha256()

    def next(self, data: bytes) -> Chunk:
        """What the next chunk is, if it is made of `data`."""
        return Chunk(self.chunks, self.size_bytes, len(data), hashlib.sha256(data).hexdigest())

    def take(self, data: bytes) -> Chunk:
        """The next chunk, made of `data`."""
        chunk = self.next(data)
        self.add(chunk)
        return chunk

    def add(self, chunk: Chunk) -> None:
        """The next chunk, as it is listed."""
        self.chunks += 1
        self.size_bytes += chunk.size_bytes
        self._hash.update(chunk.line)

    @property
    def root(self) -> str:
        """The SHA-256 of the list so far."""
        return self._hash.hexdigest()

    def copy(self) -> Self:
        """Another that grows by itself."""
        other = type(self)()
        other.chunks, other.size_bytes, other._hash = self.chunks, self.size_bytes, self._hash.copy()
        return other


def read_list(lines: Iterable[bytes]) -> Iterator[Chunk]:
    """The chunks of a list, joined up from 0. Raises Unsound where a line is none, or leaves a gap."""
    end = 0
    for number, line in enumerate(lines):
        found = _LINE.fullmatch(line)
        if found is None:
            raise Unsound(f"line {number + 1} of the list of chunks is none: {line[:100]!r}")
        chunk = Chunk(int(found[1]), int(found[2]), int(found[3]), found[4].decode())
        if (chunk.seq, chunk.offset) != (number, end):
            raise Unsound(f"chunk {number} at byte {end} is missing from the list, chunk {chunk.seq} follows at {chunk.offset}")
        end += chunk.size_bytes
        yield chunk


def compare(listed: Iterable[Chunk], read: Callable[[int], bytes]) -> tuple[Tally, str]:
    """The tally and the whole SHA-256 of bytes that are just what the list says; `read` is a file's. Else raises Unsound."""
    tally, whole = Tally(), hashlib.sha256()
    for chunk in listed:
        data = _exactly(read, chunk.size_bytes)
        where = f"chunk {chunk.seq} (bytes {chunk.offset} to {chunk.offset + chunk.size_bytes})"
        if len(data) < chunk.size_bytes:
            raise Unsound(f"{where} is missing, or its end: the bytes stop at {chunk.offset + len(data)}")
        if tally.take(data) != chunk:
            raise Unsound(f"{where} is not what its SHA-256 says")
        whole.update(data)
    if read(1):
        raise Unsound(f"there are more bytes than the {tally.size_bytes} of its {tally.chunks} chunks")
    return tally, whole.hexdigest()


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    parts = []
    while size > 0 and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
