"""Path patterns, by table; test_fuzz.py holds them against a plain model of what they mean."""

import pytest

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


def test_a_hostile_pattern_is_not_slow() -> None:
    assert not matches("/".join(["**"] * 30 + ["x"]), "/".join(["a"] * 60))
    assert not matches("*a" * 25 + "b", "a" * 60)
