"""Hides secrets in a stream of bytes that may be cut anywhere. A courtesy, no boundary: what is encoded twice is not found.

Found are a value itself, its base64 (standard and url-safe, wherever the value begins in what was encoded), its url-encoding,
its JSON escape, and each line of a value of several lines; and AWS access key ids, as CodeBuild hides them.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote, quote_plus

MASK: Final = b"***"
MIN_CHARS: Final = 4
"""A shorter value stands in too many innocent words."""
MIN_LINE_CHARS: Final = 6
_KEY_ID: Final = rb"(?:AKIA|ASIA)[A-Z0-9]{16}"
_KEY_ID_BEGINS: Final = re.compile(rb"(?:A|AK|AKI|AS|ASI|(?:AKIA|ASIA)[A-Z0-9]{0,15})\Z")
_HEAD: Final = 4


def too_short(value: str) -> bool:
    """True for a value that is not hidden, since it is too short."""
    return len(value.strip()) < MIN_CHARS


class Redactor:
    """`feed` bytes, take what may be shown; `flush` at the end, or where what is held back must come out."""

    def __init__(self, values: Iterable[str]) -> None:
        patterns = sorted({form for value in values for form in _forms(value)}, key=lambda form: (-len(form), form))
        alternatives = [re.escape(pattern) for pattern in patterns]
        self._find = re.compile(b"|".join([*alternatives, _KEY_ID]))
        self._longest = max((len(pattern) for pattern in patterns), default=0)
        self._by_head: dict[bytes, list[bytes]] = {}
        for pattern in patterns:
            for length in range(1, _HEAD + 1):
                self._by_head.setdefault(pattern[:length], []).append(pattern)
        heads = sorted({re.escape(pattern[:_HEAD]) for pattern in patterns})
        self._heads = re.compile(b"(?=" + b"|".join(heads) + b")") if heads else None
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be shown of what came so far; the end is held back where it may be the beginning of a secret."""
        data = self._held + data
        cut = self._undecided(data)
        shown: list[bytes] = []
        at = 0
        for found in self._find.finditer(data):
            if found.start() >= cut:
                break
            shown += (data[at : found.start()], MASK)
            at = found.end()
        cut = max(cut, at)
        shown.append(data[at:cut])
        self._held = data[cut:]
        return b"".join(shown)

    def flush(self) -> bytes:
        """What was held back, and is whole now."""
        held, self._held = self._held, b""
        return self._find.sub(MASK, held)

    def _undecided(self, data: bytes) -> int:
        """Where the longest end of `data` begins that is the beginning of a pattern, and less than the whole of it."""
        key_id = _KEY_ID_BEGINS.search(data, max(0, len(data) - 20))
        first = key_id.start() if key_id else len(data)
        if self._heads is None:
            return first
        begin = max(0, len(data) - self._longest + 1)
        for found in self._heads.finditer(data, begin):
            if found.start() >= first:
                return first
            if self._is_beginning(data[found.start() :]):
                return found.start()
        for at in range(max(begin, len(data) - _HEAD + 1), first):
            if data[at:] in self._by_head and self._is_beginning(data[at:]):
                return at
        return first

    def _is_beginning(self, end: bytes) -> bool:
        return any(len(p) > len(end) and p.startswith(end) for p in self._by_head.get(end[:_HEAD], ()))


def _forms(value: str) -> Iterator[bytes]:
    """Every way in which `value` is looked for."""
    if too_short(value):
        return
    whole = value.strip("\r\n")
    for text in (whole, *(line.strip("\r") for line in whole.split("\n") if len(line.strip()) >= MIN_LINE_CHARS)):
        raw = text.encode(errors="surrogateescape")
        yield raw
        yield quote(raw, safe="").encode()
        yield quote_plus(raw).encode()
        yield json.dumps(text)[1:-1].encode()
        yield json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="surrogateescape")
        yield from _base64(raw)


def _base64(raw: bytes) -> Iterator[bytes]:
    """What is the same in every base64 of something that `raw` stands in, by where it begins among three bytes."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw)
        middle = encoded[-(-8 * before // 6) : 8 * (before + len(raw)) // 6]
        if len(middle) >= MIN_LINE_CHARS:
            yield middle
            yield middle.translate(bytes.maketrans(b"+/", b"-_"))
