"""JSON bodies: what is clear passes as it is, all else is refused with a sentence and never with a fault."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api.errors import from_validation
from api.jsonbody import parse
from millrace.errors import RequestError
from millrace.project import BuildOverrides, ProjectSettings

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, VALUES, max_size=5), st.booleans())
def test_every_clear_object_passes_unchanged(value: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert json.loads(parse(text.encode())) == value


@given(st.binary(max_size=200) | st.text("[]{}\",:\\ 0123456789eE+-.tfnulINa'", max_size=200).map(str.encode))
def test_anything_else_is_refused_with_a_sentence(raw: bytes) -> None:
    try:
        text = parse(raw)
    except RequestError as error:
        assert error.message
    else:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b"[" * 1_000_000,
        b'{"a": "' + b"\\" * 1_000_000,
        b'{"a": "' + b'\\"' * 500_000,
        b'"' * 1_000_001,
        b'{"a": ' + b" " * 1_000_000,
        b'{"a": 1' + b"0" * 1_000_000 + b"}",
    ],
    ids=["depth", "brackets", "backslashes", "escaped quotes", "quotes", "blanks", "digits"],
)
def test_hostile_bodies_cost_little(raw: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError):
        parse(raw)
    assert time.monotonic() - began < 2


def test_brackets_in_strings_are_no_depth() -> None:
    assert parse(json.dumps({"a": "[" * 500 + '\\"' + "{" * 500}).encode())
    assert parse(b'{"a":' * 64 + b"1" + b"}" * 64)


@given(VALUES)
def test_wrong_fields_are_always_told_by_their_path(value: Any) -> None:
    body = json.dumps({"name": value, "source": value, "environment": {"image": value, "odd": value}})
    with pytest.raises(ValidationError) as caught:
        ProjectSettings.model_validate_json(body, strict=True, by_alias=True, by_name=False)
    problem = from_validation(caught.value, ProjectSettings)
    told = {field.field: field.what for field in problem.fields}
    assert told["artifacts"] == "Field required"
    assert "is no known field" in told["environment.odd"]


def test_a_guess_is_made_among_the_names_of_the_same_place() -> None:
    body = json.dumps({"projectName": "demo", "name": "x", "artifactsOverride": {"type": "S3", "packagin": "ZIP"}})
    with pytest.raises(ValidationError) as caught:
        BuildOverrides.model_validate_json(body, strict=True, by_alias=True, by_name=False)
    told = {field.field: field.what for field in from_validation(caught.value, BuildOverrides).fields}
    assert told["artifactsOverride.packagin"] == "is no known field; did you mean packaging?"
    assert "did you mean name?" not in told["name"]
