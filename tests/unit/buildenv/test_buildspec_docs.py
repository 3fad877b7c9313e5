"""docs/buildspec.md lists the rules of `millrace lint` as they are."""

from pathlib import Path

from buildenv.specreader import RULES

PAGE = Path(__file__).parents[3] / "docs" / "buildspec.md"


def test_the_page_lists_every_rule() -> None:
    table = "| name | what it is |\n|---|---|\n" + "".join(f"| `{rule}` | {says} |\n" for rule, says in RULES.items())
    _, _, rest = PAGE.read_text().partition("<!-- rules -->\n")
    found, _, _ = rest.partition("<!-- rules end -->")
    assert found == table
