"""No cut of the stream lets a secret through, and nothing else is changed."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv.redact import MASK, Redactor, too_short

TEXTS = st.text(alphabet='abAB+/ =%\n"é', min_size=4, max_size=12).filter(lambda text: not too_short(text))


def at_once(values: list[str], data: bytes) -> bytes:
    redactor = Redactor(values)
    return redactor.feed(data) + redactor.flush()


@given(
    values=st.lists(TEXTS, max_size=4),
    parts=st.lists(st.one_of(st.binary(max_size=6), TEXTS.map(str.encode)), max_size=12),
    use=st.lists(st.integers(0, 3), max_size=6),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_cuts_change_nothing(values: list[str], parts: list[bytes], use: list[int], cuts: list[int]) -> None:
    data = b"".join(parts) + b"".join(values[i].encode() for i in use if i < len(values))
    redactor = Redactor(values)
    said, at = b"", 0
    for cut in sorted(cut for cut in cuts if cut <= len(data)):
        said += redactor.feed(data[at:cut])
        at = cut
    said += redactor.feed(data[at:]) + redactor.flush()
    assert said == at_once(values, data)
    for value in values:
        assert value.strip("\r\n").encode() not in said or value.strip("\r\n").encode() in MASK * 20


SECRET = 'p@ss "wörd"/+x'


@pytest.mark.parametrize("before", ["", "u", "us", "user:"])
def test_base64_is_found_wherever_the_secret_begins(before: str) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        shown = at_once([SECRET], encode(f"{before}{SECRET}:more".encode()))
        assert MASK in shown
        assert base64.b64encode(SECRET.encode())[4:12] not in shown


def test_other_spellings_are_found() -> None:
    for text in (SECRET, quote(SECRET, safe=""), json.dumps(SECRET), json.dumps(SECRET, ensure_ascii=False)):
        assert at_once([SECRET], f"<{text}>".encode()).replace(b'"', b"") == b"<***>", text


def test_each_line_of_a_long_secret_is_hidden() -> None:
    key = "-----BEGIN KEY-----\nabcdefghij\nklm\n-----END KEY-----\n"
    assert at_once([key], b"x\nabcdefghij\nklm\n") == b"x\n***\nklm\n"
    assert at_once([key], key.encode()) == b"***\n"


def test_what_is_short_stays_and_access_key_ids_go() -> None:
    assert at_once(["abc"], b"abcabc") == b"abcabc"
    assert too_short("abc")
    assert at_once([], b"id AKIAIOSFODNN7EXAMPLE.") == b"id ***."
    redactor = Redactor([])
    assert redactor.feed(b"id AKIAIOSF") + redactor.feed(b"ODNN7EXAMPLE") + redactor.flush() == b"id ***"


def test_only_what_may_be_a_secret_is_held_back() -> None:
    redactor = Redactor(["hunter22"])
    assert redactor.feed(b"Password: ") == b"Password: "
    assert redactor.feed(b"hunt") == b""
    assert redactor.feed(b"ing") == b"hunting"
