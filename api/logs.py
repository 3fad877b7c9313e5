"""A build's log: as text, or live as server-sent events, both resumed by offset; and what proves that it is whole."""

import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any, Final

from flask import Blueprint, Response, request

from api import render
from api.auth import Scope, needs, require_build
from api.builds import existing
from api.context import Context, here
from api.paging import only, whole_number
from millrace.errors import InvalidInput, MillraceError, NotFound, Unavailable
from millrace.log import get_logger
from scheduler import queries
from scheduler.queries import BuildRecord, LogInfo
from scheduler.states import TERMINAL

log = get_logger(__name__)
blueprint = Blueprint("logs", __name__, url_prefix="/v1/builds")

_PIECE_BYTES: Final = 64 * 1024
"""So much is in an event at most: what a connection that often breaks must bring over at once."""
_CHARACTER_BYTES: Final = 4
_TEXT_BYTES: Final = 1024 * 1024
"""So much is read at once: of a log that was put away it is a request of its own to the store, of another a chunk to unpack."""
_SOON_S: Final = 0.03
_LOOK_EVERY_S: Final = 0.25
"""How often is looked for more: soon after there was some, and after each look that found none a little later, up to this."""
_SLOWER: Final = 1.25
_PHASES_EVERY_S: Final = 0.7
"""Phases take more reading than the length of the log, and are looked at less often; all are told before the end."""
_HEARTBEAT_S: Final = 10.0
_EVENT_ID: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,18})(?::(full|gap))?")
MARK: Final = "[Millrace] "
"""How the one line begins that stands in for what is missing."""
_INERT: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


@blueprint.get("/<build_id>/logs")
@needs(Scope.USER)
def read(build_id: str) -> Response:
    """The log so far as text/plain; with `Accept: text/event-stream`, live until the build has ended.

    `offset` counts bytes. `attempt` picks an earlier attempt; by default the newest. A stream resumes by `Last-Event-ID`.
    Where some of an ended log is missing, one line behind it says so; it is counted as if it were part of the text, so that
    a reader may be cut off within it, too.
    """
    only("offset", "attempt")
    record, attempt = _asked(build_id)
    offset = whole_number("offset", 0) or 0
    context = here()
    if "text/event-stream" in request.headers.get("Accept", ""):
        attempt, offset, told = _resumed(record, attempt, offset)
        if not context.streams.acquire(blocking=False):
            raise Unavailable("too many logs are followed at this server", hint="Try again in a few seconds.")
        stream = _Stream(context, build_id, attempt or max(1, record.attempt_no), offset, told)
        response = Response(stream.events(), content_type="text/event-stream; charset=utf-8", headers=_INERT)
        response.call_on_close(context.streams.release)
        return response
    number = attempt or record.attempt_no
    info = queries.log_info(context.db, build_id, number)
    headers = _INERT | {"X-Millrace-Log-Attempt": str(number)}
    if info is not None:
        headers |= {"X-Millrace-Log-Ended": str(info.ended).lower(), "X-Millrace-Log-Complete": str(info.complete).lower()}
    text = _text(context, build_id, number, offset)
    first = next(text, b"")  # before the answer begins, so that a store that is away can be said
    return Response(itertools.chain([first], text), content_type="text/plain; charset=utf-8", headers=headers)


@blueprint.get("/<build_id>/logs/footer")
@needs(Scope.USER)
def footer(build_id: str) -> dict[str, Any]:
    """What is stored of a log, what its worker says it wrote, and what is missing between the two."""
    only("attempt")
    record, attempt = _asked(build_id)
    info = queries.log_info(here().db, build_id, attempt or record.attempt_no)
    if info is None:
        raise NotFound(f"there is no build {build_id}")
    said = info.footer
    return {
        "attempt": info.attempt_no,
        "ended": info.ended,
        "complete": info.complete,
        "stored": {"bytes": info.size_bytes, "chunks": info.chunks, "root": info.root},
        "written": said and {"bytes": said.size_bytes, "chunks": said.chunks, "sha256": said.sha256, "root": said.root},
        "gap": {"offset": info.size_bytes, "missingBytes": info.missing_bytes, "says": info.gap} if info.gap else None,
    }


@blueprint.get("/<build_id>/logs/chunks")
@needs(Scope.USER)
def chunks(build_id: str) -> Response:
    """The list of a log's chunks so far; its SHA-256 is the log's root."""
    only("attempt")
    record, attempt = _asked(build_id)
    context = here()
    listed = queries.log_list(context.db, context.store, context.settings, build_id, attempt or record.attempt_no)
    if listed is None:
        raise NotFound(f"the log of {build_id} was put away by an older release, which kept no list of its chunks")
    return Response(listed, content_type="text/plain; charset=utf-8", headers=_INERT)


def _asked(build_id: str) -> tuple[BuildRecord, int | None]:
    """The build, and the attempt that the query names."""
    require_build(build_id)
    record = existing(build_id)
    attempt = whole_number("attempt", None, least=1, most=1_000_000)
    if attempt is not None and attempt > record.attempt_no:
        raise InvalidInput(f"build {build_id} has had {record.attempt_no} attempts so far, not {attempt}")
    return record, attempt


def _resumed(record: BuildRecord, attempt: int | None, offset: int) -> tuple[int | None, int, str | None]:
    last = request.headers.get("Last-Event-ID")
    if not last:
        return attempt, offset, None
    known = _EVENT_ID.fullmatch(last)
    if known is None or not 1 <= int(known[1]) <= max(1, record.attempt_no):
        raise InvalidInput("Last-Event-ID is none of ours: they are ATTEMPT:OFFSET")
    return int(known[1]), int(known[2]), known[3]


def _piece(context: Context, build_id: str, attempt_no: int, offset: int, size: int) -> bytes:
    return queries.read_log(context.db, context.store, context.settings, build_id, attempt_no, offset, size)


def _text(context: Context, build_id: str, attempt_no: int, offset: int) -> Iterator[bytes]:
    while True:
        info = queries.log_info(context.db, build_id, attempt_no)  # first, so that of an ended log nothing comes later
        if data := _piece(context, build_id, attempt_no, offset, _TEXT_BYTES):
            yield data
            offset += len(data)
            continue
        if info is None or not info.ended:
            return
        gap = _short(offset, info) if offset < info.size_bytes else info.gap
        if gap is not None:
            end = min(offset, info.size_bytes)
            before = b"\n" if end == 0 else _piece(context, build_id, attempt_no, end - 1, 1)
            line = f"{MARK}{gap}\n".encode()
            yield (line if before == b"\n" else b"\n" + line)[offset - end :]
        return


def _short(offset: int, info: LogInfo) -> str:
    return f"the log ends here: {info.size_bytes - offset} bytes from byte {offset} on were lost after they had been stored"


class _Stream:
    """One client that follows one build."""

    def __init__(self, context: Context, build_id: str, attempt_no: int, offset: int, told: str | None) -> None:
        self._context, self._build_id = context, build_id
        self._attempt_no, self._offset = attempt_no, offset
        self._ahead = b""  # read, and not sent yet
        self._told: dict[str, str] = {}
        self._last_sign = time.monotonic()
        self._phases_seen = 0.0
        self._short: tuple[int, str] | None = None
        self._full_told, self._gap_told = told is not None, told == "gap"
        self._seen: tuple[str, int] | None = None
        self._is_at_newest = False
        """All that there was of the newest attempt is told."""

    def events(self) -> Iterator[str]:
        """Events until the build has ended and all of its log was sent, or the server stops."""
        yield ": following\n\n"
        pause_s = _SOON_S
        beat: tuple[object, ...] | None = None
        try:
            while not self._context.closing.is_set():
                before, beat = beat, queries.pulse(self._context.db, self._build_id)
                if beat is not None and beat == before and self._is_at_newest:
                    yield from self._meanwhile()
                    self._context.closing.wait(pause_s)
                    pause_s = min(_SLOWER * pause_s, _LOOK_EVERY_S)
                    continue
                self._is_at_newest = False
                newest = queries.log_info(self._context.db, self._build_id)
                if newest is None:
                    yield _event("end", {"state": None, "reason": None})
                    return
                mine = self._mine(newest)
                if (newest.state, newest.attempt_no) != self._seen:
                    self._seen, pause_s = (newest.state, newest.attempt_no), _SOON_S
                if mine.size_bytes > self._offset and (event := self._more_log(mine)) is not None:
                    pause_s = _SOON_S
                    yield event
                    continue
                if (event := self._full(mine) or self._gap(mine)) is not None:
                    yield event
                    continue
                if self._is_over(newest, mine):
                    yield from self._changed_phases()
                    whole = mine.complete and self._short is None
                    yield _event("end", {"state": newest.state, "reason": newest.reason, "logComplete": whole})
                    return
                if newest.attempt_no > self._attempt_no and mine.ended:
                    yield self._next_attempt()
                    continue
                self._is_at_newest = newest.attempt_no <= self._attempt_no
                yield from self._meanwhile()
                self._context.closing.wait(pause_s)
                pause_s = min(_SLOWER * pause_s, _LOOK_EVERY_S)
        except MillraceError as error:
            log.warning("stream.broken", build_id=self._build_id, why=error.message)
            yield _event("error", {"code": error.code, "detail": error.message, "hint": "Connect again; the stream resumes."})

    def _meanwhile(self) -> Iterator[str]:
        """What is told now and then, whatever becomes of the log."""
        if time.monotonic() - self._phases_seen > _PHASES_EVERY_S:
            self._phases_seen = time.monotonic()
            yield from self._changed_phases()
        if time.monotonic() - self._last_sign > _HEARTBEAT_S:
            self._last_sign = time.monotonic()
            yield ": still here\n\n"

    def _mine(self, newest: LogInfo) -> LogInfo:
        """What there is of the attempt that this client is at."""
        if newest.attempt_no <= self._attempt_no:
            return newest
        return queries.log_info(self._context.db, self._build_id, self._attempt_no) or newest

    def _more_log(self, mine: LogInfo) -> str | None:
        if len(self._ahead) < _CHARACTER_BYTES:
            self._ahead = _piece(self._context, self._build_id, self._attempt_no, self._offset, _TEXT_BYTES)
        data = self._ahead[:_PIECE_BYTES]
        if not data and mine.ended:  # the object is shorter than the records say; waiting brings no more of it
            log.error("log.short", build_id=self._build_id, attempt_no=self._attempt_no, offset=self._offset)
            self._short = mine.size_bytes - self._offset, _short(self._offset, mine)
            self._offset = mine.size_bytes
        whole = whole_characters(data)
        if not whole and mine.ended:  # half a character, and the rest of it will not come
            whole = data
        if not whole:
            return None
        start = self._offset
        self._offset += len(whole)
        self._ahead = self._ahead[len(whole) :]
        self._last_sign = time.monotonic()
        text = whole.decode(errors="replace")
        return _event(
            "log", {"attempt": self._attempt_no, "offset": start, "text": text}, ident=f"{self._attempt_no}:{self._offset}"
        )

    def _full(self, mine: LogInfo) -> str | None:
        """What says that a log which goes on is at its limit: once, when all of it was sent."""
        if self._full_told or mine.full is None or mine.ended or self._offset < mine.size_bytes:
            return None
        self._full_told = True
        shape = {"attempt": self._attempt_no, "offset": self._offset, "says": mine.full}
        return _event("full", shape, ident=f"{self._attempt_no}:{self._offset}:full")

    def _gap(self, mine: LogInfo) -> str | None:
        """What says that some of this attempt's log is missing: once, when all that is there was sent."""
        missing, says = self._short or (mine.missing_bytes, mine.gap)
        if self._gap_told or says is None or not mine.ended or self._offset < mine.size_bytes:
            return None
        self._gap_told = True
        offset = mine.size_bytes - (self._short[0] if self._short else 0)
        shape = {"attempt": self._attempt_no, "offset": offset, "missingBytes": missing, "says": says}
        return _event("gap", shape, ident=f"{self._attempt_no}:{self._offset}:gap")

    def _is_over(self, newest: LogInfo, mine: LogInfo) -> bool:
        return newest.state in TERMINAL and newest.attempt_no <= self._attempt_no and self._offset >= mine.size_bytes

    def _next_attempt(self) -> str:
        self._attempt_no, self._offset, self._ahead = self._attempt_no + 1, 0, b""
        self._short, self._full_told, self._gap_told = None, False, False
        self._told.clear()
        self._phases_seen = 0.0
        return _event("attempt", {"attempt": self._attempt_no}, ident=f"{self._attempt_no}:0")

    def _changed_phases(self) -> Iterator[str]:
        for item in queries.phases_of(self._context.db, self._build_id):
            shape = json.dumps(render.phase(item))
            if self._told.get(item.phase_type) != shape:
                self._told[item.phase_type] = shape
                self._last_sign = time.monotonic()
                yield f"event: phase\ndata: {shape}\n\n"


def _event(kind: str, data: object, *, ident: str | None = None) -> str:
    head = f"id: {ident}\n" if ident else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n"


def whole_characters(data: bytes) -> bytes:
    """`data` without the beginning of a UTF-8 character at its end; bytes that are no UTF-8 at all stay."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0b1100_0000 == 0b1000_0000:  # inside a character: look further back
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return data[:-back] if length > back else data
    return data
