"""Chunks of a log, compressed on their way and in the database: a zstd frame that tells its size. Pure: bytes in, bytes out."""

from typing import Final

import zstandard

MAGIC: Final = zstandard.FRAME_HEADER
_LEVEL: Final = 1
_LEAST_BYTES: Final = 4096
"""Less is not worth the while."""


class Packed(bytes):
    """Bytes that `pack` made, and `unpack` knows to be good."""


def pack(data: bytes) -> Packed:
    """`data` as a frame."""
    return Packed(zstandard.ZstdCompressor(level=_LEVEL).compress(data))


def smaller(data: bytes) -> Packed | None:
    """`data` as a frame, where that makes it fewer bytes."""
    packed = pack(data) if len(data) >= _LEAST_BYTES else None
    return packed if packed is not None and len(packed) < len(data) else None


def unpack(packed: bytes, most: int) -> bytes:
    """What is in a frame, and nothing behind it, of at most `most` bytes. Raises ValueError; never makes more bytes than that."""
    try:
        size = zstandard.get_frame_parameters(packed).content_size
        if size > most:  # as is the size of a frame that does not tell it
            raise ValueError(f"it does not say that it unpacks to at most {most} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
