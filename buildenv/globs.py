"""CodeBuild's path patterns: `*` and `?` within one component, `**` across components, `[...]` sets. Dot files match like others.

Source: CodeBuild, build-spec-ref, artifacts.files and exclude-paths.
"""

import re
from functools import lru_cache


@lru_cache(maxsize=512)
def pattern(glob: str) -> re.Pattern[str]:
    """`glob` as a regular expression over whole relative paths. It has no nested repeats, so matching stays linear-ish.

    `dir/**/*` matches everything below `dir`, at any depth; `dir/*` only what lies directly in it; `**` alone everything.
    """
    parts = [part for part in glob.removeprefix("./").split("/") if part not in ("", ".")]
    text = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            if text.endswith("(?:[^/]+/)*"):
                pass  # two in a row mean one
            else:
                text += "(?:[^/]+/)*"
            if last:
                text += "[^/]+"
        else:
            text += _component(part) + ("" if last else "/")
    return re.compile(text, re.DOTALL)


def matches(glob: str, path: str) -> bool:
    """True where `glob` matches the whole of `path`, which is relative and has no dot components."""
    return pattern(glob).fullmatch(path) is not None


def _component(part: str) -> str:
    out, at = "", 0
    while at < len(part):
        char = part[at]
        if char == "*":
            while part[at + 1 : at + 2] == "*":
                at += 1
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[" and (end := part.find("]", at + 2)) > 0:
            body = part[at + 1 : end]
            negated = body[0] in "!^"
            inner = re.escape(body[1:] if negated else body).replace(r"\-", "-")
            out += f"(?!/)[{'^' if negated else ''}{inner}]"
            at = end
        else:
            out += re.escape(char)
        at += 1
    return out
