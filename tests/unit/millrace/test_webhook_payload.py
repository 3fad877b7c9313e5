"""Payload files that are none are refused in a sentence, before anybody is asked."""

from pathlib import Path

import pytest

from millrace.commands.webhooks import _json
from millrace.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r'{"\ud800": 1}', "has a lone surrogate"),
        (r'{"commits": [{"added": ["\udfff"]}]}', "has a lone surrogate"),
        ("[1]", "holds a JSON list"),
        ("[1", "is not JSON"),
    ],
)
def test_a_file_that_is_no_payload_is_said_to_be_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with (tmp_path / "p.json").open() as file, pytest.raises(InvalidInput, match=words):
        _json(file)
