"""A build's log: as text, or live as server-sent events that can be resumed by offset."""

import json
import re
import time
from collections.abc import Iterator
from typing import Final

from flask import Blueprint, Response, request

from api import render
from api.auth import Scope, needs, require_build
from api.builds import existing
from api.context import Context, here
from api.paging import only, whole_number
from millrace.errors import InvalidInput, MillraceError, Unavailable
from millrace.log import get_logger
from scheduler import queries
from scheduler.queries import BuildRecord, LogInfo
from scheduler.states import TERMINAL

log = get_logger(__name__)
blueprint = Blueprint("logs", __name__, url_prefix="/v1/builds")

_PIECE_BYTES: Final = 64 * 1024
_LOOK_EVERY_S: Final = 0.25
_PHASES_EVERY_S: Final = 0.7
"""Phases take more reading than the length of the log, and are looked at less often; all are told before the end."""
_HEARTBEAT_S: Final = 10.0
_EVENT_ID: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,18})")
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
    """
    only("offset", "attempt")
    require_build(build_id)
    record = existing(build_id)
    attempt = whole_number("attempt", None, least=1, most=1_000_000)
    if attempt is not None and attempt > record.attempt_no:
        raise InvalidInput(f"build {build_id} has had {record.attempt_no} attempts so far, not {attempt}")
    offset = whole_number("offset", 0) or 0
    context = here()
    if "text/event-stream" in request.headers.get("Accept", ""):
        attempt, offset = _resumed(record, attempt, offset)
        if not context.streams.acquire(blocking=False):
            raise Unavailable("too many logs are followed at this server", hint="Try again in a few seconds.")
        stream = _Stream(context, build_id, attempt or max(1, record.attempt_no), offset)
        response = Response(stream.events(), content_type="text/event-stream; charset=utf-8", headers=_INERT)
        response.call_on_close(context.streams.release)
        return response
    number = attempt or record.attempt_no
    info = queries.log_info(context.db, build_id, number)
    headers = dict(_INERT)
    if info is not None:
        headers |= {"X-Millrace-Log-Ended": str(info.ended).lower(), "X-Millrace-Log-Complete": str(info.complete).lower()}
    first = _piece(context, build_id, number, offset)  # before the answer begins, so that a store that is away can be said
    return Response(_text(context, build_id, number, offset, first), content_type="text/plain; charset=utf-8", headers=headers)


def _resumed(record: BuildRecord, attempt: int | None, offset: int) -> tuple[int | None, int]:
    last = request.headers.get("Last-Event-ID")
    if not last:
        return attempt, offset
    known = _EVENT_ID.fullmatch(last)
    if known is None or not 1 <= int(known[1]) <= max(1, record.attempt_no):
        raise InvalidInput("Last-Event-ID is none of ours: they are ATTEMPT:OFFSET")
    return int(known[1]), int(known[2])


def _piece(context: Context, build_id: str, attempt_no: int, offset: int) -> bytes:
    return queries.read_log(context.db, context.store, context.settings, build_id, attempt_no, offset, _PIECE_BYTES)


def _text(context: Context, build_id: str, attempt_no: int, offset: int, data: bytes) -> Iterator[bytes]:
    while data:
        yield data
        offset += len(data)
        data = _piece(context, build_id, attempt_no, offset)


class _Stream:
    """One client that follows one build."""

    def __init__(self, context: Context, build_id: str, attempt_no: int, offset: int) -> None:
        self._context, self._build_id = context, build_id
        self._attempt_no, self._offset = attempt_no, offset
        self._told: dict[str, str] = {}
        self._last_sign = time.monotonic()
        self._phases_seen = 0.0
        self._short = False

    def events(self) -> Iterator[str]:
        """Events until the build has ended and all of its log was sent, or the server stops."""
        yield ": following\n\n"
        try:
            while not self._context.closing.is_set():
                newest = queries.log_info(self._context.db, self._build_id)
                if newest is None:
                    yield _event("end", {"state": None, "reason": None})
                    return
                mine = self._mine(newest)
                if mine.size_bytes > self._offset and (event := self._more_log(mine)) is not None:
                    yield event
                    continue
                if self._is_over(newest, mine):
                    yield from self._changed_phases()
                    yield _event(
                        "end", {"state": newest.state, "reason": newest.reason, "logComplete": mine.complete and not self._short}
                    )
                    return
                if newest.attempt_no > self._attempt_no and mine.ended:
                    yield self._next_attempt()
                    continue
                if time.monotonic() - self._phases_seen > _PHASES_EVERY_S:
                    self._phases_seen = time.monotonic()
                    yield from self._changed_phases()
                if time.monotonic() - self._last_sign > _HEARTBEAT_S:
                    self._last_sign = time.monotonic()
                    yield ": still here\n\n"
                self._context.closing.wait(_LOOK_EVERY_S)
        except MillraceError as error:
            log.warning("stream.broken", build_id=self._build_id, why=error.message)
            yield _event("error", {"code": error.code, "detail": error.message, "hint": "Connect again; the stream resumes."})

    def _mine(self, newest: LogInfo) -> LogInfo:
        """What there is of the attempt that this client is at."""
        if newest.attempt_no <= self._attempt_no:
            return newest
        return queries.log_info(self._context.db, self._build_id, self._attempt_no) or newest

    def _more_log(self, mine: LogInfo) -> str | None:
        data = _piece(self._context, self._build_id, self._attempt_no, self._offset)
        if not data and mine.ended:  # the object is shorter than the records say; waiting brings no more of it
            log.error("log.short", build_id=self._build_id, attempt_no=self._attempt_no, offset=self._offset)
            self._offset, self._short = mine.size_bytes, True
        whole = whole_characters(data)
        if not whole and mine.ended:  # half a character, and the rest of it will not come
            whole = data
        if not whole:
            return None
        start = self._offset
        self._offset += len(whole)
        self._last_sign = time.monotonic()
        text = whole.decode(errors="replace")
        return _event(
            "log", {"attempt": self._attempt_no, "offset": start, "text": text}, ident=f"{self._attempt_no}:{self._offset}"
        )

    def _is_over(self, newest: LogInfo, mine: LogInfo) -> bool:
        return newest.state in TERMINAL and newest.attempt_no <= self._attempt_no and self._offset >= mine.size_bytes

    def _next_attempt(self) -> str:
        self._attempt_no, self._offset = self._attempt_no + 1, 0
        self._told.clear()
        self._phases_seen = 0.0
        return _event("attempt", {"attempt": self._attempt_no}, ident=f"{self._attempt_no}:0")

    def _changed_phases(self) -> Iterator[str]:
        record = queries.get_build(self._context.db, self._build_id)
        for item in record.phases if record else ():
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
