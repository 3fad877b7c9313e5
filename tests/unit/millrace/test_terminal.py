"""Build output cannot take the terminal over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.commands import terminal
from millrace.commands.terminal import duration, harmless, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü \t text", "plain ü \t text"),
        ("\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]52;c;c2VjcmV0\x1b\\after", "after"),
        ("\x1b[2Jcleared\x1b[1;1H", "cleared"),
        ("\x1bPdevice\x1b\\x", "x"),
        ("a\x08b\x00c\x7f\x9b", "abc"),
        ("\u202eturned\u202c", "turned"),
    ],
)
def test_only_colours_pass(text: str, expected: str) -> None:
    assert harmless(text, colours=True) == expected


@given(st.text(alphabet=st.sampled_from("\x1b[]0;mPX^_\\\x07\x08\u202eab12HJ")))
def test_no_escape_but_a_colour_is_left(text: str) -> None:
    assert "\x1b" not in harmless(text, colours=False)


def test_numbers_for_people() -> None:
    assert [duration(ms) for ms in (None, 5, 1500, 61_000)] == ["", "5 ms", "1.5 s", "1 min 1 s"]
    assert [size(n) for n in (5, 2048, 3 * 1024**3)] == ["5 B", "2.0 KiB", "3.0 GiB"]


def test_the_ledgers_stages_add_up_to_the_whole() -> None:
    marks = {
        "accepted": 1000,
        "claimed": 1010,
        "attempt_started": 1020,
        "first_command": 1100,
        "last_command": 3100,
        "verdict": 3150,
    }
    assert terminal.ledger(marks) == "queue 10 ms, process 10 ms, first command 80 ms, commands 2.0 s, artifacts and caches 50 ms"
    assert terminal.ledger({"accepted": 1000}) == ""
    assert terminal.ledger({}) == ""
