"""Every wrong buildspec of tests/badinput/buildspec.yaml is refused, warned of or taken, in the words that stand there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from buildenv.buildspec import Buildspec, parse
from millrace.errors import BadBuildspec
from millrace.vocabulary import PhaseType

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parents[2] / "badinput" / "buildspec.yaml").read_text())
FINE = "version: 0.2\nphases:\n  build:\n    commands:\n      - echo hello\n"
NOT_OF_THE_TEXT = {25, 29, 30}
"""Rows about where a buildspec and its secrets come from; they need an API or a build."""


def text_of(row: dict[str, Any]) -> str | bytes:
    if "hex" in row:
        return bytes.fromhex(row["hex"])
    text: str = FINE + row["more"] if "more" in row else row["spec"]
    return text.replace("<many>", row.get("many", "") * row.get("times", 1))


def said_of(row: dict[str, Any]) -> tuple[Buildspec | None, str]:
    text = text_of(row)
    try:
        spec = parse(text)
    except BadBuildspec as bad:
        assert row["outcome"] == "refused", str(bad)
        lines = len(text.split(b"\n" if isinstance(text, bytes) else "\n"))  # type: ignore[arg-type]
        for problem in bad.problems:
            assert 1 <= problem.line <= lines and problem.column >= 1, problem
            assert problem.hint, f"nothing says what to write instead: {problem}"
            assert len(str(problem)) < 1500 and str(problem).isprintable()
        return None, "\n".join(map(str, bad.problems))
    return spec, "\n".join(map(str, spec.warnings))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['row']}: {row['name']}" for row in ROWS])
def test_a_bad_buildspec(row: dict[str, Any]) -> None:
    spec, said = said_of(row)
    for words in row.get("words", ()):
        assert words in said, said
    if spec is None:
        return
    assert row["outcome"] == ("warned" if said else "taken"), said
    if "commands" in row:
        assert [command.text for command in spec.phases[PhaseType.BUILD].commands] == row["commands"]
    if "variables" in row:
        assert spec.env.variables == row["variables"]


def test_every_row_of_the_catalogue_is_here() -> None:
    assert {row["row"] for row in ROWS} == (set(range(1, 34)) | {94, 98, 100, 101, 102}) - NOT_OF_THE_TEXT
    assert len({(row["row"], row["name"]) for row in ROWS}) == len(ROWS)
