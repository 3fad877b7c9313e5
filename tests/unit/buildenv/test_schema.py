"""The schema for editors and the parser know the same language."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given

from buildenv.buildspec import parse
from buildenv.schema import page, schema
from millrace.errors import BadBuildspec
from tests.support.buildspecs import buildspecs, odd_buildspecs

ROOT = Path(__file__).parents[3]
VALIDATOR = jsonschema.Draft202012Validator(schema())
PHASES = {"build": {"commands": ["make"]}}
FULL: dict[str, Any] = yaml.safe_load((ROOT / "tests/benchmarks/data/buildspec.yml").read_text())
GOOD: list[dict[str, Any]] = [
    {"version": 0.2, "phases": PHASES},
    {"version": "0.1", "environment_variables": {"plaintext": {"A": 1}}, "phases": PHASES},
    {"version": 0.2, "phases": {"build": {"commands": "make", "finally": None, "on-failure": "Retry-2-x"}}},
    {"version": 0.2, "batch": {"build-fanout": {"parallelism": 3}}},
    {"version": 0.2, "phases": PHASES, "artifacts": {"files": "**/*", "discard-paths": "yes"}},
    {"version": 0.2, "phases": PHASES, "reports": {"a": {"files": ["x"], "file-format": "cucumberJSON"}}},
    FULL,
]
BAD: list[dict[str, Any]] = [
    {"phases": PHASES},
    {"version": 0.3, "phases": PHASES},
    {"version": 0.2},
    {"version": 0.2, "phase": PHASES, "phases": PHASES},
    {"version": 0.2, "phases": {"bild": {"commands": ["x"]}}},
    {"version": 0.2, "phases": {"build": {"commands": [{"echo foo": "bar"}]}}},
    {"version": 0.2, "phases": {"build": {"commands": ["x"], "on-failure": "MAYBE"}}},
    {"version": 0.2, "phases": PHASES, "env": {"shell": "fish"}},
    {"version": 0.2, "phases": PHASES, "env": {"variables": ["A"]}},
    {"version": 0.2, "phases": PHASES, "cache": {"key": "k"}},
    {"version": 0.2, "phases": PHASES, "cache": {"paths": ["a"], "action": "both"}},
    {"version": 0.2, "phases": PHASES, "reports": {"a": {"files": ["x"], "file-format": "JUNIT"}}},
    {"version": 0.2, "batch": {"build-list": [{"buildspec": "x"}]}},
    {"version": 0.2, "batch": {"build-graph": [{"identifier": "a", "depends-on": ["b"]}]}},
]


def test_the_file_is_what_the_table_makes() -> None:
    assert (ROOT / "docs/buildspec.schema.json").read_text() == page(), "python -m buildenv.schema > docs/buildspec.schema.json"
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("document", GOOD, ids=range(len(GOOD)))
def test_what_the_parser_takes_the_schema_takes(document: dict[str, Any]) -> None:
    parse(json.dumps(document))
    VALIDATOR.validate(document)


@pytest.mark.parametrize("document", BAD, ids=range(len(BAD)))
def test_what_the_schema_refuses_the_parser_refuses(document: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(BadBuildspec):
        parse(json.dumps(document))


def test_every_scenario_that_parses_is_taken() -> None:
    taken = 0
    for path in sorted((ROOT / "tests/e2e/scenarios").glob("*/buildspec.yml")) + sorted(
        (ROOT / "examples").glob("*/buildspec.yml")
    ):
        try:
            parse(path.read_text())
        except BadBuildspec:
            continue
        VALIDATOR.validate(yaml.safe_load(path.read_text()))
        taken += 1
    assert taken > 30


SHAPE = {"unknown-key", "wrong-kind", "not-a-command"}
"""What is wrong with the shape of a file is the schema's business too; the rest is more than a schema can say."""


@given(buildspecs())
def test_both_take_what_is_made_from_the_table(document: dict[str, Any]) -> None:
    parse(json.dumps(document))
    VALIDATOR.validate(document)


@given(odd_buildspecs())
def test_both_say_the_same_of_an_odd_shape(document: dict[str, Any]) -> None:
    try:
        parse(json.dumps(document))
    except BadBuildspec as bad:
        if VALIDATOR.is_valid(document):
            assert not {problem.rule for problem in bad.problems} & SHAPE, bad
    else:
        VALIDATOR.validate(document)
