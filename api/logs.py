"""A build's log: as text, or live as server-sent events that can be resumed by offset."""

import json
import time
from collections.abc import Iterator
from typing import Final

from flask import Blueprint, Response, request

from api import render
from api.auth import Scope, needs, require_build
from api.builds import existing
from api.context import Context, here
from api.paging import whole_number
from millrace.errors import InvalidInput, MillraceError
from millrace.log import get_logger
from scheduler import queries
from scheduler.states import TERMINAL

log = get_logger(__name__)
blueprint = Blueprint("logs", __name__, url_prefix="/v1/builds")

_PIECE_BYTES: Final = 64 * 1024
_LOOK_EVERY_S: Final = 0.25
_HEARTBEAT_S: Final = 10.0
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
    require_build(build_id)
    record = existing(build_id)
    attempt = whole_number("attempt", None, least=1, most=1_000_000)
    if attempt is not None and attempt > record.attempt_no:
        raise InvalidInput(f"build {build_id} has had {record.attempt_no} attempts so far, not {attempt}")
    offset = whole_number("offset", 0) or 0
    if "text/event-stream" in request.headers.get("Accept", ""):
        attempt, offset = _resumed(attempt, offset)
        stream = _Stream(here(), build_id, attempt or max(1, record.attempt_no), offset)
        return Response(stream.events(), content_type="text/event-stream; charset=utf-8", headers=_INERT)
    number = attempt or record.attempt_no
    info = queries.log_info(here().db, build_id, number)
    headers = dict(_INERT)
    if info is not None:
        headers |= {"X-Millrace-Log-Ended": str(info.ended).lower(), "X-Millrace-Log-Complete": str(info.complete).lower()}
    return Response(_text(here(), build_id, number, offset), content_type="text/plain; charset=utf-8", headers=headers)


def _resumed(attempt: int | None, offset: int) -> tuple[int | None, int]:
    last = request.headers.get("Last-Event-ID")
    if not last:
        return attempt, offset
    first, _, second = last.partition(":")
    if not (first.isdigit() and second.isdigit() and len(last) < 40):
        raise InvalidInput("Last-Event-ID is none of ours: they are ATTEMPT:OFFSET")
    return int(first), int(second)


def _text(context: Context, build_id: str, attempt_no: int, offset: int) -> Iterator[bytes]:
    while data := queries.read_log(context.db, context.store, context.settings, build_id, attempt_no, offset, _PIECE_BYTES):
        offset += len(data)
        yield data


class _Stream:
    """One client that follows one build."""

    def __init__(self, context: Context, build_id: str, attempt_no: int, offset: int) -> None:
        self._context, self._build_id = context, build_id
        self._attempt_no, self._offset = attempt_no, offset
        self._told: dict[str, str] = {}
        self._last_sign = time.monotonic()

    def events(self) -> Iterator[str]:
        """Events until the build has ended and all of its log was sent, or the server stops."""
        yield ": following\n\n"
        try:
            while not self._context.closing.is_set():
                sent = False
                for event in self._more_log():
                    sent = True
                    yield event
                if sent:
                    continue
                yield from self._changed_phases()
                end = self._end_or_next_attempt()
                if end is not None:
                    yield end
                    if end.startswith("event: end"):
                        return
                    continue
                if time.monotonic() - self._last_sign > _HEARTBEAT_S:
                    self._last_sign = time.monotonic()
                    yield ": still here\n\n"
                self._context.closing.wait(_LOOK_EVERY_S)
        except MillraceError as error:
            log.warning("stream.broken", build_id=self._build_id, why=error.message)
            yield _event("error", {"code": error.code, "detail": error.message, "hint": "Connect again; the stream resumes."})

    def _more_log(self) -> Iterator[str]:
        context = self._context
        data = queries.read_log(
            context.db, context.store, context.settings, self._build_id, self._attempt_no, self._offset, _PIECE_BYTES
        )
        if not data:
            return
        whole = whole_characters(data)
        if not whole:  # a character that is not here in full; taken as it is once nothing more will come
            info = queries.log_info(context.db, self._build_id, self._attempt_no)
            if info is None or not info.ended:
                return
            whole = data
        start = self._offset
        self._offset += len(whole)
        self._last_sign = time.monotonic()
        text = whole.decode(errors="replace")
        yield _event(
            "log", {"attempt": self._attempt_no, "offset": start, "text": text}, ident=f"{self._attempt_no}:{self._offset}"
        )

    def _changed_phases(self) -> Iterator[str]:
        record = queries.get_build(self._context.db, self._build_id)
        for item in record.phases if record else ():
            shape = json.dumps(render.phase(item))
            if self._told.get(item.phase_type) != shape:
                self._told[item.phase_type] = shape
                yield f"event: phase\ndata: {shape}\n\n"

    def _end_or_next_attempt(self) -> str | None:
        newest = queries.log_info(self._context.db, self._build_id)
        if newest is None:
            return _event("end", {"state": None, "reason": None})
        mine = (
            newest
            if newest.attempt_no <= self._attempt_no
            else queries.log_info(self._context.db, self._build_id, self._attempt_no)
        )
        if mine is None or self._offset < mine.size_bytes:
            return None
        if newest.attempt_no > self._attempt_no and mine.ended:
            self._attempt_no, self._offset = self._attempt_no + 1, 0
            self._told.clear()
            return _event("attempt", {"attempt": self._attempt_no}, ident=f"{self._attempt_no}:0")
        if newest.state in TERMINAL and newest.attempt_no <= self._attempt_no:
            return _event("end", {"state": newest.state.value, "reason": newest.reason, "logComplete": mine.complete})
        return None


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
