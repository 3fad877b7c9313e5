"""Odd input to the readers of buildspecs, path patterns and output streams: nothing but our own errors, and bounded work.

A hundred tries each here; `make fuzz` takes twenty thousand.
"""

import contextlib
import fnmatch
import json
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from buildenv.buildspec import Buildspec, looks_inline, parse
from buildenv.frames import HEADER, Frames
from buildenv.globs import matches
from buildenv.specreader import MAX_FOUND
from buildenv.yamltree import MAX_NODES
from millrace.errors import BadBuildspec, InfraProblem
from tests.support.buildspecs import odd_buildspecs

MOST_CALLS = 60 * MAX_NODES
MOST_CHARS = 2 * MAX_FOUND * 1300


class TooManyCalls(Exception):
    """More work than the limits of the language allow for."""


@contextlib.contextmanager
def few_calls() -> Iterator[None]:
    """Raises TooManyCalls where what is inside calls more functions than a bounded reader may: a clock that no load disturbs."""
    left = MOST_CALLS
    before = sys.getprofile()

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooManyCalls

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def check(text: str | bytes, *, counted: bool = False) -> None:
    """Reads `text`, and looks that what comes of it keeps the promises of `parse`."""
    with few_calls() if counted else contextlib.nullcontext():
        try:
            spec = parse(text)
            problems, warnings = (), spec.warnings
            assert isinstance(spec, Buildspec)
        except BadBuildspec as bad:
            problems, warnings = bad.problems, bad.warnings
            assert problems
    lines = len(text) + 1
    assert len(problems) <= MAX_FOUND and len(warnings) <= MAX_FOUND
    said = [str(one) for one in (*problems, *warnings)]
    assert all(one.isprintable() for one in said) and sum(map(len, said)) <= MOST_CHARS
    assert all(1 <= one.line <= lines and one.column >= 1 for one in (*problems, *warnings))


@given(st.text() | st.text(alphabet="abc:-[]{}&*!|>'\"\n \t#0.2%@,?<~\\\x85\u2028\u202e") | st.binary())
def test_any_text(text: str | bytes) -> None:
    check(text)
    if isinstance(text, str):
        looks_inline(text)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document)


def _indented_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent="\t")


def _block(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, allow_unicode=True, default_flow_style=False)


def _short(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, width=20, indent=1)


WRITERS = st.sampled_from([_json, _indented_json, _block, _short])


@given(odd_buildspecs(), WRITERS)
def test_nearly_right_buildspecs(document: dict[str, Any], write: Any) -> None:
    check(write(document))


@given(
    odd_buildspecs(),
    WRITERS,
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), st.text(alphabet="-:*&<[]{}'\"|> \n\t\0a\u202e", max_size=4)), max_size=4
    ),
)
def test_nearly_right_text(document: dict[str, Any], write: Any, edits: list[tuple[float, int, str]]) -> None:
    text = write(document)
    for where, removed, added in edits:
        at = int(where * len(text))
        text = text[:at] + added + text[at + removed :]
    check(text)


@given(odd_buildspecs(), st.binary(min_size=1, max_size=3), st.floats(0, 1))
def test_nearly_right_bytes(document: dict[str, Any], noise: bytes, where: float) -> None:
    data = _block(document).encode()
    at = int(where * len(data))
    check(data[:at] + noise + data[at:])


ANCHORED = st.recursive(
    st.sampled_from(["*a", "*b", "*c", "x", "<<: *a", "<<: [*a, *b]", "commands: *b", "~"]),
    lambda inner: st.tuples(
        st.sampled_from(["", "&a ", "&b ", "&c "]), st.sampled_from(["[]", "{}"]), st.lists(inner, min_size=1, max_size=9)
    ).map(lambda made: f"{made[0]}{made[1][0]}{', '.join(made[2])}{made[1][1]}"),
    max_leaves=60,
)


@given(st.lists(st.tuples(st.sampled_from(["env", "phases", "reports", "batch", "cache", "x"]), ANCHORED), max_size=12))
def test_anchors_and_aliases_everywhere(sections: list[tuple[str, str]]) -> None:
    check("version: 0.2\n" + "".join(f"{name}: {value}\n" for name, value in sections), counted=True)


@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from(["[{}]", "{{files: {}}}", "{{<<: [{}]}}"]))
def test_wide_lists_of_aliases(wide: int, aliases: int, shape: str) -> None:
    many = ", ".join(f"A{number}: {{files: 1}}" for number in range(wide))
    sections = "".join(f"k{number}: {shape.format('*v')}\n" for number in range(aliases))
    check(f"version: 0.2\nreports: &v {{{many}}}\n{sections}", counted=True)


PARTS = st.text(alphabet="ab-!]*?[.^", min_size=1, max_size=7).filter(lambda part: "[^" not in part)
NAMES = st.text(alphabet="ab-!]*?[.^", min_size=1, max_size=7).filter(lambda name: name != ".")


def by_definition(glob: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """What a pattern means, said as plainly as can be: component by component, each by Python's own fnmatch."""

    @cache
    def at(part: int, name: int) -> bool:
        if part == len(glob):
            return name == len(path)
        if glob[part] == "**":
            if part == len(glob) - 1:
                return name < len(path)
            return at(part + 1, name) or (name < len(path) and at(part, name + 1))
        return name < len(path) and fnmatch.fnmatchcase(path[name], glob[part]) and at(part + 1, name + 1)

    return at(0, 0)


@given(
    st.lists(PARTS.filter(lambda part: part != ".") | st.just("**"), min_size=1, max_size=6),
    st.lists(NAMES, min_size=1, max_size=8),
)
def test_patterns_mean_what_the_definition_says(glob: list[str], path: list[str]) -> None:
    assert matches("/".join(glob), "/".join(path)) == by_definition(tuple(glob), tuple(path))


@given(st.text(), st.text())
def test_any_pattern_and_any_path(glob: str, path: str) -> None:
    assert matches(glob, path) in (True, False)


@given(st.text(alphabet="a*?/[]", max_size=600), st.text(alphabet="a/", max_size=300))
def test_patterns_made_to_be_slow_are_bounded(glob: str, path: str) -> None:
    with few_calls():
        matches(glob, path)


def read(data: bytes, cuts: list[int]) -> tuple[bytes, bool]:
    """What frames `data` holds, fed in pieces; and whether it is a whole stream of frames."""
    frames = Frames()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    out = b""
    try:
        for begin, end in zip([0, *ends], ends, strict=False):
            out += frames.feed(data[begin:end])
            assert len(frames._header) < HEADER.size
        frames.end()
    except InfraProblem:
        return out, False
    return out, True


FRAME = st.tuples(st.integers(0, 3), st.integers(0, 2**32 - 1) | st.integers(0, 9), st.binary(max_size=9)).map(
    lambda made: HEADER.pack(made[0], made[1]) + made[2]
)


@given(st.binary(max_size=200) | st.lists(FRAME, max_size=8).map(b"".join), st.lists(st.integers(0, 200), max_size=20))
def test_any_bytes_as_a_stream_of_frames(data: bytes, cuts: list[int]) -> None:
    out, whole = read(data, cuts)
    assert len(out) <= len(data)
    at_once, is_whole = read(data, [])
    assert whole == is_whole
    if whole:
        assert out == at_once
