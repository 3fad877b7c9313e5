"""Reads the sections of a buildspec. A fault is noted with its place, and reading goes on: all are told at once."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from buildenv import globs, yamltree
from buildenv.speckeys import NO, SECTIONS, YES
from buildenv.yamltree import Node, Place, place
from millrace.errors import SpecProblem
from millrace.project import ENV_NAME, MAX_ENV_TOTAL_BYTES, MAX_ENV_VALUE_BYTES

RULES: Final = {
    "yaml": "the file is no YAML that is read: syntax, encoding, size or nesting",
    "unknown-key": "a key that the language does not have there",
    "missing-key": "a key that must be there",
    "missing-value": "a key without a value that it needs",
    "duplicate-key": "the same name twice",
    "wrong-kind": "a mapping, list or plain value where another is needed",
    "unknown-value": "a value that is none of those known",
    "bad-name": "a name that cannot be used",
    "reserved-name": "a name that the farm sets itself",
    "bad-pattern": "a pattern or regular expression that cannot be used",
    "not-a-command": "a command that YAML reads as a mapping or list",
    "misplaced": "a key in a phase where it has no meaning",
    "too-large": "more than is allowed",
    "batch-kind": "none, or more than one, of the kinds of batch",
    "cycle": "tasks that wait for each other",
    "assumed": "a warning: what was assumed where CodeBuild's rules leave room",
    "version": "a warning: a key of the other version of the language",
    "direction-marks": "a warning: characters that make a command look like another",
}
"""The stable names of what is found; a test looks that each is used."""
MAX_FOUND: Final = 100
"""So many problems of a file are told, and so many warnings."""
MAX_GLOB_CHARS: Final = 4096
_MOST_CHARS: Final = 600
IDENTIFIER: Final = re.compile(r"[A-Za-z0-9_]{1,127}")


class EnoughFound(Exception):
    """`MAX_FOUND` problems are there; reading on would not help."""


class Reader:
    """Walks the tree once. `problems` and `warnings` fill while it does."""

    def __init__(self) -> None:
        self.problems: list[SpecProblem] = []
        self.warnings: list[SpecProblem] = []
        self._names: dict[tuple[int, str], Node] = {}
        self._unknown: dict[int, list[str]] = {}

    def section(self, node: Node | None, kind: str, what: str = "") -> dict[str, Node]:
        """The entries of a section of this kind (`speckeys.SECTIONS`), name -> node; what is none of its keys is noted."""
        known = SECTIONS[kind]
        found = self.entries(node, what or kind, known)
        if node is not None and is_null(node) and (needed := [name for name, key in known.items() if key.needed]):
            self.problem(node, "missing-value", f"{what or kind} is empty", f"it needs {', '.join(needed)}")
        for name, key in known.items():
            if key.needed and kind != "the buildspec" and name not in found and self.lacks(node, name):
                self.problem(node, "missing-key", f"{what or kind} has no '{name}'", key.says)
        for name, value in found.items():
            wanted = known[name].values
            if wanted and isinstance(value, yamltree.Scalar) and not is_null(value) and value.value.lower() not in wanted:
                shown = [word.upper() if kind == "report group" else word for word in wanted]
                hint = did_you_mean(value.value.upper() if kind == "report group" else value.value.lower(), shown)
                self.problem(value, "unknown-value", f"{name} {value.value!r} is not known", hint or f"one of {', '.join(shown)}")
        return found

    def entries(self, node: Node | None, what: str, allowed: Iterable[str] | None = None) -> dict[str, Node]:
        """The entries of a mapping; other kinds of node, unknown names and duplicates are noted."""
        if not isinstance(node, yamltree.Mapping):
            if node is not None and not is_null(node):
                kind = "a list" if isinstance(node, yamltree.Sequence) else f"the text {_short(node.value)}"
                self.problem(node, "wrong-kind", f"{what} is {kind}, not a mapping", "put 'name: value' lines below it, indented")
            return {}
        found: dict[str, Node] = {}
        for key, value in self._pairs(node, what):
            if not isinstance(key, yamltree.Scalar):
                self.problem(key, "wrong-kind", f"a name in {what} is a list or a mapping", "write plain names")
                continue
            name = str(key.value)
            if name in found:
                line = place(self._names[id(node), name]).line
                self.problem(
                    key,
                    "duplicate-key",
                    f"'{name}' stands twice in {what}; the first is on line {line}",
                    "keep one of them",
                )
                continue
            if allowed is not None and name not in allowed:
                self._unknown.setdefault(id(node), []).append(name)
                self.problem(key, "unknown-key", f"'{name}' is not known in {what}", _where(name, what, list(allowed)))
                continue
            found[name] = value
            self._names[id(node), name] = key
        return found

    def _pairs(self, node: yamltree.Mapping, what: str) -> list[tuple[Node, Node]]:
        """The pairs of a mapping, with those of a merge key `<<` behind its own, where they are not overridden."""
        pairs: list[tuple[Node, Node]] = [pair for pair in node.value if not _is_merge(pair[0])]
        own = {key.value for key, _ in pairs if isinstance(key, yamltree.Scalar)}
        for key, value in node.value:
            if not _is_merge(key):
                continue
            for source in value.value if isinstance(value, yamltree.Sequence) else [value]:
                if not isinstance(source, yamltree.Mapping):
                    what_is = f"'<<' in {what} merges something that is no mapping"
                    self.problem(key, "wrong-kind", what_is, "write '<<: *name-of-an-anchor'")
                    continue
                for inner, inherited in self._pairs(source, what):
                    if isinstance(inner, yamltree.Scalar) and inner.value not in own:
                        own.add(inner.value)
                        pairs.append((inner, inherited))
        return pairs

    def name_of(self, node: Node, name: str) -> Node:
        """Where the name of an entry stands."""
        return self._names[id(node), name]

    def lacks(self, node: Node | None, name: str) -> bool:
        """True where this is a mapping in which `name` is neither there nor misspelt, so that it is worth saying."""
        misspelt = any(did_you_mean(unknown, [name]) for unknown in self._unknown.get(id(node), []))
        return isinstance(node, yamltree.Mapping) and (id(node), name) not in self._names and not misspelt

    def is_absent(self, node: Node | None, what: str) -> bool:
        """True where there is nothing; an empty value is warned of."""
        if node is not None and is_null(node):
            self.warn(node, f"{what} is empty")
        return node is None or is_null(node)

    def text(self, node: Node | None, what: str) -> str | None:
        """One plain value in its source words; None where there is none."""
        if node is None or is_null(node):
            return None
        if not isinstance(node, yamltree.Scalar):
            self.problem(node, "wrong-kind", f"{what} is not a single value", "quote it if it holds ': ' or begins with [ or {")
            return None
        return str(node.value)

    def list_of(self, node: Node | None, what: str, check: Callable[[Node, str], None] | None = None) -> list[str]:
        """A list of plain values, each looked at by `check`; one value by itself is taken as a list of one."""
        if node is None or is_null(node):
            return []
        if isinstance(node, yamltree.Scalar):
            self.warn(node, f"{what} is one text, not a list; it is taken as a list of one")
            items: list[Node] = [node]
        elif isinstance(node, yamltree.Sequence):
            items = node.value
        else:
            self.problem(node, "wrong-kind", f"{what} is a mapping, not a list", "begin each item with '- '")
            return []
        texts = []
        for number, item in enumerate(items):
            text = self.text(item, f"{what}[{number}]")
            if text is None:
                if is_null(item):
                    self.warn(item, f"{what}[{number}] is empty, and is left out")
                continue
            if check is not None:
                check(item, text)
            texts.append(text)
        return texts

    def check_glob(self, node: Node, pattern: str) -> None:
        """Note a path pattern that can match nothing, or what it must not."""
        if not pattern or len(pattern) > MAX_GLOB_CHARS:
            what = f"a pattern has {len(pattern)} characters" if pattern else "a pattern is empty"
            self.problem(node, "bad-pattern", what, "write a path, as dist/* or **/* in quotes")
        if ".." in pattern.split("/"):
            self.problem(
                node,
                "bad-pattern",
                f"the pattern {pattern!r} leaves the source folder",
                "use paths below it, or an absolute path",
            )
        if any(_has_open_bracket(name) for name in pattern.split("/")):
            self.problem(
                node, "bad-pattern", f"the pattern {pattern!r} has a bracket that is not closed", "write [[] for a bracket itself"
            )

    def flag(self, node: Node | None, what: str) -> bool:
        """Yes or no, in YAML's words."""
        text = self.text(node, what)
        if node is None or text is None:
            return False
        if text.lower() not in YES | NO:
            self.problem(node, "unknown-value", f"{what} is {text!r}", "write yes or no")
        return text.lower() in YES

    def variables(self, node: Node | None, what: str, *, references: bool = False) -> dict[str, str]:
        """Plain values by the names of variables. A reference to a secret is never empty."""
        if self.is_absent(node, what) or node is None:
            return {}
        values: dict[str, str] = {}
        for name, value in self.entries(node, what).items():
            self.check_name(self.name_of(node, name), name)
            text = self.text(value, name)
            if text is not None and len(text.encode()) > MAX_ENV_VALUE_BYTES:
                most = MAX_ENV_VALUE_BYTES // 1024
                self.problem(value, "too-large", f"the value of {name} has more than {most} KiB", "put it into a file")
            if references and not text:
                self.problem(value, "missing-value", f"{name} in {what} names no secret", "write the name of one, or remove it")
            values[name] = text or ""
        self.check_total(node, what, values)
        return values

    def check_total(self, node: Node, what: str, values: Mapping[str, str]) -> None:
        """Note variables that together are more than a process can be given."""
        if sum(len(name.encode()) + len(text.encode()) for name, text in values.items()) > MAX_ENV_TOTAL_BYTES:
            most = MAX_ENV_TOTAL_BYTES // 1024
            self.problem(node, "too-large", f"{what} together have more than {most} KiB", "put large values into files")

    def check_name(self, node: Node, name: str) -> None:
        """Note a name that no variable can have, or that is the farm's."""
        if not ENV_NAME.fullmatch(name):
            self.problem(
                node, "bad-name", f"{name!r} is no variable name", "use letters, digits and _, not beginning with a digit"
            )
        elif name.startswith(("CODEBUILD_", "MILLRACE_")):
            hint = "names that begin with CODEBUILD_ or MILLRACE_ are set by the farm"
            self.problem(node, "reserved-name", f"{name} is reserved", hint)

    def problem(self, node: Node | None, rule: str, what: str, hint: str = "") -> None:
        """Something is wrong at `node`."""
        self.problems.append(_at(place(node) if node is not None else Place(line=1, column=1), rule, what, hint))
        if len(self.problems) >= MAX_FOUND:
            raise EnoughFound

    def warn(self, node: Node, what: str, rule: str = "assumed") -> None:
        """Something was assumed at `node`."""
        if len(self.warnings) < MAX_FOUND:
            self.warnings.append(_at(place(node), rule, what, ""))


def is_null(node: Node) -> bool:
    """True for an empty value, `null` or `~`."""
    return isinstance(node, yamltree.Scalar) and node.tag == "tag:yaml.org,2002:null"


def direction_marks(text: str) -> str:
    """`text` with the characters shown that change the direction of writing, or "" where it has none of them."""
    if not any(unicodedata.bidirectional(char) in _TURNING for char in text if ord(char) > 127):
        return ""
    return "".join(f"\\u{ord(c):04x}" if ord(c) > 127 and unicodedata.bidirectional(c) in _TURNING else c for c in text)


_TURNING: Final = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_TOP: Final = SECTIONS["the buildspec"]
_PHASES: Final = SECTIONS["phases"]


def _where(name: str, what: str, known: list[str]) -> str:
    """What to write in place of an unknown name."""
    if what == "phases" and name in _TOP:
        return f"{name} belongs to the top level: move it left, beside 'phases'"
    if what == "the buildspec" and name in _PHASES:
        return f"phase {name} belongs below 'phases:'"
    if what in ("the buildspec", "phases") and name in SECTIONS["phase"]:
        return f"{name} belongs into a phase, as 'build:', below 'phases:'"
    if what == "env" and ENV_NAME.fullmatch(name) and name.isupper():
        return "put variables below 'variables:', in 'env:'"
    return did_you_mean(name, known) or f"known: {', '.join(known)}"


def _at(where: Place, rule: str, what: str, hint: str) -> SpecProblem:
    return SpecProblem(line=where.line, column=where.column, what=shown(what), hint=shown(hint), rule=rule)


def shown(text: str) -> str:
    """`text` on one line that is not too long, with what cannot be seen as an escape: it may hold words of the file."""
    if len(text) > _MOST_CHARS:
        text = f"{text[: _MOST_CHARS // 2]} ... {text[-_MOST_CHARS // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _is_merge(key: Node) -> bool:
    return isinstance(key, yamltree.Scalar) and key.tag == "tag:yaml.org,2002:merge"


def _has_open_bracket(name: str) -> bool:
    """True where a `[` of a pattern's component has no `]`, as `globs` reads them."""
    at = name.find("[")
    while at >= 0:
        end = globs.closing(name, at)
        if end < 0:
            return True
        at = name.find("[", end + 1)
    return False


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the known word most like `name`, or "" where none is like it."""
    for spelling in (name.replace("_", "-"), name, name.lower()):
        if found := difflib.get_close_matches(spelling, list(known), n=1):
            return f"did you mean {found[0]}?"
    return ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
