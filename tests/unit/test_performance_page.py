"""docs/performance.md says what the last measurements found, and no more than they do."""

from tests.benchmarks import report
from tests.benchmarks.bench import DOCS, PARTS, page, read


def test_the_page_and_its_plots_are_made_from_what_was_found() -> None:
    rows, about = read()
    assert (DOCS / "performance.md").read_text() == page(rows, about)
    drawn = report.pictures([one for _part, one in rows])
    assert {path.name: path.read_text() for path in DOCS.glob("performance-*.svg")} == drawn
    assert {part for part, _one in rows} == set(about) <= set(PARTS)
