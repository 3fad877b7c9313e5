"""Packed chunks come out as they went in, and a frame that lies is told from one that does not."""

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from millrace import packing

MOST = 2 * 1024 * 1024


@given(st.binary(max_size=5000), st.integers(1, 300))
def test_what_is_packed_comes_out_as_it_was(data: bytes, times: int) -> None:
    assert packing.unpack(packing.pack(data * times), MOST) == data * times
    packed = packing.smaller(data * times)
    assert packed is None or (len(packed) < len(data * times) and packing.unpack(packed, MOST) == data * times)


def test_a_few_bytes_and_what_does_not_get_smaller_are_left_alone() -> None:
    assert packing.smaller(b"x" * 100) is None
    assert packing.smaller(random.Random(1).randbytes(10_000)) is None


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"plain text",
        packing.MAGIC,
        packing.pack(b"x" * 10_000)[:-1],
        packing.pack(b"x" * 10_000) + b"more",
        packing.pack(b"x" * 10_000) * 2,
        packing.pack(b"x" * (MOST + 1)),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 10_000),
    ],
    ids=["empty", "plain", "magic", "cut", "more behind it", "two", "too large", "tells no size"],
)
def test_a_bad_frame_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="it "):
        packing.unpack(packed, MOST)
