"""The JSON Schema of buildspecs, from the same table as the parser: `python -m buildenv.schema > docs/buildspec.schema.json`.

It is for editors, which complete and check while one types. What a schema cannot say, `millrace lint` says.
"""

import json
from collections.abc import Iterable
from typing import Any

from buildenv.speckeys import NO, SECTIONS, YES, Key


def _any_case(word: str) -> str:
    return "".join(f"[{char.upper()}{char}]" if char.isalpha() else char for char in word)


def _words(words: Iterable[str]) -> str:
    return f"^({'|'.join(_any_case(word) for word in words)})$"


_SCALAR: dict[str, Any] = {"type": ["string", "number", "boolean", "null"]}
_LIST: dict[str, Any] = {"type": ["array", "string", "number", "boolean", "null"], "items": _SCALAR}
_FLAG: dict[str, Any] = {"anyOf": [{"type": ["boolean", "null"]}, {"type": "string", "pattern": _words(sorted(YES | NO))}]}
_PLAIN: dict[str, dict[str, Any]] = {
    "text": _SCALAR,
    "flag": _FLAG,
    "list": _LIST,
    "globs": _LIST,
    "commands": _LIST,
    "texts by name": {"type": ["object", "null"], "additionalProperties": _SCALAR},
    "lists by name": {"type": ["object", "null"], "additionalProperties": _LIST},
}
_ON_FAILURE = f"^({_any_case('abort')}|{_any_case('continue')}|{_any_case('retry')}(-.+)?)$"


def schema() -> dict[str, Any]:
    """The schema (JSON Schema, draft 2020-12)."""
    top = _section("the buildspec")
    top["properties"]["version"] = {"description": top["properties"]["version"]["description"], "enum": [0.2, 0.1, "0.2", "0.1"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Buildspec of AWS CodeBuild and Millrace",
        **top,
        "anyOf": [{"required": ["phases"]}, {"required": ["batch"]}],
        "$defs": {name: _section(name) for name in SECTIONS if name != "the buildspec"},
    }


def _section(name: str) -> dict[str, Any]:
    keys = SECTIONS[name]
    found: dict[str, Any] = {
        "type": "object",
        "properties": {key: {"description": said.says, **_key(key, said)} for key, said in keys.items()},
        "additionalProperties": False,
    }
    needed = [key for key, said in keys.items() if said.needed]
    if needed:
        found["required"] = needed
    return found


def _key(name: str, key: Key) -> dict[str, Any]:
    if name == "on-failure":
        return {"anyOf": [{"type": "string", "pattern": _ON_FAILURE}, {"type": "null"}]}
    if key.values:
        return {
            "anyOf": [
                {"type": "string", "pattern": _words(key.values)},
                {"type": "null"},
            ]
        }
    if key.kind in _PLAIN:
        return _PLAIN[key.kind]
    inner = {"$ref": f"#/$defs/{key.section.replace(' ', '%20')}"}
    if key.kind == "sections by name":
        return {"type": ["object", "null"], "additionalProperties": {"anyOf": [inner, {"type": "null"}]}}
    if key.kind == "list of sections":
        return {"type": "array", "items": inner, "minItems": 1}
    return {"anyOf": [inner, {"type": "null"}]}


def page() -> str:
    """The file's text."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  # this is the command that makes the file
