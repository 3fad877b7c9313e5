"""YAML and JSON text as a tree of nodes with places, under limits. Scalars keep their source words; nothing is executed.

The limits are looked at in the event stream, before any tree is made: aliases cost nothing there.
"""

import codecs
from dataclasses import dataclass
from typing import Any, Final

import yaml

from millrace.errors import SpecProblem

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 20_000
MAX_ALIASES: Final = 64
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Node = yaml.Node
Scalar = yaml.ScalarNode
Sequence = yaml.SequenceNode
Mapping = yaml.MappingNode


class Unreadable(Exception):
    """The text is no tree that we take; `problem` says where and why."""

    def __init__(self, line: int, column: int, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.problem = SpecProblem(line=line, column=column, what=what, hint=hint)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a node begins, both from 1."""

    line: int
    column: int


def place(node: Node) -> Place:
    """Where `node` begins."""
    return Place(line=node.start_mark.line + 1, column=node.start_mark.column + 1)


def decode(data: bytes) -> str:
    """The text of a file. Raises Unreadable for what is not UTF-8, and says which other encoding it looks like."""
    for mark, name in ((codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(mark):
            raise Unreadable(1, 1, f"the file is {name}", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Unreadable(line, 1, f"the file is not UTF-8 (byte {error.start})", "save it as UTF-8") from error


def compose(text: str) -> Node | None:
    """The tree of `text`; None where there is nothing in it. Raises Unreadable."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise Unreadable(1, 1, f"the file has more than {MAX_BYTES // 1024} KiB", "move long scripts into files of their own")
    for number, line in enumerate(text.split("\n"), 1):
        for column, char in enumerate(line, 1):
            if (ord(char) < 32 and char != "\t") or ord(char) == 127 or 0xD800 <= ord(char) <= 0xDFFF:
                raise Unreadable(number, column, f"the control character U+{ord(char):04X} cannot stand in a file", "remove it")
    try:
        _look_over(text)
        root: Node | None = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        raise _unreadable(error) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(1, 1, f"the file cannot be read as YAML: {error}") from error
    return root


def _look_over(text: str) -> None:
    depth = nodes = aliases = documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        mark = event.start_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise Unreadable(line, column, "a second document begins here", "remove the line '---'")
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MAX_ALIASES:
                raise Unreadable(line, column, f"the file has more than {MAX_ALIASES} aliases")
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if nodes > MAX_NODES:
                raise Unreadable(line, column, f"the file has more than {MAX_NODES} entries")
            tag = getattr(event, "tag", None)
            if tag is not None and tag != "!":
                raise Unreadable(line, column, f"the tag {tag} is not taken", "write the plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise Unreadable(line, column, f"the file is nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _unreadable(error: yaml.MarkedYAMLError) -> Unreadable:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    what = error.problem or error.context or "cannot be read"
    if error.context and error.problem:
        what = f"{error.problem}, {error.context}"
    hint = ""
    if "\\t" in what or "cannot start any token" in what:
        hint = "indent with spaces, not tabs; quote values that begin with @, ` or %"
    elif "mapping values are not allowed" in what:
        hint = "quote the value: it holds a colon and a space"
    elif "could not find expected ':'" in what or "did not find expected key" in what:
        hint = "look at the indentation and at quotes that are not closed, here or just above"
    return Unreadable(line, column, what, hint)
