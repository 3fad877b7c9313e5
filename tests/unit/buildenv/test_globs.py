"""Path patterns, by table, and against a plain model of what they mean."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv.globs import matches


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("**/*", "a", True),
        ("**/*", "a/b/c", True),
        ("**/*", ".hidden", True),
        ("**/*", "a/.git/config", True),
        ("**", "a/b", True),
        ("*", "a", True),
        ("*", "a/b", False),
        ("dir/*", "dir/a", True),
        ("dir/*", "dir/sub/a", False),
        ("dir/**/*", "dir/a", True),
        ("dir/**/*", "dir/sub/deep/a", True),
        ("dir/**/*", "other/a", False),
        ("./dir/a.txt", "dir/a.txt", True),
        ("dir//a", "dir/a", True),
        ("*.js", "x.js", True),
        ("*.js", "x.jsx", False),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("[ab].txt", "a.txt", True),
        ("[!ab].txt", "c.txt", True),
        ("[!ab].txt", "a.txt", False),
        ("[a-c]x", "bx", True),
        ("**/.*", ".env", True),
        ("**/.*", "a/.env", True),
        ("**/.*", "a/env", False),
        ("**/.*/**/*", ".git/x/y", True),
        ("**/node_modules/**/*", "a/node_modules/b/c", True),
        ("a.b", "axb", False),
        ("[a-cx]y", "xy", True),
        ("[a-]", "-", True),
        ("[a--b]", "b", True),
        ("[z-a]", "m", False),
        ("[[]a]", "[a]", True),
        ("[]]", "]", True),
        ("[*]", "*", True),
        ("[*]", "a", False),
        ("[!]]", "a", True),
        ("[^a]", "a", False),
        ("[!]", "[!]", True),
        ("a]b", "a]b", True),
        ("a[b", "a[b", True),
        ("a+b(c)", "a+b(c)", True),
        ("a", "a/b", False),
        ("é*", "été", True),
    ],
)
def test_a_pattern_means_what_codebuild_documents(glob: str, path: str, expected: bool) -> None:
    assert matches(glob, path) is expected


def _model(glob: list[str], path: list[str]) -> bool:
    """The meaning, said as plainly as can be: component by component."""
    if not glob:
        return not path
    if glob[0] == "**":
        if len(glob) == 1:
            return bool(path)
        return _model(glob[1:], path) or (bool(path) and _model(glob, path[1:]))
    return bool(path) and fnmatch.fnmatchcase(path[0], glob[0]) and _model(glob[1:], path[1:])


_PART = st.sampled_from(["a", "b", "ab", ".a", "a.b"])
_GLOB = st.sampled_from(["a", "b", "*", "**", "a*", "*.b", "?", ".*", "[ab]"])


@given(st.lists(_GLOB, min_size=1, max_size=5), st.lists(_PART, min_size=1, max_size=5))
def test_it_agrees_with_the_plain_model(glob: list[str], path: list[str]) -> None:
    assert matches("/".join(glob), "/".join(path)) == _model(glob, path)


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_pattern_raises(glob: str, path: str) -> None:
    matches(glob, path)


def test_a_hostile_pattern_is_not_slow() -> None:
    assert not matches("/".join(["**"] * 30 + ["x"]), "/".join(["a"] * 60))
    assert not matches("*a" * 25 + "b", "a" * 60)
