"""YAML and JSON text as a tree of nodes with places, under limits. Scalars keep their source words; nothing is executed.

The limits are looked at in the event stream, before any tree is made: aliases cost nothing there.
"""

import codecs
import re
from dataclasses import dataclass
from typing import Any, Final

import yaml

from millrace.errors import SpecProblem

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 20_000
MAX_ALIASES: Final = 64
_TAGS: Final = frozenset({"!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool"))})
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_JSON_PAIR: Final = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|\\.")
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
    if found := _CONTROL.search(text):
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        raise Unreadable(line, column, f"the control character U+{ord(found[0]):04X} cannot stand in a file", "remove it")
    if text.lstrip().startswith("{"):
        text = _JSON_PAIR.sub(_joined, text)
    try:
        _look_over(text)
        root: Node | None = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        raise _unreadable(error) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(
            1, 1, f"the file cannot be read as YAML: {' '.join(str(error).split())[:300]}", "write it anew, as UTF-8"
        ) from error
    return root


def _joined(found: re.Match[str]) -> str:
    """A character that JSON writes as two escapes, which YAML does not know; other escapes stay."""
    if found[1] is None:
        return found[0]
    return chr(0x10000 + ((int(found[1], 16) & 0x3FF) << 10) + (int(found[2], 16) & 0x3FF))


def _look_over(text: str) -> None:
    depth = deepest = nodes = aliases = documents = 0
    begun: list[tuple[str | None, int, int]] = []  # of each open collection its anchor, and `nodes` and `deepest` before it
    known: dict[str, tuple[int, int]] = {}  # of each anchor the number of entries and the levels below it
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
                raise Unreadable(line, column, f"the file has more than {MAX_ALIASES} aliases", "write the values out")
            name = event.anchor or ""
            if name not in known and any(anchor == name for anchor, *_ in begun):
                raise Unreadable(line, column, f"the alias *{name} stands inside what it repeats", "write it out")
            size, height = known.get(name, (1, 0))
            nodes, deepest = nodes + size, max(deepest, depth + height)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            tag = getattr(event, "tag", None)
            if tag is not None and tag not in _TAGS:
                raise Unreadable(
                    line, column, f"the tag {tag} is not taken", "quote a value that begins with !; write other values plainly"
                )
            if isinstance(event, yaml.ScalarEvent) and "\0" in event.value:
                raise Unreadable(
                    line, column, "the value has a NUL character, which no command and no variable can hold", "remove it"
                )
            if event.anchor is not None:
                known.pop(event.anchor, None)
                if isinstance(event, yaml.ScalarEvent):
                    known[event.anchor] = (1, 0)
        if isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, nodes - 1, deepest))
            depth += 1
            deepest = depth
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, deepest_before = begun.pop()
            depth -= 1
            if anchor is not None:
                known[anchor] = (nodes - before, deepest - depth)
            deepest = max(deepest, deepest_before)
        if nodes > MAX_NODES:
            raise Unreadable(line, column, f"the file has more than {MAX_NODES} entries, aliases spelt out", "write less of it")
        if deepest > MAX_DEPTH:
            raise Unreadable(line, column, f"the file is nested deeper than {MAX_DEPTH} levels", "no buildspec needs that")


def _unreadable(error: yaml.MarkedYAMLError) -> Unreadable:
    at_key = "simple key" in (error.context or "")  # then the mistake is where the name began, not where it was noticed
    mark = (error.context_mark if at_key else None) or error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    what = error.problem or error.context or "cannot be read"
    if error.context and error.problem:
        what = f"{error.problem}, {error.context}"
    hint = "look at the quotes, brackets and indentation, here or just above"
    if "\\t" in what or "cannot start any token" in what:
        hint = "indent with spaces, not tabs; quote values that begin with @, ` or %"
    elif "mapping values are not allowed" in what:
        hint = "quote a value that holds a colon and a space; or look at the indentation, and for a ':' that is missing above"
    elif "could not find expected ':'" in what or "did not find expected key" in what:
        hint = "look at the indentation, for a missing ':', and at quotes that are not closed, here or just above"
    elif any(words in what for words in ("an alias", "an anchor", "a tag", "block collection", "block mapping")):
        hint = "quote a value that begins with *, &, !, [ or {; or look at the indentation"
    elif "undefined alias" in what:
        hint = "quote a value that begins with *, or define the anchor above"
    elif "escape c" in what:
        hint = "write one of YAML's escapes, or the text in single quotes"
    return Unreadable(line, column, what, hint)
