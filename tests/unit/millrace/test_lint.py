"""`millrace lint`: what it says of buildspecs, to whom, and with which exit status."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from buildenv.specreader import RULES
from millrace.commands.lint import lint

GOOD = "version: 0.2\nphases:\n  build:\n    commands: [make]\n"
BAD = "version: 0.2\nphase:\n  build:\n    commands: [make]\nartifacts:\n  file: x\n"
WARNS = GOOD + "artifacts:\n  files: x\n"


def ran(*words: str, text: str | None = None) -> Result:
    result = CliRunner().invoke(lint, list(words), input=text, standalone_mode=False)
    assert result.exception is None, result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "buildspec.yml").write_text(GOOD)
    (tmp_path / "bad.yml").write_text(BAD)
    (tmp_path / "warns.yml").write_text(WARNS)
    return tmp_path


def test_a_fine_file_is_said_to_be_fine(folder: Path) -> None:
    for words in ([str(folder / "buildspec.yml")], [str(folder)]):
        result = ran(*words)
        assert result.return_value == 0
        assert result.output.replace("\n", "").endswith("buildspec.yml is fine")


def test_every_problem_has_its_place_its_line_and_what_to_write(folder: Path) -> None:
    result = ran(str(folder / "bad.yml"))
    assert result.return_value == 1
    for words in (
        "bad.yml:2:1: error: 'phase' is not known in the buildspec [unknown-key]",
        "    2 | phase:\n        ^\n        did you mean phases?",
        "bad.yml:6:3: error: 'file' is not known in artifacts [unknown-key]",
        "    6 |   file: x\n          ^\n        did you mean files?",
        "2 problems in",
    ):
        assert words in result.output, result.output


def test_strict_makes_warnings_count(folder: Path) -> None:
    assert ran(str(folder / "warns.yml")).return_value == 0
    result = ran("--strict", str(folder / "warns.yml"))
    assert result.return_value == 1
    assert "warning: files is one text" in result.output


def test_stdin_and_what_cannot_be_read(folder: Path) -> None:
    assert ran("-", text=BAD).return_value == 1
    assert ran("-", text=GOOD).output == "stdin is fine\n"
    result = ran(str(folder / "none.yml"), str(folder))
    assert result.return_value == 2
    assert "none.yml cannot be read: No such file or directory" in result.output
    (folder / "empty").mkdir()
    assert "empty/buildspec.yml cannot be read" in ran(str(folder / "empty")).output
    assert "is fine" in result.output


def test_json_is_for_programs(folder: Path) -> None:
    result = ran("--json", str(folder / "bad.yml"), str(folder / "warns.yml"))
    first, second = json.loads(result.output)
    said = first["problems"][0]
    assert (said["line"], said["column"], said["rule"], said["hint"]) == (2, 1, "unknown-key", "did you mean phases?")
    assert (second["problems"], second["warnings"][0]["rule"]) == ([], "assumed")


def test_sarif_has_what_its_standard_asks_for(folder: Path) -> None:
    document = json.loads(ran("--sarif", str(folder / "bad.yml"), str(folder / "warns.yml")).output)
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert run["tool"]["driver"]["name"]
    assert rules == set(RULES)
    for result in run["results"]:
        assert result["ruleId"] in rules
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"]
        (location,) = result["locations"]
        region = location["physicalLocation"]["region"]
        assert region["startLine"] >= 1 and region["startColumn"] >= 1
        assert location["physicalLocation"]["artifactLocation"]["uri"].endswith(".yml")
    assert {result["level"] for result in run["results"]} == {"error", "warning"}


def test_warnings_are_shown_beside_problems(folder: Path) -> None:
    result = ran("-", text=WARNS + "env: {shell: fish}\n")
    assert "2 problems" not in result.output
    assert "stdin:6:10: warning: files is one text" in result.output
    assert "stdin:7:14: error: shell 'fish' is not known" in result.output


def test_the_caret_stands_below_wide_letters_and_far_out() -> None:
    lines = ran("-", text=GOOD + "env: {variables: {A: 構建, B-C: 1}}\n").output.splitlines()
    assert lines[1:3] == ["    5 | env: {variables: {A: 構建, B-C: 1}}", " " * 35 + "^"]
    lines = ran("-", text=GOOD + "env: {variables: {A: " + "x" * 300 + ", B-C: 1}}\n").output.splitlines()
    assert lines[1][lines[2].index("^") :].startswith("B-C: 1}}")


def test_every_line_end_of_yaml_counts() -> None:
    output = ran("-", text="version: 0.2\n# a\u2028phase: {}\nphases: {build: {commands: [a]}}\n").output
    assert "    3 | phase: {}\n        ^" in output


def test_places_in_sarif_are_addresses(tmp_path: Path) -> None:
    (tmp_path / "ä b#.yml").write_text(BAD)
    (run,) = json.loads(ran("--sarif", str(tmp_path / "ä b#.yml")).output)["runs"]
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri.startswith("file:///") and uri.endswith("/%C3%A4%20b%23.yml")
    assert run["columnKind"] == "unicodeCodePoints"


def test_a_hostile_file_shows_no_control_characters() -> None:
    result = ran("-", text="version: 0.2\n\x1b]0;owned\x07: x\n")
    assert result.return_value == 1
    assert "\x1b" not in result.output


def test_every_rule_is_used() -> None:
    root = Path(__file__).parents[3] / "buildenv"
    sources = "".join((root / name).read_text() for name in ("specreader.py", "buildspec.py", "batchspec.py", "yamltree.py"))
    sources += (root.parent / "millrace" / "errors.py").read_text()
    for rule in RULES:
        assert sources.count(f'"{rule}"') >= (2 if rule != "yaml" else 1), rule
