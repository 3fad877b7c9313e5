"""docs/buildspec.md lists the rules of `millrace lint`; docs/buildspec-support.md every key, and tests that are there."""

import re
from pathlib import Path

from buildenv.speckeys import SECTIONS
from buildenv.specreader import RULES

ROOT = Path(__file__).parents[3]
SUPPORT = (ROOT / "docs" / "buildspec-support.md").read_text()


def test_the_page_lists_every_rule() -> None:
    table = "| name | what it is |\n|---|---|\n" + "".join(f"| `{rule}` | {says} |\n" for rule, says in RULES.items())
    _, _, rest = (ROOT / "docs" / "buildspec.md").read_text().partition("<!-- rules -->\n")
    found, _, _ = rest.partition("<!-- rules end -->")
    assert found == table


def test_the_support_page_names_every_key() -> None:
    keys, _, _ = SUPPORT.partition("## What is easy to get wrong")
    named = {part for words in re.findall(r"`([^`]+)`", keys) for part in words.split(".")}
    wanted = {key for section in SECTIONS.values() for key in section}
    assert wanted - named == set()


def test_the_support_page_has_all_points_and_tests_that_are_there() -> None:
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", SUPPORT, re.MULTILINE)] == list(range(1, 48))
    functions = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    scenarios = {path.parent.name for path in (ROOT / "tests/e2e/scenarios").glob("*/expect.json")}
    for name in re.findall(r"`(test_\w+|\d\d_\w+)`", SUPPORT):
        assert name in functions | scenarios, name
    for row in re.findall(r"^\| \d+ \|.*$", SUPPORT, re.MULTILINE):
        assert row.endswith("` |") or "not yet" in row, row
