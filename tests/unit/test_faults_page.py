"""docs/faults.md says what the last runs found, and names every row of the matrix."""

import json
import re

from tests.chaos.__main__ import DOCS, NOT_RUN, RESULTS, page


def test_the_page_is_made_from_what_was_found() -> None:
    found = json.loads(RESULTS.read_text())
    assert (DOCS / "faults.md").read_text() == page(found)
    assert [name for name, one in found.items() if one["problem"]] == []


def test_every_row_was_run_or_says_why_not() -> None:
    known = {*json.loads(RESULTS.read_text()), *NOT_RUN}
    assert {f"F-{number:02}" for number in range(1, 56)} <= known
    assert all(re.search(r"\w+ \w+", why) for why in NOT_RUN.values())
