"""docs/performance.md says what the last measurements found, and no more than they do."""

import signal
from collections.abc import Iterator

import pytest

from tests.benchmarks import report
from tests.benchmarks.bench import DOCS, PARTS, carry, heard, page, read
from tests.benchmarks.samples import Sample, Scale


def test_the_page_and_its_plots_are_made_from_what_was_found() -> None:
    rows, about = read()
    assert (DOCS / "performance.md").read_text() == page(rows, about)
    drawn = report.pictures([one for _part, one in rows])
    assert {path.name: path.read_text() for path in DOCS.glob("performance-*.svg")} == drawn
    assert {part for part, _one in rows} == set(about) <= set(PARTS)


def _breaks(scale: Scale) -> Iterator[Sample]:
    scale.about("two of three")
    for value in (1.0, 2.0):
        yield Sample(what="a measure", who="Millrace", value=value, unit="s")
    raise RuntimeError("the third is gone")


def test_a_part_that_fails_keeps_the_samples_that_it_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PARTS, "parser", _breaks)
    with pytest.raises(RuntimeError):
        carry("parser", quick=True)
    output = capsys.readouterr().out
    samples, about = heard(f"what else it said\n{output}", 1)
    assert [one.value for one in samples] == [1.0, 2.0]
    assert about == {"about": ["two of three"], "incomplete": "RuntimeError: the third is gone"}
    about |= {"commit": "x", "machine": "y", "took_s": 1}
    assert "**Incomplete**: it ended before its time (RuntimeError: the third is gone)" in page(
        [("parser", one) for one in samples], {"parser": about}
    )
    _samples, killed = heard(output.rpartition("bench: ")[0], -signal.SIGKILL)
    assert killed["incomplete"] == "it ended with status -9"
