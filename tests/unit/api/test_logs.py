"""Where a log may be cut for an event: never inside a character."""

from hypothesis import given
from hypothesis import strategies as st

from api.logs import whole_characters


@given(st.text(), st.integers(0, 50))
def test_a_cut_never_splits_a_character_and_loses_nothing(text: str, at: int) -> None:
    data = text.encode(errors="ignore")
    first = whole_characters(data[:at])
    first.decode()
    assert data.startswith(first)
    assert len(data[:at]) - len(first) < 4


@given(st.binary())
def test_bytes_that_are_no_text_pass_too(data: bytes) -> None:
    kept = whole_characters(data)
    assert data.startswith(kept)
    assert len(data) - len(kept) < 4


def test_what_is_no_utf8_is_not_held_back_for_ever() -> None:
    assert whole_characters(b"\x80\x80\x80\x80\x80") == b"\x80\x80\x80\x80\x80"
    assert whole_characters(b"a\xff") == b"a"
