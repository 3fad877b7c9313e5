"""No cut of the stream lets a secret through, and nothing else is changed."""

import base64
import json
import random
import string
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv.redact import MASK, MAX_PATTERN_BYTES, Redactor, not_hidden, too_short

FEW_LETTERS = st.text(alphabet='abAKI+/ =%\n"é', min_size=4, max_size=12).filter(lambda text: not too_short(text))
WORDS = st.text(alphabet=string.ascii_letters + string.digits + "-_/+=", min_size=8, max_size=40)
CUTS = st.lists(st.integers(0, 400), max_size=30)


def at_once(values: list[str], data: bytes) -> bytes:
    redactor = Redactor(values)
    return redactor.feed(data) + redactor.flush()


def cut_up(values: list[str], data: bytes, cuts: list[int]) -> bytes:
    redactor = Redactor(values)
    said, at = b"", 0
    for cut in sorted(cut for cut in cuts if cut <= len(data)):
        said += redactor.feed(data[at:cut])
        at = cut
    return said + redactor.feed(data[at:]) + redactor.flush()


def plainly(values: list[str], data: bytes) -> bytes:
    """What the redactor is to do for values of one line, written down without any cleverness."""
    forms = {text.encode() for value in values for text in (value, quote(value, safe=""), json.dumps(value)[1:-1])}
    spans = []
    for form in forms:
        at = data.find(form)
        while at >= 0:
            spans.append((at, at + len(form)))
            at = data.find(form, at + 1)
    said, at = b"", 0
    for start, end in sorted(spans):
        if start >= at:
            said += data[at:start] + MASK
        at = max(at, end)
    return said + data[at:]


@given(
    values=st.lists(FEW_LETTERS, max_size=4),
    parts=st.lists(st.one_of(st.binary(max_size=6), FEW_LETTERS.map(str.encode)), max_size=12),
    use=st.lists(st.integers(0, 3), max_size=6),
    cuts=CUTS,
)
def test_cuts_change_nothing(values: list[str], parts: list[bytes], use: list[int], cuts: list[int]) -> None:
    data = b"".join(parts) + b"".join(values[i].encode() for i in use if i < len(values))
    said = cut_up(values, data, cuts)
    assert said == at_once(values, data)
    for value in values:
        assert value.strip("\r\n").encode() not in said or value.strip("\r\n").encode() in MASK * 20


@given(
    values=st.lists(st.text(alphabet="abc", min_size=4, max_size=6), max_size=4),
    data=st.text(alphabet="abc.", max_size=120),
    cuts=CUTS,
)
def test_what_is_hidden_is_every_byte_of_a_secret_and_no_other(values: list[str], data: str, cuts: list[int]) -> None:
    assert cut_up(values, data.encode(), cuts) == plainly(values, data.encode())


SPELLINGS = {
    "raw": str.encode,
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64, one byte in": lambda text: base64.b64encode(b":" + text.encode()),
    "base64, two bytes in": lambda text: base64.b64encode(b"u:" + text.encode()),
    "url-safe base64": lambda text: base64.urlsafe_b64encode(b"u:" + text.encode()),
    "base64 in lines": lambda text: base64.encodebytes(text.encode()),
    "url-encoded": lambda text: quote(text, safe="").encode(),
    "form-encoded": lambda text: quote_plus(text).encode(),
    "JSON": lambda text: json.dumps({"password": text}).encode(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(value=WORDS, before=st.binary(max_size=20), after=st.binary(max_size=20), cuts=CUTS)
def test_no_spelling_of_a_secret_comes_through(spelling: str, value: str, before: bytes, after: bytes, cuts: list[int]) -> None:
    said = cut_up([value], before + SPELLINGS[spelling](value) + after, cuts)
    assert MASK in said
    for form in (value.encode(), quote(value, safe="").encode(), base64.b64encode(value.encode())[:-4]):
        assert form not in said.replace(MASK, b"") or form in before + after


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_a_long_secret_is_hidden_as_one_and_little_is_held_back(size: int) -> None:
    value = "".join(random.Random(size).choices(string.printable + "é", k=4000)).strip()
    data = b"<" + value.encode() + b">"
    redactor = Redactor([value])
    said = b""
    for at in range(0, len(data), size):
        said += redactor.feed(data[at : at + size])
        assert len(redactor._held) < MAX_PATTERN_BYTES
    assert said + redactor.flush() == b"<***>"


SECRET = 'p@ss "wörd"/+x'


@pytest.mark.parametrize("before", ["", "u", "us", "user:"])
def test_base64_is_found_wherever_the_secret_begins(before: str) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        shown = at_once([SECRET], encode(f"{before}{SECRET}:more".encode()))
        assert MASK in shown
        assert base64.b64encode(SECRET.encode())[4:12] not in shown


@pytest.mark.parametrize("width", [64, 76])
def test_base64_in_lines_is_found(width: int) -> None:
    encoded = base64.b64encode((SECRET * 20).encode())
    lines = [encoded[at : at + width] for at in range(0, len(encoded), width)]
    assert at_once([SECRET * 20], b"\n".join(lines)).count(MASK) == len(lines)


def test_base64_twice_is_not_found() -> None:
    twice = base64.b64encode(base64.b64encode(SECRET.encode()))
    assert at_once([SECRET], twice) == twice


def test_other_spellings_are_found() -> None:
    for text in (SECRET, quote(SECRET), quote(SECRET, safe=""), json.dumps(SECRET), json.dumps(SECRET, ensure_ascii=False)):
        assert at_once([SECRET], f"<{text}>".encode()).replace(b'"', b"") == b"<***>", text


def test_each_line_of_a_long_secret_is_hidden() -> None:
    key = "-----BEGIN KEY-----\n  abcdefghij\r\nklm\n-----END KEY-----\n"
    assert at_once([key], b"x\nabcdefghij\nklm\n") == b"x\n***\nklm\n"
    assert at_once([key], key.encode()) == b"***\n"


def test_of_secrets_that_overlap_nothing_is_left() -> None:
    assert at_once(["admin:pass", "password-1"], b"<admin:password-1>") == b"<***>"
    assert at_once(["aaaa"], b"<aaaaaaa>") == b"<***>"


def test_secrets_that_end_one_another_take_no_more_room_than_the_text() -> None:
    nested = "\n".join("a" * size for size in range(6, 360))
    shown = at_once([nested], b"a" * 200_000 + b"b")
    assert shown == b"***b"


def test_what_is_short_stays_and_access_key_ids_go() -> None:
    assert at_once(["abc"], b"abcabc") == b"abcabc"
    assert too_short("abc")
    assert not_hidden({"B": "abc", "A": " 1 ", "EMPTY": "", "LONG": "abcd"}) == ["A", "B"]
    for key_id in (b"AKIAIOSFODNN7EXAMPLE", b"ASIAIOSFODNN7EXAMPLE"):
        assert at_once([], b"id " + key_id + b".") == b"id ***."
        assert cut_up([], b"id " + key_id, list(range(24))) == b"id ***"
    assert at_once([], b"AKIA is no id") == b"AKIA is no id"


def test_only_what_may_be_a_secret_is_held_back() -> None:
    redactor = Redactor(["hunter22"])
    assert redactor.feed(b"Password: ") == b"Password: "
    assert redactor.feed(b"hunt") == b""
    assert redactor.feed(b"ing") == b"hunting"
    assert redactor.feed(b"hunter22") == b"***"
