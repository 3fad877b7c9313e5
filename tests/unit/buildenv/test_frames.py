"""The attached stream, cut anywhere."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv.frames import Frames
from buildenv.shell import Marks
from millrace.errors import InfraProblem


def framed(payloads: list[bytes]) -> bytes:
    return b"".join(struct.pack(">BxxxL", 1 + n % 2, len(payload)) + payload for n, payload in enumerate(payloads))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(st.lists(st.binary(max_size=300), max_size=10), st.lists(st.integers(0, 3000), max_size=30))
def test_payloads_come_out_whatever_the_cuts(payloads: list[bytes], cuts: list[int]) -> None:
    frames = Frames()
    assert b"".join(frames.feed(piece) for piece in pieces(framed(payloads), cuts)) == b"".join(payloads)
    frames.end()


@given(st.binary(min_size=1, max_size=50), st.integers(1, 57))
def test_an_end_inside_a_frame_is_an_error(payload: bytes, kept: int) -> None:
    data = framed([payload])
    frames = Frames()
    frames.feed(data[: min(kept, len(data) - 1)])
    with pytest.raises(InfraProblem, match="cut inside a frame"):
        frames.end()


@pytest.mark.parametrize("data", [b"\x07\0\0\0\0\0\0\x01x", b"\x01\x01\0\0\0\0\0\x01x", b"HTTP/1.1 500"])
def test_what_is_no_stream_of_frames_is_refused(data: bytes) -> None:
    with pytest.raises(InfraProblem):
        Frames().feed(data)


def test_the_engines_own_error_is_passed_on() -> None:
    with pytest.raises(InfraProblem, match="disk is full"):
        Frames().feed(struct.pack(">BxxxL", 3, 12) + b"disk is full")


@given(st.binary(max_size=400), st.binary(max_size=100), st.lists(st.integers(0, 600), max_size=40))
def test_a_mark_is_found_and_no_byte_of_output_is_lost(before: bytes, behind: bytes, cuts: list[int]) -> None:
    nonce = "0123456789abcdef"
    mark = b"\x1e" + nonce.encode() + b" 4 17\x1e"
    marks = Marks(nonce)
    said, word = b"", None
    for piece in pieces(before + mark + behind, cuts):
        if word is not None:
            break
        output, word = marks.feed(piece, 4)
        said += output
    assert (said, word) == (before, "17")


@given(st.lists(st.sampled_from([b"\x1e", b"0123", b"\x1e0123", b"\x1eabcd 1 0\x1e", b"abcd", b" ", b"x"]), max_size=30))
def test_what_only_looks_like_a_mark_passes(parts: list[bytes]) -> None:
    marks = Marks("abcde")
    said = b"".join(marks.feed(part, 1)[0] for part in parts) + marks.rest()
    assert said == b"".join(parts)
