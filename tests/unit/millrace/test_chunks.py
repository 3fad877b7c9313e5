"""The list of a log's chunks: every change of list or bytes shows, and the first wrong chunk is named."""

import hashlib
import io

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from millrace.chunks import Chunk, Tally, Unsound, compare, read_list

PIECES = st.lists(st.binary(min_size=1, max_size=50), max_size=8)


def listed(pieces: list[bytes]) -> tuple[list[Chunk], Tally]:
    tally = Tally()
    return [tally.take(piece) for piece in pieces], tally


@given(PIECES)
def test_the_root_is_the_hash_of_the_list(pieces: list[bytes]) -> None:
    chunks, tally = listed(pieces)
    text = b"".join(chunk.line for chunk in chunks)
    assert tally.root == hashlib.sha256(text).hexdigest()
    assert list(read_list(io.BytesIO(text))) == chunks
    again, whole = compare(chunks, io.BytesIO(b"".join(pieces)).read)
    assert (again.chunks, again.size_bytes, again.root) == (len(pieces), len(b"".join(pieces)), tally.root)
    assert whole == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_line_is_as_the_docs_say() -> None:
    chunks, tally = listed([b"hello ", b"world"])
    assert chunks[1].line == b"1 6 5 486ea46224d1bb4fb680f34f7c9ad96a8f24ec88be73ea8e5a6c65260e9cb8a7\n"
    assert tally.root == hashlib.sha256(chunks[0].line + chunks[1].line).hexdigest()


@given(PIECES, st.data())
def test_changed_bytes_name_the_chunk_that_they_are_of(pieces: list[bytes], data: st.DataObject) -> None:
    assume(pieces)
    chunks, _tally = listed(pieces)
    whole = bytearray(b"".join(pieces))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (wrong,) = [chunk for chunk in chunks if chunk.offset <= at < chunk.offset + chunk.size_bytes]
    with pytest.raises(Unsound, match=rf"^chunk {wrong.seq} \(bytes {wrong.offset} to .* is not what its SHA-256 says"):
        compare(chunks, io.BytesIO(whole).read)


@given(PIECES, st.data())
def test_bytes_cut_anywhere_name_the_first_chunk_that_lacks_some(pieces: list[bytes], data: st.DataObject) -> None:
    assume(pieces)
    chunks, tally = listed(pieces)
    end = data.draw(st.integers(0, tally.size_bytes - 1))
    wrong = next(chunk for chunk in chunks if end < chunk.offset + chunk.size_bytes)
    with pytest.raises(Unsound, match=rf"^chunk {wrong.seq} .* is missing, or its end: the bytes stop at {end}"):
        compare(chunks, io.BytesIO(b"".join(pieces)[:end]).read)


def test_more_bytes_than_listed_are_told() -> None:
    chunks, _tally = listed([b"hello ", b"world"])
    with pytest.raises(Unsound, match="more bytes than the 11 of its 2 chunks"):
        compare(chunks, io.BytesIO(b"hello world!").read)


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=2, max_size=8), st.data())
def test_a_line_left_out_is_a_gap_unless_it_was_the_last(pieces: list[bytes], data: st.DataObject) -> None:
    chunks, _tally = listed(pieces)
    gone = data.draw(st.integers(0, len(chunks) - 2))
    with pytest.raises(Unsound, match=f"^chunk {gone} at byte {chunks[gone].offset} is missing from the list"):
        list(read_list(chunk.line for chunk in chunks if chunk.seq != gone))


@pytest.mark.parametrize(
    "line",
    [b"", b"0 0 1\n", b"0 0 1 xyz\n", b"-1 0 1 " + b"0" * 64 + b"\n", b"0 0 1 " + b"0" * 64, b"0 0 1 " + b"A" * 64 + b"\n"],
)
def test_what_is_no_line_is_said(line: bytes) -> None:
    with pytest.raises(Unsound, match=r"^line 1 of the list of chunks is none"):
        list(read_list([line]))
