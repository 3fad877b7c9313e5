"""CodeBuild's path patterns: `*` and `?` within one component, `**` across components, `[...]` sets. Dot files match like others.

Source: CodeBuild, build-spec-ref, artifacts.files and exclude-paths. Matching takes time in proportion to pattern times path,
whatever the pattern: a regular expression would not.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class _Set:
    """The characters of a `[...]`, as ranges that include their ends."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool

    def has(self, char: str) -> bool:
        return any(low <= char <= high for low, high in self.ranges) is not self.negated


_Token = str | _Set  # a letter stands for itself
_ANY = "*"
_ONE = "?"


@lru_cache(maxsize=512)
def _parts(glob: str) -> tuple[tuple[_Token, ...] | None, ...]:
    """The components of a pattern; None stands for `**`."""
    names = [name for name in glob.split("/") if name not in ("", ".")]
    parts: list[tuple[_Token, ...] | None] = []
    for name in names:
        if name != "**":
            parts.append(_tokens(name))
        elif not parts or parts[-1] is not None:  # two in a row mean one
            parts.append(None)
    return tuple(parts)


def closing(name: str, at: int) -> int:
    """Where the set that begins with the `[` at `at` ends; -1 where nothing ends it. A `]` that comes first is in the set."""
    first = at + 2 if name[at + 1 : at + 2] in ("!", "^") else at + 1
    return name.find("]", first + 1)


def _tokens(name: str) -> tuple[_Token, ...]:
    tokens: list[_Token] = []
    at = 0
    while at < len(name):
        char = name[at]
        if char == "*":
            if not tokens or tokens[-1] is not _ANY:
                tokens.append(_ANY)
        elif char == "?":
            tokens.append(_ONE)
        elif char == "[" and (end := closing(name, at)) > 0:
            tokens.append(_set(name[at + 1 : end]))
            at = end
        else:
            tokens.append(char)
        at += 1
    return tuple(tokens)


def _set(body: str) -> _Set:
    negated = body[0] in "!^"
    body = body[1:] if negated else body
    ranges = []
    at = 0
    while at < len(body):
        is_range = body[at + 1 : at + 2] == "-" and at + 2 < len(body)
        ranges.append((body[at], body[at + 2] if is_range else body[at]))  # one that runs backwards holds nothing
        at += 3 if is_range else 1
    return _Set(tuple(ranges), negated)


def matches(glob: str, path: str) -> bool:
    """True where `glob` matches the whole of `path`, which is relative and has no dot components.

    `dir/**/*` matches everything below `dir`, at any depth; `dir/*` only what lies directly in it; `**` alone everything.
    """
    parts, names = _parts(glob), path.split("/")
    last = len(parts) - 1
    reached = {0}  # how many components of the pattern are used up, after so many of the path
    reached |= {1} if parts and parts[0] is None and last > 0 else set()
    for name in names:
        following: set[int] = set()
        for number in reached:
            if number > last:
                continue
            part = parts[number]
            if part is None:
                following.add(number)
                if number == last:
                    following.add(number + 1)
            elif _fits(part, name):
                following.add(number + 1)
        # `**` before a further component may also stand for nothing
        following |= {n + 1 for n in following if n < last and parts[n] is None}
        reached = following
    return len(parts) in reached and bool(parts)


def _fits(tokens: tuple[_Token, ...], name: str) -> bool:
    """One component, by the two-pointer walk that goes back to the last `*` only. A letter `*` or `?` is never a token."""
    token, at, star, retry = 0, 0, -1, 0
    while at < len(name):
        current = tokens[token] if token < len(tokens) else None
        if current is _ANY:
            star, retry = token, at
            token += 1
        elif current is not None and (current.has(name[at]) if isinstance(current, _Set) else current in (_ONE, name[at])):
            token, at = token + 1, at + 1
        elif star >= 0:
            retry += 1
            token, at = star + 1, retry
        else:
            return False
    return all(rest is _ANY for rest in tokens[token:])
