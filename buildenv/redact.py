"""Hides secrets in a stream of bytes that may be cut anywhere. A courtesy, no boundary: what is encoded twice is not found.

Found are a value itself, its base64 (standard and url-safe, wherever the value begins in what was encoded, and in lines of 64
and 76), its url-encoding, its JSON escape, and each line of a value of several lines; and AWS access key ids, as CodeBuild
hides them. Where two that are found overlap, all of both is hidden.
"""

import base64
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import quote, quote_plus

from ahocorasick_rs import BytesAhoCorasick

MASK: Final = b"***"
MIN_CHARS: Final = 4
"""A shorter value stands in too many innocent words."""
MIN_LINE_CHARS: Final = 6
MAX_PATTERN_BYTES: Final = 1024
"""A longer one is looked for in parts that overlap, so that no more than this is ever held back."""
_HEAD: Final = 8
_MAX_NESTING: Final = 8
_PIECE_BYTES: Final = 32 * 1024
_KEY_ID: Final = re.compile(rb"A(?=[KS]IA[A-Z0-9]{16})")
_KEY_ID_BYTES: Final = 20
_KEY_ID_BEGINS: Final = re.compile(rb"A(?:[KS](?:I(?:A[A-Z0-9]{0,15})?)?)?\Z")


def too_short(value: str) -> bool:
    """True for a value that is not hidden, since it is too short."""
    return len(value.strip()) < MIN_CHARS


def not_hidden(values: Mapping[str, str]) -> list[str]:
    """The names of those values that are too short to be hidden, so that the log can say so; what is empty tells nothing."""
    return sorted(name for name, value in values.items() if value.strip() and too_short(value))


class Redactor:
    """`feed` bytes, take what may be shown; `flush` at the end, or where what is held back must come out."""

    def __init__(self, values: Iterable[str]) -> None:
        self._patterns = _few_nested({part for value in values for form in _forms(value) for part in _parts(form)})
        self._find = BytesAhoCorasick(self._patterns) if self._patterns else None
        self._heads = BytesAhoCorasick(sorted({pattern[:_HEAD] for pattern in self._patterns})) if self._patterns else None
        self._longest = max((len(pattern) for pattern in self._patterns), default=0)
        self._held = b""
        self._covered = 0  # so much of what is held is hidden already

    def feed(self, data: bytes) -> bytes:
        """What may be shown of what came so far; the end is held back where it may be the beginning of a secret."""
        if len(data) <= _PIECE_BYTES or self._find is None:
            data = self._held + data
            return self._show(data, self._undecided(data))
        return b"".join(self.feed(data[at : at + _PIECE_BYTES]) for at in range(0, len(data), _PIECE_BYTES))

    def flush(self) -> bytes:
        """What was held back, and is whole now."""
        shown = self._show(self._held, len(self._held))
        self._covered = 0
        return shown

    def _show(self, data: bytes, cut: int) -> bytes:
        """`data` up to `cut`, hidden where it must be; what begins before `cut` is whole."""
        shown: list[bytes] = []
        at = self._covered
        for start, end in self._found(data):
            if start >= cut:
                break
            if start >= at:
                shown += (data[at:start], MASK)
            at = max(at, end)
        shown.append(data[at:cut])
        self._held = data[cut:]
        self._covered = max(0, at - cut)
        return b"".join(shown)

    def _found(self, data: bytes) -> list[tuple[int, int]]:
        found = [(match.start(), match.start() + _KEY_ID_BYTES) for match in _KEY_ID.finditer(data)]
        if self._find is not None:
            found += [(start, end) for _, start, end in self._find.find_matches_as_indexes(data, overlapping=True)]
        return sorted(found)

    def _undecided(self, data: bytes) -> int:
        """Where the longest end of `data` begins that is the beginning of a pattern, and less than the whole of it."""
        size = len(data)
        key_id = _KEY_ID_BEGINS.search(data, max(0, size - _KEY_ID_BYTES + 1))
        first = key_id.start() if key_id else size
        if self._heads is None:
            return first
        begin = max(0, size - self._longest + 1)
        heads = self._heads.find_matches_as_indexes(data[begin:], overlapping=True)
        places = sorted({begin + start for _, start, _ in heads} | set(range(max(begin, size - _HEAD + 1), size)))
        return next((at for at in places if at < first and self._is_beginning(data[at:])), first)

    def _is_beginning(self, end: bytes) -> bool:
        after = bisect_right(self._patterns, end)
        return after < len(self._patterns) and self._patterns[after].startswith(end)


def _forms(value: str) -> Iterator[bytes]:
    """Every way in which `value` is looked for."""
    if too_short(value):
        return
    whole = value.strip("\r\n")
    for text in (whole, *(line.strip() for line in whole.splitlines() if len(line.strip()) >= MIN_LINE_CHARS)):
        raw = text.encode(errors="surrogateescape")
        yield raw
        for safe in ("", "/", "!'()*"):  # curl; urllib; encodeURIComponent
            yield quote(raw, safe=safe).encode()
        yield quote_plus(raw).encode()
        yield json.dumps(text)[1:-1].encode()
        yield json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="surrogateescape")
        for form in _base64(raw):
            yield form
            yield form.translate(bytes.maketrans(b"+/", b"-_"))


def _base64(raw: bytes) -> Iterator[bytes]:
    """What is the same in every base64 of something that `raw` stands in, by where it begins among three bytes."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + raw)
        middle = encoded[-(-8 * before // 6) : 8 * (before + len(raw)) // 6]
        if len(middle) >= MIN_LINE_CHARS:
            yield middle
        if before == 0:
            for width in (64, 76):  # openssl; base64
                yield from (line for line in _cut(middle, width, width) if MIN_LINE_CHARS <= len(line) < len(middle))


def _parts(form: bytes) -> Iterator[bytes]:
    """A long form in parts of which each begins in the last."""
    if len(form) <= MAX_PATTERN_BYTES:
        yield form
        return
    yield from _cut(form[:-MIN_LINE_CHARS], MAX_PATTERN_BYTES, MAX_PATTERN_BYTES - 1)
    yield form[-MAX_PATTERN_BYTES:]


def _cut(data: bytes, size: int, step: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), step))


def _few_nested(patterns: set[bytes]) -> list[bytes]:
    """The patterns in order. Of those that end one another, like a, aa, aaa, ..., only the shortest few: so much is hidden of
    the others, too, and what is found stays in proportion to what was searched."""
    kept: list[bytes] = []
    nested: list[bytes] = []
    for pattern in sorted(pattern[::-1] for pattern in patterns):
        while nested and not pattern.startswith(nested[-1]):
            nested.pop()
        if len(nested) < _MAX_NESTING:
            nested.append(pattern)
            kept.append(pattern[::-1])
    return sorted(kept)
